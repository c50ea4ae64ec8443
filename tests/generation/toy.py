"""Two tiny random Llamas over 7 tokens, and the exact law of what a cascade of them must emit."""

import copy
import math
from collections import Counter

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_iclr.generation.deferral_rules import target_distribution


VOCAB = 7
# Rule and alpha where both models have a say on the toy models.
RULES = [
    ("spec", 0.0),
    ("chow", 0.6),
    ("chow_log", 1.5),
    ("diff", 0.1),
    ("opt", 0.3),
    ("opt_log", 0.5),
    ("token_v1", 0.1),
    ("token_v2", 0.3),
    ("token_v3", 0.5),
    ("lossy", 0.4),
    ("ensemble", 0.5),
]
GREEDY = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
RAGGED_PROMPTS = [[1, 2, 3], [4], [5, 6, 0, 2, 1], [3, 3]]


def tiny_llama(seed: int, layers: int = 1, vocab_size: int = VOCAB, **kwargs) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        initializer_range=0.4,
        **kwargs,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def perturbed_copy(model):
    """A model so like another that its drafts are often, but not always, accepted."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter += 0.05 * torch.randn_like(parameter)
    return other


def left_padded(prompts: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


@torch.no_grad()
def exact_law(large, small, prompt, rule, alpha, length, temperature=1.0, top_k=None) -> dict[tuple[int, ...], float]:
    """Probability of every continuation: the product of π along it, from fresh forwards without a cache."""
    law = {(): 1.0}
    for _ in range(length):
        prefixes = list(law)
        ids = torch.tensor([prompt + list(prefix) for prefix in prefixes])
        q_logits, p_logits = small(ids).logits[:, -1].float(), large(ids).logits[:, -1].float()
        q, p = (_warp(logits, temperature, top_k).softmax(-1) for logits in (q_logits, p_logits))
        pi = target_distribution(rule, alpha, q, p, q_logits.softmax(-1), p_logits.softmax(-1))
        law = {
            prefix + (token,): law[prefix] * pi[i, token].item()
            for i, prefix in enumerate(prefixes)
            for token in range(pi.shape[-1])
        }
    return law


def _warp(logits, temperature, top_k):
    logits = logits / temperature
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    return logits


def chi_square_z(samples: list[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square statistic of samples against a law, as a number of standard deviations; rare outcomes are pooled."""
    counts = Counter(samples)
    assert set(counts) <= {outcome for outcome, probability in law.items() if probability > 0}, "an impossible outcome"
    statistic, freedom, rare_expected, rare_seen = 0.0, -1, 0.0, 0
    for outcome, probability in law.items():
        expected = probability * len(samples)
        if expected < 5:
            rare_expected, rare_seen = rare_expected + expected, rare_seen + counts[outcome]
        else:
            statistic, freedom = statistic + (counts[outcome] - expected) ** 2 / expected, freedom + 1
    if rare_expected > 1:
        statistic, freedom = statistic + (rare_seen - rare_expected) ** 2 / rare_expected, freedom + 1
    return (statistic - freedom) / math.sqrt(2 * max(freedom, 1))
