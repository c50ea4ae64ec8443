import math

import pytest
import torch

from hf_iclr.generation.calibration.baselines import bild_generate, sequence_cascade_generate, token_cascade_generate
from hf_iclr.generation.cascade_generation import enable_cascade
from tests.generation.toy import RAGGED_PROMPTS, left_padded, tiny_llama


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
        (token_cascade_generate, {"alpha": -1.0}, {"alpha": 1.0}),
        (token_cascade_generate, {"rule": "chow_log", "alpha": 0.0}, {"rule": "chow_log", "alpha": 10.0}),
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


@pytest.mark.parametrize("rule, alpha", [("chow", 0.7), ("chow_log", 2.0)])
def test_token_cascade_has_the_law_of_the_speculative_one(models, inputs, rule, alpha):
    """In greedy decoding a law is one sequence, so both must write the same tokens and defer at the same ones."""
    sequences, statistics = run(token_cascade_generate, models, inputs, rule=rule, alpha=alpha)
    model = enable_cascade(*models)
    expected = greedy(model, inputs, cascade_rule=rule, cascade_alpha=alpha)
    assert torch.equal(sequences, expected)
    assert statistics.deferred == model.cascade_statistics.deferred
    assert 0 < sum(statistics.deferred) < 4 * NEW_TOKENS
    # One forward of the large model a deferred token, and one of the small model a token.
    assert statistics.large_forwards == sum(statistics.deferred)
    assert statistics.small_forwards == 4 * NEW_TOKENS


def test_token_cascade_samples_the_mixture(models):
    """The second token of 600 samples, given the first: q where max q0 >= 1 - alpha, else p."""
    large, small = models
    inputs = left_padded([[3, 4]] * 600)
    sequences, _ = token_cascade_generate(large, small, **inputs, alpha=0.5, max_new_tokens=1, do_sample=True, top_k=0)
    with torch.no_grad():
        q, p = (half(input_ids=inputs["input_ids"][:1]).logits[0, -1].softmax(-1) for half in (small, large))
    expected = q if q.max() >= 0.5 else p
    other = p if q.max() >= 0.5 else q
    counts = torch.bincount(sequences[:, 2], minlength=23) / 600
    assert (counts - expected).abs().sum() < 0.15 < (counts - other).abs().sum()


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
    sequences, statistics = run(token_cascade_generate, models, inputs, alpha=1.0, eos_token_id=token)
    assert torch.equal(sequences, greedy(small, inputs, eos_token_id=token))
    assert statistics.new_tokens[0] == 3


@pytest.mark.parametrize(
    "function, kwargs, message",
    [
        (token_cascade_generate, {"rule": "opt"}, "needs p. Choose one of chow, chow_log"),
        (token_cascade_generate, {"alpha": 2.0}, "must lie in"),
        (bild_generate, {"do_sample": True}, "Pass `do_sample=False`"),
        (sequence_cascade_generate, {"temprature": 1}, "got temprature"),
    ],
)
def test_bad_input(models, function, kwargs, message):
    with pytest.raises(ValueError, match=message):
        function(*models, torch.tensor([[1, 2]]), **kwargs)
