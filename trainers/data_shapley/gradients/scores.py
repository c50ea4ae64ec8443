"""The derivative of a loss along a direction of one module's parameters, by position, from its input and output."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_iclr.trainers.measuring import forked_random

from .direction import Direction, LowRank, wide


@dataclass
class TappedModule:
    """A module and the trainable parameters that its own forward pass uses, by their name in it."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    index: int
    kind: str  # "linear", "conv1d", "embedding", "norm" or "other"
    directions: list[dict[str, Direction]] = field(default_factory=list)  # of each target, by parameter


def token_scores(
    tapped: TappedModule,
    directions: dict[str, Direction],
    arguments: Any,
    b: torch.Tensor,
    product: torch.Tensor | None,
) -> torch.Tensor:
    """
    Directional derivative of the loss along one direction, by position.

    Args:
        tapped ([`TappedModule`]):
            The module.
        directions (`dict`):
            Direction of each of its parameters.
        arguments (`tuple`):
            Positional and named arguments of the call.
        b (`torch.Tensor` of shape `(batch, ..., channels)`):
            Gradient of the loss by the output.
        product (`torch.Tensor`, *optional*):
            Input of a linear layer times its thin direction.

    Returns:
        `torch.Tensor` of shape `(batch, ...)`: at least in float32.
    """
    u = directions.get("weight")
    if tapped.kind in ("linear", "conv1d"):
        scores = None
        if u is not None:
            scores = _linear_scores(u, first_input(*arguments), b, tapped.kind == "linear", product)
        if "bias" in directions:
            bias = (b @ _dense(directions["bias"]).to(b.dtype)).to(wide(b.dtype))
            scores = bias if scores is None else scores + bias
        assert scores is not None
        return scores
    if tapped.kind == "embedding":
        assert u is not None
        x = first_input(*arguments)
        if isinstance(u, LowRank):
            thin = b @ u.right.T.to(b.dtype)
            scores = _sum_product(thin, F.embedding(x, u.left).to(b.dtype))
        else:
            scores = _sum_product(b, F.embedding(x, u).to(b.dtype))
    elif tapped.kind == "norm":
        output = _norm_output(tapped.module, first_input(*arguments), directions)
        scores = _sum_product(b, output.to(b.dtype), count_leading(tapped, b))
    else:
        scores = _sum_product(b, _jvp(tapped, directions, arguments).to(b.dtype), count_leading(tapped, b))
    padding = getattr(tapped.module, "padding_idx", None)
    if isinstance(tapped.module, nn.Embedding) and padding is not None:
        scores = scores.masked_fill(first_input(*arguments) == padding, 0)  # whose weight gets no gradient
    return scores


def first_input(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """The input of a module with one input, given by position or name."""
    return args[0] if args else next(iter(kwargs.values()))


def count_leading(tapped: TappedModule, output: torch.Tensor) -> int:
    """How many leading dimensions of an output are positions rather than channels."""
    if tapped.kind in ("linear", "conv1d", "embedding"):
        return output.dim() - 1
    if isinstance(tapped.module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return 1
    return max(output.dim() - 1, 1)


def thin_rows(tapped: TappedModule, directions: dict[str, Direction]) -> torch.Tensor | None:
    """What a linear layer's input is multiplied by first, `(few, inputs)`, where that is far narrower than it is."""
    u = directions.get("weight")
    if u is None or tapped.kind not in ("linear", "conv1d"):
        return None
    if isinstance(u, LowRank):
        return u.right if tapped.kind == "linear" else u.left.T
    weight = u if tapped.kind == "linear" else u.T
    return weight if 8 * weight.shape[0] <= weight.shape[1] else None


def _linear_scores(
    u: Direction, x: torch.Tensor, b: torch.Tensor, out_first: bool, product: torch.Tensor | None
) -> torch.Tensor:
    if isinstance(u, LowRank):
        assert product is not None
        return _sum_product(b @ (u.left if out_first else u.right.T).to(b.dtype), product)
    if product is not None:
        return _sum_product(b, product)
    weight, x = u.to(b.dtype) if out_first else u.T.to(b.dtype), x.to(b.dtype)
    if weight.shape[0] <= weight.shape[1]:
        return _sum_product(b, F.linear(x, weight))
    return _sum_product(b @ weight, x)


def _sum_product(left: torch.Tensor, right: torch.Tensor, leading: int | None = None) -> torch.Tensor:
    left, right = left.to(wide(left.dtype)), right.to(wide(right.dtype))
    product = left * right
    return product.flatten(leading if leading is not None else product.dim() - 1).sum(-1)


def _dense(direction: Direction) -> torch.Tensor:
    return direction.left @ direction.right if isinstance(direction, LowRank) else direction


def _norm_output(module: nn.Module, x: torch.Tensor, directions: dict[str, Direction]) -> torch.Tensor:
    """Output of a normalisation whose weight and bias are the direction: it is linear in both."""
    weight, bias = (
        _dense(directions[name]).to(x.dtype) if name in directions else _zero(getattr(module, name, None), x)
        for name in ("weight", "bias")
    )
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(x, module.normalized_shape, weight, module.eps)
    running = (None, None) if module.training else (module.running_mean, module.running_var)
    return F.batch_norm(x, *running, weight, bias, training=running[0] is None, eps=module.eps)  # type: ignore


def _zero(parameter: nn.Parameter | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else torch.zeros_like(parameter, dtype=x.dtype)


def _jvp(tapped: TappedModule, directions: dict[str, Direction], arguments: Any) -> torch.Tensor:
    module, (args, kwargs) = tapped.module, arguments
    if any(isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 for child in module.modules()):
        raise NotImplementedError("it draws dropout masks")
    primals = {name: parameter.detach() for name, parameter in tapped.parameters.items()}
    tangents = {name: _dense(directions[name]).to(primals[name].dtype) for name in primals}

    def run(values: dict[str, torch.Tensor]) -> torch.Tensor:  # a tied parameter of a child is the child's
        return torch.func.functional_call(module, values, tuple(args), kwargs, tie_weights=False)

    device = next(iter(primals.values())).device
    with forked_random(device):
        state = _random_state(device)
        derivative = torch.func.jvp(run, (primals,), (tangents,))[1]
        if not torch.equal(_random_state(device), state):
            raise NotImplementedError("it draws random numbers")
        return derivative


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
