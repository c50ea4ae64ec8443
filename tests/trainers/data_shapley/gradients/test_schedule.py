"""When the direction is refreshed, and that a running one is the mean of its batches."""

import pytest
import torch

from hf_iclr.trainers.data_shapley.directions import EngineSettings
from hf_iclr.trainers.data_shapley.engine import ShapleyEngine
from hf_iclr.trainers.data_shapley.gradients import schedule as schedules
from hf_iclr.trainers.data_shapley.gradients.schedule import SCORING, RefreshSchedule


class Clock:
    """Steps of one second and what scoring takes, batches of a quarter."""

    def __init__(self, monkeypatch, scoring=SCORING):
        self.now, self.scoring, self.scored = 0.0, scoring, 0.0
        monkeypatch.setattr(schedules.time, "perf_counter", lambda: self.now)

    def run(self, schedule, steps, known=False, start=1):
        """What is measured in which step."""
        found = {}
        for step in range(start, start + steps):
            places = schedule.begin(step, known, self.scored)
            if places is not None:
                known, found[step] = True, places
                self.now += 0.25 * len(places)
                schedule.took(0.25 * len(places), len(places), self.scored)
            self.now += 1.0 + self.scoring
            self.scored += self.scoring
        return found


def test_a_fixed_interval_takes_the_whole_set():
    schedule = RefreshSchedule(3, 0.05, batches=2, steps=100, batch_share=1.0)
    assert [step for step in range(1, 8) if schedule.begin(step, step > 1) == [0, 1]] == [1, 4, 7]


@pytest.mark.parametrize("steps", [100, 400, 4000])
@pytest.mark.parametrize("cost", [0.03, 0.05, 0.2])
@pytest.mark.parametrize("scoring", [0.001, SCORING, 0.5])
def test_scoring_and_passes_cost_what_is_allowed_and_no_more(scoring, steps, cost, monkeypatch, caplog):
    schedule = RefreshSchedule(None, cost, batches=25, steps=steps, batch_share=0.25)
    found = Clock(monkeypatch, scoring).run(schedule, steps)
    budget = (cost - min(scoring, 0.9 * cost)) * steps
    first = 0.25 * 4 / 3 * len(found[1])  # with the last losses
    seconds = first + 0.25 * (sum(map(len, found.values())) - len(found[1]))
    assert seconds <= max(budget, first)  # which is chosen before scoring is timed
    assert seconds > 0.6 * budget - 0.25  # an interval is a whole number of steps
    taken = [place for places in found.values() for place in places]
    assert taken == [index % 25 for index in range(len(taken))]  # in turn
    assert ("can't be kept: scoring the rows" in caplog.text) == (scoring > 0.9 * cost)


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
