"""Run a snippet in two gloo processes that meet over a file, and get back what each returned."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing


def run_in_two(function: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """
    Call `function(*arguments)` in two processes of one gloo group.

    Args:
        function (`Callable`):
            A function of a module, so that it can be found again in the new processes.
        folder (`pathlib.Path`):
            Empty folder for the results.
        arguments (`Any`):
            Anything that can be pickled.

    Returns:
        `list`: what each process returned, saved and loaded by torch.
    """
    torch.multiprocessing.spawn(_worker, (function, str(folder), arguments, _free_port()), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _worker(rank: int, function: Callable[..., Any], folder: str, arguments: tuple[Any, ...], port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
