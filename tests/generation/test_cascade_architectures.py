"""Twelve decoders on ragged rows, and what takes the assisted loop: encoder-decoders, images, other tokenizers."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
)

from hf_iclr import SpeculativeCascadeForCausalLM, enable_cascade
from hf_iclr.generation.cached_decoder import why_not_batched
from tests.architectures import ARCHITECTURES, tiny
from tests.generation.toy import GREEDY, RAGGED_PROMPTS, left_padded, perturbed_copy, tiny_llama


@pytest.fixture(scope="module")
def models():
    large = tiny_llama(1, layers=2, vocab_size=50)
    return large, perturbed_copy(large)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_ragged_batches_of_every_architecture(model_type, attention):
    """Greedy `spec` on ragged rows equals each prompt alone, past the sliding window."""
    if model_type == "gemma2" and attention == "sdpa":
        pytest.skip("Gemma 2 caps attention logits, which sdpa does not")
    large = tiny(model_type, 1, **ARCHITECTURES[model_type], attn_implementation=attention)
    small = perturbed_copy(large)
    prompts = [*RAGGED_PROMPTS, [9, 8, 7, 6, 5, 4, 3, 2, 1]]
    model = enable_cascade(large, small)
    output = model.generate(**left_padded(prompts), **GREEDY, cascade_rule="spec", cascade_backend="batched")
    assert model.cascade_statistics.backend == "batched"
    for prompt, row in zip(prompts, output, strict=True):
        alone = large.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **GREEDY)
        assert row[-16:].tolist() == alone[0, len(prompt) :].tolist()


def test_a_model_that_ignores_positions_is_found_out():
    """Bloom tells positions from slots (ALiBi), so holes would shift them: it takes the other loop, and says why."""
    large, small = (tiny("bloom", seed, n_layer=2, n_head=2) for seed in (1, 2))
    assert "explicit positions and a 4-D mask" in why_not_batched(large)
    model = enable_cascade(large, small)
    prompt = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3).long()}
    output = model.generate(**prompt, **GREEDY, cascade_rule="spec")
    assert torch.equal(output, large.generate(**prompt, **GREEDY))
    assert model.cascade_statistics.backend == "assisted"
    with pytest.raises(ValueError, match="explicit positions"):
        model.generate(**left_padded(RAGGED_PROMPTS), **GREEDY)


def test_attention_scaled_by_the_number_of_cached_tokens():
    """Llama 4 without chunks: from the 16th slot on its attention is sharper, and rejected drafts fill slots."""
    config = {"head_dim": 8, "intermediate_size_mlp": 32, "num_local_experts": 2, "no_rope_layers": [0, 0]}
    large = tiny("llama4_text", 1, **config, floor_scale=16, attn_scale=2.0)
    prompt = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3).long()}
    model, call = enable_cascade(large, perturbed_copy(large)), {**GREEDY, "max_new_tokens": 40}
    assert torch.equal(model.generate(**prompt, **call), large.generate(**prompt, **call))
    assert model.cascade_statistics.backend == "assisted"
    with pytest.raises(ValueError, match="by the number of cached tokens"):
        model.generate(**left_padded(RAGGED_PROMPTS), **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_no_reason_to_refuse(dtype):
    assert why_not_batched(tiny_llama(1, layers=2, vocab_size=50).to(dtype)) is None


def test_encoder_decoder_takes_the_assisted_loop():
    config = T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
        eos_token_id=None, pad_token_id=0, initializer_factor=20.0,
    )  # fmt: skip
    torch.manual_seed(0)
    large, small = (AutoModelForSeq2SeqLM.from_config(config).eval() for _ in range(2))
    model = enable_cascade(large, small)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    output = model.generate(**inputs, do_sample=False, max_new_tokens=12, cascade_rule="spec")
    assert torch.equal(output, large.generate(**inputs, do_sample=False, max_new_tokens=12))
    assert model.cascade_statistics.backend == "assisted"
    model.generate(**inputs, do_sample=True, max_new_tokens=12, cascade_rule="token_v2", cascade_alpha=1.0)
    assert model.cascade_statistics.deferred[0] < 12
    with pytest.raises(ValueError, match="encoder-decoder"):
        model.generate(input_ids=torch.ones(2, 4).long(), max_new_tokens=4)


def test_early_exit_drafts_with_the_model_itself(models):
    large = models[0]
    model = enable_cascade(large)
    output = model.generate(torch.tensor([[1, 2, 3]]), **GREEDY, assistant_early_exit=1, cascade_rule="spec")
    assert torch.equal(output, large.generate(torch.tensor([[1, 2, 3]]), **GREEDY))
    stats = model.cascade_statistics
    assert stats.backend == "assisted" and stats.small_forwards > stats.large_forwards > 0


def test_padded_vocabularies_of_one_tokenizer(models, word_tokenizer):
    """Embeddings padded to other sizes (as Qwen's are): the batched loop aligns them when the tokenizers agree."""
    torch.manual_seed(3)
    small = tiny_llama(4, vocab_size=58)
    inputs = left_padded(RAGGED_PROMPTS)
    tokenizers = {"tokenizer": word_tokenizer, "assistant_tokenizer": word_tokenizer}
    prompt = {name: value[2:3] for name, value in inputs.items()}
    for pair in ((models[0], small), (small, models[0])):
        model = enable_cascade(*pair)
        output = model.generate(**inputs, **GREEDY, **tokenizers, cascade_rule="spec")
        assert torch.equal(output, pair[0].generate(**inputs, **GREEDY))
        model.generate(**inputs, do_sample=True, max_new_tokens=9, pad_token_id=0, **tokenizers)
        assert model.cascade_statistics.backend == "batched"
        call = {**tokenizers, "cascade_rule": "token_v3", "cascade_backend": "assisted"}
        for alpha, whose in ((0.0, pair[0]), (1.0, pair[1])):
            output = model.generate(**prompt, **GREEDY, **call, cascade_alpha=alpha, num_assistant_tokens=20)
            alone = whose.generate(**prompt, **GREEDY, suppress_tokens=list(range(50, 58)) if alpha else None)
            assert output[0, :-1].tolist() == alone[0, :-1].tolist()  # the token after all drafts is the large model's
        output = model.generate(**prompt, do_sample=True, max_new_tokens=16, **call)
        assert model.cascade_statistics.backend == "assisted" and int(output.max()) < pair[0].config.vocab_size


def test_a_pair_is_compared_once(models, word_tokenizer, tmp_path, monkeypatch):
    """A composite of padded vocabularies knows that it is one; tokenizers given again are not compared again."""
    folders = []
    for name, model in (("large", models[0]), ("small", tiny_llama(4, vocab_size=58))):
        model.save_pretrained(tmp_path / name)
        word_tokenizer.save_pretrained(tmp_path / name)
        folders.append(str(tmp_path / name))
    inputs, plain = left_padded(RAGGED_PROMPTS), models[0].generate(**left_padded(RAGGED_PROMPTS), **GREEDY)
    composite = SpeculativeCascadeForCausalLM.from_cascade_pretrained(*folders)
    composite.save_pretrained(tmp_path / "both")
    pair = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    compared = []
    get_vocab = PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", lambda self: compared.append(self) or get_vocab(self))
    for model in (composite, AutoModelForCausalLM.from_pretrained(tmp_path / "both")):
        assert torch.equal(model.generate(**inputs, **GREEDY, cascade_rule="spec"), plain)
    assert not compared
    model = enable_cascade(*pair)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in folders]
    given = dict(zip(("tokenizer", "assistant_tokenizer"), tokenizers, strict=True))
    for arguments in ({}, {}, given, given):
        assert torch.equal(model.generate(**inputs, **GREEDY, **arguments, cascade_rule="spec"), plain)
    assert len(compared) == 4  # those beside the models once, those given once


def other_vocabulary():
    """40 of the 50 words of `word_tokenizer` with other ids, and five words it lacks."""
    vocabulary = {"w0": 0} | {f"w{50 - index}": index for index in range(1, 40)}
    vocabulary |= {f"x{index}": index for index in range(40, 45)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0", pad_token="w0", padding_side="left")


def test_different_tokenizers_take_the_assisted_loop(models, word_tokenizer):
    large, prompt = models[0], {"input_ids": torch.tensor([[21, 22, 23]]), "attention_mask": torch.ones(1, 3).long()}
    tokenizers = {"tokenizer": word_tokenizer, "assistant_tokenizer": other_vocabulary()}
    model = enable_cascade(large, tiny_llama(4, vocab_size=45))
    output = model.generate(**prompt, **GREEDY, **tokenizers, cascade_rule="spec")
    assert torch.equal(output, large.generate(**prompt, **GREEDY))
    assert model.cascade_statistics.backend == "assisted"
    with pytest.raises(ValueError, match="Choose one of spec, token_v2, token_v3"):
        model.generate(**prompt, **GREEDY, **tokenizers, cascade_rule="opt")
    model.generate(**prompt, do_sample=True, max_new_tokens=16, **tokenizers, cascade_rule="diff", cascade_alpha=1.0)
    assert model.cascade_statistics.new_tokens == [16]
    with pytest.raises(ValueError, match="different vocabularies"):
        model.generate(torch.tensor([[21, 22], [23, 24]]), **GREEDY, **tokenizers)


def test_vision_language_model_with_a_text_only_draft(models):
    """Pixels reach the large model; the small one reads the tokens alone."""
    text = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.4, "bos_token_id": None,
        "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    torch.manual_seed(0)
    large = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=49, image_seq_length=4)
    ).eval()
    model = enable_cascade(large, models[1])
    inputs = {
        "input_ids": torch.tensor([[1, 49, 49, 49, 49, 2, 3]]),
        "attention_mask": torch.ones(1, 7).long(),
        "pixel_values": torch.randn(1, 3, 8, 8),
    }
    kwargs = {**GREEDY, "suppress_tokens": [49]}
    output = model.generate(**inputs, **kwargs, cascade_rule="spec")
    assert torch.equal(output, large.generate(**inputs, **kwargs))
    assert model.cascade_statistics.backend == "assisted"
    other = model.generate(**{**inputs, "pixel_values": torch.randn(1, 3, 8, 8)}, **kwargs, cascade_rule="spec")
    assert not torch.equal(output, other)
