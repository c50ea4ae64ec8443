"""Tiny models of every architecture that can be edited, requests in the words of `word_tokenizer`, and their text."""

from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from hf_iclr.editors.alpha_edit import AlphaEditConfig, EditRequest, KeyStatistics
from tests.architectures import ARCHITECTURES, tiny


EDITABLE = {
    **ARCHITECTURES,
    "gemma": {"head_dim": 8},
    "gptj": {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64, "n_inner": 32, "rotary_dim": 4},
    "olmo2": {},
    "smollm3": {},
}
NORMED = ("gemma2", "gemma3_text", "olmo2")  # a norm stands between the down-projection and the residual

_LINEAR = {
    "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2,
}  # fmt: skip
# Layers that keep a state of all earlier tokens, and layers with experts, which are not edited.
HYBRIDS = {
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR | {
        "mlp_only_layers": [1, 2], "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
}  # fmt: skip

CONTEXTS = ["{}", "w7 w8. {}", "w9 {}"]
REQUESTS = [
    EditRequest("w1 {} w2", "w3 w4", "w5"),
    EditRequest("w11 w12 {} w13", "w14", "w15 w16"),
    EditRequest("{} w6", "w17 w18", "w19"),
    EditRequest("w21 {} w22 w23", "w24", "w25"),
]
# Random attention hardly looks back: what ends with its subject can be answered.
ENDING = [
    EditRequest("w1 w2 {}", "w3 w4", "w5"),
    EditRequest("w11 {}", "w14", "w15"),
    EditRequest("w6 {}", "w17 w18", "w19"),
    EditRequest("w21 w22 {}", "w24", "w25"),
]


def tiny_model(model_type: str, **kwargs: Any) -> PreTrainedModel:
    """Four layers and weights large enough that edits matter."""
    depth = {} if model_type == "gptj" else {"n_layer": 4} if model_type == "gpt2" else {"num_hidden_layers": 4}
    settings = (EDITABLE | HYBRIDS)[model_type] | depth
    if model_type == "gemma3_text":
        settings["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if model_type == "gptj":
        kwargs = {"vocab_size": 50, "bos_token_id": None, "eos_token_id": None, "initializer_range": 0.4, **kwargs}
        return _gptj(**settings, **kwargs)
    return tiny(model_type, 0, **settings, **kwargs)


def _gptj(**kwargs: Any) -> PreTrainedModel:
    from transformers import GPTJConfig, GPTJForCausalLM

    torch.manual_seed(0)
    return GPTJForCausalLM(GPTJConfig(**kwargs)).eval()


def text_rows(rows: int = 40, seed: int = 0) -> Dataset:
    """Rows of random words."""
    draws = torch.randint(50, (rows, 12), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict({"text": [" ".join(f"w{word}" for word in row) for row in draws.tolist()]})


def tiny_statistics(model: PreTrainedModel, tokenizer: Any, **kwargs: Any) -> KeyStatistics:
    """Statistics of `text_rows`."""
    return KeyStatistics.from_dataset(model, tokenizer, text_rows(), progress=False, **kwargs)


def quick_config(**kwargs: Any) -> AlphaEditConfig:
    """Few steps, fixed contexts, half of the directions preserved."""
    settings = {"context_templates": CONTEXTS, "num_steps": 8, "nullspace_rank": 8, "l2": 0.1, "layers": [1, 2]}
    settings |= {"nll_threshold": 0.0}  # as the paper
    return AlphaEditConfig(**settings | kwargs)
