"""`generate` of a cascade: equality with its parents, everything a user of `generate` expects, and bad input."""

import copy

import pytest
import torch
from transformers import (
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteria,
)

from hf_iclr import SpeculativeCascadeGenerationMixin, enable_cascade
from tests.generation.toy import GREEDY, RAGGED_PROMPTS, left_padded, perturbed_copy, tiny_llama


@pytest.fixture(scope="module")
def models():
    large = tiny_llama(1, layers=2, vocab_size=50)
    return large, perturbed_copy(large)


# --- equality with the parents ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1, 3, 6])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("backend", ["auto", "assisted"])
def test_greedy_spec_is_the_large_model(models, gamma, batch, backend):
    if backend == "assisted" and batch > 1:
        pytest.skip("the loop of transformers takes one prompt")
    inputs = left_padded(RAGGED_PROMPTS[:batch])
    model = enable_cascade(*models)
    output = model.generate(
        **inputs, **GREEDY, cascade_rule="spec", num_assistant_tokens=gamma, cascade_backend=backend
    )
    assert torch.equal(output, models[0].generate(**inputs, **GREEDY))
    assert model.cascade_statistics.backend == ("assisted" if backend == "assisted" else "batched")
    assert 0 < sum(model.cascade_statistics.accepted) < sum(model.cascade_statistics.drafted)


@pytest.mark.parametrize(
    ("rule", "alpha", "which"),
    [
        ("token_v3", 0.0, 0),
        ("token_v3", 1.0, 1),
        ("token_v1", -1.0, 0),
        ("token_v1", 1.0, 1),
        ("token_v2", 1.0, 1),
        ("chow", -0.1, 0),
        ("chow", 1.0, 1),
        ("chow_log", -1.0, 0),
        ("chow_log", float("inf"), 1),
        ("diff", -1.0, 0),
        ("diff", 1.0, 1),
        ("opt", float("-inf"), 0),
        ("opt_log", float("inf"), 1),
        ("ensemble", 0.0, 0),
        ("ensemble", 1.0, 1),
        ("lossy", 0.0, 0),
    ],
)
def test_alpha_limits_are_either_model(models, rule, alpha, which):
    inputs = left_padded(RAGGED_PROMPTS)
    output = enable_cascade(*models).generate(**inputs, **GREEDY, cascade_rule=rule, cascade_alpha=alpha)
    assert torch.equal(output, models[which].generate(**inputs, **GREEDY))


def test_a_model_that_drafts_for_itself_accepts_everything(models):
    model = enable_cascade(models[0], models[0])
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}):
        for backend in ("batched", "assisted"):
            model.generate(
                torch.tensor([[1, 2, 3]]),
                max_new_tokens=21,
                num_assistant_tokens=4,
                cascade_rule="spec",
                cascade_backend=backend,
                **sampling,
            )
            stats = model.cascade_statistics
            assert stats.accepted == stats.drafted, (backend, sampling)
            assert stats.large_forwards == 5  # 4 drafts and a bonus, then 1 token of 21 left
    # large 5 forwards of 5 tokens, first one with the prompt of 3 instead of 1
    assert model.cascade_statistics.large_tokens == 3 + 4 + 3 * 5 + 1


def test_enable_cascade_leaves_the_model_alone(models):
    large = models[0]
    cascade = enable_cascade(large, models[1], cascade_rule="opt", cascade_alpha=0.1)
    assert not isinstance(large, SpeculativeCascadeGenerationMixin)
    assert isinstance(cascade, type(large)) and type(cascade).__name__ == type(large).__name__
    assert cascade.lm_head.weight is large.lm_head.weight
    assert cascade.state_dict().keys() == large.state_dict().keys()
    assert not hasattr(large.generation_config, "cascade_rule")
    cascade.generate(torch.tensor([[1]]), **GREEDY)
    assert (cascade.cascade_statistics.rule, cascade.cascade_statistics.alpha) == ("opt", 0.1)


# --- what `generate` users expect ------------------------------------------------------------------------------------


def equal_to_plain(models, inputs, backend="auto", **kwargs):
    kwargs = {**GREEDY, **kwargs}
    plain = models[0].generate(**inputs, **copy.deepcopy(kwargs))
    cascade = enable_cascade(*models).generate(**inputs, **kwargs, cascade_rule="spec", cascade_backend=backend)
    return torch.equal(plain, cascade)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [9]]},
        {"min_new_tokens": 12, "eos_token_id": [3, 11, 20, 41]},
        {"eos_token_id": [3, 11, 20, 41]},
        {"suppress_tokens": [7, 9, 11]},
        {"sequence_bias": [[[5], 3.0]]},
        {"max_new_tokens": 1},
        {"max_new_tokens": 2},
        {"num_assistant_tokens_schedule": "heuristic"},
        {"assistant_confidence_threshold": 0.3},
        {"forced_eos_token_id": 4},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_greedy_equality_under_processors(models, kwargs):
    extra = {
        key: kwargs.pop(key)
        for key in ("num_assistant_tokens_schedule", "assistant_confidence_threshold")
        if key in kwargs
    }
    inputs = left_padded(RAGGED_PROMPTS)
    plain = models[0].generate(**inputs, **{**GREEDY, **kwargs})
    cascade = enable_cascade(*models).generate(**inputs, **{**GREEDY, **kwargs}, **extra, cascade_rule="spec")
    assert torch.equal(plain, cascade)


def test_prefix_allowed_tokens_fn_is_asked_for_the_right_row(models):
    def allowed(row, ids):
        return list(range(10 * row + 1, 10 * row + 9)) if len(ids) % 2 else list(range(40, 50))

    assert equal_to_plain(models, left_padded(RAGGED_PROMPTS), prefix_allowed_tokens_fn=allowed)


def test_eos_inside_a_draft_ends_the_row(models):
    inputs = left_padded(RAGGED_PROMPTS)
    plain = models[0].generate(**inputs, **GREEDY)
    eos = plain[:, -9].tolist()  # a token that each row produces in the middle
    assert equal_to_plain(models, inputs, eos_token_id=eos, num_assistant_tokens=6)


class StopAfter(StoppingCriteria):
    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_see_every_token(models):
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    token = int(models[0].generate(**inputs, **GREEDY)[0, 9])
    output = enable_cascade(*models).generate(
        **inputs, **GREEDY, cascade_rule="spec", num_assistant_tokens=6, stopping_criteria=[StopAfter(token)]
    )
    assert torch.equal(output, models[0].generate(**inputs, **GREEDY, stopping_criteria=[StopAfter(token)]))


class Recorder:
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values += value.flatten().tolist()

    def end(self):
        self.ended = True


@pytest.mark.parametrize("backend", ["batched", "assisted"])
def test_streamer_gets_every_token_and_the_end(models, backend):
    streamer = Recorder()
    output = enable_cascade(*models).generate(
        torch.tensor([[1, 2, 3]]), **GREEDY, streamer=streamer, cascade_backend=backend
    )
    assert streamer.values == output[0].tolist() and streamer.ended


def test_several_sequences_for_a_prompt(models):
    inputs = left_padded(RAGGED_PROMPTS)
    output = enable_cascade(*models).generate(
        **inputs, do_sample=True, num_return_sequences=3, max_new_tokens=8, pad_token_id=0
    )
    assert output.shape == (12, inputs["input_ids"].shape[1] + 8)
    assert torch.equal(output[:, :5], inputs["input_ids"].repeat_interleave(3, 0))
    assert len({tuple(row) for row in output[:3].tolist()}) == 3


def test_a_seed_repeats(models):
    model, inputs = enable_cascade(*models), left_padded(RAGGED_PROMPTS)
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(model.generate(**inputs, do_sample=True, max_new_tokens=12, pad_token_id=0))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


def test_sampling_stays_in_the_top_p_of_both(models):
    """With top_k=1 both models are greedy, whatever the rule."""
    inputs = left_padded(RAGGED_PROMPTS)
    output = enable_cascade(*models).generate(
        **inputs, do_sample=True, top_k=1, max_new_tokens=16, pad_token_id=0, cascade_rule="spec"
    )
    assert torch.equal(output, models[0].generate(**inputs, **GREEDY))


def test_returned_dict_holds_scores_and_logits(models):
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    kwargs = {**GREEDY, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    plain = models[0].generate(**inputs, **kwargs)
    cascade = enable_cascade(*models).generate(**inputs, **kwargs, cascade_rule="spec")
    assert torch.equal(plain.sequences, cascade.sequences)
    assert len(cascade.scores) == len(cascade.logits) == 16
    for name in ("scores", "logits"):
        assert torch.allclose(torch.stack(plain[name]), torch.stack(cascade[name]), atol=1e-4)


def test_generation_config_object(models):
    config = GenerationConfig(max_new_tokens=16, do_sample=False, pad_token_id=0)
    config.cascade_rule, config.cascade_alpha = "token_v3", 1.0
    output = enable_cascade(*models).generate(torch.tensor([[1, 2, 3]]), config)
    assert torch.equal(output, models[1].generate(torch.tensor([[1, 2, 3]]), **GREEDY))
    assert not hasattr(config, "cascade_backend")


def test_bfloat16(models):
    large, small = (copy.deepcopy(model).to(torch.bfloat16) for model in models)
    output = enable_cascade(large, small).generate(
        **left_padded(RAGGED_PROMPTS), do_sample=True, max_new_tokens=12, pad_token_id=0
    )
    assert output.shape[1] == 5 + 12


def test_strict_prefix_greedy(models):
    inputs = left_padded(RAGGED_PROMPTS)
    output = enable_cascade(*models).generate(
        **inputs, **GREEDY, cascade_rule="token_v3", cascade_alpha=1.0, strict_prefix=7
    )
    assert torch.equal(output[:, :12], models[0].generate(**inputs, **GREEDY)[:, :12])


def test_statistics_add_up(models):
    model = enable_cascade(*models)
    model.generate(**left_padded(RAGGED_PROMPTS), **GREEDY, cascade_rule="token_v3", cascade_alpha=0.5)
    stats = model.cascade_statistics
    assert stats.new_tokens == [16] * 4
    for rounds, accepted, tokens in zip(stats.rounds, stats.accepted, stats.new_tokens, strict=True):
        assert tokens == accepted + rounds  # every round adds its accepted drafts and one token more
    assert stats.large_forwards == max(stats.rounds)
    assert stats.total_seconds >= stats.draft_seconds + stats.verify_seconds > 0
    row = stats.row(2)
    assert row["acceptance_rate"] == stats.accepted[2] / stats.drafted[2]
    assert row["call"]["new_tokens"] == 64
    model.generate(torch.tensor([[1, 2, 3]]), **GREEDY, cascade_rule="spec")
    assert model.cascade_statistics.deferred == [16.0] and model.cascade_statistics.drift == [0.0]


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"cascade_rule": "best"}, "Choose one of spec"),
        ({"cascade_rule": "token_v3", "cascade_alpha": 2.0}, r"\[0, 1\]"),
        ({"num_assistant_tokens": 0}, "at least 1"),
        ({"cascade_alpha": 0.2}, "rule 'spec' has none.*Name a rule"),
        ({"num_assistant_tokens": 2.5}, "whole number"),
        ({"strict_prefix": -1}, "at least 0"),
        ({"cascade_backend": "fast"}, "auto, batched, assisted"),
        ({"num_assistant_tokens_schedule": "often"}, "constant, heuristic"),
        ({"assistant_confidence_threshold": 2}, "probability"),
        ({"assistant_confidence_threshold": "high"}, "probability"),
        ({"num_beams": 3}, "num_beams=1"),
        ({"cache_implementation": "static"}, "static"),
        ({"use_cache": False}, "cache"),
    ],
)
def test_bad_arguments(models, kwargs, words):
    model = enable_cascade(*models)
    with pytest.raises(ValueError, match=words):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, **kwargs)
    assert model.cascade_statistics is None


def test_bad_models(models):
    large, small = models
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="mixes in a small model"):
        enable_cascade(large).generate(prompt, cascade_rule="opt")
    with pytest.raises(ValueError, match="Pass `tokenizer=` and `assistant_tokenizer=`"):
        enable_cascade(large, tiny_llama(1)).generate(prompt)
    with pytest.raises(ValueError, match=r"one device, got cpu \(large\) and meta \(small\)"):
        enable_cascade(large, copy.deepcopy(small).to("meta")).generate(prompt)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match="recurrent state"):
        enable_cascade(large, mamba).generate(prompt)
    with pytest.raises(ValueError, match="stateful"):
        enable_cascade(mamba, small).generate(prompt)
    with pytest.raises(TypeError, match="with `generate`"):
        enable_cascade(torch.nn.Linear(1, 1), small)
    with pytest.raises(TypeError, match="got 'small'. Load it first"):
        enable_cascade(large, "small")
    with pytest.raises(TypeError, match="got 'small'. Load it first"):
        enable_cascade(large).generate(prompt, assistant_model="small")
    with pytest.raises(TypeError, match="Unknown defaults"):
        enable_cascade(large, small, alpha=0.3)
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        enable_cascade(large, small, cascade_rule="diff", cascade_alpha=3.0)
    with pytest.raises(ValueError, match="rule 'spec' has none"):
        enable_cascade(large, small, cascade_alpha=0.3)


def test_bad_prompts(models):
    model = enable_cascade(*models)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(torch.empty(1, 0, dtype=torch.long))
    for mask in ([0, 0, 0], [1, 1, 0]):
        with pytest.raises(ValueError, match="Row 1 of `attention_mask` ends with padding"):
            model.generate(torch.ones(2, 3).long(), attention_mask=torch.tensor([[1, 1, 1], mask]))


def test_nan_logits_stop_with_a_sentence(models):
    large = copy.deepcopy(models[0])
    with torch.no_grad():
        large.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="NaN logits after 0 new tokens"):
        enable_cascade(large, models[1]).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
