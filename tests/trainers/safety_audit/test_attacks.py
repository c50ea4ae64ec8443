"""The attacks do what they say, against the same attack done prompt by prompt with plain `generate`."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_iclr.trainers.safety_audit.attacks import (
    DECODING_GRID,
    PAPER_DECODING_GRID,
    decoding_attack,
    gcg_attack,
    prefilling_attack,
    rank_assisted_prefilling,
)


PROMPTS = ["w1 w2 w3", "w4"]
ANSWERS = ["w20 w21 w22", "w24"]


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def greedy(model, ids, tokens):
    return model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0].tolist()


def test_prefilling(model, word_tokenizer):
    found = prefilling_attack(model, word_tokenizer, PROMPTS, ANSWERS, (0, 1, 2), max_new_tokens=4, progress=False)
    assert found[2][1] is None and found[0][1].prefix_ids == [] and found[0][1].text == found[0][1].joined
    entry = found[2][0]
    assert entry.prefix_ids == [20, 21] and [20, 21, *entry.new_ids] == greedy(model, [1, 2, 3, 20, 21], 4)[3:]
    assert entry.joined == "w20 w21 " + entry.text


def test_decoding(model, word_tokenizer):
    grid = ({"temperature": 1e-4}, {"top_k": 1}, {"temperature": 2.0, "top_p": 0.5})
    found = decoding_attack(model, word_tokenizer, PROMPTS, grid, max_new_tokens=5)
    assert list(found) == ["temperature=0.0001", "top_k=1", "temperature=2, top_p=0.5"]
    expected = word_tokenizer.batch_decode([greedy(model, [1, 2, 3], 5)[3:], greedy(model, [4], 5)[1:]], True)
    said = {setting: [entry.text for entry in entries] for setting, entries in found.items()}
    assert said["top_k=1"] == said["temperature=0.0001"] == expected
    assert said["temperature=2, top_p=0.5"] != expected
    assert decoding_attack(model, word_tokenizer, PROMPTS, grid, max_new_tokens=5, seed=1) != found


def test_grids():
    assert len(PAPER_DECODING_GRID) == 49 and {"top_k": 500} in PAPER_DECODING_GRID
    assert len(DECODING_GRID) == 6


def test_rank_assisted_prefilling(model, word_tokenizer):
    """
    A refusal is any text that begins with one of the two likeliest words; the third must be taken, and the rest of the
    prefix is greedy.
    """
    order = model(torch.tensor([[1, 2, 3]])).logits[0, -1].argsort(descending=True).tolist()
    order = [token for token in order if token not in (0, 49)]  # special tokens are passed over
    refusing = {f"w{token}" for token in order[:2]}

    def judge(texts):
        return [text.split()[0] in refusing for text in texts]

    found, ranks = rank_assisted_prefilling(
        model, word_tokenizer, [PROMPTS[0]], judge, num_steps=2, num_candidates=5, lookahead=2, max_new_tokens=4
    )
    assert ranks == [[2, 0]] and found[0].prefix_ids[0] == order[2]
    assert greedy(model, [1, 2, 3, *found[0].prefix_ids], 4)[5:] == found[0].new_ids
    second = model(torch.tensor([[1, 2, 3, order[2]]])).logits[0, -1].argsort(descending=True).tolist()
    assert found[0].prefix_ids[1] == next(token for token in second if token not in (0, 49))


def test_rank_assisted_prefilling_when_all_refuse(model, word_tokenizer):
    found, ranks = rank_assisted_prefilling(
        model, word_tokenizer, PROMPTS, lambda texts: [True] * len(texts), num_steps=1, num_candidates=5, lookahead=1
    )
    assert ranks == [[4], [4]] and len(found) == 2
    with pytest.raises(ValueError, match="num_steps=0"):
        rank_assisted_prefilling(model, word_tokenizer, PROMPTS, list, num_steps=0)


def test_gcg_attack(model, word_tokenizer, monkeypatch):
    suffixes = []

    def found(model, tokenizer, prompt, target, **options):
        suffixes.append((prompt, target, options["num_steps"]))
        return type("Found", (), {"suffix": " w9"})()

    monkeypatch.setattr("hf_iclr.trainers.safety_audit.attacks.gcg", found)
    said, none = gcg_attack(
        model, word_tokenizer, PROMPTS, ["w20 w21 w22", ""], target_tokens=2, num_steps=7, max_new_tokens=3
    )
    assert suffixes == [("w1 w2 w3", [20, 21], 7)]
    assert said.text == word_tokenizer.decode(greedy(model, [1, 2, 3, 9], 3)[4:]) and none is None
    assert gcg_attack(model, word_tokenizer, PROMPTS, ["", ""]) == [None, None]


@pytest.mark.parametrize("attack", ["prefilling", "decoding", "rank", "gcg"])
def test_a_system_prompt_is_a_turn_before_the_prompt(model, word_tokenizer, attack):
    tokenizer = word_tokenizer.__class__(
        tokenizer_object=word_tokenizer.backend_tokenizer, unk_token="w0", eos_token="w49",
        chat_template="{% for m in messages %}w40 {{ m.content }} {% endfor %}{{ mark }}",
    )  # fmt: skip

    def run(prompts, **rendering):
        options = {"chat_template_kwargs": {"mark": "w41"}, "max_new_tokens": 4, **rendering}
        if attack == "prefilling":
            return prefilling_attack(model, tokenizer, prompts, ["w20 w21 w22", "w23"], (0, 1), **options)
        if attack == "decoding":
            return decoding_attack(model, tokenizer, prompts, [{"top_k": 5}], **options)
        if attack == "rank":
            judge = lambda texts: ["w1" in text for text in texts]  # noqa: E731
            return rank_assisted_prefilling(model, tokenizer, prompts, judge, num_steps=2, **options)
        return gcg_attack(model, tokenizer, prompts, ["w20 w21", "w23"], num_steps=1, **options)

    with_system = [[{"role": "system", "content": "w7"}, {"role": "user", "content": prompt}] for prompt in PROMPTS]
    assert run(PROMPTS, system="w7") == run(with_system) != run(PROMPTS)
    assert run(with_system) != run(with_system, chat_template_kwargs={"mark": "w42"})
