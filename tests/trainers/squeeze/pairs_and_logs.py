"""Preference pairs of words, logs of a squeezing run, and the fused head's outputs, computed from all the logits."""

import torch
from datasets import Dataset
from trl.trainer.utils import FusedCausalLMOutput


NAMES = ("other_train", "permuted", "random_words", "rejected")


def probe_log(step, chosen, peak, *others, source="probe"):
    named = dict(zip(NAMES, others, strict=True))
    return {
        "step": step,
        f"{source}/chosen/logp": chosen,
        f"{source}/chosen/logp_argmax": peak,
        f"{source}/initial_greedy/logp": -0.5 + 0.1 * step,
        **{f"{source}/{name}/logp": value for name, value in named.items()},
    }


# chosen rises, is overtaken by its peak, and falls while the others fall from the second evaluation on
CURVE = [
    probe_log(0, -2.00, -1.00, -3.0, -7.0, -8.0, -2.0),
    probe_log(1, -1.90, -0.95, -3.0, -7.0, -8.0, -2.1),
    probe_log(2, -1.80, -0.90, -3.1, -7.1, -8.1, -2.2),
    probe_log(3, -1.75, -0.80, -3.2, -7.2, -8.2, -2.5),
    probe_log(4, -1.79, -0.75, -3.3, -7.3, -8.3, -3.0),
    probe_log(5, -1.85, -0.70, -3.4, -7.4, -8.4, -4.0),
]


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
