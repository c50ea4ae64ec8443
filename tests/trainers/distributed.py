"""Run a function in two gloo processes and get back what each returned."""

import contextlib
import os
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState, GradientState, PartialState


def run_in_two(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """
    Call `function(*arguments)` in two processes of one gloo group. They are forked, so that nothing is imported again.

    Args:
        function (`Callable`):
            Any function.
        folder (`pathlib.Path`):
            Folder for the results.
        arguments (`Any`):
            Passed on.

    Returns:
        `list[Any]`: what each process returned, saved and loaded by torch.
    """
    port = 0
    while not port:  # below those that the system gives away, for one of these may be taken before it is listened to
        drawn = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", drawn))
            port = drawn
    torch.multiprocessing.start_processes(_child, (port, function, arguments, folder), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def reset_accelerate() -> None:
    """Forget the processes that accelerate knows of."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


def _child(rank: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    reset_accelerate()
    torch.save(function(*arguments), folder / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
