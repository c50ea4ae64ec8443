"""Along which direction a row's gradient lowers a validation loss: its gradient, preconditioned, perhaps sketched."""

import copy
import importlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import nn
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from hf_iclr.saving import contiguous_clone
from hf_iclr.trainers.measuring import forked_random


logger = logging.getLogger(__name__)


_CACHED = 2**16  # elements


@dataclass
class LowRank:
    """`left @ right`, of shapes `(rows, rank)` and `(rank, columns)`."""

    left: torch.Tensor
    right: torch.Tensor


Direction = torch.Tensor | LowRank


def sketch(matrix: torch.Tensor, rank: int, generator: torch.Generator) -> LowRank:
    """
    A randomised rank-`rank` approximation with one power step and Cholesky-QR (Halko, Martinsson and Tropp, 2011,
    algorithm 4.4). It is exact if the matrix has no higher rank. The generator is one of the CPU.
    """
    wide = matrix.float() if matrix.dtype in (torch.bfloat16, torch.float16) else matrix
    start = torch.randn(wide.shape[1], rank, generator=generator).to(wide)
    basis = _orthonormal(wide @ start)
    basis = _orthonormal(wide @ _orthonormal(wide.T @ basis), times=2)
    right = (basis.T @ wide).to(matrix.dtype)
    return LowRank(contiguous_clone(basis.to(matrix.dtype)), contiguous_clone(right))


def inner(direction: Direction, gradient: torch.Tensor) -> torch.Tensor:
    """(`torch.Tensor` scalar): the inner product of a direction and a gradient of the same parameter."""
    if isinstance(direction, LowRank):
        gradient = gradient.to(direction.left.dtype)
        return torch.sum((direction.left.T @ gradient) * direction.right, dtype=wide(direction.left.dtype))
    if gradient.dtype != direction.dtype or gradient.dtype in (torch.bfloat16, torch.float16):
        return torch.dot(gradient.flatten().float(), direction.flatten().float())
    return torch.dot(gradient.flatten(), direction.flatten())


def dense(direction: Direction) -> torch.Tensor:
    """A direction as one tensor."""
    return direction.left @ direction.right if isinstance(direction, LowRank) else direction


def squared_norm(direction: Direction) -> torch.Tensor:
    """(`torch.Tensor` scalar): the squared Frobenius norm; the left factor is orthonormal."""
    tensor = direction.right if isinstance(direction, LowRank) else direction
    parts = [part.to(wide(part.dtype)).square().sum() for (part,) in _blocks(tensor)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def precondition(
    gradient: torch.Tensor, optimizer: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter
) -> torch.Tensor:
    """
    Multiply a gradient, in place, by what an optimiser multiplies it by over time, apart from the learning rate,
    element by element.

    Adam divides by the root of the second moment as it was before the step (https://huggingface.co/papers/2602.00329),
    `D = 1 / (sqrt(v_{t-1} / (1 - beta2^{t-1})) + eps)`, 0 where there has been no gradient yet. Its first moment hands
    the gradient on in shares `(1 - beta1) beta1^k`, which sum to one; SGD with momentum in shares that sum to `(1 -
    dampening) / (1 - momentum)`. Any other optimiser is treated as SGD, as the paper treats AdamW.
    """
    state = optimizer.state.get(parameter, {})
    second = _second_moment(optimizer, state)
    if second is not None and "betas" in group:
        second = state.get("max_exp_avg_sq", second) if group.get("amsgrad") else second
        correction = 1 - group["betas"][1] ** float(state["step"])
        for part, of_part in _blocks(gradient, whole(second)):
            root = (of_part / correction).sqrt_()
            part.mul_(root.add_(group["eps"]).reciprocal_().mul_(of_part.sign()))
        return gradient
    momentum = group.get("momentum", 0.0)
    return gradient.mul_((1 - group.get("dampening", 0.0)) / (1 - momentum)) if momentum else gradient


def _blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Parts along the first dimension that stay in the cache of a processor; on other devices, all at once."""
    first = tensors[0]
    if first.device.type != "cpu" or first.numel() <= _CACHED:
        return iter([tensors])
    return zip(*(tensor.split(max(_CACHED * len(first) // first.numel(), 1)) for tensor in tensors), strict=True)


def _second_moment(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> torch.Tensor | None:
    """Adam's as an optimizer keeps it, read from 8 bits if it is bitsandbytes'."""
    found = state.get("exp_avg_sq")
    if found is not None or "Adam" not in type(optimizer).__name__ or "state2" not in state:
        return found
    found = state["state2"]
    if found.is_floating_point():
        return found
    scales, count = state.get("absmax2"), found.numel()
    block = next((size for size in (256, 2048) if scales is not None and -(-count // size) == len(scales)), None)
    if scales is None or block is None:
        raise ValueError(
            f"Expected the 8-bit moments of {type(optimizer).__name__} in blocks of 256, with a scale each, got a "
            f"state with {sorted(state)}: values would not be Adam's. Type `block_wise=True`, or use its 32 bits."
        )
    values = state["qmap2"][found.flatten().long()] * scales.repeat_interleave(block)[:count]
    return values.view(found.shape)


def warn_of_other_rule(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Say so, once there are states, if an optimizer's are neither those of SGD nor of the Adam family."""
    state: dict[str, Any] = next((found for p in parameters if (found := optimizer.state.get(p))), {})
    keys = {key for key, value in state.items() if isinstance(value, torch.Tensor)} - {"step"}
    adam = _second_moment(optimizer, state) is not None and "betas" in optimizer.param_groups[0]
    if not adam and not keys <= {"momentum_buffer"}:
        logger.warning(
            "%s is none of SGD and the Adam family, whose rules are known: values are those of SGD at its learning "
            "rate. Their sizes mean nothing and their order may be off; see `explained_ratio`.",
            type(optimizer).__name__,
        )


def pack_directions(directions: Sequence[Sequence[Direction]]) -> dict[str, torch.Tensor]:
    """Directions of each target and parameter as tensors by name, for a file."""
    tensors = {}
    for which, by_parameter in enumerate(directions):
        for index, direction in enumerate(by_parameter):
            parts = [direction] if isinstance(direction, torch.Tensor) else [direction.left, direction.right]
            for part, tensor in enumerate(parts):
                tensors[f"{which}.{index}.{part}"] = tensor.cpu()
    return tensors


def unpack_directions(
    tensors: dict[str, torch.Tensor], targets: int, parameters: Sequence[nn.Parameter]
) -> list[list[Direction]]:
    """What [`pack_directions`] has packed, on the parameters' devices, laid out as [`sketch`] does."""
    unpacked: list[list[Direction]] = []
    for which in range(targets):
        unpacked.append([])
        for index, parameter in enumerate(parameters):
            found = [
                contiguous_clone(tensors[key].to(parameter.device))
                for part in range(2)
                if (key := f"{which}.{index}.{part}") in tensors
            ]
            unpacked[-1].append(found[0] if len(found) == 1 else LowRank(*found))
    return unpacked


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 or tensor parallelism shards the model's parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of one that FSDP2 has sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def applied_gradient(parameter: nn.Parameter) -> torch.Tensor | None:
    """All of the gradient that a parameter has after the backward pass, the mean of all processes."""
    if is_partitioned(parameter):
        return importlib.import_module("deepspeed.utils").safe_get_full_grad(parameter)
    return None if parameter.grad is None else whole(parameter.grad)


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed takes its gradient and divides it among processes."""
    return hasattr(parameter, "get_full_hp_grad")


def validation_gradient(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batches: Sequence[tuple[Any, int]],
    compute_loss: Callable[[nn.Module, Any], torch.Tensor],
    *,
    seed: int = 0,
    with_gradient: bool = True,
) -> tuple[list[torch.Tensor], float]:
    """
    Gradients, whole where parameters are sharded, and loss of a validation set, averaged over rows, by a pass in
    evaluation mode that leaves `.grad`, random states and modes as they were. All processes are given all batches,
    with how many rows each has, and share them; `seed` is of losses that draw noise.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    sharded = any(isinstance(parameter, DTensor) for parameter in parameters)
    total = sum(rows for _, rows in batches)
    gradients = [torch.zeros(0)] * len(parameters)
    loss_sum = torch.zeros((), dtype=torch.float64)
    device = parameters[0].device
    kept = [parameter.grad for parameter in parameters]
    if sharded:
        for parameter in parameters:
            parameter.grad = None
    with untouched(model, device, seed), torch.set_grad_enabled(with_gradient):
        starts = range(0, len(batches), world)
        for start in tqdm(starts, "Validation gradient", delay=5, leave=False, disable=rank > 0):
            # Every process makes as many passes: losses may gather metrics
            mine = start + rank
            batch, rows = batches[mine] if mine < len(batches) else (batches[0][0], 0)
            loss = compute_loss(model, send_to_device(copy.copy(batch), device)) * (rows / total)
            loss_sum += loss.detach().double().cpu()
            if not with_gradient:
                continue
            if not loss.requires_grad:
                raise ValueError(
                    "Expected a validation loss that depends on what is trained, got one without a gradient."
                )
            if sharded:  # FSDP differentiates copies, so that only `.grad` of the shards is right
                loss.backward()
                continue
            for position, found in enumerate(torch.autograd.grad(loss, parameters, allow_unused=True)):
                if found is not None:
                    known = gradients[position]
                    gradients[position] = found if known.numel() == 0 else known.add_(found)
    if sharded and with_gradient:
        for position, parameter in enumerate(parameters):
            if parameter.grad is not None:
                gradients[position] = whole(parameter.grad) * world  # of which FSDP took the mean
    if sharded:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
    if with_gradient:
        gradients = [
            torch.zeros(parameter.shape, dtype=parameter.dtype, device=device) if found.numel() == 0 else found
            for found, parameter in zip(gradients, parameters, strict=True)
        ]
    if world > 1:
        loss_sum = loss_sum.to(device)
        dist.all_reduce(loss_sum)
        if with_gradient and not sharded:
            for found in gradients:
                dist.all_reduce(found)
    return (gradients if with_gradient else []), loss_sum.item()


@contextmanager
def untouched(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Evaluation mode, and random states of our own; both restored."""
    modes = [(module, module.training) for module in model.modules()]
    states = random.getstate(), np.random.get_state()
    with forked_random(device):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        model.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            random.setstate(states[0])
            np.random.set_state(states[1])


def _orthonormal(columns: torch.Tensor, times: int = 1) -> torch.Tensor:
    """Cholesky-QR, twice where it must be to the last bits; Householder's where columns depend on one another."""
    wide = columns.double()
    for _ in range(times):
        factor, failed = torch.linalg.cholesky_ex(wide.T @ wide)
        if failed or factor.diagonal().min() <= 1e-5 * factor.diagonal().max():
            return torch.linalg.qr(columns.double()).Q.to(columns.dtype)
        wide = torch.linalg.solve_triangular(factor.T, wide, upper=True, left=False)
    return wide.to(columns.dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that numbers of this one are added up in."""
    return torch.float64 if dtype == torch.float64 else torch.float32
