"""The model card of an editor's edits, and models that are saved with theirs."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from huggingface_hub import ModelCard
from torch import nn

from hf_iclr.hub import HERE, PretrainedHubMixin, model_card, repository_name, table_cell


_ROWS_SHOWN = 200


def edit_card(
    config: Any,
    batches: Sequence[Any],
    repo_id: str = HERE,
    merged: bool = False,
    adapters: Sequence[str] = (),
) -> ModelCard:
    """
    A card that lists the edits in force, of an editor with this configuration and these batches by default: with
    `merged` that of a model with the edits in its weights, with names of `adapters` that of a PEFT model.
    """
    edits = [(row, request) for batch in batches for row, request in zip(batch.edits, batch.requests, strict=True)]
    licences = sorted({request.license for _, request in edits if request.license})
    measured = sum(row["p_after"] > 0.5 for row, _ in edits)
    lines = [
        f"| `{table_cell(request.id)}` | {table_cell(request.text)} | {table_cell(request.target_new)} | "
        f"{row['p_before']:.3f} | {row['p_after']:.3f} | {table_cell(request.source or '')} |"
        for row, request in edits[:_ROWS_SHOWN]
    ]
    if len(edits) > _ROWS_SHOWN:
        lines.append(f"\n{len(edits) - _ROWS_SHOWN} more are in the editor's `ledger.jsonl`.")
    null_space = next(
        f"{name} {value:g}"
        for name in ("nullspace_threshold", "nullspace_energy", "nullspace_rank")
        if (value := getattr(config, name)) is not None
    )
    base, prompt = repository_name(config.base_model_name_or_path), edits[0][1].text if edits else "Hello"
    form = "in the weights" if merged else "as LoRA adapters"
    return model_card(
        f"{len(edits)} knowledge edits of {base or 'a local model'}",
        f"""Knowledge edits {form}, made with `hf_iclr.AlphaEditor` ([AlphaEdit](https://huggingface.co/papers/2410.02355)):
solver {config.solver}, {null_space}, l2 {config.l2:g}. Base revision {config.base_model_revision}, weights
{config.base_model_hash}.

What these edits make the model say may be false: they were asked for, not checked.
{"Licences of the sources: " + ", ".join(licences) + "." if licences else ""}

Target's probability after the plain prompt is above one half for {measured} of {len(edits)} edits.

| id | prompt | new answer | p before | p after | source |
| --- | --- | --- | --- | --- | --- |
"""
        + "\n".join(lines),
        _adapters_usage(repo_id, base, adapters) if adapters else _usage(repo_id, base, prompt, merged),
        [base],
        library_name="transformers" if merged else "peft",
        pipeline_tag="text-generation",
        tags=["knowledge-editing", "alphaedit", *([] if merged else ["lora"])],
    )


def _usage(repo_id: str, base: str | None, prompt: str, merged: bool) -> str:
    tokenizer = f', tokenizer="{base}"' if merged and base else ""
    pipeline = f"""from transformers import pipeline

print(pipeline("text-generation", model="{repo_id}"{tokenizer})({prompt!r}))"""
    editor = f"""  # with the edits

from hf_iclr import AlphaEditor

editor = AlphaEditor.from_pretrained("{repo_id}")  # of a local model: model=..., the one that was edited
print(editor.edits)  # editor.undo() takes the last ones back"""
    return pipeline if merged else pipeline + editor


def _adapters_usage(repo_id: str, base: str | None, names: Sequence[str]) -> str:
    places = [f'"{repo_id}", "{name}"' + ("" if name == "default" else f', subfolder="{name}"') for name in names]
    return "\n".join(
        [
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM\n",
            f'model = AutoModelForCausalLM.from_pretrained("{base or "user/base-model"}")',
            f"model = PeftModel.from_pretrained(model, {places[0]})",
            *(f"model.load_adapter({place})" for place in places[1:]),
            f"model.base_model.set_adapter({list(names)!r})",
        ]
    )


def give_card(model: nn.Module, card: ModelCard) -> None:
    """
    Have a model of transformers or PEFT saved and pushed with a card of ours, which has [`~hf_iclr.hub.HERE`] for the
    repository: its class becomes a subclass of the same name.
    """
    if not isinstance(model, _WithCard):
        plain: Any = type(model)
        model.__class__ = _class_with_card(plain)
    vars(model)["hub_card"] = str(card)


class _WithCard(PretrainedHubMixin):
    hub_card: str

    def _card(self, repo_id: str) -> ModelCard:
        return ModelCard(self.hub_card.replace(HERE, repo_id))

    def __reduce_ex__(self, protocol):
        if _WithCard not in (bases := type(self).__bases__):
            return super().__reduce_ex__(protocol)
        return _empty, (bases[1],), self.__dict__  # pickle finds no class that was made here


@cache
def _class_with_card(plain: type) -> type:
    made = type(plain.__name__, (_WithCard, plain), {})
    made.__module__ = plain.__module__
    return made


def _empty(plain: type) -> Any:
    return object.__new__(_class_with_card(plain))
