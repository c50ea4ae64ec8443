"""What the callbacks and trainers share that measure a training without disturbing it."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import Trainer, TrainerControl
from transformers.trainer_utils import EvalLoopOutput
from typing_extensions import override


class SummedMetrics(Trainer):
    """
    A trainer with metrics of its own, from sums over the batches since the last log, or of an evaluation set.

    Attributes:
        sums (`dict[str, torch.Tensor]`): of `"train"` and `"eval"`, on the device until they are logged.
    """

    sums: dict[str, torch.Tensor]

    def metrics_from(self, sums: torch.Tensor) -> dict[str, float]:
        """Metrics of sums over batches and processes."""
        raise NotImplementedError

    def add_sums(self, sums: torch.Tensor) -> None:
        """Count a batch."""
        mode = "train" if self.model.training else "eval"
        self.sums[mode] = self.sums[mode] + sums if mode in self.sums else sums

    def pop_metrics(self, mode: str) -> dict[str, float]:
        """Metrics of what was counted, which begins anew."""
        sums = self.sums.pop(mode, None)
        return {} if sums is None else self.metrics_from(self.accelerator.reduce(sums, reduction="sum"))

    @override
    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self.sums.pop("eval", None)
        output = super().evaluation_loop(*args, **kwargs)
        # Added here rather than in `log`, which does not know the name of the split.
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self.pop_metrics("eval").items()})
        return output

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            logs.update(self.pop_metrics("train"))
        super().log(logs, start_time)


def forked_random(device: torch.device) -> AbstractContextManager[None]:
    """Torch's random states, of the CPU and of this device, are restored at the end."""
    devices = [] if device.type == "cpu" else [device]
    return torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type)


def log_beside(trainer: Trainer, logs: dict[str, float], control: TrainerControl) -> None:
    """Log as an entry of its own, which leaves the trainer's next log as it would be."""
    should_log = control.should_log
    # Not `trainer.log`: TRL's would put the step's metrics into this record and start their means anew
    Trainer.log(trainer, logs)
    control.should_log = should_log  # which every log resets


def rows_of_this_process(trainer: Trainer, rows: int) -> int:
    """Without those that repeat the first rows of an evaluation so that its last batch is full on each process."""
    state = trainer.accelerator.gradient_state
    if trainer.model.training or not state.end_of_dataloader or state.remainder <= 0:
        return rows
    return min(max(state.remainder - trainer.accelerator.process_index * rows, 0), rows)
