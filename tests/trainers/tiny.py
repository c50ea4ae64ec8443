"""A two-layer Llama, word prompts and quick arguments for the trainers' tests."""

from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, set_seed


QUICK = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "disable_tqdm": True,
    "activation_checkpointing": False,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 3,
}


def tiny_llama(vocab_size: int = 50, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama of 16 dimensions whose output layer is spread out enough to prefer some tokens."""
    set_seed(seed)
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.4,
        "bos_token_id": None,
        "eos_token_id": vocab_size - 1,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **config}))


def word_rows(count: int = 24, seed: int = 1) -> Dataset:
    """Prompts of 2 to 5 words and completions of 3 to 9, all of `w1` .. `w48`."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(f"w{index}" for index in torch.randint(1, 49, (length,), generator=generator).tolist())

    return Dataset.from_list([{"prompt": words(2, 5) + " ", "completion": words(3, 9) + " "} for _ in range(count)])


def triplet_rows(count: int = 6) -> Dataset:
    """Triplets for recovery rows, of the same words."""
    rows = word_rows(2 * count, seed=2)
    return Dataset.from_list(
        [
            {
                "prompt": rows[index]["prompt"].strip(),
                "harmful": rows[index]["completion"].strip(),
                "refusal": rows[count + index]["completion"].strip(),
            }
            for index in range(count)
        ]
    )


def losses(trainer: Any, key: str = "loss") -> list[float]:
    """What a trainer logged under `key`, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]
