"""
Our parts in one run: each trainer with each callback, in each way of training. What docs/combinations.md says is what
happens here; `python -m tests.runs.test_combinations` writes that page anew.
"""

import functools
import re
import tempfile
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_iclr import (
    DeepSafetySFTConfig,
    DeepSafetySFTTrainer,
    InRunDataShapleyCallback,
    KeyStatistics,
    NullSpaceCallback,
    SafetyDriftCallback,
    SqueezeDPOConfig,
    SqueezeDPOTrainer,
    SqueezeProbeCallback,
    build_probe_set,
)
from hf_iclr.doctor.self_check import TRAINING
from hf_iclr.tiny_models import tiny_llama, word_tokenizer
from tests.trainers.distributed import run_in_two
from tests.trainers.tiny import triplet_rows, word_rows


PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
PAIRS = triplet_rows(12).rename_columns({"harmful": "rejected", "refusal": "chosen"})
TRAINERS = {
    "SFTTrainer": (SFTTrainer, SFTConfig, word_rows(16)),
    "DeepSafetySFTTrainer": (DeepSafetySFTTrainer, DeepSafetySFTConfig, word_rows(16)),
    "DPOTrainer": (DPOTrainer, DPOConfig, PAIRS),
    "SqueezeDPOTrainer": (SqueezeDPOTrainer, SqueezeDPOConfig, PAIRS),
}
WAYS = {
    "full": {},
    "LoRA": {},
    "packing": {"packing": True, "max_length": 32},  # of SFT alone
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "resumed": {"save_strategy": "steps", "save_steps": 2},
    "two processes": {"per_device_train_batch_size": 2},
}
WAYS["packing, resumed, two processes"] = {**WAYS["packing"], **WAYS["resumed"], **WAYS["two processes"]}
INTRODUCTION = """
# Parts in one run

Each trainer with each of our callbacks, in each way of training. A run of four steps on a tiny model is held against
the same run without the callback, bit for bit. `python -m tests.runs.test_combinations` writes this page.

- Shapley: `InRunDataShapleyCallback`. Probes: `SqueezeProbeCallback`. Drift: `SafetyDriftCallback`. Null space:
  `NullSpaceCallback`, which is there to change the weights.
- Resumed: from a checkpoint of the second step; held against the unbroken run, too, to 1e-6: the null space is then
  counted from the weights of the checkpoint.
- Two processes: gloo, one forked process each; both end with the same weights.
"""
CALLBACKS = ["Shapley", "probes", "drift", "null space", "all four"]


def statistics(model):
    return KeyStatistics.from_dataset(
        model, word_tokenizer(), [{"text": row["prompt"]} for row in word_rows(8)], layers=[0]
    )


def callbacks(name, rows, trainer, kept):
    """What goes into a trainer; `kept` are the statistics of its model before."""
    if name == "Shapley":
        return [InRunDataShapleyCallback(rows.select(range(2)), refresh_every=1, adam_warmup=0)]
    if name == "probes":
        return [SqueezeProbeCallback(build_probe_set(PAIRS.select(range(4))), trainer=trainer, every=2)]
    if name == "drift":
        return [SafetyDriftCallback(["w1 w2", "w3"], trainer=trainer, every=2, max_new_tokens=2, kl_tokens=2)]
    if name == "null space":
        return [NullSpaceCallback(kept, nullspace_rank=4)]
    return [callback for one in CALLBACKS[:4] for callback in callbacks(one, rows, trainer, kept)]


def train(kind, way, names, folder):
    """The weights after four steps, and after two of them and the rest of a resumed run, if there is one."""
    trainer_class, config, rows = TRAINERS[kind]
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM") if way == "LoRA" else None

    def make():
        model = tiny_llama()
        kept = statistics(model)
        settings = {**TRAINING, "max_steps": 4, "per_device_train_batch_size": 4, **WAYS[way]}
        reference = {"ref_model": tiny_llama()} if kind.endswith("DPOTrainer") and lora is None else {}
        trainer = trainer_class(
            model, args=config(str(folder), **settings), train_dataset=rows, processing_class=word_tokenizer(),
            peft_config=lora, **reference,
        )  # fmt: skip
        for name in names:
            for callback in callbacks(name, rows, trainer, kept):
                trainer.add_callback(callback)
        return trainer

    trained = []
    for checkpoint in (None, folder / "checkpoint-2") if "resumed" in way else (None,):
        trainer = make()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trained.append({name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()})
    return trained


@functools.cache
def weights(kind, way, name):
    """The weights after a run with a callback, unbroken and resumed; `name` is None for the run without."""
    names = () if name is None else (name,)
    with tempfile.TemporaryDirectory() as folder:
        if "two processes" not in way:
            return train(kind, way, names, Path(folder))
        first, second = run_in_two(train, Path(folder), kind, way, names, Path(folder))
    assert all(map(same, first, second))
    return first


def same(first, second, tolerance=0.0):
    return all(torch.allclose(first[key], second[key], rtol=tolerance, atol=tolerance) for key in first)


def outcome(kind, way, name):
    """What a callback does to a trainer's run: the null space changes the weights, and nothing else does."""
    if "packing" in way and "DPO" in kind:
        return "no option of DPO"
    *unbroken, measured = weights(kind, way, name)
    if unbroken and not same(unbroken[0], measured, 1e-6):
        return "not as the unbroken run"
    if name == "all four":
        return "as the null space alone" if same(weights(kind, way, "null space")[-1], measured) else "others"
    as_bare = same(weights(kind, way, None)[-1], measured)
    if name == "null space":
        return "no effect" if as_bare else "other weights"
    return "same weights" if as_bare else "others"


# What one run has together is not also run one by one.
TOGETHER = "packing, resumed, two processes"
ONE_BY_ONE = [pytest.param("DeepSafetySFTTrainer", way, marks=pytest.mark.slow) for way in TOGETHER.split(", ")]
CASES = [("DeepSafetySFTTrainer", way) for way in WAYS if way not in TOGETHER.split(", ")]
CASES += [("SqueezeDPOTrainer", way) for way in WAYS if "packing" not in way]


@pytest.mark.parametrize(("kind", "way"), [*CASES, *ONE_BY_ONE])
def test_all_callbacks_at_once(kind, way):
    """They leave the weights of a run with the null space alone, which are others than without it."""
    row = re.search(rf"## {kind}\n(?:.*\n)*?\| {way} \|(.*)\|\n", PAGE.read_text(encoding="utf-8"))[1]
    assert outcome(kind, way, "all four") == row.split("|")[-1].strip()


@pytest.mark.slow
def test_the_page_is_what_happens():
    assert page() == PAGE.read_text(encoding="utf-8")


def page():
    lines = [*INTRODUCTION.strip().split("\n"), ""]
    for kind in TRAINERS:
        lines += [f"## {kind}", "", "| | " + " | ".join(CALLBACKS) + " |", "| --- " * (len(CALLBACKS) + 1) + "|"]
        lines += ["| " + " | ".join([way, *(outcome(kind, way, name) for name in CALLBACKS)]) + " |" for way in WAYS]
        lines += [""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
