"""Models, optimizers and loops that a sum over rows could get wrong without anybody noticing."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import DebertaV2Config, DebertaV2Model, default_data_collator

from hf_iclr.trainers.data_shapley.callback import InRunDataShapleyCallback
from hf_iclr.trainers.data_shapley.gradients.thin import ThinProducts
from tests.trainers.data_shapley.gradients.test_taps import check, scored, with_lora
from tests.trainers.data_shapley.test_callback import callback, make, token_rows
from tests.trainers.tiny import losses, tiny_llama


def points(count, seed, width=3):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=generator).double()
    return TensorDataset(x, x.sum(1, keepdim=True))


def square_loss(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def loop(model, optimizer=None, loader=None, before=None, loss=square_loss, data=points, **options):
    """Three steps of a plain loop; its values."""
    model = model.double().train()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-2)
    loader = loader or DataLoader(data(12, 0), batch_size=4)
    options = {"refresh_every": 1, "exact": True, "compute_loss": loss, "adam_warmup": 0, **options}
    with InRunDataShapleyCallback.attach(model, optimizer, loader, data(6, 1), **options) as shapley:
        for step, batch in enumerate(loader):
            if before is not None and before(step, optimizer, batch):
                continue
            loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return shapley.result


def exact_first_step(model, rates=None, loss=square_loss, data=points):
    """Learning rate times the product of each row's share of the gradient and the validation gradient."""
    model = model.double().train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    rates = rates or [1e-2] * len(parameters)
    held_out = torch.autograd.grad(loss(model, data(6, 1)[:]), parameters)
    rows = [torch.autograd.grad(loss(model, data(12, 0)[[row]]), parameters) for row in range(4)]
    return [
        sum(rate * (g * v).sum().item() / 4 for rate, g, v in zip(rates, row, held_out, strict=True)) for row in rows
    ]


def first_step(result):
    rows = result.rows
    return rows[rows["step"] == 1].sort_values("index")["value"].tolist()


class Sequence(nn.Module):
    """Rows are along the second axis of what its layer sees."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(1, 2), nn.Linear(2, 1)

    def forward(self, x):
        x = x.T[..., None]  # (length, rows, 1), 4 by 4
        return self.out(self.layer(x).mean(0))


class Offset(Sequence):
    """What all rows have in common is far larger than in what they differ."""

    def __init__(self):
        super().__init__()
        self.layer.bias.data += 50


class Views(nn.Module):
    """Two views of every row, one batch after the other."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 2), nn.Linear(2, 1)

    def forward(self, x):
        first, second = self.layer(torch.cat([x, x.flip(1)])).tanh().chunk(2)
        return self.out(first * second)


@pytest.mark.parametrize(("model", "width"), [(Sequence, 4), (Offset, 4), (Views, 3)])
def test_outputs_in_another_order_than_rows_are_left_out_by_name(model, width, caplog):
    torch.manual_seed(0)
    result = loop(model(), data=lambda count, seed: points(count, seed, width), min_scored_share=0)
    assert "layer.weight" in caplog.text and "can't be split into rows" in caplog.text
    assert "out.weight" not in caplog.text and len(first_step(result)) == 4


@pytest.mark.parametrize("bad", [1, 5])
def test_a_step_whose_gradient_is_not_finite_has_no_values_and_is_named(bad, caplog):
    """Sums would take its NaN for nothing; a scaler's first steps overflow."""

    def spoiled(count, seed):
        data = points(count, seed)
        data.tensors[0][bad if count == 12 else slice(0)] = float("nan")
        return data

    def give_back(step, optimizer, batch, kept=[]):  # noqa: B006
        (weight,) = optimizer.param_groups[0]["params"]
        kept.append(weight.detach().clone())
        if step and not weight.isfinite().all():
            weight.data.copy_(kept[step - 1])

    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    expected = exact_first_step(model) if bad == 5 else None
    result = loop(model, before=give_back, data=spoiled)
    lost = bad // 4 + 1
    assert set(result.rows["step"]) == {1, 2, 3} - {lost} and len(result.values()) == 8
    assert result.rows["value"].notna().all()
    assert caplog.text.count("no values") == 1 and f"Step {lost} has no values: its gradient" in caplog.text
    assert expected is None or first_step(result) == pytest.approx(expected)


def one_ahead(loader):
    batches = iter(loader)
    batch = next(batches)
    for following in batches:
        yield batch
        batch = following
    yield batch


@pytest.mark.parametrize("fetched", [list, one_ahead])
def test_a_loop_that_fetches_ahead_is_refused(fetched):
    """Batches would be taken for the one that was fetched last."""
    model, loader = nn.Linear(3, 1).double(), DataLoader(points(16, 0), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    options = {"refresh_every": 1, "compute_loss": square_loss}
    with (
        pytest.raises(ValueError, match="fetches ahead: values would be those of other rows"),
        InRunDataShapleyCallback.attach(model, optimizer, loader, points(6, 1), **options),
    ):
        for batch in fetched(loader):
            square_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_rows_that_no_output_keeps_apart_are_refused():
    class Mixed(nn.Linear):
        def forward(self, x):
            return super().forward(x.roll(1, 0).cumsum(0))

    with pytest.raises(ValueError, match="is rotated when the rows are"):
        loop(Mixed(3, 1))


def test_positions_that_are_used_outside_of_their_embedding_are_named_and_their_projection_is_scored(caplog):
    config = DebertaV2Config(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, max_position_embeddings=16,
        position_buckets=4, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)

    def ids(count, seed):
        return TensorDataset(torch.randint(0, 30, (count, 5), generator=torch.Generator().manual_seed(seed)))

    result = loop(
        DebertaV2Model(config), loss=lambda model, batch: model(batch[0]).last_hidden_state[..., :3].exp().mean(),
        data=ids,
    )  # fmt: skip
    assert "rel_embeddings.weight" in caplog.text and "key_proj" not in caplog.text and len(first_step(result)) == 4


def test_modules_that_take_no_tensor_or_a_list_are_exact():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, rows=None, parts=()):
            return self.scale.expand(rows, 3) if rows else self.scale * torch.stack(parts).sum(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.out = Constant(), Constant(), nn.Linear(3, 1)

        def forward(self, x):
            return self.out((x * self.first(rows=len(x)) + self.second(parts=[x, x])).tanh())

    torch.manual_seed(0)
    model = Model()
    expected = exact_first_step(model)
    assert first_step(loop(model)) == pytest.approx(expected, rel=1e-6)


def test_the_last_state_of_a_recurrent_layer_is_exact(caplog):
    """It begins with a dimension of layers: rows meet it in the loss, as single numbers."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.out = nn.LSTM(1, 2, batch_first=True), nn.Linear(2, 1)

        def forward(self, x):
            _, (state, _) = self.layer(x[..., None])
            return self.out(state[-1])[:, 0]

    def loss(model, batch):
        return (model(batch[0]) - batch[1][:, 0]).square().mean()

    torch.manual_seed(0)
    model = Model()
    expected = exact_first_step(model, loss=loss)
    assert first_step(loop(model, loss=loss)) == pytest.approx(expected, rel=1e-6) and "leave out" not in caplog.text


def test_outputs_may_be_changed_in_place():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.out = nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 1)

        def forward(self, x):
            h = self.layer(x)
            h += x
            h = self.norm(h)
            h *= 2
            return self.out(h.tanh_())

    check(Model(), {"x": torch.randn(4, 3)}, lambda model, batch: model(batch["x"]).square().sum())


def test_a_module_that_draws_random_numbers_is_named_and_draws_the_same(caplog):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return nn.functional.dropout(x * self.weight, 0.5)

    def run(scored):
        torch.manual_seed(0)
        model = nn.Sequential(Noisy(), nn.Linear(3, 1))
        if scored:
            loop(model)
        else:
            optimizer = torch.optim.SGD(model.double().parameters(), lr=1e-2)
            for batch in DataLoader(points(12, 0), batch_size=4):
                square_loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
        return [p.detach().clone() for p in model.parameters()], torch.get_rng_state()

    (weights, state), (scored, scored_state) = run(False), run(True)
    assert all(map(torch.equal, weights, scored)) and torch.equal(state, scored_state)
    assert "draws random numbers" in caplog.text


@pytest.mark.parametrize("loader", [False, True])
def test_validation_rows_that_are_drawn_leave_the_run_as_it_was(loader, tmp_path):
    def collate(rows):
        batch = default_data_collator(rows)
        return {**batch, "input_ids": batch["input_ids"].where(torch.rand(batch["input_ids"].shape) > 0.2, 1)}

    def weights(*callbacks):
        trainer = make(tmp_path, tiny_llama(), callbacks)
        trainer.data_collator = collate
        trainer.train()
        return [p.detach() for p in trainer.model.parameters()]

    if not loader:
        assert all(map(torch.equal, weights(), weights(callback())))
        return
    model = nn.Linear(3, 1).double()
    state = torch.get_rng_state()
    held_out = DataLoader(points(6, 1), batch_size=3, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with InRunDataShapleyCallback.attach(
        model, optimizer, DataLoader(points(4, 0)), held_out, compute_loss=square_loss, output_dir=tmp_path
    ):
        pass
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_whose_gradient_is_thrown_away_has_no_value(caplog):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)

    def skip_first(step, optimizer, batch):
        if step == 0:
            square_loss(model, batch).backward()
            optimizer.zero_grad()
        return step == 0

    result = loop(model, before=skip_first)
    assert sorted(result.rows["index"]) == list(range(4, 12)) and "leave out" not in caplog.text
    assert result.steps["clip_factor"].dropna().tolist() == pytest.approx([1, 1])


def test_learning_rates_are_those_of_the_step(caplog):
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    expected = exact_first_step(model, [0.3, 0.3])

    def set_rate(step, optimizer, batch):
        optimizer.param_groups[0]["lr"] = 0.3 / (step + 1)

    result = loop(model, torch.optim.SGD(model.parameters(), lr=0.0), before=set_rate)
    assert first_step(result) == pytest.approx(expected, rel=1e-6)


def test_parameters_of_a_module_may_have_rates_of_their_own_or_none():
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    expected = exact_first_step(model, [1e-2, 0.5])
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 1e-2}, {"params": [model.bias], "lr": 0.5}])
    assert first_step(loop(model, optimizer)) == pytest.approx(expected, rel=1e-6)

    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    expected = exact_first_step(model, [1e-2, 0.0])
    optimizer = torch.optim.SGD([model.weight], lr=1e-2)
    assert first_step(loop(model, optimizer)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("optimizer", "known"), [(torch.optim.AdamW, True), (torch.optim.SGD, True), (torch.optim.RMSprop, False)]
)
def test_an_optimizer_of_another_rule_is_named(optimizer, known, caplog):
    model = nn.Linear(3, 1).double()
    loop(model, optimizer(model.parameters(), lr=1e-3), adam_warmup=1)
    assert ("none of SGD and the Adam family" in caplog.text) is not known


def test_adam_is_warm_when_any_of_its_states_is():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.layer = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.layer(x)

    model = Model().double()
    result = loop(model, torch.optim.AdamW(model.parameters(), lr=1e-3), adam_warmup=1)
    assert set(result.rows["step"]) == {2, 3}


def test_a_batch_norm_that_is_not_trained_on_its_batch_is_exact(caplog):
    torch.manual_seed(0)

    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(nn.Linear(3, 3), Frozen(3), nn.Linear(3, 1))
    expected = exact_first_step(model)
    assert first_step(loop(model)) == pytest.approx(expected, rel=1e-6) and "leave out" not in caplog.text


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_keeps_only_what_is_thin_of_inputs(use_reentrant):
    torch.manual_seed(0)
    model = with_lora(tiny_llama(num_hidden_layers=4), r=1).train()  # whose directions are thin
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    ids = torch.randint(1, 49, (4, 12))
    batch, kept = {"input_ids": ids, "labels": ids}, []
    of = ThinProducts.of

    def keep(*call):
        kept.append(of(*call))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThinProducts, "of", keep)
        taps, _, _ = scored(model, batch, 4, lambda model, batch: model(**batch).loss)
    assert kept and all(right.shape[-1] == 1 for right in kept)
    assert taps.scores.abs().sum() > 0 and taps.products._x is None


def test_clipping_scales_values_as_it_does_gradients(tmp_path):
    plain, clipped = callback(), callback()
    make(tmp_path / "plain", tiny_llama().double(), [plain], max_steps=1).train()
    trainer = make(tmp_path / "clipped", tiny_llama().double(), [clipped], max_steps=1, max_grad_norm=0.05)
    trainer.train()
    factor = 0.05 / losses(trainer, "grad_norm")[0]
    assert factor < 0.5
    first, second = (each.result.values().sort_index() for each in (plain, clipped))
    assert second.tolist() == pytest.approx((first * factor).tolist(), rel=1e-4)


def test_parts_of_a_batch_have_the_values_of_the_whole(tmp_path):
    whole, parts = callback(), callback()
    rows = token_rows(12)
    make(tmp_path / "whole", tiny_llama().double(), [whole], rows).train()
    make(
        tmp_path / "parts", tiny_llama().double(), [parts], rows,
        per_device_train_batch_size=2, gradient_accumulation_steps=2,
    ).train()  # fmt: skip
    first, second = (each.result.values().sort_index() for each in (whole, parts))
    assert second.tolist() == pytest.approx(first.tolist(), rel=1e-6)
