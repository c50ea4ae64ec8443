"""What a cascading call must keep to itself, take back with rejected drafts, or refuse with a sentence."""

import copy
import threading

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MptConfig,
    Phi3Config,
    Phi3ForCausalLM,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation import BaseStreamer

from hf_iclr import enable_cascade
from hf_iclr.cache_argument import cache_inputs, find_cache
from hf_iclr.generation.cached_decoder import why_not_batched
from tests.generation.toy import GREEDY, RAGGED_PROMPTS, chi_square_z, left_padded, perturbed_copy, tiny_llama


PROMPT = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BACKENDS = ["batched", "assisted"]


def alone(prompt):
    return left_padded([prompt])  # with a mask: 0 is a token, too


@pytest.fixture(scope="module")
def models():
    large = tiny_llama(1, layers=2, vocab_size=50)
    return large, perturbed_copy(large)


# --- calls at once ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_of_many_threads(models, backend):
    """Each thread gets its own text and its own statistics, and nothing of a call stays on the models."""
    cascade = enable_cascade(*models)
    before = [(set(vars(model)), len(model._forward_hooks)) for model in (cascade, models[1])]
    inputs = [{"input_ids": torch.tensor([[index + 1, 2, 3]])} for index in range(8)]
    wanted = [models[0].generate(**row, **GREEDY) for row in inputs]
    failures = []

    def serve(index):
        for length in (5 + index, 16):
            call = {**GREEDY, "max_new_tokens": length, "cascade_rule": "spec", "cascade_backend": backend}
            output = cascade.generate(**inputs[index], **call)
            if not torch.equal(output, wanted[index][:, : 3 + length]):
                failures.append((index, output))
            statistics = cascade.cascade_statistics
            if (statistics.new_tokens, statistics.backend) != ([length], backend):
                failures.append((index, statistics))

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert cascade.cascade_statistics.new_tokens == [16]  # of the newest call: this thread made none
    after = [(set(vars(model)) - {"_newest_statistics"}, len(model._forward_hooks)) for model in (cascade, models[1])]
    assert after == before


def test_early_exits_at_once(models):
    """The draft stops at the first layer while another call verifies with both."""
    cascade, texts = enable_cascade(models[0]), []
    wanted = models[0].generate(**PROMPT, **GREEDY)

    def serve():
        for _ in range(4):
            texts.append(cascade.generate(**PROMPT, **GREEDY, assistant_early_exit=1, cascade_rule="spec"))

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 16 and all(torch.equal(text, wanted) for text in texts)
    assert models[0].config.num_hidden_layers == 2


# --- rotations that depend on the length -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_rope():
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    config = Phi3Config(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, max_position_embeddings=64, original_max_position_embeddings=16,
        rope_parameters={**rope, "original_max_position_embeddings": 16}, **NO_IDS,
    )  # fmt: skip
    return Phi3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def dynamic_rope():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return tiny_llama(1, layers=2, vocab_size=50, max_position_embeddings=12, rope_parameters=rope)


@pytest.mark.parametrize("gamma", [None, 1, 4, 9])
@pytest.mark.parametrize("length", [3, 10, 15, 16, 20])
@pytest.mark.parametrize("kind", ["long_rope", "dynamic_rope"])
def test_text_past_a_switch_of_the_rotation(request, kind, length, gamma):
    """Also where the cost of rounds is measured in the middle; a dynamic rotation remembers the longest text."""
    plain, large = (copy.deepcopy(request.getfixturevalue(kind)) for _ in range(2))
    prompt = {"input_ids": torch.arange(1, length + 1)[None]}
    cascade = enable_cascade(large, perturbed_copy(large))
    output = cascade.generate(**prompt, **GREEDY, cascade_rule="spec", num_assistant_tokens=gamma)
    assert torch.equal(output, plain.generate(**prompt, **GREEDY))
    assert cascade.cascade_statistics.backend == "batched"


def test_the_small_models_rotation_switches_too(long_rope):
    """With alpha 1 all tokens are the small model's own, also those after a draft past the switch was taken back."""
    small = perturbed_copy(long_rope)
    prompt = {"input_ids": torch.arange(1, 11)[None]}
    output = enable_cascade(long_rope, small).generate(**prompt, **GREEDY, cascade_rule="token_v3", cascade_alpha=1.0)
    assert torch.equal(output, small.generate(**prompt, **GREEDY))


def test_rows_that_would_pass_a_switch_at_different_times(long_rope, dynamic_rope):
    for large in (long_rope, dynamic_rope):
        cascade = enable_cascade(large, perturbed_copy(large))
        with pytest.raises(ValueError, match="rotary embedding changes at 1[26] tokens"):
            cascade.generate(**left_padded(RAGGED_PROMPTS), **GREEDY)
        with pytest.raises(ValueError, match="rotary embedding changes at 1[26] tokens"):
            cascade.generate(**PROMPT, **GREEDY, cascade_backend="assisted")
        short = {**GREEDY, "max_new_tokens": 5}
        output = cascade.generate(**left_padded(RAGGED_PROMPTS), **short, cascade_rule="spec")
        for row, prompt in zip(output, RAGGED_PROMPTS, strict=True):
            assert row[-5:].tolist() == large.generate(**alone(prompt), **short)[0, len(prompt) :].tolist()


# --- logits processors -----------------------------------------------------------------------------------------------


class TwoHalves(LogitsProcessor):
    """Allows the lower half of the ids, then the upper, then the lower, ... one step a call."""

    low = False

    def __call__(self, input_ids, scores):
        self.low = not self.low
        allowed = (torch.arange(scores.shape[-1]) < scores.shape[-1] // 2) == self.low
        return scores.masked_fill(~allowed, -torch.inf)


class NoFive(LogitsProcessor):
    """Bans token 5 by a number that a library takes for the least."""

    def __init__(self, least):
        self.least = least

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([5]), self.least)

    def clone(self):
        return self


class CloneableTwoHalves(TwoHalves):
    def clone(self):
        return copy.copy(self)


def halves(cls=CloneableTwoHalves):
    return LogitsProcessorList([cls()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_processor_that_may_have_a_state_is_refused(models, backend):
    cascade = enable_cascade(*models)
    with pytest.raises(ValueError, match=r"TwoHalves may be stateful.*`clone\(self\)`"):
        cascade.generate(**PROMPT, **GREEDY, logits_processor=halves(TwoHalves), cascade_backend=backend)
    assert cascade.cascade_statistics is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [1, 4])
def test_the_state_of_a_processor_is_taken_back(models, backend, gamma):
    processors = halves()
    call = {"cascade_rule": "spec", "cascade_backend": backend, "num_assistant_tokens": gamma}
    cascade = enable_cascade(*models)
    output = cascade.generate(**PROMPT, **GREEDY, logits_processor=processors, **call)
    assert torch.equal(output, models[0].generate(**PROMPT, **GREEDY, logits_processor=halves(TwoHalves)))
    assert 0 < sum(cascade.cascade_statistics.accepted) < sum(cascade.cascade_statistics.drafted)
    assert processors[0].low is False  # the caller's own was not used up


@pytest.mark.parametrize(("rule", "alpha"), [("spec", 0.0), ("token_v3", 1.0), ("chow", 0.5)])
def test_each_row_has_a_state_of_its_own(models, rule, alpha):
    call = {**GREEDY, "cascade_rule": rule, "cascade_alpha": alpha, "logits_processor": halves()}
    cascade = enable_cascade(*models)
    output = cascade.generate(**left_padded(RAGGED_PROMPTS), **call)
    for row, prompt in zip(output, RAGGED_PROMPTS, strict=True):
        text = cascade.generate(**alone(prompt), **call)[0, len(prompt) :]
        assert row[-16:].tolist() == text.tolist()
        assert ((text < 25) == torch.tensor([True, False] * 8)).all()


def test_law_under_a_processor_with_a_state():
    large, small = tiny_llama(1), tiny_llama(2)
    call = {"do_sample": True, "top_k": 0, "max_new_tokens": 2, "num_return_sequences": 6_000, "pad_token_id": 0}
    output = enable_cascade(large, small).generate(
        **PROMPT, **call, num_assistant_tokens=1, cascade_rule="spec", logits_processor=halves()
    )
    law = {}
    with torch.no_grad():
        first = large(PROMPT["input_ids"]).logits[0, -1, :3].softmax(-1)
        for token, mass in enumerate(first.tolist()):
            second = large(torch.tensor([[1, 2, 3, token]])).logits[0, -1, 3:].softmax(-1)
            law |= {(token, 3 + index): mass * other for index, other in enumerate(second.tolist())}
    assert abs(chi_square_z([tuple(row) for row in output[:, -2:].tolist()], law)) < 4.5


def test_guidance_is_refused(models):
    guided = {"guidance_scale": 2.0, "negative_prompt_ids": torch.tensor([[9, 8, 7]])}
    with pytest.raises(ValueError, match=r"guidance_scale=2.0 makes the large model read a second text"):
        enable_cascade(*models).generate(**PROMPT, **GREEDY, **guided)


@pytest.mark.parametrize("kwargs", [{"encoder_repetition_penalty": 1.7}, {"encoder_no_repeat_ngram_size": 1}])
def test_processors_that_read_the_prompt(models, kwargs):
    """A row is compared with its own prompt, also where a prompt has several rows."""
    cascade = enable_cascade(*models)
    call = {"max_new_tokens": 12, "do_sample": True, "top_k": 1, "pad_token_id": 0, "num_return_sequences": 2}
    inputs = {"input_ids": torch.tensor([[1, 2, 3], [7, 8, 9]])}
    output = cascade.generate(**inputs, **call, **kwargs, cascade_rule="spec")
    for index, row in enumerate(output):
        prompt = alone(inputs["input_ids"][index // 2].tolist())
        assert torch.equal(row, models[0].generate(**prompt, **{**GREEDY, "max_new_tokens": 12}, **kwargs)[0])


@pytest.mark.parametrize("options", [{}, {"assistant_confidence_threshold": 0.2}])
def test_bans_hold_after_a_short_draft(models, options):
    """Rows draft to different lengths, at the end of the text or where the small model is unsure: π reads the
    processed q after the last draft of each."""
    output = enable_cascade(*models).generate(
        **left_padded([[1, 2], [3], [4, 5, 6]]), do_sample=True, top_k=0, num_return_sequences=10, max_new_tokens=9,
        eos_token_id=None, pad_token_id=0, prefix_allowed_tokens_fn=lambda prompt, ids: [7 + prompt, 17 + prompt],
        num_assistant_tokens=4, cascade_rule="token_v3", cascade_alpha=1.0, **options,
    )  # fmt: skip
    for prompt in range(3):
        assert set(output[10 * prompt : 10 * prompt + 10, 3:].unique().tolist()) == {7 + prompt, 17 + prompt}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("least", [-torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_rules_read_the_probabilities_after_a_ban(backend, least):
    """Both models are sure of token 5, which is forbidden, and unsure of the rest: the large model must decide."""
    large = tiny_llama(1, layers=2, vocab_size=50)
    small = perturbed_copy(perturbed_copy(large))
    with torch.no_grad():
        for model in (large, small):
            model.model.embed_tokens.weight[:, 0] = 8.0
            model.lm_head.weight[:, 0] = 0.0
            model.lm_head.weight[5, 0] = 8.0
        assert small(PROMPT["input_ids"]).logits[0, -1].softmax(-1).max() > 0.9
    cascade = enable_cascade(large, small)
    ban = (
        {"suppress_tokens": [5]} if least == -torch.inf else {"logits_processor": LogitsProcessorList([NoFive(least)])}
    )
    call = {**ban, "cascade_rule": "chow", "cascade_alpha": 0.05, "cascade_backend": backend}
    cascade.generate(**PROMPT, **GREEDY, **call)
    assert cascade.cascade_statistics.deferred == [16.0]
    cascade.generate(**PROMPT, do_sample=True, max_new_tokens=16, pad_token_id=0, temperature=0.05, **call)
    assert cascade.cascade_statistics.deferred == [16.0]  # before the temperature


# --- stopping criteria -----------------------------------------------------------------------------------------------


class AllRowsDone(StoppingCriteria):
    """One flag a row, as evaluation harnesses keep."""

    def __init__(self, stop_ids, rows):
        self.stop_ids, self.done, self.seen = stop_ids, [False] * rows, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append((input_ids.shape, None if scores is None else len(scores)))
        for index, done in enumerate(self.done):
            self.done[index] = done or int(input_ids[index, -1]) in self.stop_ids
        return all(self.done)


class EachRow(AllRowsDone):
    def __call__(self, input_ids, scores, **kwargs):
        super().__call__(input_ids, scores)
        return torch.tensor(self.done)


@pytest.mark.parametrize("cls", [AllRowsDone, EachRow])
@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_criteria_are_asked_as_plain_generate_asks_them(models, cls, scores, rows):
    inputs = left_padded(RAGGED_PROMPTS[:rows])
    call = {**GREEDY, "max_new_tokens": 30, "return_dict_in_generate": True, "output_scores": scores}
    call["eos_token_id"] = 49  # with one, plain `generate` pads rows that are done
    width = inputs["input_ids"].shape[1]
    plain = models[0].generate(**inputs, **call).sequences
    stop_ids = set(plain[:, width + 6].tolist())
    ours, theirs = cls(stop_ids, rows), cls(stop_ids, rows)
    expected = models[0].generate(**inputs, **call, stopping_criteria=StoppingCriteriaList([theirs]))
    cascade = enable_cascade(*models)
    got = cascade.generate(**inputs, **call, cascade_rule="spec", stopping_criteria=StoppingCriteriaList([ours]))
    assert torch.equal(got.sequences, expected.sequences)
    assert ours.seen == theirs.seen
    assert sum(cascade.cascade_statistics.new_tokens) <= rows * (expected.sequences.shape[1] - width)
    if scores:
        assert len(got.scores) == len(expected.scores)


# --- what a model is -------------------------------------------------------------------------------------------------


class Pieces(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append("end")


class SeventhCall(StoppingCriteria):
    asked = 0

    def __call__(self, input_ids, scores, **kwargs):
        self.asked += 1
        return torch.full((len(input_ids),), self.asked >= 7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_criterion_that_stops_inside_a_draft(models, backend):
    """The text, its scores, its cache and what is streamed end with the token that stopped it."""
    found = []
    for model, more in ((models[0], {}), (enable_cascade(*models), {"cascade_backend": backend})):
        pieces, criteria = Pieces(), StoppingCriteriaList([SeventhCall()])
        call = {**GREEDY, "streamer": pieces, "return_dict_in_generate": True, "output_scores": True, **more}
        output = model.generate(**PROMPT, **call, stopping_criteria=criteria)
        cached = find_cache(output).get_seq_length()
        found.append((output.sequences.tolist(), pieces.tokens, len(output.scores), cached))
    assert found[0] == found[1] and found[1][2:] == (7, 9)


def test_a_first_call_in_train_mode_is_no_verdict():
    large = tiny_llama(1, layers=2, vocab_size=50, attention_dropout=0.3).train()
    cascade = enable_cascade(large, perturbed_copy(large).eval())
    assert "type `model.eval()`" in why_not_batched(large)
    cascade.generate(**PROMPT, **GREEDY)
    large.eval()
    inputs = left_padded(RAGGED_PROMPTS)
    assert torch.equal(
        cascade.eval().generate(**inputs, **GREEDY, cascade_rule="spec"), large.generate(**inputs, **GREEDY)
    )


def test_token_type_ids_reach_both_models():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.4, **NO_IDS)
    large = GPT2LMHeadModel(config).eval()
    small = perturbed_copy(large)
    inputs = left_padded(RAGGED_PROMPTS)
    inputs["token_type_ids"] = 7 + torch.arange(4)[:, None].expand_as(inputs["input_ids"]) * inputs["attention_mask"]
    plain = large.generate(**inputs, **GREEDY)
    assert not torch.equal(plain, large.generate(**left_padded(RAGGED_PROMPTS), **GREEDY))
    for alpha, model in ((0.0, large), (1.0, small)):
        cascade = enable_cascade(large, small)
        output = cascade.generate(**inputs, **GREEDY, cascade_rule="token_v3", cascade_alpha=alpha)
        assert torch.equal(output, model.generate(**inputs, **GREEDY))
    single = {name: value[2:3] for name, value in inputs.items()}
    output = cascade.generate(**single, **GREEDY, cascade_rule="spec", cascade_backend="assisted")
    assert torch.equal(output, large.generate(**single, **GREEDY))


def test_models_under_adapters(models, tmp_path):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    large, small = (get_peft_model(copy.deepcopy(model), lora) for model in models)
    inputs = left_padded(RAGGED_PROMPTS)
    plain = large.generate(**inputs, **GREEDY)
    assert not torch.equal(plain, models[0].generate(**inputs, **GREEDY))
    cascade = enable_cascade(large, small, num_assistant_tokens=4)
    assert torch.equal(cascade.generate(**inputs, **GREEDY, cascade_rule="spec"), plain)
    assert sum(cascade.cascade_statistics.accepted) > 0
    cascade.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists() and not (tmp_path / "model.safetensors").exists()
    prompt_tuned = get_peft_model(copy.deepcopy(models[0]), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(TypeError, match=r"learned a prompt \(PROMPT_TUNING\)"):
        enable_cascade(prompt_tuned, small)


# --- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_are_the_large_models(models, backend, do_sample):
    """`output_scores` holds the large model's processed scores and `output_logits` its raw ones, whatever the rule."""
    call = {"do_sample": do_sample, "max_new_tokens": 12, "pad_token_id": 0, "cascade_backend": backend}
    call |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    call |= {"temperature": 0.7, "top_k": 0} if do_sample else {}
    output = enable_cascade(models[0], tiny_llama(9, vocab_size=50)).generate(
        **PROMPT, **call, suppress_tokens=[4], cascade_rule="token_v3", cascade_alpha=0.9
    )
    with torch.no_grad():
        logits = models[0](output.sequences).logits[0, 2:-1]
    assert torch.allclose(torch.stack(output.logits)[:, 0], logits, atol=1e-4)
    expected = logits.index_fill(-1, torch.tensor([4]), -torch.inf) / (0.7 if do_sample else 1.0)
    assert torch.allclose(torch.stack(output.scores)[:, 0], expected, atol=1e-4)


@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[4]], RAGGED_PROMPTS], ids=["chat", "one token", "ragged"])
@pytest.mark.parametrize("gamma", [2, 6])
def test_a_chat_goes_on_from_the_cache_that_came_back(models, prompts, gamma):
    large, cascade = models[0], enable_cascade(*models)
    call = {**GREEDY, "return_dict_in_generate": True}
    rule = {"cascade_rule": "spec", "num_assistant_tokens": gamma}
    inputs = left_padded(prompts)
    plain, got = large.generate(**inputs, **call), cascade.generate(**inputs, **call, **rule)
    assert find_cache(got).get_seq_length() == find_cache(plain).get_seq_length() == plain.sequences.shape[1] - 1
    for which, used in zip(find_cache(got).layers, find_cache(plain).layers, strict=True):
        mask = inputs["attention_mask"].bool()
        mask = torch.nn.functional.pad(mask, (0, 15), value=True)[:, None, :, None]
        assert torch.allclose(which.keys * mask, used.keys * mask, atol=1e-4)
    turn = torch.cat([got.sequences, torch.full((len(prompts), 3), 8)], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 19), value=1)
    expected = large.generate(turn, attention_mask=mask, **GREEDY)
    for model, rules in ((cascade, rule), (large, {})):
        cache = cache_inputs(large, copy.deepcopy(find_cache(got)))
        assert torch.equal(model.generate(turn, attention_mask=mask, **cache, **GREEDY, **rules), expected)
    before = cascade.cascade_statistics.large_tokens
    cascade.generate(turn, attention_mask=mask, **GREEDY, **rule)
    assert before < cascade.cascade_statistics.large_tokens - 10  # the first turn was not read again


# --- sentences -------------------------------------------------------------------------------------------------------


class TurnByTurn:
    """A `prefix_allowed_tokens_fn` that counts what it was asked."""

    asked = 0

    def __call__(self, row, ids):
        self.asked += 1
        return range(25) if self.asked % 2 else range(25, 50)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens=3 asks for other drafts"),
        ({"assistant_early_exit": 1}, "assistant_early_exit=1 asks for other drafts"),
        ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight=0.5 asks for other drafts or another target"),
        ({"inputs_embeds": torch.zeros(1, 3, 16)}, "Pass `input_ids`"),
        ({"prefix_allowed_tokens_fn": TurnByTurn()}, "gave two answers about one text, so it is stateful"),
    ],
)
def test_arguments_that_would_be_ignored(models, kwargs, words):
    with pytest.raises(ValueError, match=words):
        enable_cascade(*models).generate(**({} if "inputs_embeds" in kwargs else PROMPT), **GREEDY, **kwargs)


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "mpt"])
def test_a_text_past_the_small_models_positions(models, model_type):
    """A table that was learned, one of sines, and one of distances."""
    config = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, **NO_IDS}
    small = {"gpt2": GPT2Config(**config), "gptj": GPTJConfig(**config, rotary_dim=4)}
    small["mpt"] = MptConfig(vocab_size=50, d_model=16, n_layers=1, n_heads=2, max_seq_len=16)
    small = AutoModelForCausalLM.from_config(small[model_type]).eval()
    cascade = enable_cascade(models[0], small)
    with pytest.raises(ValueError, match="small model has 16 positions; a prompt of 3 tokens and 16 new ones need 18"):
        cascade.generate(**PROMPT, **GREEDY)
    short = {**GREEDY, "max_new_tokens": 14}
    assert torch.equal(cascade.generate(**PROMPT, **short, cascade_rule="spec"), models[0].generate(**PROMPT, **short))


def test_a_cache_that_is_no_start_of_the_text(models):
    cache = cache_inputs(models[0], DynamicCache())
    models[0](torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), **cache)
    with pytest.raises(ValueError, match="cache given holds 4 tokens and the ids only 3: pass all of them"):
        enable_cascade(*models).generate(torch.ones(2, 3).long(), **cache, max_new_tokens=4)
