"""Keys are read on from layer to layer; they equal those of a whole forward of each row by itself."""

import pytest
import torch

from hf_iclr.editors.alpha_edit import AlphaEditor
from hf_iclr.editors.alpha_edit.projections import capture
from hf_iclr.editors.alpha_edit.rows import encode_in_contexts
from tests.editors.tiny import REQUESTS, quick_config, tiny_model, tiny_statistics


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gptj", "falcon"])
def test_keys_of_every_layer_are_read_in_the_weights_edited_so_far(model_type, word_tokenizer):
    model, config = tiny_model(model_type), quick_config(num_steps=3, layers=[0, 2, 3])
    editor = AlphaEditor(model, word_tokenizer, config, tiny_statistics(model, word_tokenizer, layers=[0, 2, 3]))
    original = [projection.module.weight.clone() for projection in editor.setup.projections]
    editor.edit(REQUESTS, progress=False)
    edited = [projection.module.weight.clone() for projection in editor.setup.projections]

    def key(row, projection):
        with torch.no_grad(), capture({"key": (projection.module, "input")}) as seen:
            model(torch.tensor([row.ids]), use_cache=False)
        return seen["key"].reshape(len(row.ids), -1)[row.subject]

    for projection, weight in zip(editor.setup.projections, original, strict=True):
        projection.module.weight.data.copy_(weight)
    for projection, weight in zip(editor.setup.projections, edited, strict=True):
        for index, request in enumerate(REQUESTS):
            plain, *others = [key(row, projection) for row in encode_in_contexts(word_tokenizer, request, config)]
            expected = (plain + torch.stack(others).mean(0)) / 2
            torch.testing.assert_close(
                editor.batches[0].keys[projection.index][:, index], expected, rtol=1e-4, atol=1e-5
            )
        projection.module.weight.data.copy_(weight)


def test_layers_are_run_once_for_the_keys_of_contexts(word_tokenizer):
    model, config = tiny_model("llama"), quick_config(num_steps=1, layers=[0, 2, 3])
    editor = AlphaEditor(model, word_tokenizer, config, tiny_statistics(model, word_tokenizer, layers=[0, 2, 3]))
    states = torch.zeros(len(REQUESTS), 16)
    rows = [0] * 4
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda _, inputs, __, index=index: rows.__setitem__(index, rows[index] + len(inputs[0]))
        )
    editor._solver.solve("batch", list(REQUESTS), states, [])
    plain, contexts = len(REQUESTS), 2 * len(REQUESTS)
    # A layer is run again where it was just edited; up to the last one also for what the plain prompts reach.
    assert rows == [2 * (plain + contexts), 2 * plain + contexts, 3 * plain + 2 * contexts, 3 * plain + contexts]
