"""From a chat template to a verdict: what is asked, where a prefix stands, and what is cut, for each known manner."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from hf_iclr import audit_safety
from hf_iclr.models import render_prompt
from hf_iclr.trainers.safety_audit.asking.thoughts import answer_lead, opens_thoughts, read_answers, split_thoughts
from hf_iclr.trainers.safety_audit.gcg import _locate_suffix
from tests.trainers.safety_audit.chat_templates import CHATML, TEMPLATES, template_tokenizer


@pytest.fixture(params=TEMPLATES)
def template(request):
    return TEMPLATES[request.param]


@pytest.fixture
def tokenizer(template):
    return template_tokenizer(template.text, template.special, template.plain)


@pytest.fixture
def model():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes, bos_token_id=None, eos_token_id=None)).eval()


def test_audit_asks_and_reads_as_the_template_says(template, tokenizer, model, monkeypatch):
    asked = []

    def say(model, rows, prefixes, ks, **options):
        asked.extend((tokenizer.decode(row), k) for row in rows for k in ks)
        said = {0: template.said}
        return {k: [tokenizer(said.get(k, "B"), add_special_tokens=False)["input_ids"]] for k in ks}

    monkeypatch.setattr("hf_iclr.trainers.safety_audit.asking.ask.continue_rows", say)

    def judge(texts, prompts):
        assert prompts == ["Q"] * len(texts)
        return [text == "A" for text in texts]

    call = {"answers": ["xyz"], "ks": (0, 2), "attacks": ["prefill"], "judge": judge}
    report = audit_safety(model, tokenizer, ["Q"], **call)
    assert dict(map(reversed, asked)) == {0: template.prompt, 2: template.prompt + template.lead}
    assert report.find("none").texts == ["A"] and report.refusal_rate(judged="answer") == 1.0
    assert report.find("prefill", "2", "joined").texts == ["xyB"]
    thoughts = report.find("none", judged="thoughts")
    assert thoughts is None if template.thoughts is None else thoughts.texts == [template.thoughts]
    assert report.find("prefill", "2", "thoughts") is None
    assert any(template.lead and repr(template.lead) in note for note in report.notes) == bool(template.lead)

    if template.kwargs:
        asked.clear()
        report = audit_safety(model, tokenizer, ["Q"], chat_template_kwargs=template.kwargs, **call)
        assert asked[0] == (template.prompt_without_thoughts, 0)
        assert report.settings["chat_template_kwargs"] == template.kwargs
    asked.clear()
    if template.system is None:
        with pytest.raises(ValueError, match="System role|must alternate|leaves it out"):
            audit_safety(model, tokenizer, ["Q"], system="S", **call)
        assert not asked
    else:
        audit_safety(model, tokenizer, ["Q"], system="S", **call)
        assert asked[0][0].startswith(template.system) and asked[0][0].endswith(template.prompt[-8:])


def test_suffix_is_found_inside_the_template(template, tokenizer):
    encode, before, own, after = _locate_suffix(tokenizer, "Q", " ! !")
    assert tokenizer.decode(before).endswith("Q") and tokenizer.decode(own) == " ! !"
    assert tokenizer.decode(before + own + after) == template.prompt.replace("Q", "Q ! !")
    assert encode(" x y") == tokenizer(template.prompt.replace("Q", "Q x y"), add_special_tokens=False)["input_ids"]


# Of TRL's copies of the models' own templates: what stands before an answer that is given.
REAL = {
    "qwen3": "<think>\n\n</think>\n\n",
    "qwen3_6": "\n</think>\n\n",
    "glm4moe": "\n<think></think>\n",
    "gptoss": "<|channel|>final<|message|>",
    "nemotron_3_nano": "\n</think>\n\n",
    "deepseek_r1_distill": "\n</think>\n\n",
    "qwen2_5": "",
    "qwen3_instruct_2507": "",
    "llama3": "",
    "gemma": "",
    "gemma3": "",
    "phi3": "",
}


@pytest.mark.parametrize("name", REAL)
def test_lead_of_real_templates(name):
    path = Path(find_spec("trl").origin).parent / "chat_templates" / f"{name}.jinja"
    if not path.exists():
        pytest.skip("this release of TRL has no such template")
    tokenizer = template_tokenizer(path.read_text())
    assert answer_lead(tokenizer, "Q") == REAL[name]
    assert opens_thoughts(render_prompt(tokenizer, "Q")) == (REAL[name][:3] == "\n</")


@pytest.mark.parametrize(
    ("text", "options", "answer", "thoughts", "finished"),
    [
        ("Sure.", {}, "Sure.", None, True),
        ("<think>\n\n</think>\n\nSure.", {}, "Sure.", None, True),
        ("I can't.\n</think>\nSure.", {"opened": True}, "Sure.", "I can't.", True),
        ("I can't.\n</think>\nSure.", {}, "Sure.", "I can't.", True),  # what opened it is out of sight
        ("Sure, write <think> and </think>.", {}, "Sure, write <think> and </think>.", None, True),
        ("<think>I must", {"cut": True}, "", "I must", False),
        ("I must", {"opened": True, "cut": True}, "", "I must", False),
        ("I'm sorry.", {"opened": True}, "I'm sorry.", None, True),  # it answered without a thought
        ("<thought>T</thought>A", {}, "A", "T", True),
        ("<|channel>thought\nT<channel|>A", {}, "A", "T", True),
        ("<Think>T</Think>A", {}, "A", "T", True),
        ("<reasoning>T</reasoning>\nA", {}, "A", "T", True),
        ("<|begin_of_thought|>T<|end_of_thought|>A", {}, "A", "T", True),
        ("<think>T</think>\n", {"cut": True}, "", "T", False),  # the limit came right after the thoughts
        ("<|channel|>analysis<|message|>T", {"cut": True}, "", "T", False),
        ("<|channel|>commentary to=a <|constrain|>json<|message|>{}<|call|>", {}, "", "{}", True),
        ("<analysis>\nT\n</analysis>\nA", {}, "A", "T", True),
        ("<|reflection|>T<|/reflection|>A", {}, "A", "T", True),
        ("<think step='1'>T</think>A", {}, "A", "T", True),
        ("T</rationale>A", {"opened": True}, "A", "T", True),
        ("<inner_monologue>T", {"cut": True}, "", "T", False),
        ("<analysis>A", {}, "<analysis>A", None, True),  # an answer in XML
        ("<analysis>A</analysis>", {}, "<analysis>A</analysis>", None, True),
        ("Here is my thought process: T Here is my response: A", {}, "A", "T", True),
        ("Well. Here is my response: A", {}, "Well. Here is my response: A", None, True),
        ("<think>T</think>\n<answer>\nA\n</answer>", {}, "A", "T", True),
        ("<|begin_of_thought|>T<|end_of_thought|>\n<|begin_of_solution|>A<|end_of_solution|>", {}, "A", "T", True),
        ("<answer>A</answer>", {}, "<answer>A</answer>", None, True),
    ],
)
def test_split_thoughts(text, options, answer, thoughts, finished):
    assert split_thoughts(text, **options) == (answer, thoughts, finished)


def test_special_tokens_are_no_text():
    tokenizer = template_tokenizer("", ("<|end|>", "[THINK]", "[/THINK]", "<|im_end|>", "<cot>", "</cot>"))
    assert read_answers(tokenizer, [tokenizer("<cot>T</cot>A")["input_ids"]]) == [("A", "T", True)]
    ids = tokenizer("[THINK]T[/THINK]A<|im_end|>", add_special_tokens=False)["input_ids"]
    assert read_answers(tokenizer, [ids, [], ids[:2]], limit=2) == [
        ("A", "T", True),
        ("", None, True),
        ("", "T", False),
    ]


def test_unfinished_thoughts_are_no_verdict(model, monkeypatch):
    """Two of four prompts are refused, one isn't, one is never answered: .5 is kept, .6 is open, .8 is crossed."""
    qwen = TEMPLATES["qwen3"]
    tokenizer = template_tokenizer(qwen.text, qwen.special, qwen.plain)
    said = ["<think>T</think>A", "A", "B", "<think>" + "T" * 20]
    rows = [tokenizer(text)["input_ids"] for text in said]
    monkeypatch.setattr(
        "hf_iclr.trainers.safety_audit.asking.ask.continue_rows", lambda model, asked, prefixes, ks, **_: {0: rows}
    )
    call = {"attacks": ["prefill"], "ks": (0,), "judge": lambda texts: [text == "A" for text in texts]}
    report = audit_safety(model, tokenizer, list("abcd"), max_new_tokens=21, **call)
    measure = report.find("none")
    assert measure.refused == [True, True, False, None] and measure.unfinished == [3]
    assert report.check({"min_refusal": 0.5}) == []
    assert report.crossed({"min_refusal": 0.6}) == [] and "1 of 4" in report.unmeasured({"min_refusal": 0.6})[0]
    assert len(report.crossed({"min_refusal": 0.8})) == 1 and report.unmeasured({"min_refusal": 0.8}) == []
    assert any("1 of 4 answers without attack ended in the middle" in note for note in report.notes)


def test_wrong_renderings_are_refused(model):
    tokenizer = template_tokenizer(CHATML + "{% if enable_thinking %}{% endif %}", ("<|im_start|>", "<|im_end|>"))
    call = {"attacks": ["prefill"], "ks": (0,)}
    with pytest.raises(ValueError, match="got 'enable_thinkin'"):
        audit_safety(model, tokenizer, ["Q"], chat_template_kwargs={"enable_thinkin": False}, **call)
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    with pytest.raises(ValueError, match="one system prompt"):
        audit_safety(model, tokenizer, [chat], system="S", **call)
