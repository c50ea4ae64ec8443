"""Exact log-probability of the most likely token at every position of an answer, without the full logits."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled


# Logits held at once, 64 MB in float32, and the rows of the head cast at once, as many as TRL casts.
_TILE_ELEMENTS = 2**24
_HEAD_ROWS = 32768


class ArgmaxLogProbs(NamedTuple):
    """
    Teacher-forced: at each position given the answer's own tokens before it. All in nats, zero where labels are -100.

    Args:
        logp_argmax (`torch.Tensor` of shape `(batch, length)`):
            max_v log π(v), the paper's "argmax" curve per token.
        rest_logmass (`torch.Tensor` of shape `(batch, length)`):
            log(1 - max_v π(v)), finite however peaked π is.
        argmax_gap (`torch.Tensor` of shape `(batch, length)`):
            max_v log π(v) - log π(y), at least zero.
    """

    logp_argmax: torch.Tensor
    rest_logmass: torch.Tensor
    argmax_gap: torch.Tensor


class TokenOutputs(NamedTuple):
    """What is read of [`~trl.trainer.utils.FusedCausalLMOutput`], under its names."""

    log_probs: torch.Tensor
    entropy: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    is_top1: torch.Tensor


class HiddenStateTap:
    """
    Keeps the last hidden states of the latest forward of a backbone, without their graph, until they are taken.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Its `base_model` is listened to.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._hidden_states: torch.Tensor | None = None
        self._handle = model.base_model.register_forward_hook(self._keep)

    def _keep(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        self._hidden_states = output.last_hidden_state.detach()

    def pop(self) -> torch.Tensor:
        """The hidden states, of shape `(batch, length, hidden)`; they are not kept any longer."""
        self._handle.remove()
        hidden_states, self._hidden_states = self._hidden_states, None
        assert hidden_states is not None, "no forward since the tap was set"
        return hidden_states


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """
    What a model does to the product of hidden state and head: multiply, then cap softly.

    Args:
        config ([`~transformers.PreTrainedConfig`]):
            Of the model; its text part is read.

    Returns:
        `tuple[float, float | None]`: the scale (1.0 if none) and `final_logit_softcapping` (`None` if none).
    """
    text = config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text, name, None) is not None:
            return getattr(text, name), softcap
    scaling = getattr(text, "logits_scaling", None)
    if scaling is None:
        return 1.0, softcap
    return (scaling if text.model_type == "hyperclovax" else 1 / scaling), softcap


@torch.no_grad()
def exact_argmax(model: PreTrainedModel, hidden_states: torch.Tensor, labels: torch.Tensor) -> ArgmaxLogProbs:
    """
    Project hidden states through the head of `model`, a tile of tokens at a time, and keep three numbers per token.

    With r = Σ_{v≠argmax} exp(z(v) - z_max), summed in the log domain, `logp_argmax = -log(1 + r)` and
    `rest_logmass = log r - log(1 + r)`; `log(1 - p_max)` of a rounded `p_max` would be minus infinity.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            Whose `get_output_embeddings()` and logit scale or soft cap are used. A sharded head is gathered.
        hidden_states (`torch.Tensor` of shape `(batch, length, hidden)`):
            Last hidden states, at the positions that predict `labels`.
        labels (`torch.Tensor` of shape `(batch, length)`):
            Next tokens, -100 where nothing is asked.

    Returns:
        [`ArgmaxLogProbs`] in float32.
    """
    head = model.get_output_embeddings()
    scale, softcap = logit_transform(model.config)
    weight, bias = head.weight, getattr(head, "bias", None)
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        bias = None if bias is None else bias.full_tensor()
    # With the model split across devices, the backbone can end on another device than the head
    hidden_states, labels, device = hidden_states.to(weight.device), labels.to(weight.device), weight.device.type
    mask = labels != -100
    hidden_states, targets = hidden_states[mask], labels[mask]
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    flat = torch.zeros((3, len(targets)), device=weight.device)
    with gathered_head(weight, bias):
        tile = max(1, _TILE_ELEMENTS // len(weight))
        for start in range(0, len(targets), tile):
            rows = slice(start, start + tile)
            states = hidden_states[rows].to(dtype)
            logits = torch.empty((len(states), len(weight)), device=weight.device)
            for first in range(0, len(weight), _HEAD_ROWS):
                columns = slice(first, first + _HEAD_ROWS)
                part = states @ weight[columns].to(dtype).t()
                logits[:, columns] = part if bias is None else part.add_(bias[columns].to(dtype))
            logits.mul_(scale)
            if softcap is not None:
                logits.div_(softcap).tanh_().mul_(softcap)
            highest, index = logits.max(-1, keepdim=True)
            logits -= highest
            gap = -logits.gather(-1, targets[rows, None]).squeeze(-1)
            log_rest = logits.scatter_(-1, index, float("-inf")).logsumexp(-1)
            log_total = torch.nn.functional.softplus(log_rest)  # log(1 + r)
            flat[:, rows] = torch.stack([-log_total, log_rest - log_total, gap])
    return ArgmaxLogProbs(
        *flat.new_zeros((3, *mask.shape)).masked_scatter(mask.to(flat.device), flat).to(labels.device)
    )


def from_logits(logits: torch.Tensor, labels: torch.Tensor) -> tuple[TokenOutputs, ArgmaxLogProbs]:
    """
    What TRL's fused head and [`exact_argmax`] tell, for a trainer that has built the logits.

    Args:
        logits (`torch.Tensor` of shape `(batch, length, vocabulary)`):
            Of the same positions as `labels`; answers are gone through one after the other.
        labels (`torch.Tensor` of shape `(batch, length)`):
            -100 outside of the answers.

    Returns:
        `tuple[TokenOutputs, ArgmaxLogProbs]`: fields of shape `(batch, length - 1)`, zero outside.
    """
    mask = labels[:, 1:] != -100
    fields = logits.new_zeros((7, *mask.shape), dtype=torch.float32)
    for row, own in enumerate(mask):
        log_p = logits[row, :-1][own].float().log_softmax(-1)
        targets = labels[row, 1:][own]
        logp = log_p.gather(-1, targets[:, None]).squeeze(-1)
        highest, index = log_p.max(-1, keepdim=True)
        rest = log_p.scatter(-1, index, float("-inf")).logsumexp(-1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        top = highest.squeeze(-1)
        fields[:, row, own] = torch.stack(
            [logp, entropy, (2 * log_p).logsumexp(-1), index.squeeze(-1) == targets, top, rest, top - logp]
        )
    log_probs, entropy, log_s, is_top1, *argmax = fields
    return TokenOutputs(log_probs, entropy, log_s, is_top1.bool()), ArgmaxLogProbs(*argmax)


def gathered_head(*parameters: torch.Tensor | None) -> AbstractContextManager:
    """Inside, what ZeRO-3 shards of these parameters is there whole; nothing to do elsewhere."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    # What is whole already, as a tied embedding may be, must not be sharded again on the way out.
    sharded = [p for p in parameters if p is not None and p.ds_status.name != "AVAILABLE"]  # type: ignore[attr-defined]
    return deepspeed.zero.GatheredParameters(sharded) if sharded else nullcontext()
