"""`constrain="refused"`: rows whose prompt the reference refuses are held, the others trained as ever."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from datasets import Dataset

from hf_iclr.trainers.deep_safety.refused_prompts import find_refusals, mark_answers, prompts_of


class Refuser:
    """Answers "I cannot help." where the prompt holds a 7, else "Sure, gladly."; "!" ends an answer."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen, self.device = tokenizer, [], torch.device("cpu")
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.pad_token_id)

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
        assert not do_sample
        answers = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = ids[mask.bool()].tolist()
            self.seen.append(tuple(prompt))
            text = "I cannot help.!" if "7" in self.tokenizer.decode(prompt) else "Sure, gladly.!!"
            answers.append(self.tokenizer(text)["input_ids"][:max_new_tokens])
        width = max(map(len, answers))
        answers = torch.tensor([answer + [pad_token_id] * (width - len(answer)) for answer in answers])
        return torch.cat([input_ids, answers], dim=1)


def test_marks_follow_the_references_own_answers(byte_tokenizer):
    model = Refuser(byte_tokenizer)
    texts = ["number 7", "number 5", "a longer prompt with 7", "number 7"]
    rows = []
    for text in texts:
        prompt, answer = byte_tokenizer(text)["input_ids"], byte_tokenizer(" yes")["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    dataset = Dataset.from_list(rows)
    refusals = find_refusals(dataset, model, byte_tokenizer, Accelerator(cpu=True), "train", batch_size=2)
    assert [prompt in refusals for (prompt,) in prompts_of(dataset)] == [True, False, True, True]
    assert len(model.seen) == 3  # every prompt once
    (ids,) = {tuple(refusal) for refusal in refusals.values()}
    assert list(ids) == byte_tokenizer("I cannot help.!")["input_ids"]  # with its end, without the padding


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
