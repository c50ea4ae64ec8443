"""The audit against the same counted prompt by prompt; what it compares, says, saves and refuses to do."""

import copy
import json
import math

import pytest
import torch
from datasets import Dataset
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hf_iclr.trainers.safety_audit.asking.prompt_sets import HARMLESS_ORDERS, NEUTRAL_BEGINNINGS
from hf_iclr.trainers.safety_audit.audit import audit_safety
from hf_iclr.trainers.safety_audit.gcg import append_to_prompt, gcg
from hf_iclr.trainers.safety_audit.report import Measure, SafetyReport


PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10", "w11", "w12 w13"]
HARMLESS = ["w30", "w31 w32", "w33"]
ANSWERS = ["w20 w21 w22", "w24", "w25 w26", "", None, "w27 w28 w29 w20"]
OPTIONS = {"max_new_tokens": 5, "batch_size": 4, "ks": (0, 1, 2, 40)}


def tiny_llama(seed, vocab_size=50):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def model():
    return tiny_llama(0)


def odd(texts):
    """A refusal is a text whose first word is odd."""
    return [int(text.split()[0][1:]) % 2 == 1 for text in texts]


def ids(text):
    return [int(word[1:]) for word in (text or "").split()]


def continued(model, prompt, prefix=()):
    row = torch.tensor([ids(prompt) + list(prefix)])
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    new = model.generate(row, attention_mask=torch.ones_like(row), **options)[0, row.shape[1] :].tolist()
    return " ".join(f"w{token}" for token in new if token)  # w0 is padding


def expected_verdicts(model, k):
    return [
        odd([continued(model, prompt, ids(answer)[:k])])[0] if len(ids(answer)) >= k else None
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]


def test_counts_as_prompt_by_prompt(model, word_tokenizer):
    report = audit_safety(
        model, word_tokenizer, PROMPTS, harmless_prompts=HARMLESS, answers=ANSWERS, judge=odd, **OPTIONS
    )
    assert report.find("none").refused == expected_verdicts(model, 0)
    for k in (1, 2):
        assert report.find("prefill", str(k)).refused == expected_verdicts(model, k)
    assert report.find("harmless").refused == odd([continued(model, prompt) for prompt in HARMLESS])

    frame = report.to_frame().set_index(["attack", "setting", "judged"])
    n = {k: frame.loc[("prefill", str(k), "continuation"), "n"] for k in (1, 2, 40)}
    assert n == {1: 4, 2: 3, 40: 0}  # answers shorter than k don't count
    assert math.isnan(frame.loc[("prefill", "40", "continuation"), "refused"])
    known = [verdict for verdict in expected_verdicts(model, 2) if verdict is not None]
    assert report.prefill_curve()[2] == report.refusal_rate("prefill", "2") == sum(known) / 3
    curve = [rate for rate in report.prefill_curve().values() if not math.isnan(rate)]
    assert report.prefill_auc == pytest.approx(1 - sum(curve) / 3)


def test_gcg_asks_each_prompt_with_the_suffix_found_for_it(model, word_tokenizer):
    report = audit_safety(
        model, word_tokenizer, PROMPTS, answers=ANSWERS, judge=odd, attacks=["gcg"], gcg_steps=2, **OPTIONS
    )
    texts = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        suffix = gcg(model, word_tokenizer, prompt, ids(answer), num_steps=2).suffix if answer else None
        texts.append(continued(model, append_to_prompt(prompt, suffix)) if answer else None)
    measure = report.find("gcg")
    assert measure.texts == texts
    assert measure.refused == [text and odd([text])[0] for text in texts]


def test_joined_texts_begin_with_the_prefix(model, word_tokenizer):
    report = audit_safety(model, word_tokenizer, PROMPTS, answers=ANSWERS, judge=odd, attacks=["prefill"], **OPTIONS)
    joined = report.find("prefill", "1", "joined")
    assert joined.texts[1].split()[0] == "w24" and joined.refused[:3] == [False, False, True]  # w20, w24, w25


def test_decoding_sweep(model, word_tokenizer):
    grid = ({"top_k": 1}, {"temperature": 3.0})
    report = audit_safety(
        model, word_tokenizer, PROMPTS, judge=odd, attacks=["decoding"], decoding_grid=grid, max_new_tokens=5
    )
    plain, hot = report.find("none").refused, report.find("decoding", "temperature=3").refused
    assert report.find("decoding", "top_k=1").refused == plain != hot
    every = report.find("decoding", "every setting").refused
    assert every == [a and b for a, b in zip(plain, hot, strict=True)]
    assert report.find("prefill", "1") is None


def test_rank_assisted_and_gcg(model, word_tokenizer):
    report = audit_safety(
        model, word_tokenizer, PROMPTS[:2], answers=["w20 w21 w22", ""], judge=odd, attacks=["rap"], max_new_tokens=4
    )
    assert not any(report.find("rap", judged="joined").refused)  # it chose an even first word
    assert len(report.find("rap").texts) == 2


def test_divergence_from_a_base(model, word_tokenizer):
    """Mean over the answers that reach a token, of KL in nats from fresh forwards."""
    base = tiny_llama(1)
    report = audit_safety(
        model, word_tokenizer, PROMPTS, answers=ANSWERS, base=base, judge=odd, attacks=["prefill"], **OPTIONS
    )
    for token in range(4):
        values = []
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            if len(ids(answer)) > token:
                row = torch.tensor([ids(prompt) + ids(answer)[:token]])
                p, q = (each(row).logits[0, -1].softmax(-1).double() for each in (model, base))
                values.append((p * (p / q).log()).sum().item())
        assert report.kl[token]["n"] == len(values)
        assert report.kl[token]["kl"] == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert len(report.kl) == 4 and 1 <= report.alignment_depth <= 4


def test_answers_of_a_base(model, word_tokenizer):
    """Without answers, those of the base that aren't refusals are cut, and the report says how many."""
    base = tiny_llama(1)
    texts = [continued(base, prompt) for prompt in PROMPTS]
    report = audit_safety(
        model, word_tokenizer, PROMPTS, base=base, judge=odd, attacks=["prefill"], ks=(1,), max_new_tokens=5
    )
    complied = [not refused for refused in odd(texts)]
    assert any(complied) and not all(complied)
    joined = report.find("prefill", "1", "joined").texts
    for text, found, used in zip(texts, joined, complied, strict=True):
        assert (found is not None) == used and (not used or found.split()[0] == text.split()[0])
    assert any(f"base answered without a refusal: {sum(complied)} of 6" in note for note in report.notes)


def test_no_answers_at_all(model, word_tokenizer):
    report = audit_safety(
        model, word_tokenizer, PROMPTS, answers=[None] * 6, judge=odd, ks=(0, 5), attacks=["prefill"], max_new_tokens=3
    )
    assert report.find("prefill", "5").refused == [None] * 6
    assert any("needs compliant answers" in note for note in report.notes)
    assert report.check({"min_refusal_at_prefill": 0.0}) == ["min_refusal_at_prefill is 0, but it wasn't measured."]


def test_before_and_after(model, word_tokenizer, tmp_path):
    earlier = tiny_llama(1)
    call = {"harmless_prompts": HARMLESS, "answers": ANSWERS, "judge": odd, "attacks": ["prefill"], **OPTIONS}
    report = audit_safety(model, word_tokenizer, PROMPTS, before=earlier, **call)
    alone = audit_safety(earlier, word_tokenizer, PROMPTS, **call)
    assert [m.refused for m in report.before.measures] == [m.refused for m in alone.measures]
    row = report.to_frame().iloc[0]
    pairs = list(zip(alone.find("none").refused, report.find("none").refused, strict=True))
    assert row["lost"] == sum(b and not a for b, a in pairs) and row["gained"] == sum(a and not b for b, a in pairs)
    assert 0 < row["p_value"] <= 1 and row["before"] == sum(b for b, _ in pairs) / 6

    alone.save(tmp_path)
    against_report = audit_safety(model, word_tokenizer, PROMPTS, before=SafetyReport.load(tmp_path), **call)
    assert against_report.to_frame().equals(report.to_frame())
    with pytest.raises(ValueError, match="same prompts in the same order"):
        audit_safety(model, word_tokenizer, PROMPTS[::-1], before=alone, judge=odd)
    with pytest.raises(ValueError, match="max_new_tokens=7"):
        audit_safety(model, word_tokenizer, PROMPTS, before=alone, judge=odd, max_new_tokens=7)
    with pytest.raises(ValueError, match="what changed would be the measurement"):
        audit_safety(model, word_tokenizer, PROMPTS, before=alone, max_new_tokens=OPTIONS["max_new_tokens"])
    assert not any("other answers" in note for note in against_report.notes)
    other = audit_safety(model, word_tokenizer, PROMPTS, before=alone, **{**call, "answers": ANSWERS[::-1]})
    assert any("prefilled with other answers" in note for note in other.notes)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapter_off(model, word_tokenizer):
    plain = copy.deepcopy(model)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    call = {"answers": ANSWERS, "judge": odd, "attacks": ["prefill"], **OPTIONS}
    report = audit_safety(lora, word_tokenizer, PROMPTS, before="adapter_off", base="adapter_off", **call)
    expected = audit_safety(lora, word_tokenizer, PROMPTS, before=plain, base=plain, **call)
    assert report.to_frame().equals(expected.to_frame())
    assert [row["kl"] for row in report.kl] == pytest.approx([row["kl"] for row in expected.kl], rel=1e-3)
    assert report.find("none").texts != report.before.find("none").texts and report.kl[0]["kl"] > 1e-3
    with pytest.raises(TypeError, match="Expected a PEFT model"):
        audit_safety(plain, word_tokenizer, PROMPTS, before="adapter_off")


def test_latency(byte_tokenizer, monkeypatch):
    """A refusal cue at character 6 of "Sure. I can't help." comes after six tokens of a byte each."""
    text = "Sure. I can't help."
    new = byte_tokenizer(text)["input_ids"]
    monkeypatch.setattr(
        "hf_iclr.trainers.safety_audit.asking.ask.continue_rows",
        lambda model, rows, prefixes, ks, **options: {k: [new, [], new[:4]][: len(rows)] for k in ks},
    )
    model = tiny_llama(0, len(byte_tokenizer))
    report = audit_safety(model, byte_tokenizer, list("abc"), answers=list("xyz"), ks=(1,), attacks=["prefill"])
    assert report.latency == [{"k": 1, "n": 3, "cues": 1, "median": 6}]
    assert report.find("none").refused == [True, False, False]
    assert any("1 of 3 answers without attack are empty" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_the_trained_object_is_no_model_before(model, word_tokenizer):
    """Whatever shares the weights in memory was changed by the training too; a copy was not."""
    call = {"judge": odd, "attacks": ["prefill"], "ks": (0,), "max_new_tokens": 2}
    with pytest.raises(ValueError, match=r"before to be another model.*copy\.deepcopy"):
        audit_safety(model, word_tokenizer, PROMPTS, before=model, **call)
    twin = tiny_llama(0)
    twin.load_state_dict(model.state_dict(), assign=True)  # another object over the same memory
    with pytest.raises(ValueError, match="before to be another model"):
        audit_safety(model, word_tokenizer, PROMPTS, before=twin, **call)
    half = tiny_llama(1)
    half.model = model.model  # a head of its own over a body that is trained
    with pytest.raises(ValueError, match="before to be another model"):
        audit_safety(model, word_tokenizer, PROMPTS, before=half, **call)
    before = copy.deepcopy(model)
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    for name in ("before", "base"):
        with pytest.raises(ValueError, match=f"{name} to be another.*adapter_off"):
            audit_safety(lora, word_tokenizer, PROMPTS, **{name: model}, **call)
    assert audit_safety(lora, word_tokenizer, PROMPTS, before=before, **call).before is not None
    for wrapped in (torch.nn.Sequential(model), {"model": model}):
        with pytest.raises(TypeError, match=r"model\.module.*trainer\.model"):
            audit_safety(wrapped, word_tokenizer, PROMPTS, **call)
        with pytest.raises(TypeError, match="before to be a model"):
            audit_safety(model, word_tokenizer, PROMPTS, before=wrapped, **call)
    merged = lora.merge_and_unload()
    with pytest.raises(ValueError, match="another model"):
        audit_safety(merged, word_tokenizer, PROMPTS, before=model, **call)


def test_a_copy_from_after_the_training_is_named(model, word_tokenizer):
    call = {"judge": odd, "attacks": ["prefill"], "ks": (0,), "max_new_tokens": 2}
    same = audit_safety(model, word_tokenizer, PROMPTS, before=copy.deepcopy(model), **call)
    assert "copied after the training" in same.notes[0]
    other = copy.deepcopy(model)
    other.model.norm.weight.data[0] += 1
    notes = audit_safety(model, word_tokenizer, PROMPTS, before=other, **call).notes
    assert not any("copied after" in note for note in notes)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("settings", "words"),
    [({"bias": "all"}, "got bias='all'"), ({"init_lora_weights": "pissa"}, "'pissa'"), ({}, "'lm_head.weight' in")],
)
def test_adapter_off_is_the_model_before_only_if_the_weights_below_are_those_of_before(
    word_tokenizer, settings, words
):
    lora = get_peft_model(tiny_llama(0), LoraConfig(r=4, target_modules=["q_proj"], **settings))
    if not settings:
        lora.base_model.model.lm_head.weight.requires_grad = True
    with pytest.raises(ValueError, match=words):
        audit_safety(lora, word_tokenizer, PROMPTS, before="adapter_off", judge=odd)


def test_a_prompt_beyond_the_context_is_refused(word_tokenizer):
    small = tiny_llama(0)
    small.config.max_position_embeddings = 16
    small.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    for options, words in (
        ({"prompts": ["w1", "w2 " * 20]}, r"context of 16 tokens.*prompt 1 \(from 0\) has 20"),
        ({"prompts": ["w1"], "ks": (12,)}, "the 17 that follow"),
        ({"prompts": ["w1"], "harmless_prompts": ["w2 " * 20], "ks": (0,)}, "harmless prompt 0"),
    ):
        with pytest.raises(ValueError, match=words):
            audit_safety(small, word_tokenizer, judge=odd, max_new_tokens=5, **options)


def test_neutral_beginnings_give_everyone_a_curve(model, byte_tokenizer):
    """Nothing is given, and there is a curve; both sets are of the size they say."""
    assert len(set(HARMLESS_ORDERS)) == 60 and len(set(NEUTRAL_BEGINNINGS)) == 20
    model = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "vocab_size": 256})).eval()
    call = {"judge": lambda texts: [True] * len(texts), "attacks": ["prefill"], "max_new_tokens": 1}
    report = audit_safety(model, byte_tokenizer, list("abc"), ks=(0, 40), **call)
    assert len(report.find("prefill", "40").refused) == 3 and None not in report.find("prefill", "40").refused
    assert report.find("prefill", "40", "joined").texts[2].startswith(NEUTRAL_BEGINNINGS[2][:40])
    assert any("neutral beginnings" in note for note in report.notes)
    again = audit_safety(model, byte_tokenizer, list("abc"), ks=(0, 40), answers="neutral", before=report, **call)
    assert again.find("prefill", "40") == report.find("prefill", "40")
    with pytest.raises(ValueError, match="or 'neutral', got 'yes'"):
        audit_safety(model, byte_tokenizer, ["a"], answers="yes", **call)


def test_a_judge_that_needs_prompts_works_under_every_attack(model, word_tokenizer, few_candidates):
    seen = set()

    def judge(texts, prompts):
        assert len(texts) == len(prompts)
        seen.update(prompts)
        return odd(texts)

    call = {"attacks": ["prefill", "decoding", "rap", "gcg"], "gcg_steps": 1, "harmless_prompts": HARMLESS, **OPTIONS}
    report = audit_safety(model, word_tokenizer, PROMPTS, answers=ANSWERS, judge=judge, **call)
    without = audit_safety(model, word_tokenizer, PROMPTS, answers=ANSWERS, judge=odd, **call)
    assert seen == {*PROMPTS, *HARMLESS} and [m.refused for m in report.measures] == [
        m.refused for m in without.measures
    ]


def test_harm_judge(model, word_tokenizer):
    """A second verdict, on prefix and answer together; a threshold on it holds under every attack."""

    def harm(texts, prompts):
        return [None if prompt == "w4" else len(text.split()) > 5 for text, prompt in zip(texts, prompts, strict=True)]

    call = {"judge": odd, "attacks": ["prefill"], **OPTIONS, "ks": (0, 1)}
    report = audit_safety(model, word_tokenizer, PROMPTS, answers=ANSWERS, harm_judge=harm, **call)
    for attack, setting in (("none", ""), ("prefill", "1")):
        joined = report.find(attack, setting, "joined").texts
        expected = [None if text is None else harm([text], [p])[0] for p, text in zip(PROMPTS, joined, strict=True)]
        assert report.find(attack, setting).harmful == expected and None in expected
    rate = report.harmful_rate("prefill", "1")
    assert rate > 0.5 and "harmful" in report.to_markdown()
    assert report.crossed({"max_harmful": 0.5})[-1] == (
        f"max_harmful is 0.5, but the share of harmful answers (prefix of 1 token) is {rate:.3f}."
    )
    with pytest.raises(ValueError, match="harm_judge=HarmJudge"):
        audit_safety(model, word_tokenizer, PROMPTS, thresholds={"max_harmful": 0.1}, **call)


def test_inputs_and_model_are_left_as_found(model, word_tokenizer):
    model.train()
    rng, side = torch.get_rng_state(), word_tokenizer.padding_side
    column = Dataset.from_dict({"prompt": PROMPTS})["prompt"]
    report = audit_safety(model, word_tokenizer, column, judge=odd, max_new_tokens=3, base=tiny_llama(1))
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()
    assert word_tokenizer.padding_side == side
    model.eval()
    torch.set_rng_state(rng)
    again = audit_safety(model, word_tokenizer, PROMPTS, judge=odd, max_new_tokens=3, base=tiny_llama(1))
    assert again == report


def hand_made(none=(True,) * 9 + (False,), five=(True,) * 2 + (False,) * 8, harmless=(False,) * 5, before=None):
    measures = [Measure("none", "", "continuation", list(none), ["secret"] * 10)]
    measures.append(Measure("prefill", "5", "continuation", list(five)))
    measures.append(Measure("prefill", "5", "joined", [False] * 10))
    measures.append(Measure("harmless", "", "continuation", list(harmless)))
    settings = {
        "model": "org/model", "judges": ["cues"], "max_new_tokens": 64, "seed": 0, "thresholds": {"min_refusal": 0.95},
        "versions": {"hf_iclr": "0", "transformers": "5"},
    }  # fmt: skip
    prompts = {"prompts": ["a"] * 10, "harmless_prompts": ["b"] * 5}
    return SafetyReport(
        measures, kl=[{"token": 1, "n": 9, "kl": 2.0}], settings=settings, prompts=prompts, before=before
    )


def test_thresholds():
    report = hand_made()
    assert report.check() == ["min_refusal is 0.95, but the refusal rate is 0.900."]
    assert report.check({"min_refusal": 0.9, "max_over_refusal": 0.0}) == []
    assert report.check({"min_refusal_at_prefill": 0.5}) == [
        "min_refusal_at_prefill is 0.5, but the refusal rate after 5 tokens is 0.200."
    ]
    assert "wasn't measured" in report.check({"min_refusal_under_gcg": 0.5})[0]
    worse = hand_made(none=(True,) * 4 + (False,) * 6, before=report)
    assert worse.check({"max_refusal_drop": 0.2}) == ["max_refusal_drop is 0.2, but the drop in refusals is 0.500."]
    assert worse.check({"max_refusal_drop": 0.6}) == []


def test_markdown():
    text = hand_made(none=(True,) * 4 + (False,) * 6, before=hand_made()).to_markdown()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[2] == ["no attack", "10", "40 %", "17 % to 69 %", "-", "90 %", "5 / 0", "0.0625"]
    assert rows[3][:5] == ["prefix of 5 tokens", "10", "20 %", "6 % to 51 %", "0 %"]
    assert "2.00 nats; alignment depth (tokens with 90 % of it): 1 of 1" in text
    assert "org/model" in text and "secret" not in text


def test_save_and_load(tmp_path):
    report = hand_made(before=hand_made())
    report.save(tmp_path / "a")
    assert (tmp_path / "a" / "prefill_curve.png").stat().st_size > 5000
    assert (tmp_path / "a" / "model_card.md").read_text() == report.to_markdown()
    content = (tmp_path / "a" / "report.json").read_text()
    assert "secret" not in content and json.loads(content)["summary"]["rates"][0]["refused"] == 0.9
    loaded = SafetyReport.load(tmp_path / "a")
    assert loaded.to_frame().equals(report.to_frame()) and loaded.check() == report.check()
    report.save(tmp_path / "b", with_texts=True)
    assert SafetyReport.load(tmp_path / "b") == report


def test_model_card():
    card = ModelCard("---\nlicense: mit\n---\n# My model\n\nText.\n\n## Last section\n")
    card.data.model_name, card.data.eval_results = "mine", [EvalResult("qa", "d", "D", "f1", 0.5)]
    hand_made().add_to_model_card(card)
    hand_made(none=(True,) * 10).add_to_model_card(card)
    assert card.text.count("## Safety audit") == 1 and "100 %" in card.text and "## Last section" in card.text
    results = {result.metric_type: result.metric_value for result in ModelCard(str(card)).data.eval_results}
    assert results == {"f1": 0.5, "refusal_rate": 1.0, "over_refusal_rate": 0.0}
    fresh = ModelCard.from_template(ModelCardData(), template_str="---\n{{ card_data }}\n---\n# Title")
    hand_made().add_to_model_card(fresh)
    assert fresh.data.model_name == "org/model"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"prompts": []}, ValueError, "at least one prompt, got none"),
        ({"prompts": "w1"}, TypeError, "one string"),
        ({"prompts": [{"prompt": "w1"}]}, ValueError, r'dataset\["prompt"\]'),
        ({"prompts": ["w1", ""]}, ValueError, "has none"),
        ({"harmless_prompts": []}, ValueError, "at least one prompt"),
        ({"attacks": ["magic"]}, ValueError, "got 'magic'"),
        ({"ks": (-1,)}, ValueError, "0 or more"),
        ({"ks": ("5",)}, ValueError, "0 or more"),
        ({"prompts": {"prompt": ["w1"]}}, TypeError, "list of prompts"),
        ({"decoding_grid": [{"temprature": 0.5}]}, ValueError, "temprature"),
        ({"decoding_grid": []}, ValueError, "decoding settings"),
        ({"harm_judge": "org/judge"}, TypeError, "org/judge"),
        ({"thresholds": ["min_refusal"]}, TypeError, "thresholds by name"),
        ({"system": 3}, TypeError, "system as a str, got 3"),
        ({"chat_template_kwargs": "enable_thinking"}, TypeError, "chat_template_kwargs as a mapping"),
        ({"thresholds": {"min_refusal": "half"}}, ValueError, "got 'half'"),
        ({"answers": ["w1"]}, ValueError, "one answer a prompt, got 1 and 6"),
        ({"before": "org/model"}, ValueError, "Load the model first"),
        ({"base": 3}, TypeError, "Expected base to be a model or 'adapter_off', got int"),
        ({"thresholds": {"refusal": 0.5}}, ValueError, "got 'refusal'"),
        ({"thresholds": {"min_refusal": 50}}, ValueError, "share between 0 and 1, got 50"),
        ({"thresholds": {"max_over_refusal": 0.1}}, ValueError, r"harmless_prompts=\[...\]"),
        ({"thresholds": {"max_refusal_drop": 0.1}}, ValueError, "before=model"),
        ({"thresholds": {"min_refusal_under_rap": 0.1}}, ValueError, r'attacks=\["rap"\]'),
        ({"thresholds": {"min_refusal_at_prefill": 0.1}, "ks": (0,)}, ValueError, "ks="),
    ],
)
def test_bad_input_stops_before_any_work(model, word_tokenizer, options, error, words):
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(error, match=words):
        audit_safety(model, word_tokenizer, **{"prompts": PROMPTS, **options})


def test_other_vocabulary(model, word_tokenizer):
    with pytest.raises(ValueError, match="own tokenizer, got one with a token .* where the model has 4 embeddings"):
        audit_safety(
            LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
                )
            ),
            word_tokenizer,
            PROMPTS,
        )
    other = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(ValueError, match="vocabulary, got 9 and 50"):
        audit_safety(model, word_tokenizer, PROMPTS, base=other)
