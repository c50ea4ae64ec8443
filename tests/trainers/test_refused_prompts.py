"""`constrain="refused"`: rows whose prompt the reference refuses are held, the others trained as ever."""

import torch
from accelerate import Accelerator
from datasets import Dataset

from hf_iclr.trainers.refused_prompts import mark_refused_prompts


class Refuser:
    """Answers prompts that hold token 7 with "I cannot help with that.", all others with "Sure, gladly."."""

    def __init__(self, tokenizer):
        self.tokenizer, self.seen = tokenizer, []

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample):
        assert not do_sample
        answers = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = ids[mask.bool()].tolist()
            self.seen.append(tuple(prompt))
            text = (
                "I cannot help with that." if ord("7") in self.tokenizer.decode(prompt).encode() else "Sure, gladly."
            )
            answers.append(self.tokenizer(text)["input_ids"][:max_new_tokens])
        width = max(map(len, answers))
        pad = self.tokenizer.pad_token_id
        answers = torch.tensor([answer + [pad] * (width - len(answer)) for answer in answers])
        return torch.cat([input_ids, answers], dim=1)


def test_marks_follow_the_references_own_answers(byte_tokenizer):
    model = Refuser(byte_tokenizer)
    texts = ["number 7", "number 5", "a longer prompt with 7", "number 7"]
    rows = []
    for text in texts:
        prompt, answer = byte_tokenizer(text)["input_ids"], byte_tokenizer(" yes")["input_ids"]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    marked = mark_refused_prompts(Dataset.from_list(rows), model, byte_tokenizer, Accelerator(cpu=True), "train", 2)
    assert list(marked["constrain"]) == [True, False, True, True]
    assert len(model.seen) == 3  # every prompt once
    off = Dataset.from_list([{**row, "constrain": index > 0} for index, row in enumerate(rows)])
    marked = mark_refused_prompts(off, model, byte_tokenizer, Accelerator(cpu=True), "train")
    assert list(marked["constrain"]) == [False, False, True, True]
