"""Scores of rows equal gradients computed row by row, whatever the module, and add up to the gradient."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from hf_iclr.trainers.data_shapley.gradients.direction import inner, sketch
from hf_iclr.trainers.data_shapley.gradients.rows import find_layout
from hf_iclr.trainers.data_shapley.gradients.taps import Taps
from hf_iclr.trainers.data_shapley.gradients.thin import ThinProducts
from tests.trainers.tiny import tiny_llama


def token_batch(rows=6, length=10, vocabulary=50):
    """Rows of different lengths, padded on the right, the first tokens without labels."""
    ids = torch.randint(1, vocabulary, (rows, length))
    mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1))).long()
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100).index_fill(1, torch.tensor([0, 1]), -100),
    }


def point(taps, seed=3):
    """A random direction, which is a stricter check than a gradient; its parameters."""
    generator = torch.Generator().manual_seed(seed)
    parameters, directions = [], {}
    for tapped in taps.modules:
        for parameter in tapped.parameters.values():
            if id(parameter) not in directions:
                parameters.append(parameter)
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                directions[id(parameter)] = noise.to(parameter.dtype)
        tapped.directions = [{name: directions[id(p)] for name, p in tapped.parameters.items()}]
    return parameters, [directions[id(parameter)] for parameter in parameters]


def scored(model, batch, rows, loss_of, with_tokens=False):
    """Scores by the taps, by row, in the backward pass that also fills `.grad`."""
    taps = Taps(model)
    parameters, directions = point(taps)
    taps.start(find_layout(batch, rows), 1, with_tokens)
    taps.attach()
    taps.on = True
    model.zero_grad()
    loss_of(model, batch).backward()
    taps.detach()
    assert not taps.misfits
    return taps, parameters, directions


def row_by_row(model, batch, rows, parameters, directions, loss_of):
    """The same by a backward pass for each row alone, of its share of the batch's loss."""
    scores = []
    for row in range(rows):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        gradients = torch.autograd.grad(loss_of(model, alone), parameters, allow_unused=True)
        scores.append(
            sum(
                torch.sum(g.double() * u.double()) for g, u in zip(gradients, directions, strict=True) if g is not None
            )
        )
    return torch.stack(scores)


def check(model, batch, loss_of, tolerance=1e-5):
    model.train()
    rows = len(next(iter(batch.values())))
    taps, parameters, directions = scored(model, batch, rows, loss_of)
    got = taps.scores.double().sum(0)[:, 0]
    pairs = [(p.grad, u) for p, u in zip(parameters, directions, strict=True) if p.grad is not None]
    total = sum(torch.sum(g.double() * u.double()) for g, u in pairs)
    expected = row_by_row(model, batch, rows, parameters, directions, loss_of)
    scale = expected.abs().max()
    assert (got - expected).abs().max() <= tolerance * scale
    assert abs(got.sum() - total) <= tolerance * scale * rows
    assert got.std() > 1e-3 * scale
    return taps


def lm_loss(count):
    return lambda model, batch: model(**batch, num_items_in_batch=count).loss


def gpt2():
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config)


def with_lora(model, r=3, **settings):
    config = LoraConfig(r=r, lora_alpha=7, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(model, config)


MODELS = {
    "tied, with biases": lambda: tiny_llama(tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "Conv1D and broadcast positions": gpt2,
    "LoRA": lambda: with_lora(tiny_llama()),
    "LoRA so thin that layers share a product with their input": lambda: with_lora(tiny_llama(), r=1),
    "rsLoRA on Conv1D": lambda: with_lora(gpt2(), use_rslora=True),
    "LoRA and full embeddings": lambda: with_lora(tiny_llama(), modules_to_save=["embed_tokens"]),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_of_language_models_are_those_of_each_row_alone(name, dtype):
    model, batch = MODELS[name]().to(dtype), token_batch()
    count = (batch["labels"][:, 1:] != -100).sum()
    check(model, batch, lm_loss(count), 1e-9 if dtype == torch.float64 else 1e-5)


def score_again(taps, model, batch, rows, loss_of):
    """One more step along the directions that the taps point to."""
    taps.start(find_layout(batch, rows), 1)
    taps.attach()
    taps.on = True
    loss_of(model, batch).backward()
    taps.detach()


def test_layers_that_read_one_tensor_are_scored_by_one_product(monkeypatch):
    """From the second pass on: queries, keys and values; gate and up; output; down, in each block."""
    columns, take = [], ThinProducts.of

    def counting(products, layer, x, dtype):
        known = dict(products._found)
        right = take(products, layer, x, dtype)
        if layer.thin.before is not None and id(layer) not in known:
            columns.append(right._base.shape[-1] if right._is_view() else right.shape[-1])
        return right

    monkeypatch.setattr(ThinProducts, "of", counting)
    model, batch, loss_of = with_lora(tiny_llama(), r=1).double().train(), token_batch(), lm_loss(40)
    taps, parameters, directions = scored(model, batch, 6, loss_of)
    blocks, first = model.config.num_hidden_layers, taps.scores.sum(0)[:, 0]
    assert columns == blocks * 7 * [1]
    torch.testing.assert_close(first, row_by_row(model, batch, 6, parameters, directions, loss_of))
    for seed in (3, 4, 4):  # with other directions, of which products must be those of
        columns.clear()
        _, directions = point(taps, seed)
        score_again(taps, model, batch, 6, loss_of)
        assert columns == blocks * [3, 1, 2, 1]
        expected = row_by_row(model, batch, 6, parameters, directions, loss_of)
        torch.testing.assert_close(taps.scores.sum(0)[:, 0], expected, rtol=1e-9, atol=1e-12)


def test_layers_that_stop_to_read_one_tensor_are_multiplied_alone():
    """Also one whose tensor was changed in place since another has read it."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.mode = nn.Linear(16, 2), nn.Linear(16, 2), "same"

        def forward(self, x):
            x = x * 1
            found = self.first(x.clone() if self.mode == "changed" else x)
            if self.mode == "alone":
                return found.square().sum()
            if self.mode == "changed":
                self.second(x)
                x.mul_(2)
            return (found * self.second(x)).sum()

    torch.manual_seed(0)
    model, batch = Two().double().train(), {"x": torch.randn(3, 16).double()}
    loss_of = lambda model, batch: model(**batch)  # noqa: E731
    taps = Taps(model)
    parameters, directions = point(taps)
    for mode in ("same", "same", "alone", "same", "changed", "changed", "same"):
        model.mode = mode
        score_again(taps, model, batch, 3, loss_of)
        expected = row_by_row(model, batch, 3, parameters, directions, loss_of)
        torch.testing.assert_close(taps.scores.sum(0)[:, 0], expected, rtol=1e-9, atol=1e-12)


def test_bfloat16_scores_are_as_good_as_bfloat16_gradients():
    check(MODELS["LoRA"]().to(torch.bfloat16), token_batch(), lm_loss(40), 2e-2)


def test_bert_and_its_position_embeddings():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )

    def loss_of(model, batch):
        return model(**batch).loss * (batch["labels"] != -100).sum() / 40

    check(BertForMaskedLM(config).double(), token_batch(), loss_of, 1e-9)


def test_images_convolutions_and_parameters_outside_of_layers():
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    )
    batch = {"pixel_values": torch.randn(5, 3, 8, 8).double(), "labels": torch.randint(0, 2, (5,))}
    check(
        ViTForImageClassification(config).double(),
        batch,
        lambda model, b: model(**b).loss * len(b["labels"]) / 5,
        1e-9,
    )


class Mixed(nn.Module):
    """A convolution, group, layer and RMS norms, an in-place activation, and a layer that owns a bare parameter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten())
        self.norm, self.rms, self.scale = nn.LayerNorm(64), nn.RMSNorm(64), Scale(64)
        self.head = nn.Linear(64, 3)

    def forward(self, images, labels):
        logits = self.head(self.scale(x=self.rms(self.norm(self.stem(images)))))
        return nn.functional.cross_entropy(logits, labels, reduction="sum")


class Scale(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.by = nn.ParameterDict({"a": torch.rand(size), "b": torch.rand(size)})

    def forward(self, x):
        return torch.tanh(x * self.by["a"] * self.by["b"]) + self.by["a"]


def test_any_other_module_is_exact_too():
    batch = {"images": torch.randn(4, 3, 6, 6).double(), "labels": torch.tensor([0, 1, 2, 0])}
    check(Mixed().double(), batch, lambda model, b: model(**b), 1e-9)


def test_dropout_masks_are_those_of_training_and_random_states_untouched():
    model, batch = with_lora(tiny_llama(), lora_dropout=0.5).double().train(), token_batch()
    torch.manual_seed(5)
    taps, parameters, directions = scored(model, batch, 6, lm_loss(40))
    state = torch.get_rng_state()
    gradients = [parameter.grad.clone() for parameter in parameters]
    torch.manual_seed(5)
    model.zero_grad()
    lm_loss(40)(model, batch).backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))
    total = sum(torch.sum(p.grad * u) for p, u in zip(parameters, directions, strict=True))
    assert taps.scores.sum().item() == pytest.approx(total.item(), rel=1e-9)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["tied, with biases", "Conv1D and broadcast positions"])
def test_checkpointing_changes_nothing(use_reentrant, name):
    model, batch = MODELS[name]().train(), token_batch()
    plain, parameters, _ = scored(model, batch, 6, lm_loss(40))
    gradients = [parameter.grad.clone() for parameter in parameters]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    recomputed, _, _ = scored(model, batch, 6, lm_loss(40))
    assert torch.equal(plain.scores, recomputed.scores)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


def test_a_plain_checkpoint_recomputes_inputs_rather_than_keeping_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, x):
            return checkpoint(lambda y: self.second(self.first(y).tanh()), x, use_reentrant=False).sum()

    check(Block().double(), {"x": torch.randn(3, 4).double().requires_grad_()}, lambda model, b: model(**b), 1e-9)


@pytest.mark.parametrize("name", ["LoRA", "Conv1D and broadcast positions"])
def test_accumulation_does_not_matter(name):
    model, batch = MODELS[name]().double().train(), token_batch()
    at_once = scored(model, batch, 6, lm_loss(40))[0].scores.sum(0)
    parts = [
        scored(model, {k: v[i : i + 2] for k, v in batch.items()}, 2, lm_loss(40))[0].scores.sum(0) for i in (0, 2, 4)
    ]
    torch.testing.assert_close(torch.cat(parts), at_once, rtol=1e-9, atol=1e-12)


def test_tokens_add_up_to_rows_and_padding_has_no_score():
    model, batch = MODELS["tied, with biases"]().double().train(), token_batch()
    taps, _, _ = scored(model, batch, 6, lm_loss(40), with_tokens=True)
    torch.testing.assert_close(taps.tokens.sum(1), taps.scores.sum(0), rtol=1e-9, atol=1e-12)
    assert taps.tokens[batch["attention_mask"] == 0].abs().max() == 0


def test_flattened_rows_score_as_padded_ones():
    model, batch = MODELS["LoRA"]().double().train(), token_batch(rows=3)
    padded = scored(model, batch, 3, lm_loss(20))[0].scores.sum(0)
    keep = batch["attention_mask"].bool()
    flat = {
        "input_ids": batch["input_ids"][keep][None],
        "labels": batch["labels"][keep][None],
        "position_ids": torch.arange(10).expand(3, 10)[keep][None],
        "use_cache": False,
    }
    packed = scored(model, flat, 3, lm_loss(20))[0].scores.sum(0)
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-12)


def test_a_module_whose_rows_cannot_be_told_apart_is_named():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            return (self.layer(x) + self.table(torch.arange(4)).sum()).sum()

    model = Bias().train()
    taps = Taps(model)
    point(taps)
    taps.start(find_layout({"x": torch.ones(3, 4)}, 3), 1)
    taps.attach()
    taps.on = True
    model(torch.ones(3, 4)).backward()
    taps.detach()
    assert {taps.modules[index].name for index in taps.misfits} == {"table"}
    assert {taps.modules[index].name for index in taps.fired} == {"layer"}


def test_detached_taps_leave_no_hook():
    model = tiny_llama()
    taps = Taps(model)
    taps.attach()
    taps.detach()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_sketch_is_exact_up_to_its_rank_and_keeps_more_with_more():
    torch.manual_seed(0)
    low = torch.randn(40, 3).double() @ torch.randn(3, 30).double()
    gradient = torch.randn(40, 30).double()
    found = sketch(low, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.left @ found.right, low, rtol=1e-8, atol=1e-8)
    assert inner(found, gradient).item() == pytest.approx((low * gradient).sum().item(), rel=1e-8)
    energies = []
    for rank in (1, 4, 16, 30):
        part = sketch(gradient, rank, torch.Generator().manual_seed(0))
        energies.append((part.right.square().sum() / gradient.square().sum()).item())
    assert energies == sorted(energies) and energies[0] < 0.5 and energies[-1] == pytest.approx(1)
    assert not sketch(torch.zeros(40, 30), 4, torch.Generator().manual_seed(0)).right.any()


def test_a_sketched_score_is_that_of_the_low_rank_direction():
    for module in (nn.Linear(20, 12).double(), nn.Embedding(30, 12).double()):
        is_linear = isinstance(module, nn.Linear)
        x = torch.randn(3, 5, 20).double() if is_linear else torch.randint(0, 30, (3, 5))
        scores = []
        for dense in (False, True):
            taps = Taps(module)
            point(taps)
            u = sketch(taps.modules[0].directions[0]["weight"], 2, torch.Generator().manual_seed(0))
            taps.modules[0].directions[0]["weight"] = u.left @ u.right if dense else u
            taps.start(find_layout({"input_ids" if not is_linear else "x": x}, 3), 1)
            taps.attach()
            taps.on = True
            module.train()(x).square().sum().backward()
            taps.detach()
            scores.append(taps.scores)
        torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-12)


class Odd(nn.Module):
    """Has what an RMSNorm has, and is none."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x):
        return (x * self.weight).tanh()


@pytest.mark.parametrize("kind", [LlamaRMSNorm, GemmaRMSNorm, T5LayerNorm, Odd])
def test_normalisations_are_told_from_what_only_looks_like_one(kind):
    """Called twice before either call is scored."""
    torch.manual_seed(0)
    norm = kind(8)
    norm.weight.data.normal_()
    model = nn.ModuleDict({"norm": norm, "out": nn.Linear(8, 1)})
    model.forward = lambda x: model["out"](norm(norm(x) + x)).square().mean()
    taps = check(model, {"x": torch.randn(3, 5, 8)}, lambda model, batch: model(**batch) * len(batch["x"]) / 3)
    (found,) = (tapped for tapped in taps.modules if tapped.name == "norm")
    assert found.is_rms is (kind is not Odd) and found.kind == ("other" if kind is Odd else "scale")
