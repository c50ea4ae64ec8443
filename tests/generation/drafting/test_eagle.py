"""EAGLE-3 heads of others: a random one of the published shape."""

import json

import pytest
import torch
from safetensors.torch import save_file

from hf_iclr import Eagle3ForCausalLM, SpeculativeCascadeForCausalLM, enable_cascade
from tests.generation.toy import GREEDY, RAGGED_PROMPTS, VOCAB, chi_square_z, exact_law, left_padded, tiny_llama


HIDDEN, DRAFT_VOCAB, LIMIT = 16, 5, 4.5
TOKENS = [0, 2, 3, 4, 6]  # what it can write


@pytest.fixture(scope="module")
def large():
    return tiny_llama(1, layers=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Names and shapes of yuhuili/EAGLE3-LLaMA3.1-Instruct-8B, as safetensors, at the toy's width."""
    path = tmp_path_factory.mktemp("eagle3")
    torch.manual_seed(0)
    shapes = {
        "fc": (HIDDEN, 3 * HIDDEN), "lm_head": (DRAFT_VOCAB, HIDDEN), "embed_tokens": (VOCAB, HIDDEN),
        "midlayer.self_attn.q_proj": (HIDDEN, 2 * HIDDEN), "midlayer.self_attn.k_proj": (8, 2 * HIDDEN),
        "midlayer.self_attn.v_proj": (8, 2 * HIDDEN), "midlayer.self_attn.o_proj": (HIDDEN, HIDDEN),
        "midlayer.mlp.gate_proj": (32, HIDDEN), "midlayer.mlp.up_proj": (32, HIDDEN),
        "midlayer.mlp.down_proj": (HIDDEN, 32),
    }  # fmt: skip
    tensors = {f"{name}.weight": 0.4 * torch.randn(shape) for name, shape in shapes.items()}
    for name in ("norm", "midlayer.hidden_norm", "midlayer.input_layernorm", "midlayer.post_attention_layernorm"):
        tensors[f"{name}.weight"] = torch.ones(HIDDEN)
    tensors["d2t"] = torch.tensor(TOKENS) - torch.arange(DRAFT_VOCAB)
    tensors["t2d"] = torch.tensor([token in TOKENS for token in range(VOCAB)])
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1,
        "vocab_size": VOCAB, "draft_vocab_size": DRAFT_VOCAB, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "max_position_embeddings": 64, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def head(folder):
    return Eagle3ForCausalLM.from_pretrained(folder).eval()


def reference(large, head, ids):
    """Draft probabilities after `ids`, with no cache: one pass over all tokens but the first."""
    with torch.no_grad():
        hidden = large(ids, output_hidden_states=True).hidden_states
        states = torch.cat([hidden[layer] for layer in (2, 3, 3)], -1)[:, :-1]
        positions = torch.arange(1, ids.shape[1])[None]
        embeds = large.get_input_embeddings()(ids[:, 1:])
        return head(inputs_embeds=embeds, states=states, position_ids=positions).logits[0, -1].softmax(-1)


def test_published_layout_is_read(folder, head):
    _, info = Eagle3ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        q = head(inputs_embeds=torch.randn(1, 2, HIDDEN), states=torch.randn(1, 2, 3 * HIDDEN),
             position_ids=torch.arange(2)[None]).logits[0, -1].softmax(-1)  # fmt: skip
    assert q[TOKENS].sum() == pytest.approx(1) and q[[1, 5]].sum() == 0
    assert Eagle3ForCausalLM.layers(tiny_llama(0, layers=6)) == (2, 3, 3)


@pytest.mark.parametrize("batch", [1, 4])
def test_first_draft_of_a_round_reads_the_large_models_states(large, head, monkeypatch, batch):
    """In every round q is that of a pass over the whole text: what was drafted from own states left no trace."""
    from hf_iclr.generation.batched_cascade import BatchedCascade

    accept, seen = BatchedCascade._accept, []

    def spy(self, drafts, siblings, q, p, lengths):
        for index, row in enumerate(self.rows.tolist()):
            text = self.texts.of_row(row)[max(map(len, RAGGED_PROMPTS[:batch])) - len(RAGGED_PROMPTS[row]) :]
            if q is not None and int(lengths[index]):
                seen.append(torch.allclose(q.probs[index, 0], reference(large, head, text[None]), atol=1e-5))
        return accept(self, drafts, siblings, q, p, lengths)

    monkeypatch.setattr(BatchedCascade, "_accept", spy)
    torch.manual_seed(0)
    enable_cascade(large, head).generate(
        **left_padded(RAGGED_PROMPTS[:batch]), do_sample=True, top_k=0, max_new_tokens=24, num_assistant_tokens=3,
        pad_token_id=0,
    )  # fmt: skip
    assert len(seen) > 10 * batch and all(seen)


def test_law(large, head):
    """4 x 5,000 texts of ragged prompts against the large model's own law."""
    torch.manual_seed(0)
    cascade = enable_cascade(large, head)
    output = cascade.generate(
        **left_padded(RAGGED_PROMPTS), do_sample=True, top_k=0, num_return_sequences=5_000, max_new_tokens=4,
        num_assistant_tokens=2, pad_token_id=0,
    )  # fmt: skip
    assert sum(cascade.cascade_statistics.accepted) > 1000
    for prompt, rows in zip(RAGGED_PROMPTS, output[:, -4:].chunk(4), strict=True):
        law = exact_law(large, large, prompt, "spec", 0.0, 4)
        assert abs(chi_square_z([tuple(row) for row in rows.tolist()], law)) < LIMIT


@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_decoding_is_the_large_models_own(large, head, batch):
    """With lengths chosen round by round, copies between drafts, and rows that end at different times."""
    call = {**GREEDY, "max_new_tokens": 50, "eos_token_id": 5}
    inputs = left_padded(RAGGED_PROMPTS[:batch])
    cascade = enable_cascade(large, head)
    assert torch.equal(cascade.generate(**inputs, **call), large.generate(**inputs, **call))
    call = {**call, "eos_token_id": None, "return_dict_in_generate": True}
    first, whole = cascade.generate(**inputs, **call), large.generate(**inputs, **{**call, "max_new_tokens": 60})
    if batch == 1:  # and a text that goes on from a cache, whose states are not known
        cache = {name: first[name] for name in first if name in ("cache", "past_key_values")}
        mask, call = torch.ones_like(first.sequences), {**GREEDY, "max_new_tokens": 10}
        again = cascade.generate(first.sequences, attention_mask=mask, **cache, **call)
        assert torch.equal(again, whole.sequences)


def test_what_is_no_head_is_said(large, head, tmp_path):
    large.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Expected the config of an EAGLE-3 head"):
        Eagle3ForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="drafts only inside a cascade"):
        head(torch.tensor([[1]]))
    with pytest.raises(TypeError, match="EAGLE-3 head stays in a repository of its own"):
        SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, head)
