"""What the callbacks and trainers share that measure a training without disturbing it."""

from contextlib import AbstractContextManager

import torch
from transformers import Trainer, TrainerControl


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
