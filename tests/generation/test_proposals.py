"""Drafts copied from a row's own text, alone and beside a small model."""

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, T5Config, T5ForConditionalGeneration

from hf_iclr import enable_cascade
from hf_iclr.generation import batched_cascade
from hf_iclr.generation.proposals import DraftLength, RoundCosts, TextLookup
from tests.generation.drafting.test_feature_draft import feature_draft
from tests.generation.toy import GREEDY, chi_square_z, exact_law, left_padded, perturbed_copy, tiny_llama


# a copy that the toy likes, one that it does not, and rows whose match comes later
PROMPTS = [[5, 1, 0, 5, 1], [1, 2, 3, 1, 2], [3, 5, 6, 0, 2, 3], [6]]
LIMIT = 4.5  # |z| above has a probability of about 1e-5


@pytest.fixture(scope="module")
def large():
    return tiny_llama(1, layers=2)


def small_model(large, kind):
    return {"none": lambda _: None, "layers": perturbed_copy, "features": feature_draft}[kind](large)


@pytest.fixture
def cheap(monkeypatch):
    """Drafts cost next to nothing, so they are always made."""
    costs = RoundCosts({0: 1.0, 1: 1.01, 2: 1.02, 4: 1.04, 8: 1.08}, 0.01, 0.005)
    monkeypatch.setattr(batched_cascade, "measure_rounds", lambda *_: costs)


def test_lookup_copies_what_followed_last():
    lookup = TextLookup([[1, 2, 3, 9, 1, 2, 3, 7, 8, 2, 3], [5, 6, 5, 6], [1, 2, 3]])
    assert lookup.sizes() == [2, 2, 0]  # 2 3 was last followed by 7, not 9
    assert lookup.drafts([2, 2, 0], 4)[:2] == [[7, 8, 2, 3], [5, 6, 5, 6]]  # a text that repeats itself goes on so
    lookup.extend(0, [7, 8])
    assert lookup.sizes()[0] == 3 and lookup.drafts([3, 2, 0], 2)[0] == [2, 3]  # the longest match counts
    lookup.keep([1])
    assert lookup.texts == [[5, 6, 5, 6]]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["none", "layers", "features"])
def test_greedy_decoding_is_the_large_models_own(cheap, large, kind, batch):
    """The toy falls into a loop, which is copied: fewer forwards than tokens, with whatever else drafts."""
    inputs, cascade = left_padded(PROMPTS[:batch]), enable_cascade(large, small_model(large, kind))
    call = {**GREEDY, "max_new_tokens": 60, "return_dict_in_generate": True, "output_logits": True}
    plain, output = large.generate(**inputs, **call), cascade.generate(**inputs, **call)
    assert torch.equal(output.sequences, plain.sequences)
    assert torch.allclose(torch.stack(output.logits), torch.stack(plain.logits), atol=1e-4)
    stats = cascade.cascade_statistics
    assert stats.large_forwards < 45 and 20 < stats.looked_up_accepted <= stats.looked_up


@pytest.mark.parametrize("kind", ["none", "layers", "features"])
def test_law(cheap, large, kind):
    """4 x 5,000 texts against the enumerated law; rows that copy stand beside rows that don't."""
    cascade = enable_cascade(large, small_model(large, kind))
    torch.manual_seed(0)
    output = cascade.generate(
        **left_padded(PROMPTS), do_sample=True, temperature=0.8, top_k=0, num_return_sequences=5_000,
        max_new_tokens=4, pad_token_id=0,
    )  # fmt: skip
    assert cascade.cascade_statistics.looked_up_accepted > 1000
    for prompt, rows in zip(PROMPTS, output[:, -4:].chunk(4), strict=True):
        law = exact_law(large, large, prompt, "spec", 0.0, 4, 0.8)
        assert abs(chi_square_z([tuple(row) for row in rows.tolist()], law)) < LIMIT


def test_law_with_a_length_that_is_named(large):
    """20,000 texts under top-k, which leaves some copied tokens no probability."""
    torch.manual_seed(0)
    output = enable_cascade(large).generate(
        **left_padded(PROMPTS[:1]), do_sample=True, top_k=3, num_return_sequences=20_000, max_new_tokens=3,
        num_assistant_tokens=2, pad_token_id=0,
    )  # fmt: skip
    law = exact_law(large, large, PROMPTS[0], "spec", 0.0, 3, top_k=3)
    assert abs(chi_square_z([tuple(row) for row in output[:, -3:].tolist()], law)) < LIMIT


def test_a_seed_gives_the_same_text_again(large):
    cascade, texts = enable_cascade(large), []
    for _ in range(2):
        torch.manual_seed(3)
        texts.append(cascade.generate(**left_padded(PROMPTS), do_sample=True, max_new_tokens=50, pad_token_id=0))
    assert torch.equal(*texts)


def test_prompt_lookup_num_tokens_is_a_draft_length(large):
    cascade = enable_cascade(large)
    output = cascade.generate(**left_padded(PROMPTS[:1]), **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(output, large.generate(**left_padded(PROMPTS[:1]), **GREEDY))
    assert set(cascade.cascade_statistics.draft_lengths) <= {0, 1, 2, 3}


def test_copies_that_are_refused_are_given_up(large):
    """A draft costs a third of a round, and of two that are copied none is ever kept."""
    costs = RoundCosts({0: 1.0, 1: 1.3, 2: 1.6, 4: 2.2, 8: 3.4}, 1.0, 0.0)
    length, found = DraftLength(large, None, ("dear",), lambda: costs), []
    for _ in range(40):
        plan = length.next([5])
        found.append(plan.gamma)
        if plan.gamma:
            length.record(plan, [5], [0], [0], [0])
    assert found[1] > 0 and set(found[-20:]) == {0}
    assert length.next([8]).gamma > 0  # longer matches have a record of their own


def test_the_small_model_rests_where_all_rows_copy(large):
    costs = RoundCosts({0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}, 1.0, 0.05)
    length = DraftLength(large, tiny_llama(2), ("rest",), lambda: costs)
    assert length.next([8, 8]).small  # before anything is known, drafts are made with the prompt
    assert length.next([0, 0]).small and not length.next([8, 8]).small


class _Forbids(LogitsProcessor):
    """Breaks when it is asked about a text that it forbids, as grammars do."""

    def clone(self):
        return _Forbids()

    def __call__(self, input_ids, scores):
        assert input_ids[0, -1] != 3 or input_ids.shape[1] <= 5
        return scores.index_fill(1, torch.tensor(3), -torch.inf)


def test_a_grammar_is_never_asked_about_a_copy(large):
    inputs, grammar = left_padded(PROMPTS[:1]), LogitsProcessorList([_Forbids()])
    output = enable_cascade(large).generate(**inputs, **GREEDY, logits_processor=grammar)
    assert torch.equal(output, large.generate(**inputs, **GREEDY, logits_processor=grammar))


def test_what_can_not_be_served_without_a_small_model_is_said(large):
    with pytest.raises(ValueError, match="Rule 'token_v3' mixes in a small model, got none"):
        enable_cascade(large).generate(**left_padded(PROMPTS), cascade_rule="token_v3")
    sizes = {"vocab_size": 7, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(ValueError, match="without a small model needs the batched loop.*encoder-decoder"):
        enable_cascade(t5.eval()).generate(torch.tensor([[1, 2]]), max_new_tokens=4)
