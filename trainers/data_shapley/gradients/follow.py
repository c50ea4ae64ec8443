"""Outputs that rows have in common, as those of position embeddings, followed to where they meet the rows."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(eq=False)
class Shared:
    """What one module gave to all rows in common: what it was called with, and how its part of a row is scored."""

    tap: Callable[["Shared", "Step", torch.Tensor], torch.Tensor]
    shape: torch.Size
    options: dict[str, Any]  # data type and device


@dataclass(eq=False)
class Step:
    """One operation on what rows have in common."""

    function: Callable[..., Any]
    args: Any
    kwargs: Any
    place: int | None = None  # of its result among several

    def sources(self) -> list[Shared]:
        """Modules that had a part in it."""
        found: dict[int, Shared] = {}
        for value in leaves((self.args, self.kwargs)):
            inner = [value] if isinstance(value, Shared) else value.sources() if isinstance(value, Step) else []
            found |= {id(source): source for source in inner}
        return list(found.values())

    def replay(self, source: Shared, moved: torch.Tensor) -> Any:
        """Its result where one module's output is moved by a tensor."""

        def value(node: Any) -> Any:
            if isinstance(node, Step):
                return node.replay(source, moved)
            if isinstance(node, Shared):
                return moved if node is source else torch.zeros(node.shape, **node.options)
            return node

        result = self.function(*replace(self.args, value), **replace(self.kwargs, value))
        return result if self.place is None else result[self.place]


class InCommon(torch.Tensor):
    """
    A tensor that is alike for all rows. Operations on it are remembered, up to the first with a tensor of the rows:
    behind it each row's gradient is still apart.
    """

    plain: torch.Tensor
    step: Step
    sizes: Sequence[int]  # of what rows are apart in

    @classmethod
    def of(cls, plain: torch.Tensor, step: Step, sizes: Sequence[int]) -> "InCommon":
        """The tensor itself, under watch."""
        made = plain.as_subclass(cls)
        made.plain, made.step, made.sizes = plain, step, sizes
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        watched = [value for value in leaves((args, kwargs)) if isinstance(value, cls)]
        result = func(*replace(args, plain), **replace(kwargs, plain))
        if not torch.is_grad_enabled():
            return result
        sizes = watched[0].sizes
        alone = isinstance(result, torch.Tensor)
        results = [result] if alone else list(result) if isinstance(result, (tuple, list)) else []
        function = _out_of_place(func)
        if function is None or not any(isinstance(value, torch.Tensor) and value.requires_grad for value in results):
            return result
        met = any(
            isinstance(value, torch.Tensor) and not isinstance(value, cls) and value.dim() and len(value) in sizes
            for value in leaves((args, kwargs))
        )
        kept = replace((args, kwargs), _node)
        found = []
        for place, value in enumerate(results):
            if isinstance(value, torch.Tensor) and value.requires_grad:
                step = Step(function, kept[0], kept[1], None if alone else place)
                if met and value.dim() and len(value) in sizes:
                    for source in step.sources():
                        value = source.tap(source, step, value)
                else:
                    value = cls.of(value, step, sizes)
            found.append(value)
        if alone:
            return found[0]
        return type(result)(*found) if hasattr(result, "_fields") else type(result)(found)


def begin(output: torch.Tensor, source: Shared, sizes: Sequence[int]) -> InCommon:
    """The output of a module, under watch from here on; it may depend on others that are."""
    before = output.step if isinstance(output, InCommon) else plain(output).detach()
    return InCommon.of(plain(output), Step(torch.add, (before, source), {}), sizes)


def plain(value: Any) -> Any:
    """A tensor that is no longer under watch; anything else as it is."""
    return value.plain if isinstance(value, InCommon) else value


def leaves(value: Any) -> Iterator[Any]:
    """What lists, tuples and dictionaries hold, however nested."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    else:
        yield value


def replace(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same lists, tuples and dictionaries with their leaves changed."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replace(item, change) for item in value))
    if type(value) in (list, tuple):
        return type(value)(replace(item, change) for item in value)
    if type(value) is dict:
        return {name: replace(item, change) for name, item in value.items()}
    return change(value)


def _node(value: Any) -> Any:
    if isinstance(value, InCommon):
        return value.step
    return value.detach() if isinstance(value, torch.Tensor) else value


def _out_of_place(function: Any) -> Any:
    """What gives the same without changing its first argument, which must not be changed again; `None` if unknown."""
    name = getattr(function, "__name__", "")
    if name in ("__iadd__", "add_"):
        return torch.Tensor.add
    return None if (name.startswith("__i") and name != "__invert__") or name.rstrip("_") + "_" == name else function
