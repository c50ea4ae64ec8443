"""The card of a model's key statistics."""

from typing import Any

from huggingface_hub import ModelCard

from hf_iclr.hub import model_card, repository_name


def statistics_card(statistics: Any, repo_id: str) -> ModelCard:
    """A card that says of which model and of how much text they are."""
    rows = []
    for layer, total in sorted(statistics.sums.items()):
        trace = statistics.traces.get(layer) or total.trace().item()
        size = " x ".join(map(str, total.shape))
        rows.append((layer, f"`{statistics.module_names[layer]}`", size, f"{trace / statistics.tokens:.4g}"))
    kind = "the main eigenvectors of" if statistics.traces else "float64"
    lines = "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return model_card(
        f"Key statistics of {repository_name(statistics.model_name) or 'a local model'}",
        f"""What an edit by [AlphaEdit](https://huggingface.co/papers/2410.02355) must leave alone: {kind} sums of
k k^T over {statistics.tokens:,} tokens, k the input of each layer's down-projection. Base revision
{statistics.model_revision}, weights {statistics.weights_hash}.

| layer | module | size | mean squared norm |
| --- | --- | --- | --- |
{lines}""",
        f"""from hf_iclr import KeyStatistics

statistics = KeyStatistics.from_pretrained("{repo_id}")
print(statistics.layers, statistics.tokens)
# editor = AlphaEditor(model, tokenizer, statistics=statistics)""",
        [statistics.model_name],
        library_name="hf_iclr",
        tags=["knowledge-editing", "alphaedit", "key-statistics"],
    )
