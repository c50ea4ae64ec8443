import copy
import logging

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    T5ForConditionalGeneration,
)

import hf_iclr  # noqa: F401  (registers the draft with the auto classes)
from hf_iclr.cache_argument import find_cache
from hf_iclr.generation.drafting.distillation import distillation_loss
from hf_iclr.generation.drafting.draft_model import (
    build_draft_model,
    fit_affine,
    frequent_tokens,
    truncate,
)
from hf_iclr.generation.drafting.teacher import read_teacher, sample_texts


SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
SPECIAL = {"bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 0, "initializer_range": 0.25}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, **SPECIAL, intermediate_size=32, num_key_value_heads=1, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SHAPE, **SPECIAL, intermediate_size=32, num_key_value_heads=1),
    "qwen3": Qwen3Config(**SHAPE, **SPECIAL, intermediate_size=32, num_key_value_heads=1, head_dim=8),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=4, n_head=2, n_positions=64, **SPECIAL),
}


def make_model(name="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def make_texts(count=64, seed=1):
    words = torch.randint(48, (count, 24), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{word}" for word in line) for line in words.tolist()]


def held_out(count=32):
    return torch.randint(48, (count, 24), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def overlap_of(model, draft):
    """Mean of `sum_v min(p(v), q(v))` over held-out texts: the chance that a drafted token is accepted."""
    p, q = (half(held_out()).logits.softmax(-1) for half in (model, draft))
    return torch.minimum(p, q).sum(-1).mean().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_closed_form_beats_truncation(name, word_tokenizer):
    model = make_model(name)
    truncation = truncate(model, 2, torch.arange(50))
    draft = build_draft_model(model, word_tokenizer, make_texts(), num_layers=2, draft_vocab_size=50)
    assert overlap_of(model, draft) > overlap_of(model, truncation)


def test_affine_map_is_ridge_regression():
    """The penalty λ n Σ (σ_j W_ij)² is n λ more rows diag(σ) with target 0 under the centred least-squares problem."""
    inputs = torch.randn(200, 6) @ torch.randn(6, 6) + 3
    targets = torch.randn(200, 4)
    weight, bias = fit_affine(inputs, targets, ridge=0.1)
    x, y = inputs.double().numpy(), targets.double().numpy()
    penalty = np.sqrt(0.1 * 200) * np.diag(x.std(0, ddof=1))
    rows, values = np.vstack([x - x.mean(0), penalty]), np.vstack([y - y.mean(0), np.zeros((6, 4))])
    expected = np.linalg.lstsq(rows, values, rcond=None)[0].T
    np.testing.assert_allclose(weight, expected, atol=1e-4)
    np.testing.assert_allclose(bias, y.mean(0) - expected @ x.mean(0), atol=1e-4)


def test_loss_by_hand():
    """p = (.5, .5), q = (.75, .25): KL = .5 ln(.5/.75) + .5 ln(.5/.25) = .14384, TV = .25, half of each .19692."""
    log_p, log_q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    assert distillation_loss(log_p, log_q, 0.0).item() == pytest.approx(0.143841, abs=1e-5)
    assert distillation_loss(log_p, log_q, 1.0).item() == pytest.approx(0.25)
    assert distillation_loss(log_p, log_q, 0.5).item() == pytest.approx(0.196921, abs=1e-5)


def test_distillation_raises_overlap(word_tokenizer):
    model, texts = make_model(), make_texts(256)
    closed_form = build_draft_model(model, word_tokenizer, texts, draft_vocab_size=50)
    draft = build_draft_model(model, word_tokenizer, texts, draft_vocab_size=50, distill_steps=60, learning_rate=3e-3)
    overlaps = [overlap_of(model, d) for d in (closed_form, draft)]
    assert overlaps[1] > overlaps[0] + 0.01
    assert torch.equal(draft.get_input_embeddings().weight, closed_form.get_input_embeddings().weight)


def test_distillation_by_steps_repeats(word_tokenizer):
    model = make_model()
    drafts = [
        build_draft_model(model, word_tokenizer, make_texts(), draft_vocab_size=50, distill_steps=3, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drafts[0].affine.weight, drafts[1].affine.weight)
    assert not torch.equal(drafts[0].affine.weight, drafts[2].affine.weight)


def test_distillation_by_time(word_tokenizer):
    model = make_model()
    closed_form = build_draft_model(model, word_tokenizer, make_texts(), draft_vocab_size=50)
    draft = build_draft_model(model, word_tokenizer, make_texts(), draft_vocab_size=50, distill_minutes=0.01)
    assert not torch.equal(draft.affine.weight, closed_form.affine.weight)


def test_only_completions_are_learned(word_tokenizer):
    records = [{"prompt": "w1 w2 w3 ", "completion": "w4 w5"}]
    (row,) = read_teacher(make_model(), word_tokenizer, records)
    assert row.input_ids.tolist() == [1, 2, 3, 4, 5]
    assert row.mask.tolist() == [False, False, True, True, True]


def test_long_texts_are_cut(word_tokenizer):
    rows = read_teacher(make_model(), word_tokenizer, ["w1 w2 w3 w4 w5"], max_length=3)
    assert sorted(row.input_ids.tolist() for row in rows) == [[1, 2, 3], [4, 5]]


def test_hidden_states_give_the_logits_again(word_tokenizer):
    model = make_model()
    for row in read_teacher(model, word_tokenizer, ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]):
        expected = model(row.input_ids[None]).logits[0]
        torch.testing.assert_close(model.get_output_embeddings()(row.hidden_states), expected)


def test_frequent_tokens_carry_the_mass(word_tokenizer):
    model = make_model()
    rows = read_teacher(model, word_tokenizer, make_texts(4))
    mass = sum(model(row.input_ids[None]).logits.softmax(-1).sum((0, 1)) for row in rows)
    assert frequent_tokens(model, rows, 10).tolist() == sorted(mass.topk(10).indices.tolist())


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name, word_tokenizer, tmp_path):
    draft = build_draft_model(make_model(name), word_tokenizer, make_texts(), num_layers=1, draft_vocab_size=30)
    draft.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(draft)
    assert torch.equal(loaded.draft_vocab_ids, draft.draft_vocab_ids)
    weights = draft.state_dict()
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    # Loaded weights begin where the file has them, and products round by the alignment of their factors.
    torch.testing.assert_close(loaded(held_out()).logits, draft(held_out()).logits, rtol=0, atol=1e-4)
    assert loaded.generation_config.eos_token_id == 49
    assert {path.name for path in tmp_path.glob("*.py")} == {
        "cache_argument.py",
        "configuration_speculative_cascade.py",
        "deferral_rules.py",
        "hub.py",
        "modeling_draft.py",
    }


def test_missing_tokens_have_no_probability(word_tokenizer):
    draft = build_draft_model(make_model(), word_tokenizer, make_texts(), draft_vocab_size=30)
    q = draft(held_out()).logits.softmax(-1)
    missing = torch.ones(50, dtype=torch.bool).index_fill(0, draft.draft_vocab_ids, False)
    assert q.shape[-1] == 50
    assert (q[..., missing] == 0).all()
    torch.testing.assert_close(q.sum(-1), torch.ones(q.shape[:-1]))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_assists_stock_generate(name, do_sample, word_tokenizer, caplog):
    caplog.set_level(
        logging.ERROR, logger="transformers"
    )  # stock assisted generation warns of its own deprecated call
    model = make_model(name)
    draft = build_draft_model(model, word_tokenizer, make_texts(), draft_vocab_size=50)
    inputs = {"input_ids": held_out(1), "attention_mask": torch.ones(1, 24, dtype=torch.long)}
    options = {"max_new_tokens": 10, "do_sample": do_sample}
    output = model.generate(**inputs, assistant_model=draft, **options)
    assert output.shape[1] <= 34
    if not do_sample:
        assert torch.equal(output, model.generate(**inputs, **options))


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_cache_positions_and_4d_mask(name, word_tokenizer):
    """A hole in the cache, hidden by the mask and skipped by the positions, leaves the logits as they were."""
    draft = build_draft_model(make_model(name), word_tokenizer, make_texts(), draft_vocab_size=50)
    ids = held_out(1)[:, :6]
    expected = draft(ids).logits[:, -1]
    first = draft(torch.cat([ids[:, :4], ids.new_tensor([[7]])], 1), use_cache=True)
    mask = torch.tensor([[[[1, 1, 1, 1, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1]]]], dtype=torch.bool)
    for argument in ("cache", "past_key_values"):  # of transformers 5.24, and of releases before it
        cache = copy.deepcopy(find_cache(first))
        output = draft(ids[:, 4:], attention_mask=mask, position_ids=torch.tensor([[4, 5]]), **{argument: cache})
        torch.testing.assert_close(output.logits[:, -1], expected)
        assert find_cache(output) is cache
    torch.testing.assert_close(draft(ids, logits_to_keep=1).logits[:, 0], expected)


def test_labels(word_tokenizer):
    draft = build_draft_model(make_model(), word_tokenizer, make_texts(), draft_vocab_size=30)
    ids = held_out(4)
    output = draft(ids, labels=ids)
    labels = ids.masked_fill(~torch.isin(ids, draft.draft_vocab_ids), -100)[:, 1:]
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output.loss, expected)


def test_sample_texts(word_tokenizer):
    model = make_model()
    records = sample_texts(model, word_tokenizer, ["w1 w2", "w3", "w4 w5 w6"], max_new_tokens=5, batch_size=2)
    assert [record["prompt"] for record in records] == ["w1 w2", "w3", "w4 w5 w6"]
    assert all(1 <= len(record["completion"].split()) <= 5 for record in records)
    again = sample_texts(model, word_tokenizer, ["w1 w2", "w3", "w4 w5 w6"], max_new_tokens=5, batch_size=2)
    assert records == again


def test_bfloat16_model_gives_bfloat16_draft(word_tokenizer):
    draft = build_draft_model(make_model().bfloat16(), word_tokenizer, make_texts(), draft_vocab_size=50)
    assert draft.dtype == torch.bfloat16
    assert draft(held_out()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"texts": []}, "got none"),
        ({"texts": ["w1 w2 w3"]}, "got 3. Pass more"),
        ({"texts": "w1 w2 w3"}, r"Expected a list of texts, .* got one: type `\['w1 w2 w3'\]`"),
        ({"texts": {"prompt": "w1", "completion": "w2"}}, "got one: type"),
        ({"texts": [{"text": "w1 w2 w3"}]}, "got {'text': 'w1 w2 w3'}"),
        ({"texts": [None]}, "got None"),
        ({"num_layers": 0}, "from 1 to 3"),
        ({"num_layers": 4}, "from 1 to 3"),
        ({"draft_vocab_size": 51}, "model's 50 tokens, got 51"),
    ],
)
def test_errors(arguments, message, word_tokenizer):
    with pytest.raises(ValueError, match=message):
        build_draft_model(make_model(), word_tokenizer, **{"texts": make_texts(), "draft_vocab_size": 50} | arguments)


def test_encoder_decoder_is_refused(word_tokenizer):
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ValueError, match="encoder-decoder T5ForConditionalGeneration"):
        build_draft_model(model, word_tokenizer, make_texts())


def test_changed_logits_are_refused(word_tokenizer):
    config = Gemma2Config(
        **SHAPE, **SPECIAL, intermediate_size=32, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5
    )
    with pytest.raises(ValueError, match="Gemma2ForCausalLM changes them afterwards"):
        build_draft_model(Gemma2ForCausalLM(config).eval(), word_tokenizer, make_texts(), draft_vocab_size=50)
