"""How much of what a step gains is scored: told, and too little refused; and what can't be scored at all."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_iclr.trainers import InRunDataShapleyCallback
from tests.trainers.data_shapley.gradients.test_taps import with_lora
from tests.trainers.tiny import QUICK, tiny_llama


class Mixed(nn.Module):
    """A layer that is called, and one whose weight the model uses by itself."""

    def __init__(self, share):
        super().__init__()
        torch.manual_seed(0)
        self.called, self.used, self.share = nn.Linear(3, 2), nn.Linear(3, 2), share

    def forward(self, x, labels):
        output = self.called(x).tanh() * self.share + (x @ self.used.weight.T + self.used.bias).tanh()
        return {"loss": (output - labels[:, None]).square().mean()}


def rows(count, seed=0):
    drawn = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return [{"x": row, "labels": float(row.sum())} for row in drawn]


def train(model, tmp_path, val=None, **options):
    settings = {name: options.pop(name) for name in list(options) if name in TrainingArguments.__dataclass_fields__}
    settings = {**QUICK, "optim": "sgd", "remove_unused_columns": False, **settings}
    args = TrainingArguments(tmp_path, label_names=["labels"], **settings)
    shapley = InRunDataShapleyCallback(val or rows(6, seed=1), refresh_every=1, **options)
    trainer = Trainer(
        model, args, train_dataset=rows(12) if val is None else val, data_collator=default_data_collator,
        callbacks=[shapley],
    )  # fmt: skip
    trainer.train()
    return trainer, shapley.result


def gained(model):
    """By layer, the product of the first step's gradient with that of the validation rows."""
    products = {}
    for which, found in (("train", rows(12)[:4]), ("val", rows(6, seed=1))):
        loss = model(**default_data_collator(found))["loss"]
        products[which] = torch.autograd.grad(loss, list(model.parameters()))
    sizes = [float((a * b).sum().abs()) for a, b in zip(products["train"], products["val"], strict=True)]
    return sizes[:2], sizes[2:]


def test_the_share_is_that_of_the_absolute_products_and_is_logged_kept_and_on_the_card(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data.RandomSampler.__iter__", lambda sampler: iter(range(12)))
    model = Mixed(4.0)
    called, used = map(sum, gained(model))
    trainer, result = train(model, tmp_path / "run")
    logged = [entry["shapley/scored_share"] for entry in trainer.state.log_history if "shapley/scored_share" in entry]
    assert logged[0] == pytest.approx(called / (called + used), rel=1e-4) and 0.8 < logged[0] < 1
    assert result.summary()["scored_share"]["validation"] == pytest.approx(logged[0])
    result.save_pretrained(tmp_path / "values")
    assert f"cover {100 * logged[0]:.1f} %" in (tmp_path / "values" / "README.md").read_text()


def test_values_of_too_little_are_refused_before_the_first_step_unless_told(tmp_path):
    model = Mixed(0.2)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"Expected values of at least 80% .*used.*min_scored_share=0\.\d"):
        train(model, tmp_path / "refused")
    assert all(map(torch.equal, before, model.parameters()))
    assert not (tmp_path / "refused" / "shapley").exists()
    assert len(train(model, tmp_path / "told", min_scored_share=0)[1].values()) == 12


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match="min_scored_share from 0 to 1, got 80"):
        InRunDataShapleyCallback(rows(2), min_scored_share=80)


def compiled_layer(model):
    model.model.layers[1].compile(backend="eager")


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")


def compiled_class(model):
    """As a decorator of a method compiles it for all objects."""
    layer = model.model.layers[1].mlp
    layer.__class__ = type(
        "Compiled", (type(layer),), {"forward": torch.compile(type(layer).forward, backend="eager")}
    )


@pytest.mark.parametrize("how", ["the trainer", "a module", "a function", "a class"])
def test_compiled_models_are_refused_before_the_first_step(how, tmp_path):
    model = tiny_llama()
    text = [{"input_ids": row, "labels": row} for row in torch.randint(1, 49, (8, 6)).tolist()]
    settings = {}
    if how == "the trainer":
        model, settings = with_lora(model), {"torch_compile": True, "torch_compile_backend": "eager"}
    elif how == "a module":
        compiled_layer(model)
    else:
        {"a function": compiled_forward, "a class": compiled_class}[how](model)
    with pytest.raises(ValueError, match="Expected a model that is not compiled.*torch_compile=False"):
        train(model, tmp_path, text, **settings)


def test_a_compiled_loss_that_shows_no_module_says_so():
    model, data = nn.Linear(3, 1), torch.utils.data.TensorDataset(torch.randn(8, 3))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    loss_of = torch.compile(lambda x: model(x).square().mean(), backend="eager")
    loss_of(data[:4][0]).backward()  # before there are hooks
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    val = [(data[:2][0],)]
    with (
        pytest.raises(ValueError, match="compile"),
        InRunDataShapleyCallback.attach(
            model,
            optimizer,
            loader,
            val,
            refresh_every=1,
            compute_loss=lambda model, batch: model(batch[0]).square().mean(),
        ),
    ):
        for (x,) in loader:
            loss_of(x).backward()
            optimizer.step()
            optimizer.zero_grad()
