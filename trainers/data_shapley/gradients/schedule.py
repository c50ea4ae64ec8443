"""When the direction is measured, and on which batches: every so many steps, or within a share of the time."""

import logging
import math
import statistics
import time

import torch
import torch.distributed as dist


logger = logging.getLogger(__name__)

SCORING = 0.035  # of a step without values, about what scoring its rows takes, until it is measured
TIMED_STEPS = 5


class RefreshSchedule:
    """
    Without `refresh_every`, up to half of the time allowed goes into the first direction and the loss it begins with.
    The rest goes into one validation batch now and then, the next in turn, which is averaged into the direction. How
    often is chosen once, from the times of the first scored steps and of scoring in them, and kept: a resumed run
    refreshes at those steps.

    `cost` is the share of the training's time for scoring and passes, `batches` those of the largest validation set,
    `steps` about how many the run has, and `batch_share` the rows of a validation batch, of all sets, over those of a
    step, in one process.
    """

    def __init__(self, refresh_every: int | None, cost: float, batches: int, steps: int, batch_share: float) -> None:
        self.refresh_every, self.batches, self.steps = refresh_every, batches, steps
        self.cost = cost
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.at_once = min(world, batches)  # each process takes one
        budget = max(cost - SCORING, cost / 5)
        self.affordable = budget * steps / batch_share * world  # batches, in all of the run, as far as one knows
        self.first = batches if refresh_every else max(self.at_once, min(batches, int(self.affordable / 2)))
        self.interval = self.next = self.taken = 0
        self._times: list[tuple[float, float]] = []  # of steps, and of scoring in them
        self._batch_seconds = 0.0
        self._began: tuple[float, float] | None = None

    def begin(self, step: int, known: bool, scoring: float = 0.0) -> list[int] | None:
        """
        The batches to measure before this step, if it is one to do so; `known`: whether there is a direction, and
        `scoring`: seconds so far in which rows were scored.
        """
        if self.refresh_every:
            due = not known or (step - 1) % self.refresh_every == 0
            return list(range(self.batches)) if due else None
        if not known:
            return list(range(self.first))
        if not self.interval:
            self._time(step, scoring)
        if not self.interval or step < self.next:
            return None
        self.next = step + self.interval
        return [(self.taken + place) % self.batches for place in range(self.at_once)]

    def share(self, batches: int) -> float:
        """Of the direction, what is that of so many new batches: the mean of the first, then of about the last set."""
        if self.refresh_every:
            return 1.0
        return batches / min(self.taken + batches, max(self.batches, batches))

    def took(self, seconds: float, batches: int, scoring: float = 0.0) -> None:
        """A refresh has been made."""
        self._began = time.perf_counter(), scoring
        self._batch_seconds = self._batch_seconds or seconds / math.ceil(batches / self.at_once)
        self.taken += batches

    def _time(self, step: int, scoring: float) -> None:
        now = time.perf_counter()
        if self._began is not None:
            self._times.append((now - self._began[0], scoring - self._began[1]))
        self._began = now, scoring
        if len(self._times) < TIMED_STEPS:
            return
        step_seconds, scored = (statistics.median(times) for times in zip(*self._times, strict=True))
        plain = max(step_seconds - scored, 1e-9)
        shares = [scored / plain, self._batch_seconds / plain]
        if dist.is_initialized():  # all processes do as the first
            dist.broadcast_object_list(shares)
        for_scoring, for_batch = shares
        if for_scoring > 0.9 * self.cost:
            logger.warning(
                "cost=%g can't be kept: scoring the rows of a step takes %.1f %% of one without values. The direction "
                "gets a tenth of the cost. Larger steps, fewer adapters or a lower rank make that share smaller.",
                self.cost, 100 * for_scoring,
            )  # fmt: skip
        spent = 4 / 3 * math.ceil(self.first / self.at_once) * for_batch / self.steps  # the last losses included
        left = self.cost - min(for_scoring, 0.9 * self.cost) - spent
        self.interval = max(math.ceil(for_batch / left), 1) if left > 0 else self.steps
        self.next = step + self.interval

    def pack(self) -> torch.Tensor:
        """What is chosen, for a run that is resumed."""
        return torch.tensor([self.first, self.interval, self.next, self.taken])

    def unpack(self, packed: torch.Tensor) -> None:
        """Take back what [`~RefreshSchedule.pack`] returned."""
        self.first, self.interval, self.next, self.taken = packed.tolist()
