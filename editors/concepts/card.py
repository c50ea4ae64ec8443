"""The model card of saved concept edits."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData


def concept_card(about: dict[str, Any]) -> ModelCard:
    """
    A card that lists which concept reads as which.

    Args:
        about (`dict`):
            What `concept_edits.json` holds.

    Returns:
        `huggingface_hub.ModelCard`
    """
    base = about["base_model"] or "a pipeline without a name"
    data = ModelCardData(
        base_model=about["base_model"],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "concept-editing"],
    )
    rows = "\n".join(
        f"| {_cell(concept)} | {_cell(other) or '*(erased)*'} |"
        for batch in about["batches"]
        for concept, other in batch["concepts"].items()
    )
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# Concept edits of {base}

Made in closed form with `hf_iclr.ConceptEditor`. {len(about["retain"])} prompts were retained; they stand in
`concept_edits.json`. Base weights {about["base_hash"]}.

| concept | reads as |
| --- | --- |
{rows}

```python
pipeline.load_lora_weights("this repository")  # with the edits

from hf_iclr import ConceptEditor
editor = ConceptEditor.from_pretrained("this repository", pipeline)
editor.undo()  # without the last ones
```
"""
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
