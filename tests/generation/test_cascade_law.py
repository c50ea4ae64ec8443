"""Every emitted token follows the target distribution exactly."""

import pytest
import torch

from hf_iclr import enable_cascade, target_distribution
from hf_iclr.generation.batched_cascade import BatchedCascade, sample
from hf_iclr.generation.calibration.teacher_forcing import logits_processors, prepare_config
from hf_iclr.generation.cascade_call import end_tokens
from tests.generation.toy import RAGGED_PROMPTS, RULES, VOCAB, chi_square_z, exact_law, left_padded, tiny_llama


LENGTH, TEMPERATURE = 3, 0.8
# 33 tests of one statistic each, and 33 slow ones: |z| > 4.5 has a probability of about 1e-5 in each of them.
LIMIT = 4.5


@pytest.fixture(scope="module")
def models():
    return tiny_llama(1), tiny_llama(2)


# Every rule with drafts of one and of two on ragged prompts, and of two on one prompt. Drafts of four are cut to the
# two that three tokens have room for, and a rule knows nothing of padding: the slow ones repeat what the others show.
@pytest.mark.parametrize(
    ("gamma", "batch"),
    [(1, 4), (2, 4), (2, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((4, 4), (1, 1), (4, 1)))],
)
@pytest.mark.parametrize(("rule", "alpha"), RULES)
def test_law_of_the_batched_loop(models, rule, alpha, gamma, batch):
    """20,000 samples of one prompt, and 4 x 5,000 of ragged prompts, against the enumerated law."""
    prompts = RAGGED_PROMPTS[:batch]
    output = enable_cascade(*models).generate(
        **left_padded(prompts),
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        num_return_sequences=20_000 // batch,
        max_new_tokens=LENGTH,
        num_assistant_tokens=gamma,
        cascade_rule=rule,
        cascade_alpha=alpha,
        pad_token_id=0,
    )
    for prompt, rows in zip(prompts, output[:, -LENGTH:].chunk(batch), strict=True):
        law = exact_law(*models, prompt, rule, alpha, LENGTH, TEMPERATURE)
        assert abs(chi_square_z([tuple(row) for row in rows.tolist()], law)) < LIMIT


@pytest.mark.parametrize(
    ("backend", "count"),
    [
        ("batched", 200),
        ("assisted", 200),
        pytest.param("batched", 20_000, marks=pytest.mark.slow),
        pytest.param("assisted", 20_000, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(("rule", "alpha"), [("token_v3", 0.5), ("opt", 0.3)])
def test_law_of_single_prompts(models, rule, alpha, backend, count):
    """The loops for one prompt, one `generate` call a sample. Two tokens and one draft: the first can't be a bonus."""
    model = enable_cascade(*models)
    samples = []
    for _ in range(count):
        output = model.generate(
            torch.tensor([[1, 2, 3]]),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            max_new_tokens=2,
            num_assistant_tokens=1,
            cascade_rule=rule,
            cascade_alpha=alpha,
            cascade_backend=backend,
        )
        samples.append(tuple(output[0, 3:4].tolist()))
    assert model.cascade_statistics.backend == backend
    assert abs(chi_square_z(samples, exact_law(*models, [1, 2, 3], rule, alpha, 1, TEMPERATURE))) < LIMIT


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_law_with_confidence_threshold(models, threshold):
    output = enable_cascade(*models).generate(
        **left_padded(RAGGED_PROMPTS),
        do_sample=True,
        top_k=0,
        num_return_sequences=5_000,
        max_new_tokens=LENGTH,
        num_assistant_tokens=3,
        assistant_confidence_threshold=threshold,
        cascade_rule="token_v3",
        cascade_alpha=0.5,
        pad_token_id=0,
    )
    for prompt, rows in zip(RAGGED_PROMPTS, output[:, -LENGTH:].chunk(4), strict=True):
        law = exact_law(*models, prompt, "token_v3", 0.5, LENGTH)
        assert abs(chi_square_z([tuple(row) for row in rows.tolist()], law)) < LIMIT


@torch.no_grad()
def processed_law(large, small, prompt, rule, alpha, **generation) -> dict[tuple[int, ...], float]:
    """Probability of every text of `LENGTH` tokens, 0 after one that ends it; processors see each prefix alone."""
    config = prepare_config(large, do_sample=True, **generation)
    processors, law = logits_processors(large, config, len(prompt)), {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for prefix, mass in law.items():
            if set(end_tokens(config)) & set(prefix):
                longer[*prefix, 0] = mass
                continue
            ids = torch.tensor([[*prompt, *prefix]])
            raw = [model(ids).logits[:, -1] for model in (small, large)]
            q, p = (processors(ids, logits.clone()).softmax(-1) for logits in raw)
            pi = target_distribution(rule, alpha, q, p, *(logits.softmax(-1) for logits in raw))[0]
            longer |= {(*prefix, token): mass * share for token, share in enumerate(pi.tolist())}
        law = longer
    return law


@pytest.mark.parametrize(
    "generation",
    [
        {"temperature": 0.7, "top_k": 3},
        {"top_k": 0, "top_p": 0.7},
        {"top_k": 0, "min_p": 0.3},
        {"top_k": 0, "eos_token_id": [2, 5]},
        # these look at each row's text: 20,000 rows of a batch take their turns
        pytest.param({"top_k": 0, "repetition_penalty": 1.8}, marks=pytest.mark.slow),
        pytest.param({"top_k": 0, "sequence_bias": {(3,): 1.5, (1, 4): -2.0}}, marks=pytest.mark.slow),
    ],
    ids=lambda generation: next(reversed(generation)),
)
def test_law_under_processors(models, generation):
    """q and p are both processed, the rule reads them as they were; impossible tokens fail in `chi_square_z`."""
    call = {"max_new_tokens": LENGTH, "num_assistant_tokens": 2, "cascade_rule": "opt", "cascade_alpha": 0.2}
    prompt = {**left_padded(RAGGED_PROMPTS[:1]), "num_return_sequences": 20_000, "pad_token_id": 0}
    output = enable_cascade(*models).generate(**prompt, do_sample=True, **generation, **call)
    law = processed_law(*models, RAGGED_PROMPTS[0], "opt", 0.2, **generation)
    assert abs(chi_square_z([tuple(row) for row in output[:, -LENGTH:].tolist()], law)) < LIMIT


def test_strict_prefix_follows_the_large_model(models):
    output = enable_cascade(*models).generate(
        **left_padded(RAGGED_PROMPTS[:1]),
        do_sample=True,
        top_k=0,
        num_return_sequences=20_000,
        max_new_tokens=LENGTH,
        num_assistant_tokens=2,
        strict_prefix=2,
        cascade_rule="token_v3",
        cascade_alpha=1.0,
        pad_token_id=0,
    )
    large = exact_law(*models, RAGGED_PROMPTS[0], "spec", 0.0, 2)
    assert abs(chi_square_z([tuple(row) for row in output[:, -LENGTH:-1].tolist()], large)) < LIMIT
    # the third token is the small model's own
    law = {}
    for prefix, probability in large.items():
        for (token,), last in exact_law(models[1], models[1], [*RAGGED_PROMPTS[0], *prefix], "spec", 0.0, 1).items():
            law[(*prefix, token)] = probability * last
    assert abs(chi_square_z([tuple(row) for row in output[:, -LENGTH:].tolist()], law)) < LIMIT


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_q_is_the_small_models_own_in_every_round(models, monkeypatch, temperature):
    """The q that accepts drafts is a fresh forward of the small model: a doubled temperature or a lost mask shows."""
    large, small = models
    seen = []
    accept = BatchedCascade._accept

    def spy(self, drafts, siblings, q, p, lengths):
        contexts = [self.texts.of_row(row) for row in self.rows.tolist()]
        for index, context in enumerate(contexts):
            real = context[self.padding[self.rows[index]] :]
            for step in range(int(lengths[index])):
                ids = torch.cat([real, drafts[index, :step]])[None]
                expected = (small(ids).logits[0, -1] / temperature).softmax(-1)
                seen.append(torch.allclose(q.probs[index, step], expected, atol=1e-5))
        return accept(self, drafts, siblings, q, p, lengths)

    padding = [5 - len(prompt) for prompt in RAGGED_PROMPTS]
    monkeypatch.setattr(BatchedCascade, "padding", padding, raising=False)
    monkeypatch.setattr(BatchedCascade, "_accept", spy)
    enable_cascade(large, small).generate(
        **left_padded(RAGGED_PROMPTS),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=24,
        num_assistant_tokens=4,
        cascade_rule="token_v3",
        cascade_alpha=0.6,
        pad_token_id=0,  # 0 is also generated
    )
    assert len(seen) > 50 and all(seen)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_q_is_the_small_models_own_in_the_assisted_loop(models, monkeypatch, temperature):
    from hf_iclr.generation import assisted_cascade

    large, small = models
    seen = []
    call = assisted_cascade.CascadeScores.__call__

    def spy(self, input_ids, scores):
        index = input_ids.shape[-1] - self.generator.prompt_and_accepted
        if self.generator.candidate_scores is not None and index < self.generator.candidate_scores.shape[1]:
            expected = (small(input_ids).logits[0, -1] / temperature).softmax(-1)
            seen.append(torch.allclose(self.generator.candidate_scores[0, index].softmax(-1), expected, atol=1e-5))
        return call(self, input_ids, scores)

    monkeypatch.setattr(assisted_cascade.CascadeScores, "__call__", spy)
    enable_cascade(large, small).generate(
        torch.tensor([[1, 2, 3]]),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        max_new_tokens=20,
        cascade_backend="assisted",
        pad_token_id=0,
    )
    assert len(seen) > 20 and all(seen)


def test_sample_is_exact_and_never_draws_a_zero():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    draws = sample(probs.expand(200_000, 6))
    counts = torch.bincount(draws, minlength=6) / 200_000
    assert torch.allclose(counts, probs, atol=5e-3)
    assert counts[[0, 2, 5]].sum() == 0


def test_acceptance_probability_is_one_minus_total_variation(models):
    """Drafts are accepted with probability Σ min(q, π); the first draft of a prompt, 20,000 times."""
    large, small = models
    model = enable_cascade(large, small)
    model.generate(
        torch.tensor([[1, 2, 3]]),
        do_sample=True,
        top_k=0,
        num_return_sequences=20_000,
        max_new_tokens=2,
        num_assistant_tokens=1,
        cascade_rule="token_v3",
        cascade_alpha=0.5,
    )
    with torch.no_grad():
        q, p = (m(torch.tensor([[1, 2, 3]])).logits[0, -1].softmax(-1) for m in (small, large))
    expected = torch.minimum(q, target_distribution("token_v3", 0.5, q, p)).sum().item()
    # rows that rejected take a second round without drafts: accepted counts the first only
    assert sum(model.cascade_statistics.accepted) / 20_000 == pytest.approx(expected, abs=4 * 0.5 / 141)
    assert VOCAB == len(q)
