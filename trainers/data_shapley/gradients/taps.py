"""Taps on modules' outputs that score, in the ordinary backward pass, what each row contributes to the gradient."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import follow
from .direction import wide
from .meter import Meter
from .rows import RowLayout
from .scores import (
    Call,
    TappedModule,
    autocast_type,
    count_leading,
    fast_scores,
    find_tapped,
    first_input,
    token_scores,
)
from .thin import ThinDirections, ThinLayer, ThinProducts


_AT_ONCE = 64  # thin layers whose products are summed one after the other, and not between large ones out of cache
_FAST = ("linear", "conv1d", "scale")  # kinds of modules that are scored from their one input


class Taps:
    """
    Scores rows against directions: `<dL_i, u> = sum_t <b_t, D f(x_t)[u]>` with `b` the gradient of a module's output.

    For a linear layer it is `b_t . (U x_t)`; section 4.2 of https://huggingface.co/papers/2406.11011 contracts the
    same product in another order. For any other module it is a Jacobian-vector product. The gradient is that of the
    row's share in the loss as it is trained, whatever its scale.

    Attributes:
        on: whether forward passes in training mode are tapped.
        scores (`torch.Tensor` of shape `(modules, rows, targets)`): of the present micro-batch, so far.
        tokens (`torch.Tensor` of shape `(batch, length, targets)`, *optional*): the same by token, times `weights`.
        fired: modules that scored something since it was cleared.
        misfits: why a module could not be scored, by its index.
        heard: modules that were called since the one around them was.
        around: modules that score those in them whose parameters they use without calling them.
        unordered, common: modules whose output isn't laid out by rows; whose output rows have in common.
        low_precision: whether some gradients are in half precision, as under autocast.
        meter: of the time spent in hooks and in scoring.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = find_tapped(model)
        self.on, self.low_precision, self.meter = False, False, Meter()
        self.excluded: set[int] = set()
        self.fired: set[int] = set()
        self.misfits: dict[int, str] = {}
        self.unordered: set[int] = set()
        self.common: set[int] = set()
        self.heard: set[int] = set()
        self.around = _find_around(self, model)
        self.layout: RowLayout | None = None
        self._scores = torch.empty(0)
        self._found: list[tuple[int, torch.Tensor]] = []  # by input, not yet in them
        self.later: list[tuple[Any, ...]] = []  # of thin layers, not yet summed
        self.tokens: torch.Tensor | None = None
        self.weights: list[float] = [1.0] * len(self.modules)
        self.model = model
        self.products = ThinProducts()
        self._hooks: dict[int, _Hook] = {}
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Hook all modules that are not excluded, and those around them that may have to stand in for them."""
        for tapped in self.modules:
            if tapped.index not in self.excluded:
                hook = self._hooks.get(tapped.index)
                if hook is None or hook.tapped is not tapped:
                    hook = self._hooks[tapped.index] = _Hook(self, tapped)
                self._handles.append(tapped.module.register_forward_hook(hook, with_kwargs=True))
        for around in self.around:
            self._handles.append(around.module.register_forward_pre_hook(around.before))
            self._handles.append(around.module.register_forward_hook(around.after, with_kwargs=True))

    def detach(self) -> None:
        """Remove all hooks."""
        self.on = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.products.clear()

    def hears(self) -> bool:
        """Whether this forward pass is tapped."""
        return self.on and self.layout is not None and self.model.training and torch.is_grad_enabled()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Modules are run again without being tapped."""
        was, self.on = self.on, False
        try:
            yield
        finally:
            self.on = was

    def start(self, layout: RowLayout, targets: int, with_tokens: bool = False) -> None:
        """Begin a micro-batch of these rows."""
        self.layout = layout
        self.products.clear()
        device = layout.tokens.device
        dtype = wide(next(iter(self.modules[0].parameters.values())).dtype)
        self._scores = torch.zeros(len(self.modules), layout.rows, targets, dtype=dtype, device=device)
        self._found.clear()
        self.later.clear()
        self.tokens = None
        if with_tokens and layout.length is not None:
            self.tokens = torch.zeros(layout.batch, layout.length, targets, dtype=dtype, device=device)

    def catch_up(self) -> None:
        """Sum the products of thin layers."""
        later, self.later = self.later, []
        for tapped, layout, thin, right, left, biased in later:
            whole = self.sums_rows(layout)
            try:
                scores = thin.score(right, left, biased, (layout.batch,) if whole else left.shape[:-1])
            except RuntimeError as error:
                self.fail(tapped, error)
            else:
                self.keep(tapped, layout, scores, left.dtype, whole)

    @property
    def scores(self) -> torch.Tensor:
        self.catch_up()
        if self._found:  # put together once, for each of them is a few numbers
            places, parts = zip(*self._found, strict=True)
            rows = torch.stack(parts).view(len(parts), -1, *self._scores.shape[1:]).sum(1).to(self._scores.dtype)
            self._scores.index_add_(0, torch.tensor(places, device=rows.device), rows)
            self._found.clear()
        return self._scores

    def score(self, tapped: TappedModule, layout: RowLayout, call: Call, b: torch.Tensor, fast: bool = False) -> None:
        """
        Add the scores of one call of a module, from its inputs and the gradient of its output. `fast`: of a module
        that is scored from its one input.
        """
        whole = fast and self.sums_rows(layout)
        shape: Sequence[int] = (layout.batch,) if whole else b.shape[:-1]
        self.on = False  # modules may be run again
        try:
            with torch.autocast(b.device.type, call.autocast) if call.autocast else nullcontext():
                by_target = [
                    fast_scores(tapped, which, call.args[0], b, shape)
                    if fast
                    else token_scores(tapped, which, call, b)
                    for which in tapped.directions
                ]
        except (NotImplementedError, RuntimeError) as error:
            self.fail(tapped, error)
            return
        finally:
            self.on = True
        self.keep(tapped, layout, torch.stack(by_target, dim=-1), b.dtype, whole)

    def sums_rows(self, layout: RowLayout) -> bool:
        """Whether the positions of a row may be summed at once."""
        return self.tokens is None and layout.segments is None

    def fail(self, tapped: TappedModule, error: Exception) -> None:
        """Note that a module could not be scored."""
        self.misfits[tapped.index] = f"its derivative can't be computed ({str(error).splitlines()[0]})"

    def keep(
        self, tapped: TappedModule, layout: RowLayout, scores: torch.Tensor, dtype: torch.dtype, whole: bool
    ) -> None:
        """Add scores of positions, or of whole rows, from a gradient of this type."""
        self.low_precision = self.low_precision or dtype in (torch.bfloat16, torch.float16)
        self.fired.add(tapped.index)
        if whole:
            self._found.append((tapped.index, scores))
            return
        self._scores[tapped.index] += layout.sum_rows(scores).to(self._scores.dtype)
        if self.tokens is not None and scores[..., 0].numel() == self.tokens[..., 0].numel():
            self.tokens += self.weights[tapped.index] * scores.view(self.tokens.shape)


class _Hook:
    """Forward hook of one module: puts a tap behind its output."""

    def __init__(self, taps: Taps, tapped: TappedModule) -> None:
        self.taps, self.tapped, self.layer = taps, tapped, ThinLayer(tapped)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        with self.taps.meter:
            self.taps.heard.add(self.tapped.index)  # in checkpoints also without gradients
            return self._watch(args, kwargs, output) if self.taps.hears() else None

    def _watch(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        taps, tapped, layout = self.taps, self.tapped, self.taps.layout
        assert layout is not None
        if tapped.kind in _FAST and type(output) is torch.Tensor and output.requires_grad:
            # What most modules are, and most calls: with the least that has to be done
            x, shape = first_input(args, kwargs), output.shape[:-1]
            in_common = layout.segments is None and layout.batch > 1 and len(shape) > 0 and shape[0] == 1
            apart = not in_common and tapped.index not in taps.unordered and tapped.index not in taps.common
            if apart and len(args) + len(kwargs) == 1 and type(x) is torch.Tensor and layout.fits(shape, False):
                thin, node = self.layer.point(output.dtype), output.grad_fn
                if thin is None or node is None:
                    return _Tap.apply(output, self, layout, None, x)
                right = taps.products.of(self.layer, x, output.dtype)
                node.register_prehook(functools.partial(self._score_thin, layout, thin, right, output.output_nr))
                return None
        args, kwargs = follow.replace((args, kwargs), follow.plain)
        call = Call(args, kwargs, autocast_type(layout.tokens.device))
        if isinstance(output, torch.Tensor):
            return self._behind(output, call)
        if not isinstance(output, (tuple, list, dict)):
            self.taps.misfits[self.tapped.index] = f"its output is {type(output).__name__}, not tensors"
            return None
        places = itertools.count()

        def tap(value: Any) -> Any:
            place = next(places)
            return self._behind(value, replace(call, place=place)) if isinstance(value, torch.Tensor) else value

        return follow.replace(output, tap)

    def _score_thin(
        self,
        layout: RowLayout,
        thin: ThinDirections,
        right: torch.Tensor,
        place: int,
        gradients: Sequence[torch.Tensor | None],
    ) -> None:
        """
        Hook of the node that made an output, before it passes on the output's gradient: a node of our own costs more.
        What it keeps of the input is thin, so that checkpoints need not recompute it: of one that isn't, a product.
        """
        taps, b = self.taps, gradients[place]
        if not taps.on or b is None:
            return
        with taps.meter:
            try:
                taps.later.append((self.tapped, layout, thin, right, *thin.project(b.detach())))
            except (NotImplementedError, RuntimeError) as error:
                taps.fail(self.tapped, error)
            if len(taps.later) >= _AT_ONCE:
                taps.catch_up()

    def _behind(self, output: torch.Tensor, call: Call) -> torch.Tensor:
        taps, tapped, layout = self.taps, self.tapped, self.taps.layout
        assert layout is not None
        if not output.requires_grad:
            return output
        shape = output.shape[: count_leading(tapped, output)]
        alone = layout.segments is None and layout.batch > 1 and output.dim() > 1 and output.shape[0] == 1
        if alone or tapped.index in taps.common or isinstance(output, follow.InCommon):
            source = follow.Shared(
                functools.partial(self._join, call), output.shape, {"dtype": output.dtype, "device": output.device}
            )
            return follow.begin(output, source, (layout.batch, layout.batch * layout.texts))
        if tapped.index in taps.unordered or not layout.fits(shape, isinstance(tapped.module, nn.Embedding)):
            taps.misfits[tapped.index] = f"its output of shape {tuple(shape)} can't be split into rows"
            return output
        return self._tap(output, call)

    def _join(self, call: Call, source: follow.Shared, step: follow.Step, output: torch.Tensor) -> torch.Tensor:
        return self._tap(output, replace(call, through=functools.partial(step.replay, source)))

    def _tap(self, output: torch.Tensor, call: Call) -> torch.Tensor:
        tensors = [value for value in follow.leaves((call.args, call.kwargs)) if isinstance(value, torch.Tensor)]
        hole = lambda value: _Hole if isinstance(value, torch.Tensor) else value  # noqa: E731
        args, kwargs = follow.replace((call.args, call.kwargs), hole)
        return _Tap.apply(output, self, self.taps.layout, replace(call, args=args, kwargs=kwargs), *tensors)


class _Around:
    """Hooks of a module that may use parameters of those in it without calling them: then it is tapped for them."""

    def __init__(self, taps: Taps, module: nn.Module, name: str) -> None:
        self.taps, self.module, self.name = taps, module, name
        self.stands_in = False

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.taps.heard -= {tapped.index for tapped in self._inside()}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not self.taps.hears():
            return None
        for tapped in self._inside():
            if tapped.index not in self.taps.heard | self.taps.excluded:
                self.stands_in = True
                path = tapped.name.removeprefix(f"{self.name}.")
                longer = [{f"{path}.{name}": u for name, u in found.items()} for found in tapped.directions]
                parameters = {f"{path}.{name}": parameter for name, parameter in tapped.parameters.items()}
                mine = replace(tapped, module=module, parameters=parameters, kind="other", directions=longer)
                tapped_output = _Hook(self.taps, mine)(module, args, kwargs, output)
                output = output if tapped_output is None else tapped_output
        return output

    def _inside(self) -> list[TappedModule]:
        return [tapped for tapped in self.taps.modules if tapped.name.startswith(f"{self.name}.")]


class _Tap(torch.autograd.Function):
    """
    The identity, whose backward pass scores. Inputs go through saved tensors, so that checkpointing recomputes; `call`
    is that of the module with holes in their place, `None` where the one input is enough.
    """

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        hook: _Hook,
        layout: RowLayout,
        call: Call | None,
        *tensors: torch.Tensor,
    ):
        ctx.hook, ctx.layout, ctx.call = hook, layout, call
        ctx.save_for_backward(*tensors)
        # Not a view, which could not be changed in place. What a module needs of its output again can't be changed in
        # place without us either, so the memory may be shared.
        return output.data

    @staticmethod
    def backward(ctx: Any, b: torch.Tensor):  # type: ignore[override]
        if ctx.hook.taps.on:
            tensors = [tensor.detach() for tensor in ctx.saved_tensors]
            if ctx.call is None:
                call = Call(tensors, {})
            else:
                saved = iter(tensors)
                fill = lambda value: next(saved) if value is _Hole else value  # noqa: E731
                args, kwargs = follow.replace((ctx.call.args, ctx.call.kwargs), fill)
                call = replace(ctx.call, args=args, kwargs=kwargs)
            with ctx.hook.taps.meter, torch.no_grad():  # gradients are on in a pass that is going to be differentiated
                ctx.hook.taps.score(ctx.hook.tapped, ctx.layout, call, b, fast=ctx.call is None)
        return (b, *[None] * (len(ctx.needs_input_grad) - 1))


class _Hole:
    """Where a tensor stood among a module's arguments."""


def _find_around(taps: Taps, model: nn.Module) -> list[_Around]:
    """
    Modules around others that are tapped, without whole models: to run one again would cost too much. Of nested
    wrappers the outermost, in which alone all of them are active.
    """
    names = {
        ".".join(parts[:count])
        for parts in (t.name.split(".") for t in taps.modules)
        for count in range(1, len(parts))
    }
    modules = dict(model.named_modules())
    return [
        _Around(taps, modules[name], name)
        for name in modules
        if name in names
        and type(modules[name.rpartition(".")[0]]) is not type(modules[name])
        and not any(isinstance(child, PreTrainedModel) for child in modules[name].modules())
    ]
