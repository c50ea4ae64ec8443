"""Tiny random decoders of every architecture."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


ARCHITECTURES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
    "gemma2": {"sliding_window": 6, "head_dim": 8},
    "gemma3_text": {"sliding_window": 6, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 32},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "phi": {},
    "phi3": {"sliding_window": 6, "pad_token_id": None},
    "falcon": {"num_kv_heads": 1, "alibi": False, "new_decoder_architecture": False},
}


def tiny(model_type: str, seed: int, **kwargs) -> PreTrainedModel:
    """Two layers, hidden size 16, 50 words; `kwargs` are the configuration's."""
    torch.manual_seed(seed)
    common = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "initializer_range": 0.4,
    }
    if model_type in ("bloom", "gpt_neox", "opt", "falcon", "phi"):
        common.pop("num_key_value_heads")
    if model_type == "gpt2":
        common = {key: value for key, value in common.items() if key in ("vocab_size", "initializer_range")}
        common.update(bos_token_id=None, eos_token_id=None)
    config = CONFIG_MAPPING[model_type](**{**common, **kwargs})
    return AutoModelForCausalLM.from_config(config).eval()
