"""`generate` of a cascade: equality with its parents, everything a user of `generate` expects, and bad input."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    T5Config,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_iclr import SpeculativeCascadeGenerationMixin, enable_cascade
from tests.generation.toy import RAGGED_PROMPTS, left_padded, tiny_llama


GREEDY = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}


@pytest.fixture(scope="module")
def models():
    # alike enough that drafts are sometimes accepted
    large = tiny_llama(1, layers=2, vocab_size=50)
    small = copy.deepcopy(large)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return large, small


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


# --- architectures ---------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma2": {"sliding_window": 6, "head_dim": 8},
    "gemma3_text": {"sliding_window": 6, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 32},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "phi": {},
    "phi3": {"sliding_window": 6, "pad_token_id": None},
    "falcon": {"num_kv_heads": 1, "alibi": False, "new_decoder_architecture": False},
}


def tiny(model_type, seed, **kwargs):
    torch.manual_seed(seed)
    common = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.4,
    }
    if model_type in ("gpt_neox", "opt", "falcon", "phi"):
        common.pop("num_key_value_heads")
    if model_type == "gpt2":
        common = {key: value for key, value in common.items() if key in ("vocab_size", "initializer_range")}
        common.update(bos_token_id=None, eos_token_id=None)
    config = CONFIG_MAPPING[model_type](**{**common, **kwargs})
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_ragged_batches_of_every_architecture(model_type, attention):
    """Greedy `spec` on ragged rows equals each prompt alone, past the sliding window."""
    if model_type == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma 2 caps attention logits, which sdpa does not")
    large = tiny(model_type, 1, **ARCHITECTURES[model_type], attn_implementation=attention)
    small = copy.deepcopy(large)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    prompts = [*RAGGED_PROMPTS, [9, 8, 7, 6, 5, 4, 3, 2, 1]]
    model = enable_cascade(large, small)
    output = model.generate(**left_padded(prompts), **GREEDY, cascade_rule="spec", cascade_backend="batched")
    assert model.cascade_statistics.backend == "batched"
    for prompt, row in zip(prompts, output, strict=True):
        alone = large.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **GREEDY)
        assert row[-16:].tolist() == alone[0, len(prompt) :].tolist()


def test_encoder_decoder_takes_the_assisted_loop():
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        eos_token_id=None, pad_token_id=0, initializer_factor=20.0,
    )  # fmt: skip
    torch.manual_seed(0)
    large, small = (AutoModelForSeq2SeqLM.from_config(config).eval() for _ in range(2))
    model = enable_cascade(large, small)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, cascade_rule="spec")
    assert torch.equal(output, large.generate(**inputs, do_sample=False, max_new_tokens=12))
    assert model.cascade_statistics.backend == "assisted"
    model.generate(**inputs, do_sample=True, max_new_tokens=12, cascade_rule="token_v2", cascade_alpha=1.0)
    assert model.cascade_statistics.deferred[0] < 12
    with pytest.raises(ValueError, match="encoder-decoder"):
        model.generate(input_ids=torch.ones(2, 4).long(), max_new_tokens=4)


def test_early_exit_drafts_with_the_model_itself(models):
    large = models[0]
    model = enable_cascade(large)
    output = model.generate(torch.tensor([[1, 2, 3]]), **GREEDY, assistant_early_exit=1, cascade_rule="spec")
    assert torch.equal(output, large.generate(torch.tensor([[1, 2, 3]]), **GREEDY))
    stats = model.cascade_statistics
    assert stats.backend == "assisted" and stats.small_forwards > stats.large_forwards > 0


def test_padded_vocabularies_of_one_tokenizer(models, word_tokenizer):
    """Embeddings padded to other sizes (as Qwen's are): the batched loop aligns them when the tokenizers agree."""
    torch.manual_seed(3)
    small = tiny_llama(4, vocab_size=58)
    inputs = left_padded(RAGGED_PROMPTS)
    tokenizers = {"tokenizer": word_tokenizer, "assistant_tokenizer": word_tokenizer}
    for pair in ((models[0], small), (small, models[0])):
        model = enable_cascade(*pair)
        output = model.generate(**inputs, **GREEDY, **tokenizers, cascade_rule="spec")
        assert torch.equal(output, pair[0].generate(**inputs, **GREEDY))
        model.generate(**inputs, do_sample=True, max_new_tokens=9, pad_token_id=0, **tokenizers)
        assert model.cascade_statistics.backend == "batched"


def other_vocabulary():
    """40 of the 50 words of `word_tokenizer` with other ids, and five words it lacks."""
    vocabulary = {"w0": 0} | {f"w{50 - index}": index for index in range(1, 40)}
    vocabulary |= {f"x{index}": index for index in range(40, 45)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w0", padding_side="left")


def test_different_tokenizers_take_the_assisted_loop(models, word_tokenizer):
    large, prompt = models[0], {"input_ids": torch.tensor([[21, 22, 23]]), "attention_mask": torch.ones(1, 3).long()}
    tokenizers = {"tokenizer": word_tokenizer, "assistant_tokenizer": other_vocabulary()}
    model = enable_cascade(large, tiny_llama(4, vocab_size=45))
    output = model.generate(**prompt, **GREEDY, **tokenizers, cascade_rule="spec")
    assert torch.equal(output, large.generate(**prompt, **GREEDY))
    assert model.cascade_statistics.backend == "assisted"
    with pytest.raises(ValueError, match="Choose one of spec, token_v2, token_v3"):
        model.generate(**prompt, **GREEDY, **tokenizers, cascade_rule="opt")
    model.generate(**prompt, do_sample=True, max_new_tokens=16, **tokenizers, cascade_rule="diff", cascade_alpha=1.0)
    assert model.cascade_statistics.new_tokens == [16]
    with pytest.raises(ValueError, match="different vocabularies"):
        model.generate(torch.tensor([[21, 22], [23, 24]]), **GREEDY, **tokenizers)


def test_vision_language_model_with_a_text_only_draft(models):
    """Pixels reach the large model; the small one reads the tokens alone."""
    text = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    large = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=49, image_seq_length=4)
    ).eval()
    model = enable_cascade(large, models[1])
    inputs = {
        "input_ids": torch.tensor([[1, 49, 49, 49, 49, 2, 3]]),
        "attention_mask": torch.ones(1, 7).long(),
        "pixel_values": torch.randn(1, 3, 8, 8),
    }
    kwargs = {**GREEDY, "suppress_tokens": [49]}
    output = model.generate(**inputs, **kwargs, cascade_rule="spec")
    assert torch.equal(output, large.generate(**inputs, **kwargs))
    assert model.cascade_statistics.backend == "assisted"
    other = model.generate(**{**inputs, "pixel_values": torch.randn(1, 3, 8, 8)}, **kwargs, cascade_rule="spec")
    assert not torch.equal(output, other)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"cascade_rule": "best"}, "Choose one of spec"),
        ({"cascade_rule": "token_v3", "cascade_alpha": 2.0}, r"\[0, 1\]"),
        ({"num_assistant_tokens": 0}, "at least 1"),
        ({"num_assistant_tokens": 2.5}, "whole number"),
        ({"strict_prefix": -1}, "at least 0"),
        ({"cascade_backend": "fast"}, "auto, batched, assisted"),
        ({"num_assistant_tokens_schedule": "often"}, "constant, heuristic"),
        ({"assistant_confidence_threshold": 2}, "probability"),
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
    with pytest.raises(ValueError, match="needs a small model"):
        enable_cascade(large).generate(prompt)
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
    with pytest.raises(TypeError, match="Unknown defaults"):
        enable_cascade(large, small, alpha=0.3)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        enable_cascade(large, small, cascade_alpha=3.0)


def test_bad_prompts(models):
    model = enable_cascade(*models)
    with pytest.raises(ValueError, match="at least one token"):
        model.generate(torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="Row 1"):
        model.generate(torch.ones(2, 3).long(), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(ValueError, match="past_key_values"):
        cache = DynamicCache()
        models[0](torch.tensor([[1, 2], [1, 2]]), past_key_values=cache)
        model.generate(torch.ones(2, 3).long(), past_key_values=cache, max_new_tokens=4)


def test_nan_logits_stop_with_a_sentence(models):
    large = copy.deepcopy(models[0])
    with torch.no_grad():
        large.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="NaN logits after 0 new tokens"):
        enable_cascade(large, models[1]).generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4)
