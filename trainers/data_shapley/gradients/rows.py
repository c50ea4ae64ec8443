"""Which row of the training set each position of a micro-batch belongs to."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .follow import leaves


@dataclass
class RowLayout:
    """
    Rows of one forward pass.

    Args:
        rows (`int`):
            Rows of the training set in it.
        batch (`int`):
            Leading dimension of the model's inputs: `rows`, a multiple of it for pairs, which TRL lays out as
            `[chosen; rejected]`, or 1 if rows were flattened.
        length (`int`, *optional*):
            Tokens of one input, if the inputs are tokens.
        segments (`torch.Tensor` of shape `(batch * length,)`, *optional*):
            Row of each token, if rows were flattened. Padding has the number `rows`.
        tokens (`torch.Tensor` of shape `(rows,)`):
            Tokens with a label, else tokens, else 1.
        mask (`torch.Tensor` of shape `(batch, length)`, *optional*):
            False where there is padding.
        texts (`int`, *optional*, defaults to 1):
            In one input, as the choices of a question are.
    """

    rows: int
    batch: int
    length: int | None
    segments: torch.Tensor | None
    tokens: torch.Tensor
    mask: torch.Tensor | None = None
    texts: int = 1

    def owner(self) -> torch.Tensor:
        """(`torch.Tensor` of shape `(batch * length,)`): the row of each token."""
        if self.segments is not None:
            return self.segments
        return torch.arange(self.batch).remainder(self.rows).repeat_interleave(self.length or 1)

    def positions(self) -> list[np.ndarray]:
        """Where the tokens of each row are, as masks of shape `(batch, length)` without padding."""
        owner = self.owner().view(self.batch, -1).cpu()
        if self.mask is not None:
            owner = owner.masked_fill(~self.mask.cpu(), self.rows)
        return [(owner == row).numpy() for row in range(self.rows)]

    def fits(self, shape: torch.Size, is_embedding: bool) -> bool:
        """Whether a module's output of this shape, channels excluded, can be split into rows."""
        count = shape.numel()
        if self.segments is not None:
            return count == self.segments.numel()
        if self.batch == 1:
            return True
        if not shape:
            return False
        if self.texts > 1 and not is_embedding and shape[0] == self.batch * self.texts:
            return True
        if shape[0] == self.batch and not (len(shape) == 1 and self.length not in (None, 1) and is_embedding):
            return True
        if len(shape) == 1 and self.length is not None:
            return count == self.batch * self.length or not is_embedding and count % (self.batch * self.length) == 0
        # The texts of each row in turn
        whole = not is_embedding or self.length is not None and count == self.batch * self.length
        return whole and len(shape) > 1 and shape[0] % self.batch == 0

    def sum_rows(self, scores: torch.Tensor) -> torch.Tensor:
        """
        (`torch.Tensor` of shape `(rows, targets)`): scores of shape `(positions, ..., targets)`, summed by row.
        """
        targets = scores.shape[-1]
        if self.segments is not None:
            total = scores.new_zeros(self.rows + 1, targets)
            return total.index_add_(0, self.segments, scores.reshape(-1, targets))[: self.rows]
        return scores.reshape(self.batch, -1, targets).sum(1).view(-1, self.rows, targets).sum(0)


def find_layout(inputs: Mapping[str, object], rows: int) -> RowLayout:
    """
    Read the layout off the arguments of the model's forward pass, by name, positional ones under any; `ValueError` if
    they can't be divided into as many rows as the data loader put into the batch.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
    if not tensors:
        raise ValueError("Expected the model to be called with tensors, got none: rows can't be told apart.")
    main = next((tensors[name] for name in ("input_ids", "inputs_embeds") if name in tensors), None)
    is_text = main is not None
    if main is None:
        main = next(iter(tensors.values()))
    batch = main.shape[0]
    texts = main.shape[1:-1].numel() if is_text and not main.is_floating_point() else 1
    length = texts * main.shape[-1 if texts > 1 else 1] if is_text and main.dim() > 1 else None
    segments = None
    if batch < rows:
        segments = _segments(tensors, rows)
    elif batch % rows:
        raise ValueError(
            f"Expected the model to get a multiple of the {rows} rows the data loader yielded, got {batch} inputs: "
            "which input belongs to which row is unknown."
        )
    layout = RowLayout(
        rows, batch, length, segments, torch.ones(rows, dtype=torch.long, device=main.device), None, texts
    )
    mask = tensors.get("attention_mask")
    if length is not None and mask is not None and mask.numel() == batch * length:
        layout.mask = mask.view(batch, length).bool()
    layout.tokens = _count_tokens(layout, tensors, main if is_text else None)
    return layout


def belongs_to(inputs: Mapping[str, Any], batch: Any, other: Any) -> bool:
    """Whether a model's inputs are seen to be those of a batch and not of another, which may be alike in part."""

    def holds(one: Any, value: torch.Tensor) -> bool:
        tensors = leaves(dict(one) if isinstance(one, Mapping) else one)
        alike = (tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.shape == value.shape)
        return any(torch.equal(tensor.to(value), value) for tensor in alike)

    values = [value for value in leaves(dict(inputs)) if isinstance(value, torch.Tensor)]
    pairs = {(holds(batch, value), holds(other, value)) for value in values}
    return (True, False) in pairs and (False, True) not in pairs


def _segments(tensors: Mapping[str, torch.Tensor], rows: int) -> torch.Tensor:
    if "seq_idx" in tensors:
        segments = tensors["seq_idx"].reshape(-1).long()
    elif "position_ids" in tensors:
        segments = (tensors["position_ids"].reshape(-1) == 0).cumsum(0) - 1
    else:
        raise ValueError(
            f"Expected the {rows} rows of the data loader's batch, or flattened ones with `position_ids`, got fewer "
            "inputs without them. Call the model with whole batches: for smaller steps take a smaller `batch_size`."
        )
    return segments.clamp(max=rows)


def _count_tokens(layout: RowLayout, tensors: Mapping[str, torch.Tensor], ids: torch.Tensor | None) -> torch.Tensor:
    labels = tensors.get("labels")
    # Those of an encoder-decoder have a width of their own; those of classes are floating point or have one dimension
    if labels is not None and labels.dim() == 2 and len(labels) == layout.batch and not labels.is_floating_point():
        counted = (labels != -100).unsqueeze(-1)
    elif ids is None:
        return layout.tokens
    elif layout.mask is not None:
        counted = layout.mask.unsqueeze(-1)
    else:
        counted = torch.ones(layout.batch, layout.length or 1, 1, dtype=torch.bool, device=ids.device)
    return layout.sum_rows(counted.long())[:, 0]
