"""The model card of saved concept edits."""

from typing import Any

from huggingface_hub import ModelCard

from hf_iclr.hub import model_card, repository_name, table_cell


def concept_card(about: dict[str, Any], concepts: dict[str, str], repo_id: str, loads_lora: bool = True) -> ModelCard:
    """
    A card that lists which concept reads as which, of the ledger's first event and the concepts in force; whether its
    pipeline loads LoRAs.
    """
    lora = f'pipeline.load_lora_weights("{repo_id}")  # with the edits\n' if loads_lora else ""
    unload = "pipeline.unload_lora_weights()\n" if loads_lora else ""
    base = repository_name(about["base_model"])
    rows = "\n".join(
        f"| {table_cell(concept)} | {table_cell(other) or '*(erased)*'} |" for concept, other in concepts.items()
    )
    return model_card(
        f"Concept edits of {base or 'a local pipeline'}",
        f"""Concepts that read as others, made in closed form with `hf_iclr.ConceptEditor`, by the update of
[AlphaEdit](https://huggingface.co/papers/2410.02355). {len(about["retain"])} prompts were retained; they stand in
`ledger.jsonl`. Base weights {about["base_hash"]}.

| concept | reads as |
| --- | --- |
{rows}""",
        f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base or "user/base-pipeline"}")
{lora}
from hf_iclr import ConceptEditor

{unload}editor = ConceptEditor.from_pretrained("{repo_id}", pipeline)
editor.undo()  # without the last ones""",
        [base],
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["lora", "concept-editing"],
    )
