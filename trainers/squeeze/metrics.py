"""Where a DPO batch puts probability mass, from the outputs of TRL's fused head: https://huggingface.co/papers/2407.10490."""

from typing import TYPE_CHECKING

import torch

from .argmax import ArgmaxLogProbs, TokenOutputs


if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput


SIDES = ("chosen", "rejected")
TOKEN_METRICS = ("logp_tok", "entropy", "renyi2", "top1_rate", "A_norm", "G_norm", "energy", "pressure", "valley_frac")
ARGMAX_METRICS = ("logp_argmax", "rest_logmass", "argmax_gap")
DOWN_METRICS = ("chosen_down", "rejected_down", "both_down")
# Logged unless everything is asked for, under "squeeze/"
DEFAULT_METRICS = ("logp_tok_chosen", "logp_tok_rejected", "pressure_rejected", "valley_frac", "force", "both_down")
# Of the token metrics these two are logged for the rejected answer only, under these names.
_REJECTED_ONLY = {"pressure": "pressure_rejected", "valley_frac": "valley_frac"}


def squeeze_pressure(log_probs: torch.Tensor, log_sum_sq_probs: torch.Tensor) -> torch.Tensor:
    """
    How far below the bar of its context a token lies: `S = Σ_v π(v)² - π(y)`.

    One step of gradient ascent on `-log π(y)` changes the log-probability of every other token `v` of the same context
    by `h (π(v) - S)` to first order, so the tokens with `π(v) < S` lose mass although nobody asked for it: the
    squeezing effect (section 3.3 of https://huggingface.co/papers/2407.10490; the threshold is worked out here from
    its softmax model and is a heuristic in a language model). `S <= 0` is benign, and tokens sampled from the model
    itself have mean zero.

    Args:
        log_probs (`torch.Tensor`):
            log π(y) in nats.
        log_sum_sq_probs (`torch.Tensor`, same shape):
            log Σ_v π(v)² in nats.

    Returns:
        `torch.Tensor`: same shape, in (-1, 1), without gradient.
    """
    return log_sum_sq_probs.detach().exp() - log_probs.detach().exp()


def token_quantities(
    log_probs: torch.Tensor,
    entropy: torch.Tensor,
    log_sum_sq_probs: torch.Tensor,
    is_top1: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """
    Every per-token quantity of `TOKEN_METRICS`, without the logits: with s = Σ_v π(v)² and V tokens in the vocabulary,

    | name | formula | unit | source |
    |---|---|---|---|
    | `logp_tok` | log π(y) | nats | |
    | `entropy` | -Σ_v π(v) log π(v) | nats | |
    | `renyi2` | -log s, the Rényi entropy of order 2 | nats | |
    | `top1_rate` | 1 if y is the most likely token | | |
    | `A_norm` | ‖I - 1πᵀ‖_F = √(V - 2 + V s) | | A of proposition 1 |
    | `G_norm` | ‖π - e_y‖ = √(s - 2π(y) + 1) | | G of proposition 1, for the negative log-likelihood |
    | `energy` | 1 - π(y) | probability | -G at y |
    | `pressure` | s - π(y) | probability | see `squeeze_pressure` |
    | `valley_frac` | 1 if the pressure is positive | | |

    Args:
        log_probs, entropy, log_sum_sq_probs, is_top1 (`torch.Tensor` of shape `(batch, length)`):
            As [`~trl.trainer.utils.FusedCausalLMOutput`] has them.
        vocab_size (`int`):
            V.

    Returns:
        `torch.Tensor` of shape `(len(TOKEN_METRICS), batch, length)`, float32, without gradient.
    """
    log_p, log_s = log_probs.detach().float(), log_sum_sq_probs.detach().float()
    p, s, energy = log_p.exp(), log_s.exp(), -torch.expm1(log_p)
    pressure = squeeze_pressure(log_p, log_s)
    quantities = {
        "logp_tok": log_p,
        "entropy": entropy.detach().float(),
        "renyi2": -log_s,
        "top1_rate": is_top1.float(),
        "A_norm": (vocab_size - 2 + vocab_size * s).sqrt(),
        # (1 - π(y))² + Σ_{v≠y} π(v)², the second at most the first: the sum above would cancel as π(y) goes to one
        "G_norm": (energy.square() + (s - p.square()).clamp(min=0).minimum(energy.square())).sqrt(),
        "energy": energy,
        "pressure": pressure,
        "valley_frac": (pressure > 0).float(),
    }
    return torch.stack([quantities[name] for name in TOKEN_METRICS])


def batch_sums(
    outputs: "FusedCausalLMOutput | TokenOutputs",
    labels: torch.Tensor,
    vocab_size: int,
    log_prob_gradients: torch.Tensor | None = None,
    reference_logps: torch.Tensor | None = None,
    argmax: ArgmaxLogProbs | None = None,
    sides: torch.Tensor | None = None,
    num_rows: int | None = None,
) -> torch.Tensor:
    """
    All that a batch adds to the metrics, as one vector: vectors of batches and processes may be added up before
    [`metrics_from_sums`] divides.

    Args:
        outputs ([`~trl.trainer.utils.FusedCausalLMOutput`] or [`TokenOutputs`]):
            Per-token fields of shape `(rows, length - 1)`.
        labels (`torch.Tensor` of shape `(rows, length)`):
            -100 outside of the answers.
        vocab_size (`int`):
            Tokens in the vocabulary.
        log_prob_gradients (`torch.Tensor` of shape `(rows, length - 1)`, *optional*):
            ∂L/∂log π(y) of the batch's mean loss. For sigmoid DPO it is β(1 - a) / pairs on each rejected token.
        reference_logps (`torch.Tensor` of shape `(rows,)`, *optional*):
            Log-probabilities of the answers under the reference, in nats.
        argmax ([`ArgmaxLogProbs`], *optional*):
            Of the same shape as the fields of `outputs`.
        sides (`torch.Tensor` of shape `(rows,)`, *optional*):
            Of answers that come without a partner: positive where one is chosen, negative where it is rejected, zero
            where it is neither. By default the first half holds the chosen answers and the second their rejected ones.
        num_rows (`int`, *optional*):
            Count only the first answers of each kind; the others repeat earlier ones to fill the last batch of an
            evaluation.

    Returns:
        `torch.Tensor` of shape `(NUM_SUMS,)`, float32.
    """
    mask = labels[:, 1:] != -100
    length, rows = mask.size(1), mask.size(0)
    # Prompt-learning adapters prepend virtual tokens: the positions of the real ones are the last
    log_probs, log_sum_sq_probs = outputs.log_probs[:, -length:], outputs.log_sum_sq_probs[:, -length:]
    index = torch.arange(rows, device=mask.device)
    paired = sides is None
    if sides is None:
        index, sides = index % (rows // 2), torch.where(index < rows // 2, 1, -1)
    counted = index < (rows if num_rows is None else num_rows)
    of_side = torch.stack([sides > 0, sides < 0]).to(mask.device) & counted

    def sums(quantities: torch.Tensor) -> torch.Tensor:  # number of tokens, then the sum of each quantity, per side
        wanted = torch.cat([torch.ones_like(quantities[:1]), quantities]).masked_fill(~mask, 0).sum(2)
        return wanted[:, None].masked_fill(~of_side, 0).sum(2).flatten()

    tokens = token_quantities(
        log_probs, outputs.entropy[:, -length:], log_sum_sq_probs, outputs.is_top1[:, -length:], vocab_size
    )
    zero, answers = tokens.new_zeros(()), of_side.sum(1)
    empty = (of_side & ~mask.any(1)).sum() if paired else zero  # TRL's unpaired losses go on without
    pushed = [zero, zero]
    if log_prob_gradients is not None:
        pull = log_prob_gradients * squeeze_pressure(log_probs, log_sum_sq_probs).clamp(min=0)
        pull = pull.masked_fill(~mask | ~of_side[1][:, None], 0)
        pushed = [answers[1], rows // (2 if paired else 1) * pull.sum()]
    compared = [zero] * 6
    if reference_logps is not None:
        down = (log_probs.detach().sum(1) < reference_logps) & of_side
        both = (down[0, : rows // 2] & down[1, rows // 2 :]).sum() if paired else zero
        compared = [*answers, answers[0] if paired else zero, *down.sum(1), both]
    argmax_sums = zero.expand(2 * (1 + len(ARGMAX_METRICS))) if argmax is None else sums(torch.stack(argmax))
    rest = [answers.sum(), empty, *pushed, *compared]
    return torch.cat([sums(tokens), argmax_sums, torch.stack([value.float() for value in rest])])


NUM_SUMS = 2 * (1 + len(TOKEN_METRICS)) + 2 * (1 + len(ARGMAX_METRICS)) + 4 + 2 * len(DOWN_METRICS)


def metrics_from_sums(sums: torch.Tensor) -> dict[str, float]:
    """
    The metrics of summed [`batch_sums`]: means over tokens, and over answers or pairs for `force` and `DOWN_METRICS`.

    `force` is the mean over rejected answers of Σ_l (∂L/∂log π(y⁻_l)) max(S_l, 0): how hard this loss now pushes on
    tokens in valleys. `chosen_down`, `rejected_down` and `both_down` are the shares of answers, and of pairs, that are
    less likely than under the reference.

    Args:
        sums (`torch.Tensor` of shape `(NUM_SUMS,)`):
            Over batches and processes.

    Returns:
        `dict[str, float]`: by `"squeeze/..."`; what was not measured is left out.

    Raises:
        `ValueError`: when an answer has no token, or a log-probability is not finite.
    """
    values = sums.tolist()
    table, start = {}, 0
    for group in (TOKEN_METRICS, ARGMAX_METRICS):
        size = 2 * (1 + len(group))
        counts, rows = values[start : start + 2], values[start + 2 : start + size]
        for index, name in enumerate(group):
            for side, count, total in zip(SIDES, counts, rows[2 * index : 2 * index + 2], strict=True):
                if count and not (name in _REJECTED_ONLY and side == "chosen"):
                    table[f"squeeze/{_REJECTED_ONLY.get(name, f'{name}_{side}')}"] = total / count
        start += size
    answers, empty, pushed, force, *compared = values[start:]
    if empty:
        raise ValueError(
            f"{empty:.0f} of {answers:.0f} chosen and rejected answers have not a single token, so nothing can be "
            "compared. Drop the rows with an empty `chosen` or `rejected`, or raise `max_length`."
        )
    if pushed:
        table["squeeze/force"] = force / pushed
    for name, total, down in zip(DOWN_METRICS, compared[:3], compared[3:], strict=True):
        if total:
            table[f"squeeze/{name}"] = down / total
    for side in SIDES:
        logp = table.get(f"squeeze/logp_tok_{side}", 0.0)
        if not abs(logp) < float("inf"):
            raise ValueError(
                f"The log-probabilities of the {side} answers should be finite, their mean is {logp}. The weights "
                "have probably diverged: lower `learning_rate`, set `max_grad_norm`, or use `bf16`, not `fp16`."
            )
    return table
