import math
import sys
from pathlib import Path

import pytest
import torch

from hf_iclr.generation.cascade_generation import enable_cascade
from tests.generation.toy import RAGGED_PROMPTS, left_padded, tiny_llama


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from common.cascade_baselines import bild_generate, sequence_cascade_generate, token_cascade


sys.path.pop(0)

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def models():
    return tiny_llama(0, layers=2, vocab_size=23), tiny_llama(1, vocab_size=23)


@pytest.fixture(scope="module")
def inputs():
    return left_padded(RAGGED_PROMPTS)


def greedy(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **kwargs)


def run(function, models, inputs, **kwargs):
    return function(*models, **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, **kwargs)


@pytest.mark.parametrize(
    "function, large_alone, small_alone",
    [
        (sequence_cascade_generate, {"threshold": math.inf}, {"threshold": -math.inf}),
        (
            bild_generate,
            {"fallback_threshold": 1.01},
            {"fallback_threshold": 0.0, "rollback_threshold": math.inf, "max_draft_tokens": 100},
        ),
    ],
)
def test_limits_are_the_models(models, inputs, function, large_alone, small_alone):
    large, small = models
    sequences, statistics = run(function, models, inputs, **large_alone)
    assert torch.equal(sequences, greedy(large, inputs))
    assert statistics.deferred == [NEW_TOKENS] * 4

    sequences, statistics = run(function, models, inputs, **small_alone)
    assert torch.equal(sequences, greedy(small, inputs))
    assert statistics.large_forwards == 0
    assert statistics.deferred == [0.0] * 4


def test_token_cascade_has_the_law_of_the_speculative_one(models):
    """In greedy decoding a law is one sequence, so both must write the same tokens and defer at the same ones."""
    inputs = left_padded([[1, 2, 3], [5, 6, 0], [3, 3, 4]])
    model = enable_cascade(*models)
    for alpha in (-1.0, 0.7, 1.0):  # the large model, both, the small model
        tokens, forwards, _ = token_cascade(*models, inputs["input_ids"], alpha, False, NEW_TOKENS)
        expected = greedy(model, inputs, cascade_rule="chow", cascade_alpha=alpha)
        assert torch.equal(tokens, expected[:, 3:])
        assert forwards.tolist() == model.cascade_statistics.deferred
    for half, alpha in zip(models, (-1.0, 1.0), strict=True):
        tokens, _, _ = token_cascade(*models, inputs["input_ids"], alpha, False, NEW_TOKENS)
        assert torch.equal(tokens, greedy(half, inputs)[:, 3:])


def test_token_cascade_samples_the_mixture(models):
    """The second token of 600 samples, given the first: q where max q0 >= 1 - alpha, else p."""
    large, small = models
    prompts = torch.tensor([[3, 4]] * 600)
    torch.manual_seed(0)
    tokens, _, log_q = token_cascade(large, small, prompts, 0.5, True, 1)
    with torch.no_grad():
        q, p = (half(input_ids=prompts[:1]).logits[0, -1].softmax(-1) for half in (small, large))
    expected = q if q.max() >= 0.5 else p
    other = p if q.max() >= 0.5 else q
    counts = torch.bincount(tokens[:, 0], minlength=23) / 600
    assert (counts - expected).abs().sum() < 0.15 < (counts - other).abs().sum()
    torch.testing.assert_close(log_q, q[tokens[:, 0]].log())


def test_sequence_cascade_defers_by_the_mean_log_probability(models, inputs):
    large, small = models
    written = greedy(small, inputs)
    with torch.no_grad():
        scores = []
        for row, prompt in zip(written[:, 5:], RAGGED_PROMPTS, strict=True):
            ids = torch.cat([torch.tensor(prompt), row])
            log_probs = small(input_ids=ids[None, :-1]).logits[0, -NEW_TOKENS:].log_softmax(-1)
            scores.append(float(log_probs.gather(1, row[:, None]).mean()))
    threshold = sorted(scores)[1] + 1e-4
    sequences, statistics = run(sequence_cascade_generate, models, inputs, threshold=threshold)
    deferred = torch.tensor([score < threshold for score in scores])
    assert deferred.sum() == 2
    assert torch.equal(sequences, torch.where(deferred[:, None], greedy(large, inputs), written))
    assert statistics.accepted == [0 if row else NEW_TOKENS for row in deferred.tolist()]


def test_bild_follows_its_definition(models):
    """The loop again, from fresh forwards without caches, for one prompt."""
    large, small = models
    ids, drafts = [5, 6, 0], 0
    with torch.no_grad():
        while len(ids) < 3 + 30:
            q = small(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
            if drafts < 4 and q.max() >= 0.3:
                ids.append(int(q.argmax()))
                drafts += 1
                continue
            log_p = large(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            for position in range(len(ids) - drafts, len(ids)):
                best = int(log_p[position - 1].argmax())
                if -log_p[position - 1, ids[position]] > 1.0:
                    if best != ids[position]:
                        ids = ids[:position] + [best]
                    else:
                        ids.append(int(log_p[-1].argmax()))
                    break
            else:
                ids.append(int(log_p[-1].argmax()))
            drafts = 0
    sequences, statistics = bild_generate(
        large, small, torch.tensor([[5, 6, 0]]), fallback_threshold=0.3, rollback_threshold=1.0, max_draft_tokens=4,
        max_new_tokens=30, do_sample=False,
    )  # fmt: skip
    assert sequences[0].tolist() == ids
    assert 0 < statistics.accepted[0] < statistics.drafted[0]
    assert statistics.accepted[0] + statistics.deferred[0] == 30


def test_end_of_text_ends_a_row(models, inputs):
    small = models[1]
    token = int(greedy(small, inputs)[0, 7])  # the third token of the first row
    sequences, statistics = run(sequence_cascade_generate, models, inputs, threshold=-math.inf, eos_token_id=token)
    assert torch.equal(sequences, greedy(small, inputs, eos_token_id=token))
    assert statistics.new_tokens[0] == 3


@pytest.mark.parametrize(
    "function, kwargs, message",
    [
        (bild_generate, {"do_sample": True}, "Pass `do_sample=False`"),
        (sequence_cascade_generate, {"temprature": 1}, "got temprature"),
    ],
)
def test_bad_input(models, function, kwargs, message):
    with pytest.raises(ValueError, match=message):
        function(*models, torch.tensor([[1, 2]]), **kwargs)
