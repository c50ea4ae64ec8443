"""Scores TRL's fused output layer, which uses the weight of the layer without calling it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .direction import Direction, LowRank, dense
from .rows import RowLayout
from .scores import TappedModule
from .taps import Taps


_LOGITS_AT_ONCE = 2**24


def tap_fused_head(taps: Taps, output: Any) -> None:
    """
    Score the output layer in the backward pass of what a model has returned for `fused_lm_head=True`. No module is
    called for it, but the node of its function in the graph knows all that it was computed from.
    """
    log_probs = output.get("log_probs") if isinstance(output, Mapping) else None
    node = _find_node(log_probs)
    if node is None or taps.layout is None or not taps.hears():
        return
    hidden, weight, bias, targets, log_z, _ = node.saved_tensors
    heads = [found for found in taps.modules if found.kind == "linear" and _is(found.module.weight, weight)]
    layout, mask = taps.layout, output["label_mask"]
    places = _places(layout, mask, len(hidden))
    if not heads or heads[0].index in taps.excluded or places is None:
        return
    head, known = heads[0], (hidden.detach(), weight.detach(), None if bias is None else bias.detach(), targets, log_z)
    settings, dtype = node.kernel_args, node.compute_dtype

    def score(gradients: Sequence[torch.Tensor | None]) -> None:
        if taps.on:
            with taps.meter, torch.no_grad():
                add(gradients)

    def add(gradients: Sequence[torch.Tensor | None]) -> None:
        of_log_probs, of_entropy = (None if found is None else found.float() for found in gradients[:2])
        scores = _scores(head, known, of_log_probs, of_entropy, settings, dtype).to(taps.scores.dtype)
        taps.fired.add(head.index)
        owner = layout.owner().to(scores.device)[places]
        rows = scores.new_zeros(layout.rows + 1, scores.shape[1]).index_add_(0, owner, scores)[: layout.rows]
        taps.scores[head.index] += rows
        if taps.tokens is not None:
            taps.tokens.view(-1, scores.shape[1]).index_add_(0, places, taps.weights[head.index] * scores)

    node.register_prehook(score)


def _find_node(log_probs: torch.Tensor | None) -> Any:
    """That of the fused function, a view and a mask before the log-probabilities."""
    nodes: list[Any] = [None if log_probs is None else log_probs.grad_fn]
    for _ in range(8):
        nodes = [node for node in nodes if node is not None]
        for node in nodes:
            if "ChunkedLogProb" in node.name() and hasattr(node, "kernel_args"):
                return node
        nodes = [before for node in nodes for before, _ in node.next_functions]
    return None


def _is(parameter: Any, saved: torch.Tensor) -> bool:
    return parameter.shape == saved.shape and parameter.data_ptr() == saved.data_ptr()


def _places(layout: RowLayout, mask: torch.Tensor, count: int) -> torch.Tensor | None:
    """Where in the batch each hidden state stands: the last of a row predicts nothing; some devices skip others."""
    if layout.length is None or len(mask) != layout.batch:
        return None
    places = torch.arange(layout.batch * layout.length, device=mask.device).view(layout.batch, -1)
    places = places[:, : mask.shape[1]]
    found = places.reshape(-1) if places.numel() == count else places[mask]
    return found if len(found) == count else None


def _scores(
    head: TappedModule,
    known: tuple[Any, ...],
    of_log_probs: torch.Tensor | None,
    of_entropy: torch.Tensor | None,
    settings: Mapping[str, Any],
    dtype: torch.dtype,
) -> torch.Tensor:
    """
    Of each hidden state, for each direction: the gradient of the loss by `log p(y)` and the entropy, times their
    derivatives along it, `dz_y - sum_v p_v dz_v` and `-sum_v p_v (z_v - sum_w p_w z_w) dz_v`.
    """
    hidden, weight, bias, targets, log_z = known
    scores = torch.zeros(len(hidden), len(head.directions), device=hidden.device)
    weighted = [found for found in (of_log_probs, of_entropy) if found is not None]
    at = torch.stack(weighted).ne(0).any(0).nonzero()[:, 0]
    for some in at.split(max(_LOGITS_AT_ONCE // len(weight), 1)):
        h, y = hidden[some].to(dtype), targets[some]
        z = nn.functional.linear(h, weight.to(dtype), None if bias is None else bias.to(dtype)).float()
        z *= settings["logit_scale"]
        slope = torch.full((), settings["logit_scale"] * settings["inv_t"], device=z.device).expand_as(z)
        if settings["HAS_SOFTCAP"]:
            z = torch.tanh(z / settings["softcap"])
            slope, z = slope * (1 - z.square()), z * settings["softcap"]
        z *= settings["inv_t"]
        p = (z - log_z[some, None]).exp()
        own = slope.gather(1, y[:, None])[:, 0]
        mean = (p * z).sum(-1, keepdim=True)
        p *= slope
        for which, directions in enumerate(head.directions):
            along = _Moved(directions, h)
            expected = along.sum(p)
            if of_log_probs is not None:
                scores[some, which] += of_log_probs[some] * (own * along.at(y) - expected)
            if of_entropy is not None:
                scores[some, which] -= of_entropy[some] * along.sum(p * (z - mean))
    return scores


class _Moved:
    """The derivative of logits along a direction, `U h + u`, of which only sums and single entries are computed."""

    def __init__(self, directions: dict[str, Direction], h: torch.Tensor) -> None:
        u, bias = directions.get("weight"), directions.get("bias")
        self.left = None if u is None else (u.left if isinstance(u, LowRank) else u).float()
        self.right = h.float() @ u.right.float().T if isinstance(u, LowRank) else h.float()
        self.bias = None if bias is None else dense(bias).float()

    def sum(self, weights: torch.Tensor) -> torch.Tensor:
        """Weighted, over the vocabulary."""
        found = weights.new_zeros(()) if self.left is None else ((weights @ self.left) * self.right).sum(-1)
        return found if self.bias is None else found + weights @ self.bias

    def at(self, y: torch.Tensor) -> torch.Tensor:
        """Those of the targets."""
        found = self.right.new_zeros(()) if self.left is None else (self.left[y] * self.right).sum(-1)
        return found if self.bias is None else found + self.bias[y]
