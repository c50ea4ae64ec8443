"""When the direction is measured, and on which batches: every so many steps, or within a share of the time."""

import logging
import math
import statistics
import time

import torch
import torch.distributed as dist


logger = logging.getLogger(__name__)

SCORING = 0.035  # of a step without values, about what scoring its rows takes, until it is measured
LAST = 1 / 3  # of the first pass, what its losses at the end take, without gradients
TIMED_STEPS = 5


class RefreshSchedule:
    """
    Without `refresh_every`, up to half of the time allowed goes into the first direction and the losses at both ends.
    Then all that was spent is counted, and what scoring takes in the steps after the first with values; what is left
    goes into one validation batch now and then, the next in turn, which is averaged into the direction. How often is
    chosen once and kept: a resumed run refreshes at those steps.

    `cost` is the share of the training's time for all of it, `batches` those of the largest validation set, `steps`
    about how many the run has, and `batch_share` the rows of a validation batch, of all sets, over those of a step, in
    one process.
    """

    def __init__(self, refresh_every: int | None, cost: float, batches: int, steps: int, batch_share: float) -> None:
        self.refresh_every, self.batches, self.steps = refresh_every, batches, steps
        self.cost = cost
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.at_once = min(world, batches)  # each process takes one
        budget = max(cost - SCORING, cost / 5)
        self.affordable = budget * steps / batch_share * world  # batches, in all of the run, as far as one knows
        half = int(self.affordable / 2 / (1 + LAST))
        self.first = batches if refresh_every else max(self.at_once, min(batches, half))
        self.interval = self.next = self.taken = 0
        self._unscored: list[float] = []  # seconds of steps
        self._scored: list[tuple[float, float]] = []  # of steps, and of scoring in them
        self._batch_seconds = 0.0
        self._began: tuple[float, float, bool] | None = None

    def begin(self, step: int, known: bool, spent: float = 0.0, scored: bool = True) -> list[int] | None:
        """
        The batches to measure before this step, if it is one to do so; `known`: whether there is a direction, `spent`:
        seconds so far that a training without values would not take, and `scored`: whether the step will have values.
        """
        if self.refresh_every:
            due = scored and (not known or (step - 1) % self.refresh_every == 0)
            return list(range(self.batches)) if due else None
        if not self.interval:
            self._time(spent, scored)
        if not scored:
            return None
        if not known:
            return list(range(self.first))
        if not self.interval and len(self._scored) > TIMED_STEPS:
            self._choose(step, spent)
        if not self.interval or step < self.next:
            return None
        self.next = step + self.interval
        return [(self.taken + place) % self.batches for place in range(self.at_once)]

    def share(self, batches: int) -> float:
        """Of the direction, what is that of so many new batches: the mean of the first, then of about the last set."""
        if self.refresh_every:
            return 1.0
        return batches / min(self.taken + batches, max(self.batches, batches))

    def took(self, seconds: float, batches: int, spent: float = 0.0) -> None:
        """A refresh has been made."""
        self._began = time.perf_counter(), spent, True
        self._batch_seconds = self._batch_seconds or seconds / math.ceil(batches / self.at_once)
        self.taken += batches

    def _time(self, spent: float, scored: bool) -> None:
        now = time.perf_counter()
        if self._began is not None:
            began, before, was_scored = self._began
            if was_scored:
                self._scored.append((now - began, spent - before))
            else:
                self._unscored.append(now - began)
        self._began = now, spent, scored

    def _choose(self, step: int, spent: float) -> None:
        """
        What can't be counted in hooks, as what they put out of caches, is seen where there are steps without values,
        the first of which warms up, as does the first with values.
        """
        step_seconds, counted = (statistics.median(times) for times in zip(*self._scored[1:], strict=True))
        plain = max(step_seconds - counted, 1e-9)
        shares = [counted / plain, counted / plain, self._batch_seconds / plain]
        if len(self._unscored) > TIMED_STEPS:
            shares[1] = max(shares[0], step_seconds / statistics.median(self._unscored[1:]) - 1)
        shares.append((spent - sum(scoring for _, scoring in self._scored)) / plain)
        if dist.is_initialized():  # all processes do as the first
            dist.broadcast_object_list(shares)
        seen, for_scoring, for_batch, once = shares
        if seen > 0.9 * self.cost:
            logger.warning(
                "cost=%g can't be kept: scoring the rows of a step takes %.1f %% of one without values. The direction "
                "gets a tenth of the cost. Larger steps, fewer adapters or a lower rank make that share smaller.",
                self.cost, 100 * seen,
            )  # fmt: skip
        once += math.ceil(self.first / self.at_once) * for_batch * LAST
        scored_steps = max(1 - len(self._unscored) / self.steps, 0.0)
        left = self.cost - min(for_scoring * scored_steps, 0.9 * self.cost) - once / self.steps
        self.interval = max(math.ceil(for_batch / left), 1) if left > 0 else self.steps
        self.next = step + self.interval

    def pack(self) -> torch.Tensor:
        """What is chosen, for a run that is resumed."""
        return torch.tensor([self.first, self.interval, self.next, self.taken])

    def unpack(self, packed: torch.Tensor) -> None:
        """Take back what [`~RefreshSchedule.pack`] returned."""
        self.first, self.interval, self.next, self.taken = packed.tolist()
