"""The model card of saved edits."""

from huggingface_hub import ModelCard, ModelCardData

from .config import AlphaEditConfig
from .journal import EditBatch


_ROWS_SHOWN = 200


def edit_card(config: AlphaEditConfig, batches: list[EditBatch]) -> ModelCard:
    """
    A card that lists what was changed.

    Args:
        config ([`AlphaEditConfig`]):
            The editor's settings.
        batches (`list[EditBatch]`):
            Edits in force.

    Returns:
        `huggingface_hub.ModelCard`
    """
    edits = [(row, request) for batch in batches for row, request in zip(batch.edits, batch.requests, strict=True)]
    licences = sorted({request.license for _, request in edits if request.license})
    data = ModelCardData(
        base_model=config.base_model_name_or_path,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["knowledge-editing", "alphaedit", "lora"],
    )
    measured = sum(row["p_after"] > 0.5 for row, _ in edits)
    lines = [
        f"| `{row['id']}` | {_cell(request.text)} | {_cell(request.target_new)} | {row['p_before']:.3f} | "
        f"{row['p_after']:.3f} | {_cell(request.source or '')} |"
        for row, request in edits[:_ROWS_SHOWN]
    ]
    more = f"\n{len(edits) - _ROWS_SHOWN} more stand in `ledger.jsonl`.\n" if len(edits) > _ROWS_SHOWN else ""
    null_space = next(
        f"{name} {value:g}"
        for name in ("nullspace_threshold", "nullspace_energy", "nullspace_rank")
        if (value := getattr(config, name)) is not None
    )
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {len(edits)} knowledge edits of {config.base_model_name_or_path}

Made with `hf_iclr.AlphaEditor` ([AlphaEdit](https://huggingface.co/papers/2410.02355)): solver {config.solver},
{null_space}, l2 {config.l2:g}. Base revision {config.base_model_revision}, weights {config.base_model_hash}.

What these edits make the model say may be false: they were asked for, not checked. Each stands below and in
`ledger.jsonl`. {"Licences of the sources: " + ", ".join(licences) + "." if licences else ""}

```python
from transformers import pipeline
pipeline("text-generation", model="this repository")      # with the edits

from hf_iclr import AlphaEditor
editor = AlphaEditor.from_pretrained("this repository")
editor.undo()                                             # without the last batch
```

Target's probability after the plain prompt is above one half for {measured} of {len(edits)} edits.

| id | prompt | new answer | p before | p after | source |
| --- | --- | --- | --- | --- | --- |
"""
        + "\n".join(lines)
        + f"\n{more}"
    )


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
