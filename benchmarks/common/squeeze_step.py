"""What one DPO step on each pair alone does to its own answers, for benchmarks/squeeze_pair_audit.py."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.models import evaluation_mode, pad_answers
from hf_iclr.trainers.squeeze.influence import answer_gradient
from hf_iclr.trainers.squeeze.rows import encode_answers


def measure_chosen_change(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Mapping[str, Any]],
    *,
    step_size: float,
    beta: float = 0.1,
    max_length: int | None = None,
) -> pd.DataFrame:
    """
    What one DPO step on each pair alone, from the same weights, does to its own chosen answer: the effect the scores
    of [`~hf_iclr.trainers.squeeze.audit_pairs`] are to predict. Two backward passes a pair.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            In float32; its weights are put back.
        tokenizer, pairs, beta, max_length:
            As in [`~hf_iclr.trainers.squeeze.audit_pairs`].
        step_size (`float`):
            Learning rate of a plain gradient step, small enough to be linear: 1e-4 on SmolLM2.

    Returns:
        `pandas.DataFrame`: a row per pair, in nats summed over tokens: `chosen_change` and `rejected_change` as
        measured, and `push_on_chosen`, the part of the first that is due to the rejected answer, to first order.
    """
    answers = encode_answers(tokenizer, pairs, ("chosen", "rejected"), max_length)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scale, rows = step_size * beta / 2, []
    with evaluation_mode(model):
        starts = range(0, len(answers), 2)
        for start in tqdm(starts, desc="one step", disable=len(starts) == 1):
            pair = answers[start : start + 2]
            before = _logps(model, pair)
            up, down = (answer_gradient(model, parameters, each)[0] for each in pair)
            # Tensor by tensor and in float64: over 1e8 elements a float32 product is off by percents.
            product = sum((up[name].double() * down[name]).sum().item() for name in parameters)
            backup = {name: p.clone() for name, p in parameters.items()}
            try:
                for name, p in parameters.items():
                    p.add_(up[name] - down[name], alpha=scale)
                chosen, rejected = (_logps(model, pair) - before).tolist()
            finally:
                for name, p in parameters.items():
                    p.copy_(backup[name])
            rows.append({"chosen_change": chosen, "rejected_change": rejected, "push_on_chosen": -scale * product})
    return pd.DataFrame(rows)


def _logps(model: PreTrainedModel, answers: list[Any]) -> torch.Tensor:
    inputs = pad_answers([(answer.prompt_ids, answer.ids) for answer in answers], model.device)
    mask = inputs.pop("labels") != -100
    log_p = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    logps = log_p.gather(-1, inputs["input_ids"][:, 1:, None]).squeeze(-1)
    return logps.masked_fill(~mask[:, 1:], 0).double().sum(1)
