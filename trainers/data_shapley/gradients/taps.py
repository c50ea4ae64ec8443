"""Taps on modules' outputs that score, in the ordinary backward pass, what each row contributes to the gradient."""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .direction import Direction, LowRank, forked_random
from .rows import RowLayout


@dataclass
class TappedModule:
    """A module and the trainable parameters that its own forward pass uses, by their name in it."""

    name: str
    module: nn.Module
    parameters: dict[str, nn.Parameter]
    index: int
    kind: str  # "linear", "conv1d", "embedding", "norm" or "other"
    directions: list[dict[str, Direction]] = field(default_factory=list)  # of each target, by parameter
    rows: torch.Tensor | None = None  # gradient of each row, (rows, parameters of the module), if they are kept


class Taps:
    """
    Scores rows against directions: `<dL_i, u> = sum_t <b_t, D f(x_t)[u]>` with `b` the gradient of a module's output.

    For a linear layer it is `b_t . (U x_t)`; section 4.2 of https://huggingface.co/papers/2406.11011 contracts the
    same product in another order. For any other module it is a Jacobian-vector product by `torch.func.jvp`. The
    gradient is that of the row's share in the loss as it is trained, whatever its scale.

    Args:
        model (`torch.nn.Module`):
            The model whose trainable parameters are scored.

    Attributes:
        on (`bool`): whether forward passes in training mode are tapped.
        scores (`torch.Tensor` of shape `(modules, rows, targets)`): of the present micro-batch.
        tokens (`torch.Tensor` of shape `(batch, length, targets)`, *optional*): the same by token, times `weights`.
        fired (`set` of `int`): modules that scored something since it was cleared.
        misfits (`dict`): why a module could not be scored, by its index.
        unordered (`set` of `int`): modules whose output isn't laid out by rows.
        low_precision (`bool`): whether some gradients are in half precision, as under autocast.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = find_tapped(model)
        self.on, self.keep_rows, self.low_precision = False, False, False
        self.excluded: set[int] = set()
        self.fired: set[int] = set()
        self.misfits: dict[int, str] = {}
        self.unordered: set[int] = set()
        self.layout: RowLayout | None = None
        self.scores = torch.empty(0)
        self.tokens: torch.Tensor | None = None
        self.weights: list[float] = [1.0] * len(self.modules)
        self.model = model
        self._inputs: dict[int, _SharedInput] = {}  # of this micro-batch, by identity
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Hook all modules that are not excluded."""
        for tapped in self.modules:
            if tapped.index not in self.excluded:
                hook = _Hook(self, tapped)
                self._handles.append(tapped.module.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Remove all hooks."""
        self.on = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, layout: RowLayout, targets: int, with_tokens: bool = False) -> None:
        """Begin a micro-batch of these rows."""
        self.layout = layout
        self._inputs.clear()
        device = layout.tokens.device
        dtype = next(iter(self.modules[0].parameters.values())).dtype
        dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.scores = torch.zeros(len(self.modules), layout.rows, targets, dtype=dtype, device=device)
        self.tokens = None
        if with_tokens and layout.length is not None:
            self.tokens = torch.zeros(layout.batch, layout.length, targets, dtype=dtype, device=device)

    def read(self, tapped: TappedModule, x: torch.Tensor) -> "_SharedInput":
        """Note that a linear layer reads this tensor."""
        shared = self._inputs.get(id(x))
        if shared is None or shared.tensor() is not x:  # another that was freed had its identity
            shared = self._inputs[id(x)] = _SharedInput(x)
        shared.readers.append(tapped)
        shared.to_come += 1
        return shared

    @torch.no_grad()
    def score(
        self, tapped: TappedModule, layout: RowLayout, arguments: Any, b: torch.Tensor, shared: "_SharedInput | None"
    ) -> None:
        """Add the scores of one call of a module, from its inputs and the gradient of its output."""
        self.low_precision = self.low_precision or b.dtype in (torch.bfloat16, torch.float16)
        if self.keep_rows:
            rows = row_gradients(tapped, _first(*arguments), b, layout)
            tapped.rows = rows if tapped.rows is None else tapped.rows + rows
            self.fired.add(tapped.index)
            return
        try:
            products: list[torch.Tensor | None] = [None] * len(tapped.directions)
            if shared is not None:
                products = shared.products(tapped, _first(*arguments), b.dtype)
            by_target = [
                token_scores(tapped, which, arguments, b, self, product)
                for which, product in zip(tapped.directions, products, strict=True)
            ]
        except (NotImplementedError, RuntimeError) as error:
            self.misfits[tapped.index] = f"its derivative can't be computed ({str(error).splitlines()[0]})"
            return
        scores = by_target[0].unsqueeze(-1) if len(by_target) == 1 else torch.stack(by_target, dim=-1)
        self.fired.add(tapped.index)
        self.scores[tapped.index] += layout.sum_rows(scores).to(self.scores.dtype)
        if self.tokens is not None and scores[..., 0].numel() == self.tokens[..., 0].numel():
            self.tokens += self.weights[tapped.index] * scores.view(self.tokens.shape)


class _SharedInput:
    """
    A tensor that several linear layers read, as those of queries, keys and values do. Its products with their thin
    directions, and with those of all targets, are taken at once, which costs little more than one of them.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.tensor = weakref.ref(x)
        self.readers: list[TappedModule] = []
        self.to_come = 0  # scores
        self._place: Any = None
        self._x: torch.Tensor | None = None
        self._found: dict[tuple[int, int], torch.Tensor] = {}

    def products(self, tapped: TappedModule, x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor | None]:
        """By target, what `token_scores` needs of the input; `None` where the direction is not thin."""
        place = (x.data_ptr(), x.shape, x.stride(), dtype)
        if self._x is None or self._place != place:
            # While the tensor is kept, no other can be in its place.
            self._place, self._x = place, x
            self._found = self._multiply(x.to(dtype)) if x.is_floating_point() else {}
        found = [self._found.get((tapped.index, target)) for target in range(len(tapped.directions))]
        self.to_come -= 1
        if self.to_come <= 0:
            self._x, self._found = None, {}
        return found

    def _multiply(self, x: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
        thin = {
            (tapped.index, target): rows.to(x.dtype)
            for tapped in self.readers
            for target, directions in enumerate(tapped.directions)
            if (rows := _thin_rows(tapped, directions)) is not None and rows.shape[1] == x.shape[-1]
        }
        if not thin:
            return {}
        sizes = [len(rows) for rows in thin.values()]
        return dict(zip(thin, F.linear(x, torch.cat(list(thin.values()))).split(sizes, dim=-1), strict=True))


class _Hook:
    """Forward hook of one module: puts a tap behind its output."""

    def __init__(self, taps: Taps, tapped: TappedModule) -> None:
        self.taps, self.tapped = taps, tapped

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        taps, tapped = self.taps, self.tapped
        if not (taps.on and taps.layout is not None and taps.model.training and torch.is_grad_enabled()):
            return None
        if not isinstance(output, torch.Tensor):
            taps.misfits[tapped.index] = f"its output is {type(output).__name__}, not one tensor"
            return None
        if not output.requires_grad:
            return None
        layout, spread = taps.layout, False
        shape = output.shape[: _leading(tapped, output)]
        is_embedding = isinstance(module, nn.Embedding)
        if layout.segments is None and len(shape) > 1 and shape[0] == 1 < layout.batch and is_embedding:
            spread = True  # one row for all, like position embeddings: keep rows apart
        elif tapped.index in taps.unordered or not layout.fits(shape, is_embedding):
            taps.misfits[tapped.index] = f"its output of shape {tuple(shape)} can't be split into rows"
            return None
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        shared = taps.read(tapped, _first(args, kwargs)) if tapped.kind in ("linear", "conv1d") else None
        return _Tap.apply(output, self, layout, spread, shared, (args, kwargs), *tensors)


class _Tap(torch.autograd.Function):
    """The identity, whose backward pass scores. Inputs go through saved tensors, so that checkpointing recomputes."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        hook: _Hook,
        layout: RowLayout,
        spread: bool,
        shared: _SharedInput | None,
        call: Any,
        *tensors: Any,
    ):
        ctx.hook, ctx.layout, ctx.spread, ctx.shared = hook, layout, spread, shared
        args, kwargs = call
        hole = lambda value: _Hole if isinstance(value, torch.Tensor) else value  # noqa: E731
        ctx.call = [hole(value) for value in args], {name: hole(value) for name, value in kwargs.items()}
        ctx.save_for_backward(*tensors)
        if spread:
            return output.expand(layout.batch, *output.shape[1:])
        # Not a view, which could not be changed in place. What a module needs of its output again can't be changed in
        # place without us either, so the memory may be shared.
        return output.data

    @staticmethod
    def backward(ctx: Any, b: torch.Tensor):  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        args, kwargs = ctx.call
        args = [next(saved).detach() if value is _Hole else value for value in args]
        kwargs = {name: next(saved).detach() if value is _Hole else value for name, value in kwargs.items()}
        if ctx.hook.taps.on:
            ctx.hook.taps.score(ctx.hook.tapped, ctx.layout, (args, kwargs), b, ctx.shared)
        needed = b.sum(0, keepdim=True) if ctx.spread else b
        return (needed, *[None] * (len(ctx.needs_input_grad) - 1))


class _Hole:
    """Where a tensor stood among a module's arguments."""


def token_scores(
    tapped: TappedModule,
    directions: dict[str, Direction],
    arguments: Any,
    b: torch.Tensor,
    taps: Taps,
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
        taps ([`Taps`]):
            They are off while a module is run again.
        product (`torch.Tensor`, *optional*):
            Input of a linear layer times its thin direction.

    Returns:
        `torch.Tensor` of shape `(batch, ...)`: at least in float32.
    """
    u = directions.get("weight")
    if tapped.kind in ("linear", "conv1d"):
        scores = None
        if u is not None:
            scores = _linear_scores(u, _first(*arguments), b, tapped.kind == "linear", product)
        if "bias" in directions:
            bias = _product(b, _dense(directions["bias"]).to(b.dtype))
            scores = bias if scores is None else scores + bias
        assert scores is not None
        return scores
    if tapped.kind == "embedding":
        assert u is not None
        x = _first(*arguments)
        if isinstance(u, LowRank):
            thin = b @ u.right.T.to(b.dtype)
            scores = _sum_product(thin, F.embedding(x, u.left).to(b.dtype))
        else:
            scores = _sum_product(b, F.embedding(x, u).to(b.dtype))
    elif tapped.kind == "norm":
        output = _norm_output(tapped.module, _first(*arguments), directions)
        scores = _sum_product(b, output.to(b.dtype), _leading(tapped, b))
    else:
        scores = _sum_product(b, _jvp(tapped, directions, arguments, taps).to(b.dtype), _leading(tapped, b))
    padding = getattr(tapped.module, "padding_idx", None)
    if isinstance(tapped.module, nn.Embedding) and padding is not None:
        scores = scores.masked_fill(_first(*arguments) == padding, 0)  # whose weight gets no gradient
    return scores


def row_gradients(tapped: TappedModule, x: torch.Tensor, b: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """
    (`torch.Tensor` of shape `(rows, weights)`): gradient of each row by the weight, and the bias, of a linear layer.
    """
    x = x.to(b.dtype)
    if layout.segments is not None:
        x, b = x.reshape(-1, x.shape[-1]), b.reshape(-1, b.shape[-1])
        pieces = [(b[layout.segments == row], x[layout.segments == row]) for row in range(layout.rows)]
        weight = torch.stack([left.T @ right for left, right in pieces])
        bias = torch.stack([left.sum(0) for left, _ in pieces])
    else:
        x, b = x.reshape(layout.batch, -1, x.shape[-1]), b.reshape(layout.batch, -1, b.shape[-1])
        weight = torch.einsum("bto,bti->boi", b, x).view(-1, layout.rows, b.shape[-1], x.shape[-1]).sum(0)
        bias = b.sum(1).view(-1, layout.rows, b.shape[-1]).sum(0)
    if tapped.kind == "conv1d":
        weight = weight.transpose(1, 2)
    found = {"weight": weight.flatten(1), "bias": bias}
    return torch.cat([found[name].to(_wide(b.dtype)) for name in tapped.parameters], dim=1)


def find_tapped(model: nn.Module) -> list[TappedModule]:
    """Modules that own trainable parameters; those of parameter lists and dicts belong to the module around them."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[tuple[int, str]] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        owner, _, local = name.rpartition(".")
        while isinstance(modules[owner], (nn.ParameterDict, nn.ParameterList)):
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
    Modules with those of their parameters that are trained, once for each learning rate among them, numbered anew.

    Args:
        modules (list of [`TappedModule`]):
            As [`find_tapped`] finds them.
        groups (`dict`):
            The optimizer's group of a parameter, by its `id`.
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


def _first(args: Sequence[Any], kwargs: dict[str, Any]) -> torch.Tensor:
    """The input of a module with one input, given by position or name."""
    return args[0] if args else next(iter(kwargs.values()))


def _kind(module: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    plain = set(parameters) <= {"weight", "bias"}
    forward = type(module).forward
    if plain and forward is nn.Linear.forward:
        return "linear"
    if plain and forward is Conv1D.forward:
        return "conv1d"
    if plain and forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return "embedding"
    if plain and forward in (nn.LayerNorm.forward, nn.RMSNorm.forward, nn.modules.batchnorm._BatchNorm.forward):
        return "norm"
    return "other"


def _leading(tapped: TappedModule, output: torch.Tensor) -> int:
    """How many leading dimensions of an output are positions rather than channels."""
    if tapped.kind in ("linear", "conv1d", "embedding"):
        return output.dim() - 1
    if isinstance(tapped.module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        return 1
    return max(output.dim() - 1, 1)


def _thin_rows(tapped: TappedModule, directions: dict[str, Direction]) -> torch.Tensor | None:
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
    left, right = left.to(_wide(left.dtype)), right.to(_wide(right.dtype))
    product = left * right
    return product.flatten(leading if leading is not None else product.dim() - 1).sum(-1)


def _product(b: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (b @ vector).to(_wide(b.dtype))


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


def _jvp(tapped: TappedModule, directions: dict[str, Direction], arguments: Any, taps: Taps) -> torch.Tensor:
    module, (args, kwargs) = tapped.module, arguments
    if any(isinstance(child, nn.modules.dropout._DropoutNd) and child.p > 0 for child in module.modules()):
        raise NotImplementedError("it draws dropout masks")
    primals = {name: parameter.detach() for name, parameter in tapped.parameters.items()}
    tangents = {name: _dense(directions[name]).to(primals[name].dtype) for name in primals}

    def run(values: dict[str, torch.Tensor]) -> torch.Tensor:  # a tied parameter of a child is the child's
        return torch.func.functional_call(module, values, tuple(args), kwargs, tie_weights=False)

    device = next(iter(primals.values())).device
    was, taps.on = taps.on, False
    try:
        with forked_random(device):
            state = _random_state(device)
            derivative = torch.func.jvp(run, (primals,), (tangents,))[1]
            if not torch.equal(_random_state(device), state):
                raise NotImplementedError("it draws random numbers")
            return derivative
    finally:
        taps.on = was


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.get_rng_state() if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
