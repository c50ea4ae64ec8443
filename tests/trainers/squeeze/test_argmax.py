"""The exact argmax mass against all the logits of models whose heads scale, cap, shift or share."""

import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GraniteConfig,
    LlamaConfig,
)
from trl.trainer import add_fused_lm_head

from hf_iclr.trainers.squeeze import argmax as module
from hf_iclr.trainers.squeeze.argmax import HiddenStateTap, exact_argmax, from_logits, logit_transform


SHAPE = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 49,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "gptj": GPTJConfig(vocab_size=50, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, initializer_range=0.4),  # a bias
}
INPUT_IDS = torch.randint(1, 49, (4, 9), generator=torch.Generator().manual_seed(0))
LABELS = INPUT_IDS.clone()
LABELS[:, :3] = -100
LABELS[1, 6:] = -100


def make_model(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    if name == "gptj":
        torch.nn.init.normal_(model.lm_head.bias)
    return model


def measure(model):
    tap = HiddenStateTap(model)
    model(INPUT_IDS, use_cache=False)
    return exact_argmax(model, tap.pop()[:, :-1], LABELS[:, 1:])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tile", [2**24, 150])  # at once, and three tokens at a time
def test_equals_the_full_softmax(name, tile, monkeypatch):
    monkeypatch.setattr(module, "_TILE_ELEMENTS", tile)
    monkeypatch.setattr(module, "_HEAD_ROWS", 32768 if tile == 2**24 else 17)
    model = make_model(name)
    log_p = model(INPUT_IDS).logits[:, :-1].double().log_softmax(-1)
    mask = LABELS[:, 1:] != -100
    highest, index = log_p.max(-1)
    own = log_p.gather(-1, LABELS[:, 1:, None].clamp(min=0)).squeeze(-1)
    rest = log_p.scatter(-1, index[..., None], -torch.inf).logsumexp(-1)
    expected = [value.masked_fill(~mask, 0).float() for value in (highest, rest, highest - own)]
    for actual, value in zip(measure(model), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_answer_is_likelier_than_the_argmax(name):
    """The invariant the first version of the authors' code broke: Σ max log π >= Σ log π(y) on the same answer."""
    model = make_model(name)
    add_fused_lm_head(model)
    log_probs = model(INPUT_IDS, labels=LABELS, fused_lm_head=True).log_probs
    measured = measure(model)
    assert (measured.argmax_gap >= 0).all()
    assert (measured.logp_argmax.sum(1) > log_probs.sum(1)).all()
    torch.testing.assert_close(measured.logp_argmax - measured.argmax_gap, log_probs, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("peak", [10.0, 50.0, 1000.0])
def test_rest_mass_of_a_certain_token_is_finite(peak):
    """Logits (peak, 0, ..., 0) over V tokens: 1 - p_max = (V - 1) / (e^peak + V - 1), and log p_max = -log1p of
    (V - 1) e^-peak. In float32 `log(1 - p_max)` is minus infinity from peak 21 on."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[7, 0] = peak
    hidden_states = torch.zeros(1, 1, 16)
    hidden_states[..., 0] = 1
    measured = exact_argmax(model, hidden_states, torch.tensor([[7]]))
    rest = torch.tensor(49.0).double().log() - peak
    expected = rest - torch.nn.functional.softplus(rest)
    assert measured.rest_logmass.item() == pytest.approx(expected.item(), rel=1e-6)
    assert measured.logp_argmax.item() == pytest.approx(-torch.log1p(rest.exp()).item(), rel=1e-5)
    assert measured.argmax_gap.item() == 0


def test_a_tap_listens_once_and_keeps_no_graph():
    model = make_model("llama")
    tap = HiddenStateTap(model)
    output = model(INPUT_IDS, output_hidden_states=True)
    hidden_states = tap.pop()
    assert not hidden_states.requires_grad
    assert not model.base_model._forward_hooks
    torch.testing.assert_close(hidden_states, output.hidden_states[-1].detach())
    kept = weakref.ref(hidden_states)
    del hidden_states
    assert kept() is None


def test_autocast_scores_in_the_type_of_the_fused_head():
    model = make_model("llama")
    add_fused_lm_head(model)
    tap = HiddenStateTap(model)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs = model(INPUT_IDS, labels=LABELS, fused_lm_head=True).log_probs
        measured = exact_argmax(model, tap.pop()[:, :-1], LABELS[:, 1:])
    torch.testing.assert_close(measured.logp_argmax - measured.argmax_gap, log_probs, rtol=1e-5, atol=2e-6)


def test_logit_transform():
    transforms = {name: logit_transform(config) for name, config in CONFIGS.items()}
    assert transforms == {
        "llama": (1.0, None),
        "gemma2": (1.0, 2.0),
        "cohere": (0.3, None),
        "granite": (0.25, None),
        "gptj": (1.0, None),
    }


def test_only_what_zero_3_has_sharded_is_gathered(monkeypatch):
    gathered, parameters = [], [torch.zeros(2) for _ in range(2)]
    for parameter, status in zip(parameters, ("NOT_AVAILABLE", "AVAILABLE"), strict=True):
        parameter.ds_status = SimpleNamespace(name=status)
    zero = SimpleNamespace(GatheredParameters=lambda given: gathered.append(given) or nullcontext())
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(zero=zero))
    monkeypatch.setattr(module, "is_deepspeed_zero3_enabled", lambda: True)
    for some in ([parameters[0], None], parameters, [parameters[1], None]):
        with module.gathered_head(*some):
            pass
    assert [[id(one) for one in given] for given in gathered] == [[id(parameters[0])]] * 2


def test_logits_that_are_there_tell_the_same():
    """Against the full softmax; zero where labels are -100. One token of an answer is the likeliest."""
    with torch.no_grad():
        logits = make_model("llama")(INPUT_IDS).logits
    labels = LABELS.clone()
    labels[0, 5] = logits[0, 4].argmax()
    found = [field for tokens in from_logits(logits, labels) for field in tokens]
    log_p, labels = logits[:, :-1].double().log_softmax(-1), labels[:, 1:]
    own = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    highest, index = log_p.max(-1)
    rest = log_p.scatter(-1, index[..., None], -torch.inf).logsumexp(-1)
    entropy, log_s = -(log_p.exp() * log_p).sum(-1), (2 * log_p).logsumexp(-1)
    expected = [own, entropy, log_s, index == labels, highest, rest, highest - own]
    for actual, value in zip(found, expected, strict=True):
        value = value.to(actual.dtype).masked_fill(labels == -100, 0)
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=2e-6)
    assert found[3][0, 4]
