"""Preference pairs of words, and the fused head's outputs computed the plain way, from all the logits."""

import torch
from datasets import Dataset
from trl.trainer.utils import FusedCausalLMOutput


def pair_rows(count: int = 12, seed: int = 1) -> Dataset:
    """Prompts of 2 to 5 words, answers of 1 to 8, all of `w1` .. `w48`."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high + 1, (), generator=generator))
        return " ".join(f"w{index}" for index in torch.randint(1, 49, (length,), generator=generator).tolist()) + " "

    return Dataset.from_list(
        [{"prompt": words(2, 5), "chosen": words(1, 8), "rejected": words(1, 8)} for _ in range(count)]
    )


def fused_outputs(logits: torch.Tensor, labels: torch.Tensor) -> FusedCausalLMOutput:
    """What TRL's fused head returns for these logits and unshifted labels; zero where a label is -100."""
    log_p = logits[:, :-1].log_softmax(-1)
    mask = labels[:, 1:] != -100
    targets = labels[:, 1:].clamp(min=0)
    fields = {
        "log_probs": log_p.gather(-1, targets[..., None]).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "is_top1": log_p.argmax(-1) == targets,
    }
    return FusedCausalLMOutput(**{name: field.masked_fill(~mask, 0) for name, field in fields.items()})
