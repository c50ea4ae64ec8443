"""Every architecture's down-projections are found, and found out when they are not what they seem."""

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_iclr.editors.alpha_edit.editor import AlphaEditor
from hf_iclr.editors.alpha_edit.projections import capture, choose_layers, find_down_projections, run_until
from tests.architectures import tiny
from tests.editors.alpha_edit.test_editor import IDS, logits, make_editor, weights_of
from tests.editors.tiny import EDITABLE, NORMED, REQUESTS, quick_config, tiny_model, tiny_statistics


@pytest.mark.parametrize("model_type", EDITABLE)
def test_found_in_every_architecture(model_type):
    model = tiny_model(model_type)
    found = find_down_projections(model)
    assert [p.index for p in found] == [0, 1, 2, 3]
    assert all(p.adds_to_residual == (model_type not in NORMED) for p in found)
    for p in found:
        assert model.get_submodule(p.name) is p.module
        assert p.as_stored(torch.ones(p.out_features, p.in_features)).shape == p.module.weight.shape


def test_an_update_of_a_square_projection_is_not_transposed():
    """Shapes alone cannot tell `Conv1D` from `Linear` when the MLP is as wide as the model."""
    for model in (_square("gpt2"), _square("llama")):
        p = find_down_projections(model)[1]
        delta, keys = torch.randn(16, 16), torch.randn(3, 16)
        before = p.module(keys)
        p.module.weight.data += p.as_stored(delta)
        torch.testing.assert_close(p.module(keys) - before, keys @ delta.T, rtol=1e-4, atol=1e-5)


def _square(model_type):
    size = {"n_inner": 16} if model_type == "gpt2" else {"intermediate_size": 16}
    return tiny(model_type, 0, **{**EDITABLE[model_type], **size})


def test_a_renamed_projection_is_found_by_what_is_called_last():
    model = tiny_model("llama")
    for layer in model.model.layers:
        mlp = layer.mlp
        mlp.last = mlp.down_proj
        del mlp.down_proj
        mlp.forward = lambda x, mlp=mlp: mlp.last(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    assert find_down_projections(model)[3].name == "model.layers.3.mlp.last"


def test_a_layer_that_is_not_the_last_of_its_mlp_is_found_out():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(x.repeat(1, 1, 2)) * 0 + x
    with pytest.raises(ValueError, match="did not move the layer's output"):
        find_down_projections(model)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_padding_whose_states_are_all_zero_says_nothing_about_a_projection(model_type):
    model = tiny_model(model_type)
    with torch.no_grad():
        model.get_input_embeddings().weight[:20] = 0
    assert all(p.adds_to_residual == (model_type == "llama") for p in find_down_projections(model))
    many = tiny_model(model_type, vocab_size=2100)
    with torch.no_grad():
        many.get_input_embeddings().weight[:2000] = 0
    assert len(find_down_projections(many)) == 4
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    with pytest.raises(ValueError, match="embeddings that are not all zero"):
        find_down_projections(model)


def test_of_a_hybrid_the_layers_with_a_dense_mlp_are_found():
    found = find_down_projections(tiny_model("qwen3_next"))
    assert [p.index for p in found] == [1, 2] and found[0].name == "model.layers.1.mlp.down_proj"
    assert [p.index for p in choose_layers(found, [2])] == [2]
    with pytest.raises(ValueError, match=r"layers among \[1, 2\], those with a dense MLP, .* got \[0\]"):
        choose_layers(found, [0])
    assert [p.name[15:] for p in find_down_projections(tiny_model("lfm2"))] == ["feed_forward.w2"] * 4
    config = NemotronHConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        layers_block_type=["mamba", "mlp", "attention", "mlp"], mamba_num_heads=4, mamba_head_dim=8, n_groups=1,
        ssm_state_size=8,
    )  # fmt: skip
    found = find_down_projections(NemotronHForCausalLM(config).eval())  # whose MLPs are layers of their own
    assert [(p.index, p.name[-15:], p.adds_to_residual) for p in found] == [
        (index, "mixer.down_proj", True) for index in (1, 3)
    ]


def test_models_without_an_mlp_or_a_head_are_refused(word_tokenizer):
    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2))
    with pytest.raises(ValueError, match="an MLP that ends .* of MambaForCausalLM, got none"):
        find_down_projections(mamba)
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=32, num_layers=2, num_heads=2, d_kv=8))
    with pytest.raises(ValueError, match="a decoder with a language model's head, got T5ForConditionalGeneration"):
        find_down_projections(t5)
    with pytest.raises(ValueError, match="a decoder with a language model's head, got LlamaModel"):
        find_down_projections(tiny_model("llama").model)
    for thing in ("gpt2", None, torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="Expected a language model of transformers, got"):
            AlphaEditor(thing, word_tokenizer)


def test_weights_that_are_not_here_are_refused():
    offloaded = cpu_offload(tiny_model("llama"))
    with pytest.raises(ValueError, match="weights in memory, got model.embed_tokens.weight .* offloaded"):
        find_down_projections(offloaded)
    sharded = tiny_model("llama")
    sharded.lm_head.weight.ds_id = 0  # what DeepSpeed's third stage marks its shards with
    with pytest.raises(ValueError, match="holds whole, got lm_head.weight sharded"):
        find_down_projections(sharded)


def test_mixtures_of_experts_are_refused_with_the_reason():
    model = tiny("mixtral", 0, num_local_experts=2)
    with pytest.raises(ValueError, match="mixture-of-experts .* other weights for other routes"):
        find_down_projections(model)


def test_bfloat16_is_checked_within_its_rounding():
    assert find_down_projections(tiny_model("llama").bfloat16())[0].adds_to_residual
    assert not find_down_projections(tiny_model("gemma2").bfloat16())[0].adds_to_residual


def test_a_run_stops_where_it_is_told_and_leaves_no_hook():
    model = tiny_model("llama")
    calls = []
    model.model.layers[2].register_forward_hook(lambda *_: calls.append(2))
    ids = torch.tensor([[1, 2, 3]])
    with capture({"k": (model.model.layers[1].mlp.down_proj, "input")}) as seen:
        run_until(model, model.model.layers[1], input_ids=ids)
    assert seen["k"].shape == (1, 3, 32) and calls == []
    model(ids)
    assert calls == [2]
    assert not any(
        module._forward_hooks for module in model.model.layers[1].modules() if isinstance(module, nn.Module)
    )


def train_a_bit(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def test_training_in_between_stays(word_tokenizer):
    editor = make_editor(word_tokenizer)
    editor.edit(REQUESTS[:1], progress=False)
    train_a_bit(editor.model)
    trained, weights = logits(editor.model), weights_of(editor)
    for act in (editor.undo, editor.to_peft, lambda: editor.remove(REQUESTS[0].id)):
        with pytest.raises(
            ValueError, match="as this editor left it, to take edits out of it, got one that was trained"
        ):
            act()
        assert torch.equal(logits(editor.model), trained) and len(editor.edits) == 1
    editor.edit(REQUESTS[1:2], progress=False)
    for layer, weight in weights_of(editor).items():
        batch = editor.batches[1]
        assert torch.equal(weight, weights[layer] + batch.residuals[layer] @ batch.factors[layer])
    editor.undo()
    assert torch.equal(logits(editor.model), trained)


def test_two_editors_of_one_model_leave_each_others_edits(word_tokenizer):
    model = tiny_model("llama")
    statistics = tiny_statistics(model, word_tokenizer, layers=[1, 2])
    first, second = (AlphaEditor(model, word_tokenizer, quick_config(), statistics) for _ in range(2))
    states = [logits(model)]
    for editor, request in ((first, REQUESTS[0]), (second, REQUESTS[1]), (first, REQUESTS[2])):
        editor.edit([request], progress=False)
        states.append(logits(model))
    total = weights_of(first)
    plain = {p.index: p.module.weight.detach() for p in find_down_projections(tiny_model("llama"))}
    for layer, weight in total.items():
        batches = [*first.batches, *second.batches]
        updates = sum(batch.residuals[layer] @ batch.factors[layer] for batch in batches)
        torch.testing.assert_close(weight - plain[layer], updates, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="last things first"):
        second.undo()
    for editor in (first, second, first):  # the last one first, each exactly
        states.pop()
        editor.undo()
        assert torch.equal(logits(model), states[-1])
