"""The composite model: one repository or two references, saved, loaded, pushed."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_iclr import SpeculativeCascadeConfig, SpeculativeCascadeForCausalLM
from tests.generation.toy import RAGGED_PROMPTS, left_padded, tiny_llama


GREEDY = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}


@pytest.fixture
def halves():
    return tiny_llama(1, layers=2, tie_word_embeddings=True), tiny_llama(2, tie_word_embeddings=True)


@pytest.fixture
def composite(halves):
    return SpeculativeCascadeForCausalLM.from_cascade_pretrained(*halves, cascade_rule="opt", cascade_alpha=0.2)


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_behaves_as_the_large_model_outside_generate(halves, composite):
    ids = torch.tensor([[1, 2, 3]])
    assert same_weights(composite.large, halves[0]) and same_weights(composite.small, halves[1])
    assert torch.equal(composite(ids).logits, halves[0](ids).logits)
    assert composite(ids, labels=ids).loss == halves[0](ids, labels=ids).loss
    assert composite.get_output_embeddings() is composite.large.lm_head
    assert composite.config.get_text_config() is composite.large.config


def test_saves_and_reloads_identically(composite, tmp_path):
    composite.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "speculative-cascade"
    assert (config["cascade_rule"], config["cascade_alpha"]) == ("opt", 0.2)
    assert config["large"]["num_hidden_layers"] == 2 and config["small"]["num_hidden_layers"] == 1
    # tied weights are stored once
    assert not any("lm_head" in key for key in load_file(tmp_path / "model.safetensors"))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is SpeculativeCascadeForCausalLM and same_weights(loaded, composite)
    assert loaded.large.lm_head.weight is loaded.large.model.embed_tokens.weight
    inputs = left_padded(RAGGED_PROMPTS)
    assert torch.equal(loaded.generate(**inputs, **GREEDY), composite.generate(**inputs, **GREEDY))
    stats = loaded.cascade_statistics
    assert (stats.rule, stats.alpha, stats.backend) == ("opt", 0.2, "batched")
    spec = loaded.generate(**inputs, **GREEDY, cascade_rule="spec")
    assert torch.equal(spec, composite.large.generate(**inputs, **GREEDY))


def test_dtype_and_device_map(composite, tmp_path):
    composite.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert loaded.dtype == loaded.large.dtype == loaded.small.dtype == torch.bfloat16
    assert loaded.generate(torch.tensor([[1, 2, 3]]), **GREEDY).shape == (1, 15)


def test_halves_of_two_architectures(halves, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=7, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    small = GPT2LMHeadModel(config).eval()
    SpeculativeCascadeForCausalLM.from_cascade_pretrained(halves[0], small).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.small, GPT2LMHeadModel) and same_weights(loaded.small, small)
    inputs = left_padded(RAGGED_PROMPTS)
    spec = loaded.generate(**inputs, **GREEDY, cascade_rule="spec")
    assert torch.equal(spec, halves[0].generate(**inputs, **GREEDY))


def test_references_hold_no_weights(halves, tmp_path):
    for name, half in zip(("large", "small"), halves, strict=True):
        half.save_pretrained(tmp_path / name)
    model = SpeculativeCascadeForCausalLM.from_cascade_pretrained(
        str(tmp_path / "large"), str(tmp_path / "small"), cascade_rule="diff", cascade_alpha=0.1, as_reference=True
    )
    model.save_pretrained(tmp_path / "cascade")
    assert not list((tmp_path / "cascade").glob("*.safetensors"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "cascade", dtype=torch.float32)
    assert same_weights(loaded, model)
    assert (loaded.config.cascade_rule, loaded.config.cascade_alpha) == ("diff", 0.1)
    loaded.generate(torch.tensor([[1, 2, 3]]), **GREEDY)
    assert loaded.cascade_statistics.rule == "diff"


def test_trains_as_the_large_model(composite):
    ids = torch.tensor([[1, 2, 3, 4]])
    composite(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in composite.large.parameters())
    assert all(parameter.grad is None for parameter in composite.small.parameters())


def test_bad_input(halves, composite, tmp_path):
    large, small = halves
    with pytest.raises(ValueError, match="one vocabulary, got 7"):
        SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, tiny_llama(1, vocab_size=9))
    with pytest.raises(ValueError, match="Choose one of spec"):
        SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, small, cascade_rule="nope")
    with pytest.raises(TypeError, match="Expected a repository name, a folder or a model, got 3"):
        SpeculativeCascadeForCausalLM.from_cascade_pretrained(3, small)
    adapted = get_peft_model(copy.deepcopy(small), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="two plain models, got one with adapters"):
        SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, adapted)
    SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, adapted.merge_and_unload())
    with pytest.raises(TypeError, match="as_reference"):
        SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, small, as_reference=True)
    with pytest.raises(ValueError, match="`small` is missing"):
        SpeculativeCascadeConfig(large=large.config)

    composite.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if key.startswith("large")}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"lacks \d+ weights of the cascade, the first is 'small\."):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["small"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`small` is missing"):
        AutoConfig.from_pretrained(tmp_path)


def test_pushed_and_loaded_with_and_without_us(composite, hub, tmp_path):
    """Over HTTP: with `import hf_iclr`, and by remote code in a process that can't import hf_iclr at all."""
    composite.save_pretrained(tmp_path / "composite")
    expected = composite.generate(torch.tensor([[1, 2, 3]]), **GREEDY)[0].tolist()
    hub.run(f"""
        from hf_iclr import SpeculativeCascadeForCausalLM
        model = SpeculativeCascadeForCausalLM.from_pretrained({str(tmp_path / "composite")!r})
        model.push_to_hub("user/cascade")
    """)
    generate = """
        import torch
        ids = model.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        print(ids[0].tolist(), model.cascade_statistics.rule)
    """
    ours = hub.run(f"""
        import hf_iclr
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("user/cascade")
        {generate}
    """)
    assert f"{expected} opt" in ours
    theirs = hub.run(f"""
        import sys
        sys.modules["hf_iclr"] = None  # any import of it fails
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained("user/cascade", trust_remote_code=True)
        {generate}
    """)
    assert f"{expected} opt" in theirs
