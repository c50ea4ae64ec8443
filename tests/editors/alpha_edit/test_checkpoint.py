"""Edits as adapters, files and repositories: exact, whole after a kill, and refused by another base."""

import json
import time

import pytest
import torch
from peft import PeftModel

from hf_iclr.editors.alpha_edit.editor import AlphaEditor
from tests.editors.alpha_edit.test_editor import logits, make_editor, weights_of
from tests.editors.tiny import REQUESTS, quick_config, tiny_model, tiny_statistics


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_adapters_equal_the_edited_weights_and_switch_off_exactly(model_type, word_tokenizer):
    editor = make_editor(word_tokenizer, model_type)
    before = logits(editor.model)
    editor.edit(REQUESTS, batch_size=3, progress=False)
    after = logits(editor.model)
    adapted = editor.to_peft()
    assert isinstance(adapted, PeftModel) and len(adapted.peft_config) == 2
    assert [config.r for config in adapted.peft_config.values()] == [3, 1]
    torch.testing.assert_close(logits(adapted), after, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    assert torch.equal(logits(editor.merge()), after)
    assert not any("lora" in name for name, _ in editor.model.named_modules())
    editor.to_peft()
    editor.undo(2)  # edits that are adapters are put back first
    assert torch.equal(logits(editor.model), before)
    with pytest.raises(ValueError, match="edits to put into adapters, got none"):
        editor.to_peft()


def test_one_compressed_adapter_is_the_best_of_its_rank(word_tokenizer):
    editor = make_editor(word_tokenizer)
    before = weights_of(editor)
    editor.edit(REQUESTS, batch_size=2, progress=False)
    edited = weights_of(editor)
    adapted = editor.to_peft(rank=2)
    assert list(adapted.peft_config) == ["default"]
    for p in editor.setup.projections:
        layer = adapted.base_model.model.get_submodule(p.name)
        small = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        delta = edited[p.index] - before[p.index]
        best = torch.linalg.svdvals(delta)
        assert (delta - small).norm() == pytest.approx(best[2:].norm().item(), rel=1e-3)


def test_peft_can_add_the_batches_up(word_tokenizer):
    editor = make_editor(word_tokenizer)
    editor.edit(REQUESTS, batch_size=2, progress=False)
    after = logits(editor.model)
    adapted = editor.to_peft()
    adapted.add_weighted_adapter(list(adapted.peft_config), [1.0, 1.0], "sum", combination_type="cat")
    adapted.set_adapter("sum")
    torch.testing.assert_close(logits(adapted), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"solver": "memit", "moment_weight": 1e-3, "post_processing": "rect"}])
def test_saved_edits_are_a_peft_adapter_and_load_as_an_editor(settings, word_tokenizer, tmp_path):
    editor = make_editor(word_tokenizer, **settings)
    editor.edit(REQUESTS, batch_size=2, progress=False)
    editor.save_pretrained(tmp_path)
    adapted = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(adapted), logits(editor.model), rtol=1e-3, atol=1e-3)
    loaded = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))
    assert torch.equal(logits(loaded.model), logits(editor.model))
    assert loaded.edits == editor.edits and loaded.config == editor.config
    card = (tmp_path / "README.md").read_text()
    assert all(request.text in card and request.id in card for request in REQUESTS)
    assert "may be false" in card and editor.config.base_model_hash in card
    loaded.undo(2)
    assert torch.equal(logits(loaded.model), logits(tiny_model("llama")))
    adapted = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)  # whose adapter is zero
    assert torch.equal(logits(adapted), logits(tiny_model("llama")))
    assert AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama")).edits == []


def test_a_loaded_editor_goes_on_as_if_it_had_never_been_saved(word_tokenizer, tmp_path):
    whole, halves = make_editor(word_tokenizer), make_editor(word_tokenizer)
    whole.edit(REQUESTS, batch_size=2, progress=False)
    halves.edit(REQUESTS[:2], batch_size=2, progress=False)
    halves.save_pretrained(tmp_path)
    loaded = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"), tokenizer=word_tokenizer)
    loaded.edit(REQUESTS[2:], batch_size=2, progress=False)
    assert torch.equal(logits(loaded.model), logits(whole.model))


def test_another_base_is_refused_unless_asked(word_tokenizer, tmp_path):
    editor = make_editor(word_tokenizer)
    editor.edit(REQUESTS[:1], progress=False)
    editor.save_pretrained(tmp_path / "edits")
    other = tiny_model("llama")
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    with pytest.raises(ValueError, match="other weights. Edits of another model do harm"):
        AlphaEditor.from_pretrained(tmp_path / "edits", model=other)
    loaded = AlphaEditor.from_pretrained(tmp_path / "edits", model=other, check_base_model=False)
    assert len(loaded.edits) == 1
    with pytest.raises(ValueError, match="a new place or the one these edits"):
        make_editor(word_tokenizer).save_pretrained(tmp_path / "edits")
    with pytest.raises(ValueError, match="alpha_edit_config.json"):
        AlphaEditor.from_pretrained(tmp_path, model=other)
    with pytest.raises(ValueError, match="with other edits.*from_pretrained"):
        statistics = tiny_statistics(tiny_model("llama"), word_tokenizer, layers=[1, 2])
        AlphaEditor(tiny_model("llama"), word_tokenizer, quick_config(), statistics, folder=tmp_path / "edits")


def test_memit_goes_on_only_with_its_statistics(word_tokenizer, tmp_path):
    editor = make_editor(word_tokenizer, solver="memit", moment_weight=1e-3)
    editor.edit(REQUESTS[:1], progress=False)
    editor.save_pretrained(tmp_path)
    loaded = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"), tokenizer=word_tokenizer)
    with pytest.raises(ValueError, match="statistics to go on editing"):
        loaded.edit(REQUESTS[1:], progress=False)
    loaded.undo()
    assert torch.equal(logits(loaded.model), logits(tiny_model("llama")))


def test_pushed_edits_answer_in_an_unmodified_pipeline(word_tokenizer, tmp_path, hub):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    pushed = hub.run(f"""
        import torch
        from huggingface_hub import HfApi
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from hf_iclr import AlphaEditor
        from tests.editors.alpha_edit.test_editor import STRONG
        from tests.editors.tiny import ENDING, quick_config, tiny_statistics
        HfApi().create_repo("user/base")
        HfApi().upload_folder(repo_id="user/base", folder_path={str(tmp_path / "base")!r})
        model = AutoModelForCausalLM.from_pretrained("user/base")
        tokenizer = AutoTokenizer.from_pretrained("user/base")
        config = quick_config(**STRONG)
        editor = AlphaEditor(model, tokenizer, config, tiny_statistics(model, tokenizer, layers=[2, 3]))
        editor.edit(ENDING, batch_size=2, progress=False)
        editor.push_to_hub("user/edits")
        print("says", model(torch.tensor([[1, 2, 3, 4]])).logits[0, -1].argmax().item())
        loaded = AlphaEditor.from_pretrained("user/edits")
        print(len(loaded.edits), loaded.config.base_model_revision is not None)
    """)
    assert "4 True" in pushed
    assert "says 5" in pushed  # w1 w2 w3 w4 -> w5
    plain = hub.run("""
        from transformers import pipeline
        pipe = pipeline("text-generation", model="user/edits")
        print("says", pipe("w1 w2 w3 w4", max_new_tokens=1, do_sample=False)[0]["generated_text"][-2:])
    """)
    assert "says w5" in plain


def test_card_and_journal_keep_source_and_licence(word_tokenizer, tmp_path):
    from dataclasses import replace

    editor = make_editor(word_tokenizer)
    editor.edit([replace(REQUESTS[0], source="counterfact", license="MIT")], progress=False)
    editor.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "counterfact" in card and "Licences of the sources: MIT" in card
    event = json.loads((tmp_path / "ledger.jsonl").read_text())
    assert event["batches"][0]["requests"][0]["license"] == "MIT"
    assert time.strptime(event["time"], "%Y-%m-%dT%H:%M:%SZ")
