"""Drafts that read the large model's own last states."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, pipeline

from hf_iclr import SpeculativeCascadeForCausalLM, build_draft_model, calibrate_cascade, enable_cascade
from hf_iclr.cache_argument import UPSTREAM_NAME, find_cache
from hf_iclr.generation import batched_cascade
from hf_iclr.generation.batched_cascade import BatchedCascade
from hf_iclr.generation.configuration_speculative_cascade import FeatureDraftConfig
from hf_iclr.generation.drafting.draft_model import truncated_head
from hf_iclr.generation.modeling_draft import FeatureDraftForCausalLM
from hf_iclr.generation.proposals import RoundCosts
from tests.generation.drafting.test_draft_model import make_model, make_texts
from tests.generation.toy import (
    GREEDY,
    RAGGED_PROMPTS,
    VOCAB,
    chi_square_z,
    exact_law,
    left_padded,
    tiny_llama,
)


LIMIT = 4.5  # |z| above has a probability of about 1e-5


@pytest.fixture(scope="module")
def large():
    return tiny_llama(1, layers=2)


def feature_draft(large, seed=0, scale=0.3):
    """Random maps and the large model's own head, so that drafts are sometimes right."""
    torch.manual_seed(seed)
    config = FeatureDraftConfig(body=copy.deepcopy(large.config), draft_vocab_size=VOCAB, intermediate_size=8)
    draft = FeatureDraftForCausalLM(config)
    draft.head.load_state_dict(truncated_head(large, torch.arange(VOCAB)).state_dict())
    with torch.no_grad():
        for parameter in (draft.affine.weight, draft.gate_up.weight, draft.down.weight):
            parameter.normal_(std=scale)
    return draft.eval()


@pytest.mark.parametrize("lengths", [{"num_assistant_tokens": 1}, {"num_assistant_tokens": 4}, {}])
def test_greedy_decoding_is_the_large_models_own(large, lengths, monkeypatch):
    costs = RoundCosts({0: 1.0, 1: 1.01, 2: 1.02, 4: 1.04}, 0.01, 0.005)  # drafts that pay, on any machine
    monkeypatch.setattr(batched_cascade, "measure_rounds", lambda *_: costs)
    inputs = left_padded(RAGGED_PROMPTS)
    cascade = enable_cascade(large, feature_draft(large))
    output = cascade.generate(**inputs, **{**GREEDY, "max_new_tokens": 40}, cascade_rule="spec", **lengths)
    assert torch.equal(output, large.generate(**inputs, **{**GREEDY, "max_new_tokens": 40}))
    stats = cascade.cascade_statistics
    assert 0 < sum(stats.accepted) < sum(stats.drafted)
    assert stats.small_forwards > 0 and stats.new_tokens == [40] * 4


def test_law_of_speculative_decoding(large):
    output = enable_cascade(large, feature_draft(large)).generate(
        **left_padded(RAGGED_PROMPTS),
        do_sample=True,
        top_k=0,
        num_return_sequences=5_000,
        max_new_tokens=3,
        num_assistant_tokens=2,
        cascade_rule="spec",
        pad_token_id=0,
    )
    for prompt, rows in zip(RAGGED_PROMPTS, output[:, -3:].chunk(4), strict=True):
        law = exact_law(large, large, prompt, "spec", 0.0, 3)
        assert abs(chi_square_z([tuple(row) for row in rows.tolist()], law)) < LIMIT


@pytest.mark.parametrize(("rule", "alpha"), [("token_v3", 0.6), ("opt", 0.4)])
def test_q_is_predicted_from_the_states_of_a_fresh_forward(large, monkeypatch, rule, alpha):
    """
    The first draft of a round reads the large model's state one token before the newest, which the large model has not
    read yet; the next ones read predicted states. A stale or shifted state, or another row's, shows.
    """
    draft, seen = feature_draft(large), []
    accept, target = BatchedCascade._accept, BatchedCascade._target
    embed = large.get_input_embeddings()

    def expected(context, drafts):
        states = large.model(context[None, :-1]).last_hidden_state[:, -1]
        probs = []
        for token in [context[-1], *drafts]:
            states = draft.predict(embed(token[None]), states)
            probs.append(draft.head(states).softmax(-1)[0])
        return torch.stack(probs)

    def context_of(self, index):
        row = self.rows[index]
        return self.texts.of_row(row)[5 - len(RAGGED_PROMPTS[int(row)]) :]

    def spy_accept(self, drafts, siblings, q, p, lengths):
        for index in range(len(self.rows)):
            length = int(lengths[index])
            if length:
                wanted = expected(context_of(self, index), drafts[index, : length - 1])
                seen.append(torch.allclose(q.probs[index, :length], wanted, atol=1e-5))
        return accept(self, drafts, siblings, q, p, lengths)

    bonus = []

    def spy_target(self, q, p, start):
        bonus.append(not isinstance(start, int))
        return target(self, q, p, start)

    monkeypatch.setattr(BatchedCascade, "_accept", spy_accept)
    monkeypatch.setattr(BatchedCascade, "_target", spy_target)
    torch.manual_seed(0)
    enable_cascade(large, draft).generate(
        **left_padded(RAGGED_PROMPTS),
        do_sample=True,
        top_k=0,
        max_new_tokens=24,
        num_assistant_tokens=2,
        cascade_rule=rule,
        cascade_alpha=alpha,
        pad_token_id=0,
    )
    assert len(seen) > 20 and all(seen)
    assert any(bonus)  # the position after the last draft has its q, too


def test_first_token_is_the_large_models(large):
    """Before the large model has read the prompt there is no state to draft from, whatever the rule would keep."""
    output = enable_cascade(large, feature_draft(large)).generate(
        **left_padded(RAGGED_PROMPTS[:1]),
        do_sample=True,
        top_k=0,
        num_return_sequences=20_000,
        max_new_tokens=2,
        num_assistant_tokens=1,
        cascade_rule="token_v3",
        cascade_alpha=1.0,
        pad_token_id=0,
    )
    law = exact_law(large, large, RAGGED_PROMPTS[0], "spec", 0.0, 1)
    assert abs(chi_square_z([tuple(row) for row in output[:, -2:-1].tolist()], law)) < LIMIT


def test_goes_on_from_a_cache(large):
    cascade, inputs = enable_cascade(large, feature_draft(large)), left_padded(RAGGED_PROMPTS[:1])
    call = {**GREEDY, "cascade_rule": "spec", "return_dict_in_generate": True}
    first = cascade.generate(**inputs, **{**call, "max_new_tokens": 6})
    cache = {UPSTREAM_NAME: find_cache(first), "attention_mask": torch.ones_like(first.sequences)}
    second = cascade.generate(first.sequences, **{**call, "max_new_tokens": 6}, **cache)
    assert torch.equal(second.sequences, large.generate(**inputs, **{**GREEDY, "max_new_tokens": 12}))


def test_saved_alone_and_in_a_composite(large, tmp_path):
    draft, inputs = feature_draft(large), left_padded(RAGGED_PROMPTS[:2])
    draft.save_pretrained(tmp_path / "draft")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "draft")
    assert type(loaded) is FeatureDraftForCausalLM
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), loaded.parameters(), strict=True))
    call = {**GREEDY, "cascade_rule": "token_v3", "cascade_alpha": 0.5, "num_assistant_tokens": 2}
    expected = enable_cascade(large, draft).generate(**inputs, **call)
    assert torch.equal(enable_cascade(large, loaded).generate(**inputs, **call), expected)
    SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, draft).save_pretrained(tmp_path / "both")
    both = AutoModelForCausalLM.from_pretrained(tmp_path / "both")
    assert torch.equal(both.generate(**inputs, **call), expected)
    assert "last hidden state" in (tmp_path / "draft" / "README.md").read_text()


def test_pipeline(word_tokenizer):
    model = make_model()
    draft = build_draft_model(model, word_tokenizer, make_texts(), kind="features", draft_vocab_size=40)
    pipe = pipeline("speculative-cascade", model=model, tokenizer=word_tokenizer, assistant_model=draft)
    call = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    plain = pipeline("text-generation", model=model, tokenizer=word_tokenizer)("w1 w2 w3", **call)
    assert pipe("w1 w2 w3", cascade_rule="spec", **call)[0]["generated_text"] == plain[0]["generated_text"]


def test_made_in_closed_form_then_distilled(word_tokenizer):
    """The closed form beats chance, distillation beats the closed form, for first and second drafts of a round."""
    model, texts = make_model(), make_texts(256)
    drafts = [
        build_draft_model(model, word_tokenizer, texts, kind="features", draft_vocab_size=50, **more)
        for more in ({}, {"distill_steps": 60, "learning_rate": 3e-3})
    ]
    ids = torch.randint(48, (32, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        states, embeddings = model.model(ids).last_hidden_state, model.get_input_embeddings()(ids)
        p = model.lm_head(states).softmax(-1)

        def overlaps(draft):
            guess, found = states, []
            for step in (1, 2):
                guess = draft.predict(embeddings[:, step:], guess[:, :-1])
                found.append(torch.minimum(draft.head(guess).softmax(-1), p[:, step:]).sum(-1).mean().item())
            return found

        chance = torch.minimum(p.mean((0, 1)), p).sum(-1).mean().item()
    closed_form, distilled = map(overlaps, drafts)
    assert min(closed_form) > chance
    assert all(late > early + 0.002 for early, late in zip(closed_form, distilled, strict=True))
    repeated = build_draft_model(model, word_tokenizer, texts, kind="features", draft_vocab_size=50, distill_steps=3)
    again = build_draft_model(model, word_tokenizer, texts, kind="features", draft_vocab_size=50, distill_steps=3)
    assert all(torch.equal(a, b) for a, b in zip(repeated.parameters(), again.parameters(), strict=True))


def test_what_it_cannot_serve_is_said(large, word_tokenizer):
    draft, prompt = feature_draft(large), left_padded(RAGGED_PROMPTS[:1])
    with pytest.raises(ValueError, match=r"drafts only inside a cascade: `enable_cascade\(large, draft\)"):
        draft.generate(**prompt, max_new_tokens=2)
    with pytest.raises(ValueError, match="needs the batched loop.*the loop of transformers"):
        enable_cascade(large, draft).generate(**prompt, **GREEDY, cascade_backend="assisted")
    with pytest.raises(ValueError, match="a small model that reads texts by itself, got a FeatureDraftForCausalLM"):
        calibrate_cascade(enable_cascade(large, draft), ["w1 w2"] * 4, {"acceptance": 0.5}, tokenizer=word_tokenizer)
    config = copy.deepcopy(large.config)
    config.hidden_size = 24
    other = FeatureDraftForCausalLM(FeatureDraftConfig(body=config, draft_vocab_size=VOCAB, intermediate_size=8))
    with pytest.raises(ValueError, match="states of 16 values, the draft was made of a model with 24"):
        enable_cascade(large, other).generate(**prompt, **GREEDY)
    gemma = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match="does more to its logits than apply its head"):
        enable_cascade(gemma, feature_draft(large)).generate(**prompt, **GREEDY)
    with pytest.raises(ValueError, match="'layers' or 'features', got 'tree'"):
        build_draft_model(make_model(), word_tokenizer, make_texts(), kind="tree")
