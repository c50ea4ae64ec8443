"""What all of this takes of a training's time."""

import functools
import time
from collections.abc import Callable
from typing import Any


class Meter:
    """Counts the seconds spent `with` it; within itself they count once."""

    def __init__(self) -> None:
        self._seconds = self._began = 0.0
        self._depth = 0

    @property
    def seconds(self) -> float:
        """So far; of devices that work on their own, what it takes to tell them."""
        return self._seconds + (time.perf_counter() - self._began if self._depth else 0.0)

    def add(self, seconds: float) -> None:
        """Count what was spent before."""
        self._seconds += seconds

    def __enter__(self) -> None:
        if not self._depth:
            self._began = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._seconds += time.perf_counter() - self._began


def metered(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an object whose `meter` counts it."""

    @functools.wraps(method)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.meter:
            return method(self, *args, **kwargs)

    return counted
