"""Edits saved as an adapter that PEFT loads, taken up again and taken back."""

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM

from hf_iclr import AlphaEditConfig, AlphaEditor, EditRequest, KeyStatistics
from hf_iclr.tiny_models import tiny_llama, word_tokenizer


IDS = torch.tensor([[1, 2, 5, 3]])


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_saved_edits_load_in_peft_and_can_be_taken_back(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    model = type(tiny_llama()).from_pretrained(tmp_path / "base")
    text = Dataset.from_dict({"text": [f"w{i} w{i * 7 % 50} w{i * 3 % 50} w{i + 1}" for i in range(40)]})
    statistics = KeyStatistics.from_dataset(model, word_tokenizer(), text, layers=[0, 1], progress=False)
    config = AlphaEditConfig(context_templates=["{}"], num_steps=5, nullspace_rank=8, layers=[0, 1])
    editor = AlphaEditor(model, word_tokenizer(), config, statistics)
    before = logits(model)
    editor.edit([EditRequest("w1 w2 {}", "w3 w4", "w5")], progress=False)
    after = logits(model)
    assert not torch.equal(before, after)
    editor.save_pretrained(tmp_path / "edits")

    adapted = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "edits")
    # The adapter adds what the editor wrote into the weights: the same sum in another order.
    torch.testing.assert_close(logits(adapted), after, rtol=1e-4, atol=1e-5)
    again = AlphaEditor.from_pretrained(tmp_path / "edits")
    torch.testing.assert_close(logits(again.model), after, rtol=1e-4, atol=1e-5)
    again.undo()
    assert torch.equal(logits(again.model), before)
