"""Scores of pairs by hand, and the step they are to foretell."""

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from hf_iclr.trainers.squeeze.pair_audit import audit_pairs, filter_pairs
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import tiny_llama


PAIRS = pair_rows(5)


def states_and_probs(model, tokenizer, row, kind):
    """Hidden states that predict the answer's tokens (the end of text is one), π there, and the tokens."""
    start = len(tokenizer(row["prompt"])["input_ids"])
    ids = tokenizer(row["prompt"] + row[kind] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True, use_cache=False)
    positions = slice(start - 1, ids.shape[1] - 1)
    return outputs.hidden_states[-1][0, positions], outputs.logits[0, positions].softmax(-1), ids[0, start:]


def test_scores_by_hand(word_tokenizer):
    model = tiny_llama()
    table = audit_pairs(model, word_tokenizer, PAIRS, beta=0.3, batch_size=2)
    for row, scores in zip(PAIRS, table.to_dict("records"), strict=True):
        up, chosen, targets = states_and_probs(model, word_tokenizer, row, "chosen")
        down, rejected, ids = states_and_probs(model, word_tokenizer, row, "rejected")
        pressure = [(p.square().sum() - p[token]).item() for p, token in zip(rejected, ids, strict=True)]
        expected = {
            "tokens_chosen": len(up),
            "tokens_rejected": len(down),
            "logp_chosen": np.mean([p[t].log().item() for p, t in zip(chosen, targets, strict=True)]),
            "logp_rejected": np.mean([p[t].log().item() for p, t in zip(rejected, ids, strict=True)]),
            "ches": sum((u @ d).item() for u in up for d in down) - sum((u @ v).item() for u in up for v in up),
            "ches_per_token": (up.mean(0) @ (down.mean(0) - up.mean(0))).item(),
            "pressure": np.mean(pressure),
            "valley_frac": np.mean([value > 0 for value in pressure]),
            "force": 0.15 * sum(value for value in pressure if value > 0),
        }
        assert scores == pytest.approx(expected, rel=1e-4)


def test_equal_answers_have_no_ches(word_tokenizer):
    """h⁺ = h⁻: the score's highest value short of a longer or larger rejected answer is zero."""
    table = audit_pairs(tiny_llama(), word_tokenizer, [{**row, "rejected": row["chosen"]} for row in PAIRS])
    assert table["ches"].tolist() == pytest.approx([0] * 5, abs=1e-3)


def test_own_samples_have_no_pressure(word_tokenizer):
    """E[π(y)] = Σ π² when y is drawn from π: over 400 first words the mean is zero within three standard errors."""
    model = tiny_llama()
    model.train()
    ids = word_tokenizer("w1 w2 ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probs = model(ids).logits[0, -1].softmax(-1)
    probs[49] = 0  # an answer that is only the end of text is no answer
    words = [f"w{index} " for index in torch.multinomial(probs, 400, replacement=True).tolist()]
    rows = [{"prompt": "w1 w2 ", "chosen": word, "rejected": word} for word in words]
    table = audit_pairs(model, word_tokenizer, rows)
    assert model.training
    first = [(probs.square().sum() - probs[int(word.strip()[1:])]).item() for word in words]
    assert abs(np.mean(first)) < 3 * np.std(first) / 20 + 0.02
    assert table["pressure"].std() > 0


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if isinstance(output, torch.Tensor):
            self.elements = max(self.elements, output.numel())
        return output


def test_memory_does_not_grow_with_the_vocabulary(word_tokenizer):
    """Nothing holds a number for each token of the vocabulary at each position."""
    largest = []
    for vocab_size in (40_000, 80_000):
        model = tiny_llama(vocab_size)
        with Largest() as seen:
            table = audit_pairs(model, word_tokenizer, PAIRS, batch_size=5)
        largest.append(seen.elements)
    assert largest[0] == largest[1] < 80_000 * table[["tokens_chosen", "tokens_rejected"]].to_numpy().sum()


def test_adapter(word_tokenizer):
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")  # starts as nothing
    plain = audit_pairs(tiny_llama(), word_tokenizer, PAIRS)
    pd.testing.assert_frame_equal(audit_pairs(get_peft_model(tiny_llama(), config), word_tokenizer, PAIRS), plain)


def test_filter_leaves_out_the_riskiest():
    table = pd.DataFrame({"ches_per_token": [-3.0, 2.0, -1.0, 5.0, 0.0], "pressure": [0.5, 0.1, 0.2, 0.3, 0.4]})
    prompts = PAIRS["prompt"]
    assert filter_pairs(PAIRS, table, drop=0.4)["prompt"] == [prompts[0], prompts[2], prompts[4]]
    assert filter_pairs(PAIRS, table, drop=0.2, by="pressure")["prompt"] == list(prompts[1:])
    assert len(filter_pairs(PAIRS, table, drop=0.19)) == 5
    shuffled = table.sample(frac=1, random_state=0)  # positions count, not the index
    assert len(filter_pairs(PAIRS, shuffled, drop=0.2)) == 4


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"table": pd.DataFrame({"ches": [0.0]})}, "a table of the 5 pairs, got one of 1"),
        ({"by": "beauty"}, "by must be one of ches, .*, got 'beauty'"),
        ({"drop": 1.0}, r"drop must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_options(option, message):
    table = pd.DataFrame(dict.fromkeys(("ches", "ches_per_token"), np.zeros(5)))
    with pytest.raises(ValueError, match=message):
        filter_pairs(PAIRS, option.pop("table", table), **option)


def test_bad_pairs(word_tokenizer):
    model = tiny_llama()
    with pytest.raises(ValueError, match="columns prompt, chosen, rejected and a row, got prompt, chosen"):
        audit_pairs(model, word_tokenizer, PAIRS.remove_columns("rejected"))
    with pytest.raises(ValueError, match="'chosen' in row 1. Drop empty answers"):
        rows = [dict(PAIRS[0]), {**PAIRS[1], "chosen": ""}]
        audit_pairs(model, word_tokenizer, Dataset.from_list(rows))
    with pytest.raises(ValueError, match="got no column and 0 rows"):
        audit_pairs(model, word_tokenizer, [])
