"""Values against Shapley values of every subset of a batch, in float64."""

import math

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from hf_iclr.trainers.data_shapley.callback import InRunDataShapleyCallback


class Net(nn.Module):
    """A small network whose LoRA layers are all that is trained."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def net(full=False):
    torch.manual_seed(1)
    model = Net().double()
    if full:
        return model
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    return model.double()


def data(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return [(x[row], int(torch.randint(0, 3, (), generator=generator))) for row in range(rows)]


def mean_loss(model, batch):
    x, labels = batch
    losses = nn.functional.cross_entropy(model(x), labels, reduction="none", ignore_index=-100)
    return losses.sum() / len(labels)


TRAIN = data(6, seed=2)
TRAIN[2] = TRAIN[1]
TRAIN[4] = (TRAIN[4][0], -100)  # a row without a label: the null player
VAL, OTHER = data(10, seed=3), data(10, seed=4)


def in_run(lr, optimizer_class=torch.optim.SGD, val=VAL, warm=0, full=False, **options):
    """Values of the rows of one step, by target, and the model before and after it with its optimizer."""
    model = net(full)
    optimizer = optimizer_class([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(warm):
        mean_loss(model, next(iter(DataLoader(data(6, 100 + step), batch_size=6)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    state = {key: dict(value) for key, value in optimizer.state.items()}
    state = {key: {k: v.clone() for k, v in value.items() if torch.is_tensor(v)} for key, value in state.items()}
    loader = DataLoader(TRAIN, batch_size=6)
    options = {"refresh_every": 1, "compute_loss": mean_loss, "exact": True, **options}
    with InRunDataShapleyCallback.attach(
        model, optimizer, loader, DataLoader(val, batch_size=5), **options
    ) as shapley:
        for batch in loader:
            model.train()
            mean_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    result = shapley.result
    values = {name: result.values(name).sort_index().to_numpy() for name in result.targets}
    return values, model, optimizer, before, state


def brute_force(lr, val=VAL, full=False, optimizer_class=torch.optim.SGD, **settings):
    """Shapley values of the falls of the validation loss that a step on each subset of rows makes; the whole fall."""
    _, model, optimizer, before, state = in_run(lr, optimizer_class, full=full, **settings)
    parameters = [p for p in model.parameters() if p.requires_grad]
    x, labels = next(iter(DataLoader(TRAIN, batch_size=6)))
    xs, ys = next(iter(DataLoader(val, batch_size=len(val))))
    count = len(labels)

    def fall(subset):
        with torch.no_grad():
            for parameter, weight in zip(parameters, before, strict=True):
                parameter.copy_(weight)
                optimizer.state[parameter] = {key: value.clone() for key, value in state.get(parameter, {}).items()}
        start = mean_loss(model, (xs, ys)).item()
        losses = nn.functional.cross_entropy(model(x), labels, reduction="none", ignore_index=-100)
        (losses[subset].sum() / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        return start - mean_loss(model, (xs, ys)).item()

    gains = [fall([row for row in range(count) if subset >> row & 1]) for subset in range(1 << count)]
    found = np.zeros(count)
    for subset in range(1 << count):
        size = (subset).bit_count()
        for row in range(count):
            if not subset >> row & 1:
                weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
                found[row] += weight * (gains[subset | 1 << row] - gains[subset])
    return found, gains[-1], gains[0]


def test_halving_the_step_halves_the_relative_error():
    errors, gaps, rates = [], [], (0.004, 0.002, 0.001)
    for lr in rates:
        exact, whole, _ = brute_force(lr)
        found = in_run(lr)[0]["validation"]
        errors.append(np.abs(found - exact).max() / np.abs(exact).max())
        gaps.append(abs(found.sum() - whole) / abs(whole))
    for errors_or_gaps in (errors, gaps):
        slopes = np.diff(np.log(errors_or_gaps)) / np.diff(np.log(rates))
        assert slopes[-1] == pytest.approx(1, abs=0.15)
    assert errors[-1] < 0.03


def test_duplicates_are_worth_the_same_and_a_row_without_labels_nothing():
    found = in_run(0.1)[0]["validation"]
    assert found[1] == pytest.approx(found[2], rel=1e-12)
    assert found[4] == 0 and (np.delete(found, 4) != 0).all()


def test_values_are_linear_in_the_validation_loss():
    together = in_run(0.1, val=VAL + OTHER, targets={"one": DataLoader(VAL, 5), "two": DataLoader(OTHER, 5)})[0]
    assert together["validation"] == pytest.approx((together["one"] + together["two"]) / 2, rel=1e-9)
    assert together["one"] == pytest.approx(in_run(0.1)[0]["validation"], rel=1e-9)


def test_with_adam_values_follow_its_own_subset_game():
    exact, _, nothing = brute_force(1e-3, optimizer_class=torch.optim.Adam, warm=100)
    found = in_run(1e-3, torch.optim.Adam, warm=100)[0]["validation"]
    plain = in_run(1e-3)[0]["validation"]
    assert np.corrcoef(found, exact)[0, 1] > 0.99
    assert np.corrcoef(found, exact)[0, 1] >= np.corrcoef(plain, exact)[0, 1]
    assert 0.1 * found.sum() == pytest.approx(exact.sum(), rel=0.3)  # of which a step of Adam applies 1 - beta1
    assert abs(nothing) > 0  # momentum alone
