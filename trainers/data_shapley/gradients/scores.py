"""The derivative of a loss along a direction of one module's parameters, by position, from its input and output."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import ParametrizationList
from transformers.cache_utils import Cache
from transformers.pytorch_utils import Conv1D

from hf_iclr.trainers.measuring import forked_random

from . import follow
from .direction import Direction, LowRank, dense, wide


_EXPERTS = "_experts_implementation"  # of a configuration of transformers


@dataclass
class TappedModule:
    """A module and the trainable parameters that its own forward pass uses, by their name in it."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    index: int
    kind: str  # "linear", "conv1d", "embedding", "norm", "scale" or "other"
    directions: list[dict[str, Direction]] = field(default_factory=list)  # of each target, by parameter
    is_rms: bool = False  # whether a scale was seen to be an RMSNorm


def find_tapped(model: nn.Module) -> list[TappedModule]:
    """Modules that own trainable parameters; those of lists, dicts and parametrisations are their parent's."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[tuple[int, str]] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        owner, _, local = name.rpartition(".")
        while isinstance(modules[owner], (nn.ParameterDict, nn.ParameterList, ParametrizationList)):
            owner, _, last = owner.rpartition(".")
            local = f"{last}.{local}"
            if isinstance(modules[owner], nn.ModuleDict):  # of parametrisations
                owner, _, last = owner.rpartition(".")
                local = f"{last}.{local}"
        if (id(modules[owner]), local) not in seen:
            seen.add((id(modules[owner]), local))
            found.setdefault(owner, {})[local] = parameter
    return [
        TappedModule(name, modules[name], parameters, index, _kind(modules[name], parameters))
        for index, (name, parameters) in enumerate(found.items())
    ]


def split_by_rate(modules: Sequence[TappedModule], groups: dict[int, dict[str, Any]]) -> list[TappedModule]:
    """
    Modules with those of their parameters that are trained, once for each learning rate among them, numbered anew;
    `groups` has the optimizer's group of a parameter, by its `id`.
    """
    found: list[TappedModule] = []
    for tapped in modules:
        by_rate: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in tapped.parameters.items():
            if id(parameter) in groups:
                group = groups[id(parameter)]
                by_rate.setdefault(float(group.get("initial_lr", group["lr"])), {})[name] = parameter
        for parameters in by_rate.values():
            found.append(replace(tapped, parameters=parameters, index=len(found), directions=[]))
    return found


def _kind(module: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    plain = set(parameters) <= {"weight", "bias"}
    forward = type(module).forward
    if plain and forward is nn.Linear.forward:
        return "linear"
    if plain and forward is Conv1D.forward:
        return "conv1d"
    if plain and forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return "embedding"
    if plain and forward in (nn.LayerNorm.forward, nn.modules.batchnorm._BatchNorm.forward):
        return "norm"
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    if has_eps and set(parameters) == {"weight"} and parameters["weight"].dim() == 1:  # an RMSNorm, as it seems
        return "scale"
    return "other"


@dataclass
class Call:
    """
    A module's call that is scored: with what arguments, in which type autocast ran it, if at all, which of its
    outputs, by their place, and what became of it until rows met it.
    """

    args: Any
    kwargs: Any
    autocast: torch.dtype | None = None
    place: int | None = None
    through: Callable[[torch.Tensor], torch.Tensor] | None = None


def token_scores(
    tapped: TappedModule,
    directions: dict[str, Direction],
    call: Call,
    b: torch.Tensor,
) -> torch.Tensor:
    """
    Directional derivative of the loss along one direction, of shape `(batch, ...)` and at least in float32, from the
    gradient `b` of the loss by the output, of shape `(batch, ..., channels)`.
    """
    if call.through is not None:
        moved = _derivative(tapped, directions, call)
        through = call.through
        moved = _push(lambda values: through(values["moved"]), {"moved": torch.zeros_like(moved)}, {"moved": moved})
        return _sum_product(b, moved.to(b.dtype), max(b.dim() - 1, 1))
    u = directions.get("weight")
    if tapped.kind in ("linear", "conv1d"):
        return fast_scores(tapped, directions, first_input(call.args, call.kwargs), b, b.shape[:-1])
    if tapped.kind == "embedding" and isinstance(u, LowRank):
        x = first_input(call.args, call.kwargs)
        scores = _sum_product(b @ u.right.T.to(b.dtype), F.embedding(x, u.left).to(b.dtype))
        padding: Any = tapped.module.padding_idx
        return scores if padding is None else scores.masked_fill(x == padding, 0)
    return _sum_product(b, _derivative(tapped, directions, call).to(b.dtype), count_leading(tapped, b))


def _derivative(tapped: TappedModule, directions: dict[str, Direction], call: Call) -> torch.Tensor:
    """Of a module's output along a direction of its parameters."""
    alone = len(call.args) + len(call.kwargs) == 1
    x: Any = first_input(call.args, call.kwargs) if alone else None
    if tapped.kind == "embedding":
        moved = F.embedding(x, dense(directions["weight"]))
    elif tapped.kind == "norm":
        moved = _norm_output(tapped.module, x, directions)
    elif tapped.kind == "scale" and alone and (factor := _rms_factor(tapped, directions, x)) is not None:
        moved = x * factor.unsqueeze(-1) * dense(directions["weight"])
    else:
        moved = _jvp(tapped, directions, call)
    if isinstance(tapped.module, nn.Embedding) and tapped.module.padding_idx is not None:
        padding = first_input(call.args, call.kwargs) == tapped.module.padding_idx
        moved = moved.masked_fill(padding.unsqueeze(-1), 0)  # whose weight gets no gradient
    return moved


def autocast_type(device: torch.device) -> torch.dtype | None:
    """In which type matrices are multiplied on a device whatever their own, `None` if that is their own."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


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


def fast_scores(
    tapped: TappedModule,
    directions: dict[str, Direction],
    x: torch.Tensor,
    b: torch.Tensor,
    shape: Sequence[int],
) -> torch.Tensor:
    """
    The derivative of a linear layer, `b . (U x)`, multiplied on its thin side first, or of an RMSNorm; in the given
    shape: `b.shape[:-1]` for positions, `(batch,)` for sums over the positions of an input.
    """
    u, bias = directions.get("weight"), directions.get("bias")
    if tapped.kind not in ("linear", "conv1d"):  # a scale, or what seemed to be one until its first call was scored
        factor = _rms_factor(tapped, directions, x) if tapped.kind == "scale" else None
        if factor is not None:
            u = dense(directions["weight"]).to(wide(b.dtype))
            return (((b.to(u.dtype) * x.to(u.dtype)) @ u) * factor).reshape(*shape, -1).sum(-1)
        return token_scores(tapped, directions, Call((x,), {}), b).reshape(*shape, -1).sum(-1)
    parts = [] if bias is None else [(b @ dense(bias).to(b.dtype)).to(wide(b.dtype))]
    if u is not None:
        right: torch.Tensor
        x = x.to(b.dtype)
        if isinstance(u, LowRank):
            before, after = (u.right.T, u.left) if tapped.kind == "linear" else (u.left, u.right.T)
            left, right = b @ after.to(b.dtype), x @ before.to(b.dtype)
        else:
            weight = (u if tapped.kind == "linear" else u.T).to(b.dtype)
            narrow = weight.shape[0] <= weight.shape[1]
            left, right = (b, F.linear(x, weight)) if narrow else (b @ weight, x)
        parts.append(left.to(wide(left.dtype)) * right.to(wide(right.dtype)))
    sums = [part.reshape(*shape, -1).sum(-1) for part in parts]
    return sums[0] if len(sums) == 1 else sums[0] + sums[1]


def _sum_product(left: torch.Tensor, right: torch.Tensor, leading: int | None = None) -> torch.Tensor:
    product = left.to(wide(left.dtype)) * right.to(wide(right.dtype))
    leading = product.dim() - 1 if leading is None else leading
    return product.flatten(leading).sum(-1) if leading < product.dim() else product


def _norm_output(module: nn.Module, x: torch.Tensor, directions: dict[str, Direction]) -> torch.Tensor:
    """Output of a normalisation whose weight and bias are the direction: it is linear in both."""
    parts: list[torch.Tensor | None] = []
    for name in ("weight", "bias"):
        own: Any = getattr(module, name, None)  # whose type autocast lets differ from the input's
        given = dense(directions[name]) if name in directions else None if own is None else x.new_zeros(own.shape)
        parts.append(None if given is None else given.to(own.dtype))
    weight, bias = parts
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
    running = (None, None) if module.training else (module.running_mean, module.running_var)
    return F.batch_norm(x, *running, weight, bias, training=running[0] is None, eps=module.eps)  # type: ignore


def _rms_factor(tapped: TappedModule, directions: dict[str, Direction], x: torch.Tensor) -> torch.Tensor | None:
    """
    (`torch.Tensor` of shape `(...)`): what an input times a direction of the weight is multiplied by to be the
    derivative of an RMSNorm: less than running it. `None` if the module's first call shows that it is something else.
    """
    module, u = tapped.module, dense(directions["weight"])
    eps: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or x.shape[-1] != len(u):
        tapped.kind = "other"
        return None
    values = x.to(wide(x.dtype))
    factor = (torch.linalg.vector_norm(values, dim=-1).square() / len(u) + eps).rsqrt()
    if not tapped.is_rms:  # it would be affine in its weight
        u = u.to(tapped.parameters["weight"].dtype)
        at_u, at_zero = (torch.func.functional_call(module, {"weight": w}, (x,)) for w in (u, torch.zeros_like(u)))
        moved = (at_u - at_zero).to(values.dtype)
        rough = 1.0 if x.dtype != torch.float64 else 1e-9  # doubles may be normalised in single precision
        tapped.is_rms = moved.shape == x.shape and torch.allclose(
            values * u * factor[..., None], moved, 2e-2 * rough, 1e-3 * rough * float(moved.abs().max())
        )
        if not tapped.is_rms:
            tapped.kind = "other"
            return None
    return factor


def _jvp(tapped: TappedModule, directions: dict[str, Direction], call: Call) -> torch.Tensor:
    module = tapped.module
    if any(isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 for child in module.modules()):
        raise NotImplementedError("it draws dropout masks")
    # A cache is that of generation, and empty in training
    args, kwargs = follow.replace((call.args, call.kwargs), lambda value: None if isinstance(value, Cache) else value)
    # The other parameters as copies of their own, for parametrisations set them in place
    frozen = {name: nn.Parameter(parameter.data, requires_grad=False) for name, parameter in module.named_parameters()}
    # Those that the module has at present, which FSDP gathers for its passes
    primals = {name: module.get_parameter(name).detach() for name in tapped.parameters}
    tangents = {name: dense(directions[name]).to(primals[name].dtype) for name in primals}

    def run(values: dict[str, torch.Tensor]) -> torch.Tensor:  # a tied parameter of a child is the child's
        output = torch.func.functional_call(module, {**frozen, **values}, args, kwargs, tie_weights=False)
        return output if call.place is None else list(follow.leaves(output))[call.place]

    device = next(iter(primals.values())).device
    with forked_random(device), _plain_experts(module):
        state = _random_state(device)
        moved = _push(run, primals, tangents)
        if not torch.equal(_random_state(device), state):
            raise NotImplementedError("it draws random numbers")
        return moved


def _push(
    run: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    primals: dict[str, torch.Tensor],
    tangents: dict[str, torch.Tensor],
) -> torch.Tensor:
    """The derivative of a function along tensors: forward or, where an operation lacks that, twice backward."""
    with sdpa_kernel(SDPBackend.MATH):  # others have no second derivative of either kind
        try:
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(
                    run({name: forward_ad.make_dual(primals[name], tangents[name]) for name in primals})
                )
                return torch.zeros_like(found.primal) if found.tangent is None else found.tangent
        except NotImplementedError:
            with torch.enable_grad():
                values = {name: primal.requires_grad_() for name, primal in primals.items()}
                output = run(values)
                b = torch.zeros_like(output, requires_grad=True)
                pulled = torch.autograd.grad(output, list(values.values()), b, create_graph=True)
                return torch.autograd.grad(pulled, b, list(tangents.values()))[0]


@contextmanager
def _plain_experts(module: nn.Module) -> Iterator[None]:
    """Experts one after the other, for grouped products have no forward derivative."""
    configs = {id(config): config for child in module.modules() if (config := getattr(child, "config", None))}
    kept = [(found, found._experts_implementation) for found in configs.values() if hasattr(found, _EXPERTS)]
    try:
        for config, _ in kept:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, was in kept:
            config._experts_implementation = was


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
