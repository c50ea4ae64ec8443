"""When the direction is refreshed, and that a running one is the mean of its batches."""

import time

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_iclr.trainers.data_shapley.directions import EngineSettings
from hf_iclr.trainers.data_shapley.engine import ShapleyEngine
from hf_iclr.trainers.data_shapley.gradients import schedule as schedules
from hf_iclr.trainers.data_shapley.gradients.schedule import SCORING, RefreshSchedule
from tests.trainers.data_shapley.test_callback import callback, make


class Clock:
    """
    Steps of one second and what scoring takes, of which a part can be counted, batches of a quarter, and checks before
    the first step with values.
    """

    def __init__(self, monkeypatch, scoring=SCORING, counted=1.0, checks=0.0):
        self.now, self.scoring, self.counted, self.checks = 0.0, scoring, counted, checks
        self.spent = self.extra = 0.0
        monkeypatch.setattr(schedules.time, "perf_counter", lambda: self.now)

    def run(self, schedule, steps, known=False, start=1, unscored=0):
        """What is measured in which step."""
        found = {}
        for step in range(start, start + steps):
            scored = step > unscored
            places = schedule.begin(step, known, self.spent, scored)
            if places is not None:
                self.pass_(0.25 * len(places) + (0.0 if known else self.checks))
                schedule.took(0.25 * len(places), len(places), self.spent)
                known, found[step] = True, places
            self.now += 1.0
            if scored:
                self.pass_(self.scoring, self.counted)
        return found

    def pass_(self, seconds, counted=1.0):
        self.now += seconds
        self.extra += seconds
        self.spent += counted * seconds


def test_a_fixed_interval_takes_the_whole_set():
    schedule = RefreshSchedule(3, 0.05, batches=2, steps=100, batch_share=1.0)
    assert [step for step in range(1, 8) if schedule.begin(step, step > 1) == [0, 1]] == [1, 4, 7]
    assert schedule.begin(10, True, scored=False) is None


@pytest.mark.parametrize("steps", [60, 100, 400, 4000])
@pytest.mark.parametrize("cost", [0.03, 0.05, 0.2])
@pytest.mark.parametrize("scoring", [0.001, SCORING, 0.5])
@pytest.mark.parametrize("checks", [0.0, 0.6])
def test_scoring_and_passes_cost_what_is_allowed_and_no_more(checks, scoring, steps, cost, monkeypatch, caplog):
    schedule = RefreshSchedule(None, cost, batches=25, steps=steps, batch_share=0.25)
    clock = Clock(monkeypatch, scoring, checks=checks)
    found = clock.run(schedule, steps)
    first = 0.25 * len(found[1])
    all_in = clock.extra + first / 3  # the last losses
    unavoidable = 4 / 3 * first + checks + scoring * steps  # the first direction is chosen before any is counted
    if scoring < 0.9 * cost:
        assert all_in <= max(cost * steps, unavoidable) + 1e-6
        assert all_in > (scoring + 0.6 * (cost - scoring)) * steps - 0.25  # an interval is a whole number of steps
        assert unavoidable <= cost * steps + 1e-6 or len(found[1]) == 1
    else:
        assert all_in <= unavoidable + 0.1 * cost * steps + 1e-6
    taken = [place for places in found.values() for place in places]
    assert taken == [index % 25 for index in range(len(taken))]  # in turn
    assert ("can't be kept: scoring the rows" in caplog.text) == (scoring > 0.9 * cost)


def test_steps_without_values_tell_what_hooks_can_not_count(monkeypatch, caplog):
    """Half of what scoring takes is seen by nobody: with such steps the cost is kept, and without them it can't be."""
    extra = []
    for unscored in (20, 0):
        schedule = RefreshSchedule(None, 0.1, batches=25, steps=400, batch_share=0.25)
        clock = Clock(monkeypatch, scoring=0.06, counted=0.5)
        found = clock.run(schedule, 400, unscored=unscored)
        extra.append(clock.extra + 0.25 * len(found[unscored + 1]) / 3)
    assert extra[0] <= 0.1 * 400 < extra[1]
    assert extra[0] > 0.9 * 0.1 * 400 and not caplog.text


def test_all_that_is_beside_the_training_is_counted_and_nothing_else(tmp_path, monkeypatch):
    """By a clock that only losses move: those of validation batches by 100, the training's by 1."""
    now, calls, seen = [0], [], []

    def loss_of(model, batch):
        now[0] += 100
        calls.append(model.training)
        return model(**batch).loss

    class Training(Trainer):
        def compute_loss(self, *args, **kwargs):
            now[0] += 1
            return super().compute_loss(*args, **kwargs)

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append((shapley._engine.meter.seconds, len(calls), now[0]))

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    shapley = callback(compute_loss=loss_of, refresh_every=2)
    trainer = make(tmp_path, callbacks=[Look(), shapley], trainer_class=Training, max_steps=4, save_strategy="no")
    trainer.train()
    passes = [count for _, count, _ in seen]
    assert passes[0] > 2 and passes[0] == passes[1] < passes[2] == passes[3]  # checks, too, and two refreshes
    assert [(spent, clock) for spent, _, clock in seen] == [
        (100 * count, 100 * count + step) for step, count in enumerate(passes, 1)
    ]


def test_a_resumed_run_refreshes_at_the_same_steps_though_it_is_slower(monkeypatch):
    whole = RefreshSchedule(None, 0.1, batches=25, steps=1000, batch_share=0.25)
    clock = Clock(monkeypatch)
    before = clock.run(whole, 40)
    resumed = RefreshSchedule(None, 0.1, batches=25, steps=1000, batch_share=0.25)
    resumed.unpack(whole.pack())
    after = clock.run(whole, 60, known=True, start=41)
    monkeypatch.setattr(schedules.time, "perf_counter", lambda: 1e6 * clock.now)
    assert before and len(after) > 3
    assert clock.run(resumed, 60, known=True, start=41) == after


def test_a_run_too_short_for_its_validation_set_is_said_to_be(caplog):
    """A twentieth, less what scoring takes, of 100 steps is 1.5 steps, and as many batches of a step's rows."""
    model = torch.nn.Linear(4, 1)
    for batches, refresh_every in ((1, None), (2, None), (2, 5)):
        held_out = {"validation": [(torch.randn(8, 4), 8)] * batches}
        settings = EngineSettings(refresh_every, steps=100, rows_per_step=8)
        caplog.clear()
        ShapleyEngine(model, torch.optim.SGD(model.parameters()), held_out, lambda m, x: m(x).mean(), settings)
        said = "100 steps is too short for cost=0.05 to measure more than 1 of 2 validation batches" in caplog.text
        assert said == (batches == 2 and refresh_every is None)


@pytest.mark.parametrize("exact", [True, False])
def test_a_running_direction_is_the_mean_gradient_of_its_batches(exact):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(40, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = [(torch.randn(2, 40), 2) for _ in range(5)]
    loss_of = lambda model, x: model(x).square().mean()  # noqa: E731
    settings = EngineSettings(steps=1, rank=10, exact=exact)
    targets = ShapleyEngine(model, optimizer, {"validation": batches}, loss_of, settings).targets
    assert targets.refresh(1) and targets.schedule.first == 1
    targets.schedule.interval = targets.schedule.next = 1
    assert "validation" in targets.losses
    for step in range(2, 6):
        assert targets.refresh(step) and not targets.losses
        if step == 2:
            one, two = (
                torch.autograd.grad(loss_of(model, batches[place][0]), list(model.parameters())) for place in (0, 1)
            )
            cosine = torch.cosine_similarity(*(torch.cat([g.flatten() for g in found]) for found in (one, two)), dim=0)
            assert targets.agreement[0] == pytest.approx(float(cosine), rel=1e-4)
    expected = torch.autograd.grad(loss_of(model, torch.cat([x for x, _ in batches])), list(model.parameters()))
    for direction, gradient in zip(targets.found[0], expected, strict=True):
        whole = direction if isinstance(direction, torch.Tensor) else direction.left @ direction.right
        torch.testing.assert_close(whole, gradient, rtol=1e-4, atol=1e-6)
