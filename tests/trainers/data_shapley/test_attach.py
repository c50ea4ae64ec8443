"""Plain loops: accelerate, images, accumulation, losses that draw noise, and clean exits."""

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.dataloader import default_collate

from hf_iclr.trainers.data_shapley.callback import InRunDataShapleyCallback
from tests.trainers.data_shapley.test_callback import leftovers


class Denoiser(nn.Module):
    """A convolution that is told how noisy its image is."""

    def __init__(self):
        super().__init__()
        self.embed, self.into, self.out = nn.Linear(1, 4), nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, images, level):
        return self.out(torch.tanh(self.into(images) + self.embed(level[:, None])[..., None, None]))


def noise_loss(model, batch):
    (images,) = batch
    noise, level = torch.randn_like(images), torch.rand(len(images), dtype=images.dtype)
    return (model(images + level[:, None, None, None] * noise, level) - noise).square().mean()


def images(count, seed):
    return TensorDataset(torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).double())


def run(scored, accumulation=1, break_at=None):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = Denoiser().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = DataLoader(images(10, 1), batch_size=4 // accumulation, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []

    def train():
        for epoch in range(2):
            for step, batch in enumerate(loader):
                seen.append(batch[0])
                if epoch == break_at:
                    raise KeyboardInterrupt
                with accelerator.accumulate(model):
                    model.train()
                    accelerator.backward(noise_loss(model, batch))
                    optimizer.step()
                    optimizer.zero_grad()
                assert step < 10

    shapley = None
    if scored:
        with InRunDataShapleyCallback.attach(
            model, optimizer, loader, images(6, 2), refresh_every=2, exact=True, compute_loss=noise_loss
        ) as shapley:
            train()
    else:
        train()
    return model, loader, shapley, torch.get_rng_state(), torch.cat(seen)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_accelerate_loop_of_a_denoiser_is_scored_and_left_untouched(accumulation):
    model, _, _, state, _ = run(False, accumulation)
    scored, loader, shapley, scored_state, seen = run(True, accumulation)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), scored.parameters(), strict=True))
    assert torch.equal(state, scored_state) and not leftovers(scored)
    assert type(loader).__module__ == "accelerate.data_loader"
    rows = shapley.result.rows
    assert torch.equal(images(10, 1).tensors[0][rows["index"].tolist()], seen)
    assert len(rows) == 20 and shapley.result.explained_ratio() == pytest.approx(1, abs=0.5)
    assert shapley.result.steps["lr"].dropna().tolist() == [1e-3] * 6


def test_an_exception_in_the_loop_gives_everything_back():
    with pytest.raises(KeyboardInterrupt):
        run(True, break_at=1)


def test_values_equal_gradients_of_single_rows():
    """A plain loop without accelerate, one step, images of a dataset of dictionaries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).double()
    model[1].eval()  # rows apart
    model[1].requires_grad_(False)

    def loss_of(model, batch):
        return nn.functional.cross_entropy(model(batch["image"]), batch["label"])

    data = [{"image": images(9, 3)[row][0], "label": row % 2} for row in range(9)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loader = DataLoader(data[:4], batch_size=4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = default_collate(data[:4]), default_collate(data[4:])
    validation = torch.autograd.grad(loss_of(model.eval(), theirs), parameters)
    expected = []
    for row in range(4):
        one = {name: value[row : row + 1] for name, value in ours.items()}
        gradient = torch.autograd.grad(loss_of(model, one), parameters)
        expected.append(0.1 / 4 * sum((a * b).sum().item() for a, b in zip(gradient, validation, strict=True)))
    with InRunDataShapleyCallback.attach(
        model, optimizer, loader, DataLoader(data[4:], batch_size=5), refresh_every=1, exact=True, compute_loss=loss_of
    ) as shapley:
        for batch in loader:
            model.train()
            model[1].eval()
            loss_of(model, batch).backward()
            optimizer.step()
    assert shapley.result.rows.sort_values("index")["value"].tolist() == pytest.approx(expected, rel=1e-9)


def test_workers_that_persist_number_rows_for_as_long_as_the_loop_is_scored():
    """They have copies of the data set and the collator, from before, of the loop and of after it."""
    rows = TensorDataset(torch.arange(6.0)[:, None])
    loader = DataLoader(rows, batch_size=2, num_workers=1, persistent_workers=True)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loss_of(model, batch):
        return model(batch[0]).square().mean()

    before = [batch[0].tolist() for batch in loader]
    with InRunDataShapleyCallback.attach(
        model, optimizer, loader, rows, refresh_every=1, compute_loss=loss_of
    ) as shapley:
        for batch in loader:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert shapley.result.rows["index"].tolist() == list(range(6))
    assert [batch[0].tolist() for batch in loader] == before


def test_a_loop_has_values_for_each_validation_row():
    """Of a linear model, `lr <grad l_i, grad l_v>` by hand: rows of one entry, l = (w x)^2."""
    train, validation, weight, lr = [1.0, 2.0, -1.0, 0.5], [1.0, 3.0], 2.0, 0.01
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, weight)
    rows, held_out = (torch.tensor(found, dtype=torch.float64)[:, None] for found in (train, validation))
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=lr), DataLoader(rows, batch_size=4)
    options = {"per_target_rows": True, "refresh_every": 1, "compute_loss": lambda m, x: m(x).square().mean()}
    with InRunDataShapleyCallback.attach(model, optimizer, loader, held_out, **options) as shapley:
        for batch in loader:
            options["compute_loss"](model, batch).backward()
            optimizer.step()
    expected = [[lr * (2 * weight * x * x / 4) * (2 * weight * y * y) for y in validation] for x in train]
    assert shapley.result.target_rows().to_numpy() == pytest.approx(torch.tensor(expected).numpy())
    assert shapley.result.values().to_numpy() == pytest.approx(torch.tensor(expected).mean(1).numpy())


def test_values_can_be_stored(tmp_path):
    model = nn.Linear(3, 1)
    rows = [torch.randn(3) for _ in range(6)]
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(rows, batch_size=2)

    def loss_of(model, batch):
        return model(batch).square().mean()

    with InRunDataShapleyCallback.attach(
        model, optimizer, loader, torch.stack(rows[:3]), compute_loss=loss_of, output_dir=tmp_path
    ) as shapley:
        for batch in loader:
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert list((tmp_path / "shapley").glob("run-*/part-*.parquet")) and len(shapley.result.rows) == 6


def test_bad_input_of_a_loop_is_refused_before_it():
    model = nn.Linear(3, 1)
    optimizer, loader = torch.optim.SGD(model.parameters(), lr=0.01), DataLoader(torch.randn(4, 3), batch_size=2)

    def summed(model, batch):
        return model(batch).square().sum()

    for val, loss_of, message in (
        ([], summed, "got none"),
        (Dataset.from_dict({}), summed, "got none"),
        (torch.randn(3, 3), summed, "mean over rows"),
        (torch.randn(3, 3), lambda model, batch: model(batch).square(), "one number"),
    ):
        with pytest.raises(ValueError, match=message):
            attached(model, optimizer, loader, val, compute_loss=loss_of)
    with pytest.raises(TypeError, match="compute_loss"):
        attached(model, optimizer, loader, torch.randn(3, 3))
    assert not leftovers(model) and type(loader) is DataLoader


def attached(*args, **options):
    with InRunDataShapleyCallback.attach(*args, **options):
        raise AssertionError("the loop has begun")
