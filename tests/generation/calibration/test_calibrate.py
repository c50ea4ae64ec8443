import copy
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_iclr.generation.calibration import calibrate as cascade_calibration
from hf_iclr.generation.calibration.calibrate import CascadeCosts, calibrate_cascade
from hf_iclr.generation.calibration.teacher_forcing import expected_rounds, prepare_config, read_texts
from hf_iclr.generation.calibration.texts import Text
from hf_iclr.generation.cascade_generation import enable_cascade
from hf_iclr.generation.deferral_rules import cascade_target, total_variation
from tests.generation.calibration.conftest import noisy_copy


STORIES = Path(__file__).parents[4] / "shared" / "data" / "models" / "stories260k"
POSITIONWISE = [
    ("chow", 0.3), ("chow_log", 1.0), ("diff", 0.1), ("opt", 0.2), ("opt_log", 0.5), ("token_v1", 0.2),
    ("token_v2", 0.3), ("token_v3", 0.8), ("lossy", 0.4), ("ensemble", 0.6),
]  # fmt: skip
SAMPLING = {"do_sample": True, "top_k": 0}


@pytest.fixture(autouse=True)
def fixed_costs(monkeypatch):
    """Seconds would differ from run to run; one test undoes this."""
    costs = CascadeCosts(0.01, 0.001, 0.011, 0.002)
    monkeypatch.setattr(cascade_calibration._Run, "time", lambda run, texts: setattr(run, "costs", costs))


@pytest.fixture(scope="module")
def dataset(pair, word_tokenizer):
    large, _ = pair
    torch.manual_seed(0)
    rows = large.generate(torch.randint(50, (192, 1)), max_new_tokens=47, pad_token_id=0, **SAMPLING)
    return datasets.Dataset.from_dict({"text": word_tokenizer.batch_decode(rows)})


def calibrate(model, dataset, target, tokenizer, **kwargs):
    settings = {"prompt_tokens": 8, "max_new_tokens": 40, "max_tokens": 3840, "batch_size": 96, **SAMPLING}
    return calibrate_cascade(model, dataset, target, tokenizer=tokenizer, **{**settings, **kwargs})


@pytest.mark.parametrize(
    "rule, target",
    [("token_v3", {"deferral_rate": 0.3}), ("opt", {"acceptance": 0.7})],
)
def test_hits_the_target_on_held_out_prompts(model, dataset, word_tokenizer, rule, target):
    result = calibrate(model, dataset, target, word_tokenizer, rule=rule)
    assert abs(result.relative_error) < 0.1
    assert result.measured != result.value  # a measurement, not the prediction
    assert 0 < result.standard_error < 0.05
    assert (model.generation_config.cascade_rule, model.generation_config.cascade_alpha) == (rule, result.alpha)
    assert (result.table["deferral_rate"].diff().dropna() <= 1e-6).all()
    assert (result.table["acceptance"].diff().dropna() >= -1e-6).all()

    # the same rate again, from another seed and the defaults that were set
    inputs = word_tokenizer([row.rsplit(" ", 40)[0] for row in dataset["text"]], return_tensors="pt")
    torch.manual_seed(5)
    model.generate(**inputs, **SAMPLING, max_new_tokens=40, pad_token_id=0)
    counts = model.cascade_statistics.to_dict()
    name, value = next(iter(target.items()))
    assert counts[{"acceptance": "acceptance_rate"}.get(name, name)] == pytest.approx(value, rel=0.1)


def test_hits_a_speedup(model, dataset, word_tokenizer):
    """With the costs above, and again from another seed one prompt at a time, where all forwards are counted."""
    result = calibrate(model, dataset, {"speedup": 1.5}, word_tokenizer)
    assert abs(result.relative_error) < 0.1

    torch.manual_seed(3)
    tokens, seconds = 0, 0.0
    for index in range(12):
        model.generate(torch.tensor([[index, 3, 5]]), **SAMPLING, max_new_tokens=40, pad_token_id=0)
        done = model.cascade_statistics
        tokens += done.new_tokens[0]
        seconds += 0.001 * done.small_forwards + 0.013 * done.large_forwards
    assert 0.01 * tokens / seconds == pytest.approx(1.5, rel=0.15)


def test_times_both_models(pair, model, dataset, word_tokenizer, monkeypatch):
    """
    On a clock that forwards alone move: 10 ms for one token of the large model, 13 ms for several, 1 ms for the small
    one. Alone, the large model reads the prompt by one forward and makes one a token from there: 13 + 39 · 10 ms for
    40 tokens. A draft is a token, a verification several but at the very end, and the rest of a round takes nothing.
    """
    monkeypatch.undo()
    _, small = pair
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def tick(module, _, kwargs, __):
        now[0] += 0.001 if module is small else 0.010 if kwargs["input_ids"].shape[1] == 1 else 0.013

    hooks = [each.register_forward_hook(tick, with_kwargs=True) for each in pair]
    try:
        costs = calibrate(model, dataset, {"deferral_rate": 0.5}, word_tokenizer, max_tokens=40, check=False).costs
    finally:
        for hook in hooks:
            hook.remove()
    assert [costs.plain, costs.draft, costs.overhead] == pytest.approx([(13 + 39 * 10) / 40e3, 0.001, 0], abs=1e-9)
    assert 0.012 < costs.verify <= 0.013 + 1e-9


def test_check_corrects_what_the_texts_do_not_show(model, dataset, word_tokenizer):
    """A strict prefix of 10 of 40 tokens defers a quarter on top: the given texts' alpha would defer 62 %."""
    result = calibrate(model, dataset, {"deferral_rate": 0.5}, word_tokenizer, rule="diff", strict_prefix=10)
    assert abs(result.relative_error) < 0.1
    assert result.alpha > result.teacher_forced_alpha + 0.02


def test_rates_that_move_more_than_texts_show(model, dataset, word_tokenizer, monkeypatch):
    """Measured is the square of what is read: by the last measurement alone, .3 and 1 would follow each other."""
    squared = lambda self, name, counts, expected: (self.rate(name, expected) ** 2, 0.01)  # noqa: E731
    monkeypatch.setattr(sys.modules[calibrate_cascade.__module__]._Run, "measure", squared)
    result = calibrate(model, dataset, {"deferral_rate": 0.3}, word_tokenizer)
    assert abs(result.relative_error) < 0.1
    assert result.predicted == pytest.approx(result.measured, rel=0.1)


@pytest.mark.parametrize(
    "generation",
    [{**SAMPLING}, {**SAMPLING, "temperature": 0.7}, {"do_sample": False}, {"do_sample": True, "top_k": 9}],
)
@pytest.mark.parametrize("rule, alpha", POSITIONWISE)
def test_rates_are_those_of_the_rule(pair, model, rule, alpha, generation):
    """Every position by brute force: fresh forwards, full distributions, the target of the rule itself."""
    large, small = pair
    texts = [Text([1, 2, 3], [4, 5, 6, 7, 8]), Text([9], [3, 1, 4])]
    config = prepare_config(model, **generation)
    read = read_texts(model, small, texts, rule, config)
    rates = read.rates(alpha)
    temperature = generation.get("temperature", 1.0)
    for index, text in enumerate(texts):
        for step in range(len(text.continuation)):
            ids = torch.tensor([text.prompt + text.continuation[:step]])
            with torch.no_grad():
                logits = [half(input_ids=ids).logits[0, -1] for half in (small, large)]
            q0, p0 = (half.softmax(-1) for half in logits)
            if generation.get("top_k"):  # most tokens have q = 0, and mass of p
                logits = [half.masked_fill(half < half.topk(9).values[-1], -torch.inf) for half in logits]
            q, p = (
                (half / temperature).softmax(-1) if config.do_sample else (half == half.max()).float()
                for half in logits
            )
            pi, deferred = cascade_target(rule, alpha, q, p, q0, p0)
            if rule == "ensemble" and not config.do_sample:
                pi = alpha * q0 + (1 - alpha) * p0
                pi = (pi == pi.max()).float()
            expected = deferred, torch.minimum(q, pi).sum(), total_variation(pi, p)
            actual = [float(part[index, step]) for part in rates]
            assert actual == pytest.approx([float(part) for part in expected], abs=2e-5)
    assert all((part[1, 3:] == 0).all() for part in rates)  # after the end of the shorter text


@pytest.mark.parametrize("rule", ["chow", "diff", "opt"])
def test_alpha_of_a_threshold_rule_is_a_quantile(model, dataset, word_tokenizer, rule):
    """The share of positions whose score exceeds alpha is the deferral rate, to within one position."""
    result = calibrate(model, dataset, {"deferral_rate": 0.25}, word_tokenizer, rule=rule, check=False, apply=False)
    texts = [Text(ids[:8], ids[8:]) for ids in word_tokenizer(list(dataset["text"]))["input_ids"]]
    order = np.random.default_rng(0).permutation(192)[:96]  # seed 0; 3840 tokens of 40 are 96 texts
    _, small = model.cascade_pair
    read = read_texts(model, small, [texts[i] for i in order], rule, prepare_config(model, **SAMPLING))
    assert read.rates(result.alpha)[0].sum() / 3840 == pytest.approx(0.25, abs=1.01 / 3840)
    assert np.quantile(read.stored[0], 0.75) == pytest.approx(result.alpha, abs=0.01)
    assert (
        not hasattr(model.generation_config, "cascade_alpha") or model.generation_config.cascade_alpha != result.alpha
    )


def test_expected_rounds_by_hand():
    """
    Three tokens, drafts of one, acceptance 0.5 everywhere. From 0: kept (1/2) emits 2 tokens, next round at 2;
    rejected, next at 1. From 1: one draft; kept, the text ends; rejected, the next is at 2, where nothing is drafted.
    Rounds at 0: 1; at 1: 1/2; at 2: 1/2 (kept at 0) + 1/4 (rejected at 1). So 2.25 rounds, 1.5 drafts, 0.75 kept, and
    small forwards: 1.5 drafts + 0.75 after a kept one + 0.75 in the round without a draft.
    """
    rounds = expected_rounds(np.full((1, 3), 0.5), np.array([3]), 1)
    assert rounds == pytest.approx((2.25, 1.5, 0.75, 3.0))


def test_expected_rounds_of_a_long_text():
    """E = (1 - a^(γ+1)) / (1 - a) tokens a round where acceptance is constant."""
    rounds = expected_rounds(np.full((2, 4000), 0.8), np.array([4000, 4000]), 4)
    assert 8000 / rounds.rounds == pytest.approx((1 - 0.8**5) / 0.2, rel=1e-3)
    certain = expected_rounds(np.ones((1, 10)), np.array([10]), 4)
    assert certain == pytest.approx((2, 8, 8, 10))


def test_expected_rounds_are_those_of_generate(model, pair):
    """Acceptance 1 (chow, alpha 1) and 0 in greedy decoding leave nothing to chance."""
    inputs = {"input_ids": torch.tensor([[1, 2, 3]])}
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=23,
        num_assistant_tokens=3,
        cascade_rule="token_v3",
        cascade_alpha=0.5,
    )
    done = model.cascade_statistics
    config = prepare_config(model, do_sample=False)
    text = Text([1, 2, 3], output[0, 3:].tolist())
    read = read_texts(model, pair[1], [text], "token_v3", config)
    rounds = expected_rounds(read.rates(0.5)[1], read.lengths, 3)
    assert rounds == pytest.approx((done.rounds[0], done.drafted[0], done.accepted[0], done.small_forwards))


def test_speedup_by_hand():
    """100 tokens at 10 ms are 1 s; 40 rounds of 10 + 1 ms and 150 drafts of 1 ms are 0.59 s."""
    assert CascadeCosts(0.01, 0.001, 0.01, 0.001).speedup(100, 40, 150) == pytest.approx(1 / 0.59)


def test_chats(model, word_tokenizer):
    word_tokenizer = copy.deepcopy(word_tokenizer)
    word_tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] }} {% endfor %}{% if add_generation_prompt %}w7{% endif %}"
    )
    rows = [
        [{"role": "user", "content": f"w{i} w2"}, {"role": "assistant", "content": " ".join([f"w{i}"] * 30)}]
        for i in range(20)
    ]
    chats = datasets.Dataset.from_dict({"messages": rows})
    result = calibrate(model, chats, {"deferral_rate": 0.3}, word_tokenizer, check=False)
    assert result.predicted == pytest.approx(0.3)


def test_what_is_predicted_without_a_check_is_computed(pair, model, word_tokenizer):
    """Fourteen positions defer in fourteenths: what alpha gives on them is not what was asked for."""
    rows = ["w1 w2 w3 w4 w5 w6 w7 w8", "w9 w8 w7 w6 w5 w4 w3 w2"]
    call = {"check": False, "prompt_tokens": 1, "max_new_tokens": 7, "rule": "chow"}
    result = calibrate(model, rows, {"deferral_rate": 0.4}, word_tokenizer, **call)
    with torch.no_grad():
        ids = torch.tensor(word_tokenizer(rows)["input_ids"])
        confidence = pair[1](ids).logits[:, :-1].softmax(-1).amax(-1)
    # The alpha lies on the confidence of a position: a last bit says on which side.
    few, many = ((confidence < 1 - result.alpha + bit).double().mean().item() for bit in (-1e-6, 1e-6))
    assert min(abs(result.predicted - share) for share in (few, many)) < 1e-9 and many - few < 1 / 13


def test_two_padded_sizes_of_one_vocabulary(pair, dataset, word_tokenizer, tmp_path):
    """The small model's embeddings have six rows more, which are no words: the same alpha is found."""
    large, small = pair
    padded = copy.deepcopy(small)
    padded.resize_token_embeddings(56)
    padded.lm_head.weight.data[50:] = 0
    models = []
    for name, model in (("large", large), ("small", padded)):
        model.save_pretrained(tmp_path / name)
        word_tokenizer.save_pretrained(tmp_path / name)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    call = {"check": False, "max_tokens": 400}
    found = [
        calibrate(enable_cascade(*models), dataset, {"acceptance": 0.7}, word_tokenizer, **call).alpha
        for models in (pair, models)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"target": {"deferal": 0.3}}, "with one of deferral_rate, acceptance, speedup, got {'deferal'"),
        ({"target": {"deferral_rate": 0.3, "acceptance": 0.5}}, "a target of one entry"),
        ({"target": {"deferral_rate": 1.2}}, "a share between 0 and 1 for deferral_rate, got 1.2"),
        ({"target": {"speedup": 0}}, "a speedup above 0"),
        ({"target": {"deferral_rate": "0.3"}}, "a share between 0 and 1 for deferral_rate, got '0.3'"),
        ({"target": {"acceptance": float("nan")}}, "a share between 0 and 1"),
        ({"target": {"acceptance": 0.001}}, r"can't be reached .* value in \[0\..*\]. The nearest is .* at alpha="),
        ({"dataset": []}, "at least 2 rows, half of them held out, got 0"),
        ({"dataset": datasets.Dataset.from_dict({"story": ["w1 w2"] * 4})}, "no column 'text', only story"),
        ({"dataset": [{"story": "w1 w2"}] * 4}, "no column 'text', only story"),
        ({"dataset": ["w1", "w2"]}, "texts of at least two tokens"),
        ({"rule": "spec"}, "a rule with an alpha to calibrate, got 'spec'"),
        ({"max_new_tokens": 1}, "max_new_tokens of at least 2"),
        ({"prompt_tokens": 0}, "prompt_tokens of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size of at least 1, got 0"),
        ({"num_assistant_tokens": 0}, "num_assistant_tokens must be a whole number"),
        ({"num_return_sequences": 2}, "one text a prompt"),
        ({"dataset": datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["w1 w2"]})})}, "name one"),
        ({"dataset": iter(["w1 w2", "w3 w4"])}, r"of a stream, `list\("),
        ({"dataset": "w1 w2 w3"}, "a list of its rows, got a str"),
        ({"dataset": [None, "w1 w2"]}, "a text, or a chat that ends with an answer, got None"),
        ({"dataset": [{"messages": [{"role": "user", "content": "w1"}]}] * 2}, "a chat that ends with an answer"),
        ({"temprature": 1}, "got temprature"),
    ],
)
def test_bad_input(model, dataset, word_tokenizer, change, message):
    arguments = {"dataset": dataset, "target": {"deferral_rate": 0.3}, "tokenizer": word_tokenizer, **change}
    with pytest.raises(ValueError, match=message):
        calibrate(model, **arguments)


def test_needs_a_cascade(pair, dataset, word_tokenizer):
    with pytest.raises(TypeError, match=r"enable_cascade\(model, small\)"):
        calibrate(pair[0], dataset, {"deferral_rate": 0.3}, word_tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(not STORIES.exists(), reason=f"no {STORIES}")
def test_hits_the_target_with_a_trained_model():
    """A trained Llama, the drafts of its noisy copy, and stories it writes itself."""
    large, tokenizer = AutoModelForCausalLM.from_pretrained(STORIES).eval(), AutoTokenizer.from_pretrained(STORIES)
    model = enable_cascade(large, noisy_copy(large, 0.2))
    rows = large.generate(torch.full((64, 1), tokenizer.bos_token_id), max_new_tokens=60, pad_token_id=0, **SAMPLING)
    stories = tokenizer.batch_decode(rows, skip_special_tokens=True)
    result = calibrate(model, stories, {"deferral_rate": 0.3}, tokenizer, rule="token_v3", batch_size=32)
    assert abs(result.relative_error) < 0.1
