"""The suffix search: the gradient is that of the one-hot tokens, the loss falls, and what it returns can be typed."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_iclr.trainers.safety_audit.gcg import _TargetLoss, append_to_prompt, gcg


TARGET = "w20 w21"


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, bos_token_id=None, eos_token_id=49, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def loss_of_text(model, tokenizer, text):
    ids = torch.tensor([tokenizer(text)["input_ids"] + [20, 21]])
    logits = model(ids).logits[0, -3:-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor([20, 21])).item()


def search(model, tokenizer, prompt="w3 w4", **options):
    options = {"initial_suffix": "w1 w1 w1 w1", "num_steps": 20, "num_swaps": 48, "progress": False, **options}
    return gcg(model, tokenizer, prompt, TARGET, **options)


def test_loss_falls_and_the_suffix_can_be_typed(model, word_tokenizer):
    found = search(model, word_tokenizer)
    assert found.losses[0] == pytest.approx(loss_of_text(model, word_tokenizer, "w3 w4 w1 w1 w1 w1"), rel=1e-5)
    assert found.loss == min(found.losses) < found.losses[0] - 1
    assert found.loss == pytest.approx(loss_of_text(model, word_tokenizer, "w3 w4" + found.suffix), rel=1e-5)
    assert word_tokenizer(found.suffix)["input_ids"] == found.suffix_ids and len(found.suffix_ids) == 4


def test_gradient_chooses_better_than_chance(model, word_tokenizer):
    """With few candidates a step, those that the gradient names beat random ones, on the mean over five seeds."""
    guided = [
        search(model, word_tokenizer, num_candidates=3, num_swaps=6, num_steps=4, seed=seed) for seed in range(5)
    ]
    chance = [
        search(model, word_tokenizer, num_candidates=48, num_swaps=6, num_steps=4, seed=seed) for seed in range(5)
    ]
    assert sum(found.loss for found in guided) < sum(found.loss for found in chance)


def test_gradient_is_that_of_one_hot_tokens(model):
    ids, place = torch.tensor([3, 4, 1, 2, 20, 21]), slice(2, 4)
    found = _TargetLoss(model, 2).gradient(ids, place)
    one_hot = torch.nn.functional.one_hot(ids, 50).float().requires_grad_()
    embedded = (one_hot @ model.get_input_embeddings().weight)[None]
    torch.nn.functional.cross_entropy(model(inputs_embeds=embedded).logits[0, -3:-1], ids[-2:]).backward()
    torch.testing.assert_close(found, one_hot.grad[2:4], rtol=1e-4, atol=1e-6)


def test_stops_at_success(model, word_tokenizer):
    """A target that greedy decoding gives already needs no step."""
    row = torch.tensor([word_tokenizer("w3 w4 w1 w1")["input_ids"]])
    target = model.generate(row, max_new_tokens=2, do_sample=False, pad_token_id=0)[0, 4:].tolist()
    found = gcg(model, word_tokenizer, "w3 w4", target, initial_suffix="w1 w1", progress=False)
    assert found.success and found.losses == [found.loss] and found.suffix == " w1 w1"
    assert not search(model, word_tokenizer, num_steps=1).success


def test_seed_and_surroundings(model, word_tokenizer):
    state = torch.get_rng_state()
    model.train()
    weights = copy.deepcopy(model.state_dict())
    first = search(model, word_tokenizer, num_steps=3)
    assert search(model, word_tokenizer, num_steps=3) == first
    assert search(model, word_tokenizer, num_steps=3, seed=1) != first
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_special_token_in_a_suffix(model, word_tokenizer):
    found = search(model, word_tokenizer, num_steps=8, num_candidates=50, num_swaps=200)
    assert not {0, 49} & set(found.suffix_ids)


def test_chat(model, word_tokenizer):
    tokenizer = word_tokenizer.__class__(
        tokenizer_object=word_tokenizer.backend_tokenizer, unk_token="w0", eos_token="w49",
        chat_template="{% for m in messages %}w40 {{ m.content }} {% endfor %}{{ 'w41' if add_generation_prompt }}",
    )  # fmt: skip
    chat = [{"role": "user", "content": "w3 w4"}]
    found = search(model, tokenizer, chat, num_steps=4)
    assert found == search(model, tokenizer, "w3 w4", num_steps=4)
    typed = append_to_prompt(chat, found.suffix)
    assert chat[0]["content"] == "w3 w4" and typed[0]["content"] == "w3 w4" + found.suffix
    assert found.loss == pytest.approx(loss_of_text(model, tokenizer, f"w40 w3 w4{found.suffix} w41"), rel=1e-5)
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w3"}]}]
    assert append_to_prompt(parts, " w5")[0]["content"] == [{"type": "image"}, {"type": "text", "text": "w3 w5"}]
    with_system = [{"role": "system", "content": "w7"}, *chat]
    assert search(model, tokenizer, "w3 w4", num_steps=4, system="w7") == search(
        model, tokenizer, with_system, num_steps=4
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_steps": 0}, "num_steps=0"),
        ({"initial_suffix": ""}, "keeps its own tokens"),
        ({"prompt": [{"role": "user", "content": "w1"}]}, "no chat template"),
    ],
)
def test_bad_input(model, word_tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        search(model, word_tokenizer, **options)


def test_empty_target(model, word_tokenizer):
    with pytest.raises(ValueError, match="target of at least one token"):
        gcg(model, word_tokenizer, "w1", "")
