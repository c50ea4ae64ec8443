"""Rank preference pairs by how likely training on them is to squeeze, before any training."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.models import evaluation_mode, pad_answers

from .argmax import HiddenStateTap
from .metrics import squeeze_pressure
from .probe_scoring import fused_head
from .rows import encode_answers


SCORES = ("ches", "ches_per_token", "pressure", "valley_frac", "force")


def audit_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Mapping[str, Any]],
    *,
    beta: float = 0.1,
    max_length: int | None = None,
    batch_size: int = 8,
) -> pd.DataFrame:
    """
    Score each pair with one forward and no gradient; the higher a score, the riskier the pair. Nothing of the size
    tokens x vocabulary is made.

    | column | |
    |---|---|
    | `logp_chosen`, `logp_rejected` | mean log-probability in nats per token |
    | `ches` | ⟨Σ h⁺, Σ h⁻⟩ - ‖Σ h⁺‖² over the last hidden states that predict the tokens of each answer |
    | `ches_per_token` | the same of means: ⟨h̄⁺, h̄⁻⟩ - ‖h̄⁺‖² |
    | `pressure` | mean squeeze pressure Σ_v π(v)² - π(y⁻) of the rejected tokens, zero for samples of the model |
    | `valley_frac` | share of rejected tokens with positive pressure |
    | `force` | β/2 Σ_l max(S_l, 0): what DPO's first step puts on tokens in valleys |

    CHES is from "Unintentional Unalignment" (https://huggingface.co/papers/2410.08847): a rejected answer whose hidden
    states resemble those of the chosen one takes the chosen one down with it. Pressure and force are worked out from
    the softmax model of https://huggingface.co/papers/2407.10490, see
    [`~hf_iclr.trainers.squeeze.metrics.squeeze_pressure`].

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The one that will be trained.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        pairs (iterable of rows):
            `prompt`, `chosen`, `rejected`: text or messages.
        beta (`float`, *optional*, defaults to `0.1`):
            β of DPO.
        max_length (`int`, *optional*):
            Tokens of prompt and answer together; what exceeds it is cut off.
        batch_size (`int`, *optional*, defaults to 8):
            Pairs in one forward.

    Returns:
        `pandas.DataFrame`: a row per pair, in the order given.

    Raises:
        `ValueError`: when a column is missing, or an answer is empty or does not fit.
    """
    answers = encode_answers(tokenizer, pairs, ("chosen", "rejected"), max_length)
    base = model.get_base_model() if is_peft_model(model) else model
    rows = []
    with evaluation_mode(model), fused_head(base, ("log_probs", "log_sum_sq_probs")):
        starts = range(0, len(answers), 2 * batch_size)
        for start in tqdm(starts, desc="pair audit", disable=len(starts) == 1):
            batch = answers[start : start + 2 * batch_size]
            inputs = pad_answers([(answer.prompt_ids, answer.ids) for answer in batch], model.device)
            tap, mask = HiddenStateTap(base), inputs["labels"][:, 1:] != -100
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
            length = mask.size(1)  # prompt-learning adapters prepend virtual tokens
            log_probs = outputs.log_probs[:, -length:]
            pressures = squeeze_pressure(log_probs, outputs.log_sum_sq_probs[:, -length:])
            tokens = mask.sum(1).double()
            states = torch.einsum("blh,bl->bh", tap.pop()[:, :-1][:, -length:].to(mask.device).double(), mask.double())
            logps = log_probs.double().masked_fill(~mask, 0).sum(1) / tokens
            for index in range(0, len(batch), 2):
                (up, down), (n_up, n_down) = states[index : index + 2], tokens[index : index + 2]
                pressure = pressures[index + 1][mask[index + 1]].double()
                rows.append(
                    {
                        "tokens_chosen": int(n_up),
                        "tokens_rejected": int(n_down),
                        "logp_chosen": logps[index].item(),
                        "logp_rejected": logps[index + 1].item(),
                        "ches": (up @ down - up @ up).item(),
                        "ches_per_token": (up @ down / (n_up * n_down) - up @ up / n_up**2).item(),
                        "pressure": pressure.mean().item(),
                        "valley_frac": (pressure > 0).double().mean().item(),
                        "force": beta / 2 * pressure.clamp(min=0).sum().item(),
                    }
                )
    return pd.DataFrame(rows)


def filter_pairs(pairs: Dataset, table: pd.DataFrame, *, drop: float = 0.1, by: str = "ches_per_token") -> Dataset:
    """
    Leave out the riskiest pairs.

    Args:
        pairs ([`~datasets.Dataset`]):
            Those that were audited.
        table (`pandas.DataFrame`):
            From [`audit_pairs`].
        drop (`float`, *optional*, defaults to `0.1`):
            Share to leave out, rounded down to whole pairs.
        by (`str`, *optional*, defaults to `"ches_per_token"`):
            Score: `ches`, `ches_per_token`, `pressure`, `valley_frac` or `force`.

    Returns:
        [`~datasets.Dataset`]: in the same order.

    Raises:
        `ValueError`: when the table is of other pairs, or an option lies outside of its range.
    """
    if len(pairs) != len(table):
        raise ValueError(f"Expected a table of the {len(pairs)} pairs, got one of {len(table)}. Audit these pairs.")
    if by not in SCORES:
        raise ValueError(f"by must be one of {', '.join(SCORES)}, got {by!r}.")
    if not 0 <= drop < 1:
        raise ValueError(f"drop must be in [0, 1), got {drop}. For example `drop=0.1`.")
    order = table[by].reset_index(drop=True).sort_values(kind="stable").index
    return pairs.select(sorted(order[: len(pairs) - int(drop * len(pairs))]))
