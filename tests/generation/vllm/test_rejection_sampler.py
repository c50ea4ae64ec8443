"""The sampler that goes into vLLM, against enumeration; what needs vLLM itself is skipped without it."""

import importlib.util
import inspect
import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from hf_iclr import target_distribution
from hf_iclr.generation.deferral_rules import sample
from hf_iclr.generation.vllm import register, rejection_sample
from tests.generation.toy import RULES, chi_square_z


VOCAB, ROWS, BONUS, LIMIT = 5, 20_000, 3, 4.5
SAMPLING = SimpleNamespace(all_greedy=False, all_random=True, temperature=None, generators={})


def round_of(q, p, rule, alpha, drafts=None):
    """20,000 requests with two drafts and as many with one, of fixed q and p at both places."""
    counts = [2, 1] * (ROWS // 2)
    place = torch.tensor([0, 1, 0] * (ROWS // 2))
    ids = sample(q[place]) if drafts is None else drafts[place]
    return rejection_sample(
        ids, counts, 2, torch.tensor(counts).cumsum(0), q[place] if drafts is None else None, p[place],
        torch.full((ROWS, 1), BONUS), SAMPLING, rule=rule, alpha=alpha,
    )  # fmt: skip


def law_of(q, p, rule, alpha, count):
    """
    A request's tokens: x with probability (π - q)+ where it ends with a refusal, min(q, π) where x is kept and the
    next place follows, and the bonus after the last.
    """
    pi = target_distribution(rule, alpha, q, p)
    law = {}
    for tokens in itertools.product(range(VOCAB), repeat=count):
        kept = 1.0
        for place, token in enumerate(tokens):
            law.setdefault((*tokens[:place], token), kept * float((pi - q)[place, token].clamp(min=0)))
            kept *= float(torch.minimum(q, pi)[place, token])
        law[(*tokens, BONUS)] = law.get((*tokens, BONUS), 0.0) + kept
    return law


@pytest.mark.parametrize(("rule", "alpha"), RULES)
def test_law(rule, alpha):
    torch.manual_seed(0)
    q, p = torch.randn(2, 2, VOCAB).softmax(-1)
    output = round_of(q, p, rule, alpha)
    assert output.dtype == torch.int32 and output.shape == (ROWS, 3)
    for count, rows in ((2, output[::2]), (1, output[1::2])):
        texts = [tuple(token for token in row if token >= 0) for row in rows.tolist()]
        assert abs(chi_square_z(texts, law_of(q, p, rule, alpha, count))) < LIMIT


@pytest.mark.parametrize(("rule", "alpha"), [("spec", 0.0), ("token_v3", 0.5)])
def test_law_of_drafts_without_probabilities(rule, alpha):
    """N-grams: q is one-hot, and `spec` gives p whatever was drafted."""
    torch.manual_seed(0)
    p, drafts = torch.randn(2, VOCAB).softmax(-1), torch.tensor([4, 0])
    output, q = round_of(None, p, rule, alpha, drafts), torch.eye(VOCAB)[drafts]
    texts = [tuple(token for token in row if token >= 0) for row in output[::2].tolist()]
    assert abs(chi_square_z(texts, law_of(q, p, rule, alpha, 2))) < LIMIT
    if rule == "spec":
        assert abs(chi_square_z([text[:1] for text in texts], {(v,): float(p[0, v]) for v in range(VOCAB)})) < LIMIT


def test_greedy_requests_beside_sampled_ones():
    """Of the greedy one (temperature -1) a draft stays where it is p's largest; logits where all are greedy."""
    logits = torch.tensor([[0.0, 5.0, 0, 0, 0], [0, 0, 5.0, 0, 0], [9.0, 0, 0, 0, 0]])
    q = torch.full((3, VOCAB), 0.2)
    arguments = torch.tensor([1, 3, 0]), [2, 1], 2, torch.tensor([2, 3]), q
    mixed = SimpleNamespace(**{**vars(SAMPLING), "all_random": False, "temperature": torch.tensor([-1.0, 1.0])})
    alone = SimpleNamespace(**{**vars(SAMPLING), "all_greedy": True, "all_random": False})
    for metadata, target in ((mixed, logits.softmax(-1)), (alone, logits)):
        output = rejection_sample(*arguments, target, torch.tensor([[4], [4]]), metadata)
        assert output.tolist()[0] == [1, 2, -1]
    assert output.tolist()[1] == [0, 4, -1]


def test_a_seeded_request_is_its_own():
    torch.manual_seed(0)
    q, p = torch.randn(2, 40, VOCAB).softmax(-1)
    ids, accepted = sample(q), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        metadata = SimpleNamespace(**{**vars(SAMPLING), "generators": {0: torch.Generator().manual_seed(7)}})
        output = rejection_sample(ids, [20, 20], 20, torch.tensor([20, 40]), q, p, torch.ones(2, 1), metadata)
        accepted.append(int((output[0] >= 0).sum()))
    assert accepted[0] == accepted[1]


@pytest.fixture
def fake_vllm(monkeypatch):
    """A module that stands where vLLM keeps its sampler."""

    def install(function):
        for name in ("vllm", "vllm.v1", "vllm.v1.sample", "vllm.v1.sample.rejection_sampler"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sampler = sys.modules["vllm.v1.sample.rejection_sampler"]
        sys.modules["vllm.v1.sample"].rejection_sampler, sampler.rejection_sample = sampler, function
        return sampler

    return install


def test_register(fake_vllm, monkeypatch):
    def theirs(
        draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_probs,
        bonus_token_ids, sampling_metadata,
    ):  # fmt: skip
        """Same names as vLLM's."""

    sampler = fake_vllm(theirs)
    register()
    assert sampler.rejection_sample is theirs  # a plugin that nobody asked for does nothing
    monkeypatch.setenv("HF_ICLR_CASCADE_RULE", "token_v3")
    monkeypatch.setenv("HF_ICLR_CASCADE_ALPHA", "0.4")
    register()
    assert sampler.rejection_sample.keywords == {"rule": "token_v3", "alpha": 0.4}
    monkeypatch.setenv("HF_ICLR_CASCADE_ALPHA", "2")
    with pytest.raises(ValueError, match="must lie in"):
        register()
    monkeypatch.setenv("HF_ICLR_CASCADE_ALPHA", "0.4")
    fake_vllm(lambda logits: None)
    with pytest.raises(RuntimeError, match="the installed one takes logits"):
        register()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM, which needs a GPU, is not installed")
def test_installed_vllm_calls_its_sampler_so():
    from vllm.v1.sample.rejection_sampler import rejection_sample as theirs

    ours = [name for name, entry in inspect.signature(rejection_sample).parameters.items() if entry.kind != 3]
    assert list(inspect.signature(theirs).parameters)[: len(ours)] == ours
