"""Several candidates for the first draft of a round, verified in one forward."""

import itertools
import statistics

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList

from hf_iclr import enable_cascade
from hf_iclr.generation.batched_cascade import BatchedCascade
from hf_iclr.generation.cached_decoder import CachedDecoder
from hf_iclr.generation.deferral_rules import sample
from hf_iclr.generation.proposals import DraftLength, Plan, RoundCosts
from tests.generation.drafting.test_feature_draft import feature_draft
from tests.generation.toy import (
    GREEDY,
    RAGGED_PROMPTS,
    VOCAB,
    chi_square_z,
    exact_law,
    left_padded,
    perturbed_copy,
    tiny_llama,
)


LIMIT = 4.5  # |z| above has a probability of about 1e-5


@pytest.fixture(scope="module")
def large():
    return tiny_llama(1)


@pytest.fixture
def rounds(monkeypatch):
    """Sets draft length and siblings of each round, in turn; collects how often a sibling was taken."""

    def plan(*pairs):
        turns, taken = itertools.cycle(pairs), []
        monkeypatch.setattr(DraftLength, "next", lambda self, *_: Plan(*next(turns)))
        monkeypatch.setattr(
            DraftLength, "record", lambda self, plan, _, __, nodes, ___: taken.append(max(nodes) > plan.gamma)
        )
        return taken

    return plan


@pytest.mark.parametrize(
    ("rule", "alpha", "plan"),
    [
        ("spec", 0.0, [(1, 1)]),
        ("spec", 0.0, [(3, 3)]),
        ("token_v3", 0.5, [(3, 1)]),
        ("token_v3", 0.5, [(1, 3)]),
        ("token_v3", 0.5, [(1, 3), (0, 3), (2, 1)]),
    ],
    ids=str,
)
def test_law(large, rounds, rule, alpha, plan):
    """4 x 5,000 texts of ragged prompts against the enumerated law; siblings end rows at different places."""
    small, taken = tiny_llama(2), rounds(*plan)
    torch.manual_seed(0)
    output = enable_cascade(large, small).generate(
        **left_padded(RAGGED_PROMPTS),
        do_sample=True,
        temperature=0.8,
        top_k=0,
        num_return_sequences=5_000,
        max_new_tokens=4,
        cascade_rule=rule,
        cascade_alpha=alpha,
        pad_token_id=0,
    )
    assert any(taken)
    for prompt, rows in zip(RAGGED_PROMPTS, output[:, -4:].chunk(4), strict=True):
        law = exact_law(large, small, prompt, rule, alpha, 4, 0.8)
        assert abs(chi_square_z([tuple(row) for row in rows.tolist()], law)) < LIMIT


def test_law_where_q_has_few_tokens(large, rounds):
    """Of three tokens that top-k leaves, four candidates can't be drawn."""
    small = tiny_llama(2)
    rounds((2, 3))
    torch.manual_seed(0)
    output = enable_cascade(large, small).generate(
        **left_padded(RAGGED_PROMPTS[:1]), do_sample=True, top_k=3, num_return_sequences=20_000, max_new_tokens=3,
        cascade_rule="opt", cascade_alpha=0.2, pad_token_id=0,
    )  # fmt: skip
    law = exact_law(large, small, RAGGED_PROMPTS[0], "opt", 0.2, 3, top_k=3)
    assert abs(chi_square_z([tuple(row) for row in output[:, -3:].tolist()], law)) < LIMIT


def test_law_with_a_feature_draft(rounds):
    """A draft of states goes on from the state that belongs to a sibling."""
    large = tiny_llama(1, layers=2)
    taken = rounds((2, 2))
    torch.manual_seed(0)
    output = enable_cascade(large, feature_draft(large)).generate(
        **left_padded(RAGGED_PROMPTS[:1]), do_sample=True, top_k=0, num_return_sequences=20_000, max_new_tokens=4,
        cascade_rule="spec", pad_token_id=0,
    )  # fmt: skip
    assert any(taken)
    law = exact_law(large, large, RAGGED_PROMPTS[0], "spec", 0.0, 4)
    assert abs(chi_square_z([tuple(row) for row in output[:, -4:].tolist()], law)) < LIMIT


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["layers", "features"])
def test_greedy_decoding_is_the_large_models_own(rounds, kind, batch):
    large = tiny_llama(1, layers=2)
    small = perturbed_copy(large) if kind == "layers" else feature_draft(large)
    taken, inputs = rounds((2, 2), (1, 3), (3, 1), (0, 0)), left_padded(RAGGED_PROMPTS[:batch])
    call = {**GREEDY, "max_new_tokens": 60, "return_dict_in_generate": True, "output_logits": True}
    plain = large.generate(**inputs, **call)
    cascade = enable_cascade(large, small)
    output = cascade.generate(**inputs, **call, cascade_rule="spec")
    assert torch.equal(output.sequences, plain.sequences)
    assert torch.allclose(torch.stack(output.logits), torch.stack(plain.logits), atol=1e-4)
    assert any(taken)
    assert {2, 3, 4} <= set(cascade.cascade_statistics.to_dict()["candidates"])


class _Counts(LogitsProcessor):
    def clone(self):
        return _Counts()

    def __call__(self, input_ids, scores):
        return scores


def test_processors_with_a_state_see_one_candidate(large, rounds):
    rounds((2, 3))
    cascade = enable_cascade(large, perturbed_copy(large))
    cascade.generate(
        **left_padded(RAGGED_PROMPTS), **GREEDY, cascade_rule="spec", logits_processor=LogitsProcessorList([_Counts()])
    )
    assert set(cascade.cascade_statistics.candidates) == {1}


@pytest.mark.parametrize("read", [0, 2])
def test_siblings_see_the_text_alone(read):
    """A chain of two and two siblings of its first, beside a prompt that is read with them or before."""
    large, ids = tiny_llama(1, layers=2), torch.tensor([[1, 2, 3, 4, 5, 6, 0]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 3, 3]])
    decoder = CachedDecoder(large, ids[:, :0], ids[:, :0])
    if read:
        decoder(ids[:, :read], positions[:, :read], 1)
    logits = decoder(ids[:, read:], positions[:, read:], 5, leaves=2)[0]
    for texts, column in (([1, 2, 3], 0), ([1, 2, 3, 4, 5], 2), ([1, 2, 3, 6], 3), ([1, 2, 3, 0], 4)):
        assert torch.allclose(logits[column], large(torch.tensor([texts])).logits[0, -1], atol=1e-5)


def test_siblings_are_chosen_where_they_pay(large):
    """Chains are refused throughout, siblings taken: 1 + (1 - a) b tokens at 1.02 a round against 1."""
    for price, chosen in ((0.01, True), (0.9, False)):
        length = DraftLength(
            large,
            tiny_llama(2),
            (price,),
            lambda price=price: RoundCosts({0: 1.0, 1: 1.01, 2: 1.5, 4: 2.5}, price, 0.0),
        )
        found = []
        for _ in range(40):
            plan = length.next()
            found.append(plan.siblings)
            if plan.siblings:
                length.record(plan, [0], [1], [plan.gamma + 1], [1])
            elif plan.gamma:
                length.record(plan, [0], [0], [0], [0])
        assert (found[-1] > 0) == chosen


def test_sample_inverts_over_blocks_of_tokens():
    """Mass at both ends of blocks and nowhere else: the law, and never a token without mass."""
    torch.manual_seed(0)
    probs = torch.zeros(1000)
    where = torch.tensor([1, 255, 256, 700, 998])
    probs[where] = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    drawn = sample(probs.expand(20_000, -1))
    law = {(int(token),): float(probs[token]) for token in where}
    assert abs(chi_square_z([(token,) for token in drawn.tolist()], law)) < LIMIT


class _Looks(TorchDispatchMode):
    """Counts what makes the host wait for a device: numbers that are read, indices of unknown number."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"):
            _Looks.number += 1
        return function(*args, **kwargs or {})


class _Lists(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        _Looks.number += function is torch.Tensor.tolist
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("rule", "wanted"), [("spec", 1), ("token_v3", 2)])
@pytest.mark.parametrize("kind", ["layers", "features"])
def test_looks_at_the_device_in_a_round(rounds, monkeypatch, rule, wanted, kind):
    """One for `spec`; two where π after the last draft needs the small model once more, if there is such a row."""
    large, found = tiny_llama(1, layers=2), []
    small = perturbed_copy(large) if kind == "layers" else feature_draft(large)
    rounds((2, 2))
    one_round = BatchedCascade._round

    def counted(self):
        _Looks.number = 0
        with _Lists(), _Looks():
            one_round(self)
        found.append(_Looks.number)

    monkeypatch.setattr(BatchedCascade, "_round", counted)
    enable_cascade(large, small).generate(
        **left_padded(RAGGED_PROMPTS), do_sample=True, top_k=5, eos_token_id=VOCAB - 1,
        max_new_tokens=40, cascade_rule=rule, pad_token_id=0,
    )  # fmt: skip
    assert statistics.mode(found[1:]) == wanted  # the first reads the prompt; where rows end, caches are compacted
