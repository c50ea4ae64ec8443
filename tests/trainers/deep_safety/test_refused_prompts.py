"""`constrain="refused"`: rows whose prompt the reference refuses are constrained, the others trained as ever."""

from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from datasets import Dataset

from hf_iclr.trainers.deep_safety import refused_prompts
from hf_iclr.trainers.deep_safety.refused_prompts import find_refusals, mark_answers, prompts_of


CONFIG = SimpleNamespace(max_position_embeddings=1000)
MODEL = SimpleNamespace(
    generation_config=SimpleNamespace(eos_token_id=None),
    config=SimpleNamespace(get_text_config=lambda decoder: CONFIG),
)


@pytest.fixture
def scripted(monkeypatch, byte_tokenizer):
    """A reference that says what `answer(prompt)` does; "!" ends an answer. What it was asked."""
    asked = []

    def use(answer):
        def continue_rows(model, prompts, *, max_new_tokens, with_end, ends, batch_size, progress):
            assert with_end
            texts = [byte_tokenizer.decode(prompt) for prompt in prompts]
            asked.extend((text, max_new_tokens) for text in texts)
            return {0: [byte_tokenizer(answer(text))["input_ids"][:max_new_tokens] for text in texts]}

        monkeypatch.setattr(refused_prompts, "continue_rows", continue_rows)
        return asked

    return use


def rows_of(tokenizer, texts):
    rows = []
    for text in texts:
        prompt, answer = tokenizer(text)["input_ids"], tokenizer(" yes")["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


def test_marks_follow_the_references_own_answers(scripted, byte_tokenizer):
    asked = scripted(lambda text: "I cannot help.!" if "7" in text else "Sure, gladly.!")
    dataset = rows_of(byte_tokenizer, ["number 7", "number 5", "a longer prompt with 7", "number 7"])
    refusals = find_refusals(dataset, MODEL, byte_tokenizer, Accelerator(cpu=True), "train")
    assert [prompt in refusals for (prompt,) in prompts_of(dataset)] == [True, False, True, True]
    assert sorted(text for text, _ in asked) == ["a longer prompt with 7", "number 5", "number 7"]  # every prompt once
    (ids,) = {tuple(refusal) for refusal in refusals.values()}
    assert list(ids) == byte_tokenizer("I cannot help.!")["input_ids"]  # with its end


def test_a_prompt_that_fills_the_context_is_not_asked(scripted, byte_tokenizer, caplog):
    """977 tokens and an answer of 24 are more than the 1000 that the model reads."""
    asked = scripted(lambda text: "I cannot help.!")
    dataset = rows_of(byte_tokenizer, ["x" * 977, "x" * 976])
    refusals = find_refusals(dataset, MODEL, byte_tokenizer, Accelerator(cpu=True), "train")
    assert [len(prompt) for prompt in refusals] == [976] and len(asked) == 1
    assert "1 of 2 answers" in caplog.text


def test_thoughts_are_no_answer(scripted, byte_tokenizer, caplog):
    """Who thinks is given more tokens; thoughts of refusing are no refusal, and without an end there is no verdict."""
    says = {
        "refuses <think>\n": "It asks for a forbidden thing.</think>I cannot help.!",
        "complies <think>\n": "I cannot help with that? But it is a cake.</think>Take some flour.!",
        "ends nowhere <think>\n": "I cannot help " * 60,
    }
    asked = scripted(lambda text: says[text])
    dataset = rows_of(byte_tokenizer, list(says))
    refusals = find_refusals(dataset, MODEL, byte_tokenizer, Accelerator(cpu=True), "train")
    assert [byte_tokenizer.decode(prompt) for prompt in refusals] == ["refuses <think>\n"]
    assert {limit for _, limit in asked} == {refused_prompts.SHORT, refused_prompts.WITH_THOUGHTS}
    assert "1 of 3 answers" in caplog.text and "turn thinking off" in caplog.text


def test_every_turn_is_asked_and_marked_by_itself():
    """Prompts 1 2, then 1 2 3 4 5; the second is refused. A column `constrain` can only take marks away."""
    rows = [{"input_ids": [1, 2, 3, 4, 5, 6, 7, 8], "labels": [-100, -100, 3, 4, -100, 6, 7, -100]}] * 4
    flags = [None, False, [True] * 8, [False] * 5 + [True] * 3]
    assert prompts_of(Dataset.from_list(rows[:1])) == [[(1, 2), (1, 2, 3, 4, 5)]]
    refusals = {(1, 2, 3, 4, 5): [9]}
    second = [False] * 5 + [True] * 3
    for flag, expected in zip(flags, (second, [False] * 8, second, second), strict=True):
        dataset = Dataset.from_list(rows[:1]).add_column("constrain", [flag])
        assert mark_answers(dataset, refusals) == ([expected], refusals if any(expected) else {})
