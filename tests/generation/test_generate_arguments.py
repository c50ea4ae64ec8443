"""What people pass to `generate`, or set on their models: greedy `spec` writes what the large model writes alone."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForSeq2SeqLM,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    StoppingCriteriaList,
    T5Config,
)
from transformers.generation import EosTokenCriteria

from hf_iclr import enable_cascade
from hf_iclr.cache_argument import cache_inputs, find_cache
from tests.generation.toy import GREEDY, RAGGED_PROMPTS, left_padded, perturbed_copy, tiny_llama


ONE, RAGGED = left_padded([[1, 2, 3]]), left_padded(RAGGED_PROMPTS)
LOOPS = [("batched", ONE), ("batched", RAGGED), ("assisted", ONE)]


@pytest.fixture(scope="module")
def models():
    large = tiny_llama(1, layers=2, vocab_size=50)
    return large, perturbed_copy(large)


@pytest.fixture(scope="module")
def encoder_decoder():
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("backend", "inputs"), LOOPS)
def test_four_turns_from_the_caches_that_came_back(models, backend, inputs, alone):
    if alone and backend == "assisted":
        pytest.skip("drafts are looked up in the batched loop")
    cascade, (ids, mask), cache = enable_cascade(models[0], None if alone else models[1]), inputs.values(), None
    call = {**GREEDY, "max_new_tokens": 7, "return_dict_in_generate": True, "output_scores": True}
    for turn in range(4):
        used = {} if cache is None else cache_inputs(models[0], cache)
        got = cascade.generate(ids, attention_mask=mask, **call, **used, cascade_backend=backend)
        plain = models[0].generate(ids, attention_mask=mask, **call)
        assert torch.equal(got.sequences, plain.sequences), turn
        assert torch.allclose(torch.stack(got.scores), torch.stack(plain.scores), atol=1e-3)
        cache = find_cache(got)
        ids = torch.cat([got.sequences, torch.full((len(ids), 2), 5 + turn)], 1)
        mask = torch.nn.functional.pad(mask, (0, 9), value=1)
    assert cascade.cascade_statistics.large_tokens < 40 * len(ids)  # earlier turns were not read again


@pytest.mark.parametrize(("backend", "inputs"), LOOPS)
@pytest.mark.parametrize(
    "criterion", [EosTokenCriteria(torch.tensor([3, 19])), MaxLengthCriteria(11), MaxLengthCriteria(29)]
)
@pytest.mark.parametrize("eos", [None, 32])
def test_criteria_of_the_kinds_that_generate_makes_itself(models, criterion, eos, backend, inputs):
    """They take the place of `generate`'s own, also where these would stop earlier."""
    call = {**GREEDY, "stopping_criteria": StoppingCriteriaList([criterion]), "eos_token_id": eos}
    plain = models[0].generate(**inputs, **call)
    assert eos or plain.shape != models[0].generate(**inputs, **GREEDY).shape or (plain[:, -1] == 0).any()
    assert torch.equal(enable_cascade(*models).generate(**inputs, **call, cascade_backend=backend), plain)


@pytest.mark.parametrize("backend", ["batched", "assisted"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cache_implementation", "static"),
        ("num_return_sequences", 2),
        ("penalty_alpha", 0.5),
        ("stop_strings", "x"),
        ("suppress_tokens", [24, 3, 15]),
        ("watermarking_config", {"bias": 2.0}),
    ],
)
def test_the_small_models_defaults_are_not_the_cascades(models, name, value, backend):
    small = copy.deepcopy(models[1])
    setattr(small.generation_config, name, value)
    cascade = enable_cascade(models[0], small)
    output = cascade.generate(**ONE, **GREEDY, num_assistant_tokens=4, cascade_backend=backend)
    assert torch.equal(output, models[0].generate(**ONE, **GREEDY))
    assert sum(cascade.cascade_statistics.accepted) > 4


@pytest.mark.parametrize(("backend", "inputs"), LOOPS)
@pytest.mark.parametrize(("name", "value"), [("use_cache", False), ("cache_implementation", "hybrid")])
def test_defaults_of_a_model_that_was_trained_or_made_for_windows(models, name, value, backend, inputs):
    large = copy.deepcopy(models[0])
    setattr(large.generation_config, name, value)
    output = enable_cascade(large, models[1]).generate(**inputs, **GREEDY, cascade_backend=backend)
    assert torch.equal(output, models[0].generate(**inputs, **GREEDY))


@pytest.mark.parametrize(("backend", "inputs"), LOOPS)
def test_a_length_that_is_a_float(models, backend, inputs):
    call = {**GREEDY, "max_new_tokens": 6.0}
    output = enable_cascade(*models).generate(**inputs, **call, cascade_backend=backend)
    assert torch.equal(output, models[0].generate(**inputs, **call))


@pytest.mark.parametrize(("backend", "inputs"), LOOPS)
def test_top_h(models, backend, inputs):
    """With a bound of nearly no entropy one token is left."""
    call = {**GREEDY, "do_sample": True, "top_h": 1e-6, "cascade_backend": backend}
    assert torch.equal(enable_cascade(*models).generate(**inputs, **call), models[0].generate(**inputs, **GREEDY))


@pytest.mark.parametrize("backend", ["batched", "assisted"])
def test_an_ensemble_of_the_large_model_alone_does_not_drift(models, backend):
    cascade = enable_cascade(*models)
    call = {"cascade_rule": "ensemble", "cascade_alpha": 0.0, "cascade_backend": backend}
    assert torch.equal(cascade.generate(**ONE, **GREEDY, **call), models[0].generate(**ONE, **GREEDY))
    assert cascade.cascade_statistics.drift == [0.0]


@pytest.mark.parametrize(
    ("kwargs", "error", "words"),
    [
        ({"input_ids": [[1, 2]]}, TypeError, r"a tensor of shape \(prompts, length\), got list"),
        ({"input_ids": torch.tensor([1, 2])}, TypeError, r"got one of shape \(2,\)"),
        ({"attention_mask": torch.tensor([[0, 1, 1, 1]])}, ValueError, r"shape of the token ids, \(1, 3\)"),
        ({"attention_mask": torch.ones(1, 4).long()}, ValueError, r"shape of the token ids, \(1, 3\)"),
        ({"use_cache": False}, ValueError, "needs the key-value cache"),
        ({"cache_implementation": "hybrid"}, ValueError, "a 'hybrid' one can't"),
    ],
)
@pytest.mark.parametrize("backend", ["batched", "assisted"])
def test_inputs_that_can_not_be_used(models, kwargs, error, words, backend):
    with pytest.raises(error, match=words):
        enable_cascade(*models).generate(**{**ONE, **kwargs}, **GREEDY, cascade_backend=backend)


@pytest.mark.parametrize("backend", ["batched", "assisted"])
def test_new_tokens_alone_beside_a_cache(models, backend):
    cascade = enable_cascade(*models)
    cache = find_cache(cascade.generate(**ONE, **GREEDY, return_dict_in_generate=True))
    call = {"attention_mask": torch.ones(1, 21).long(), **cache_inputs(models[0], cache), "cascade_backend": backend}
    with pytest.raises(ValueError, match="holds 18 tokens and the ids only 2: pass all of them"):
        cascade.generate(torch.tensor([[5, 6]]), **call, **GREEDY)


@pytest.mark.parametrize("backend", ["batched", "assisted"])
def test_a_cache_of_other_rows(models, backend):
    cache = find_cache(models[0](torch.tensor([[1, 2], [1, 2]]), use_cache=True))
    call = {**cache_inputs(models[0], cache), "cascade_backend": backend}
    with pytest.raises(ValueError, match="holds 2 rows, and there are 1 texts"):
        enable_cascade(*models).generate(**ONE, **GREEDY, **call)


class Counts(LogitsProcessor):
    """Bans another token at each call; what `clone` returns is the test's to say."""

    calls = 0

    def __init__(self, clone):
        self.clone = lambda: clone(self)

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.index_fill(1, torch.tensor([7 * self.calls % 50]), -torch.inf)


@pytest.mark.parametrize(("backend", "inputs"), LOOPS)
@pytest.mark.parametrize(
    ("clone", "words"),
    [(lambda counts: counts, "itself, but a call changed its attributes"), (lambda counts: None, "returned None")],
)
def test_a_clone_that_is_none(models, clone, words, backend, inputs):
    call = {"logits_processor": LogitsProcessorList([Counts(clone)]), "cascade_backend": backend}
    with pytest.raises(ValueError, match=words):
        enable_cascade(*models).generate(**inputs, **GREEDY, **call)


def test_pairs_that_can_not_be_used(models, encoder_decoder):
    with pytest.raises(ValueError, match=r"got a decoder \(large\) and an encoder-decoder \(small\)"):
        enable_cascade(models[0], encoder_decoder).generate(**ONE, **GREEDY)
    outputs = encoder_decoder.get_encoder()(ONE["input_ids"])
    with pytest.raises(ValueError, match="`encoder_outputs` of the large one"):
        enable_cascade(encoder_decoder, encoder_decoder).generate(encoder_outputs=outputs, max_new_tokens=4)
    config = OpenAIGPTConfig(vocab_size=50, n_embd=16, n_layer=1, n_head=2)
    with pytest.raises(ValueError, match="got a OpenAIGPTLMHeadModel, which keeps none"):
        enable_cascade(OpenAIGPTLMHeadModel(config).eval(), models[1]).generate(**ONE, **GREEDY)
