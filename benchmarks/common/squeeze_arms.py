"""Runs that do and do not lose the answers they should keep, for benchmarks/squeeze_warning.py."""

import gzip
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from common.squeeze_data import HH_FILE
from hf_iclr.models import generate_rows
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.squeeze import SqueezeDPOConfig, SqueezeDPOTrainer, SqueezeProbeCallback, build_probe_set


# Arm -> the supervised stage before it, what differs from DPO, and the learning rate in shares of the setting's.
ARMS: dict[str, tuple[str, dict[str, Any], float]] = {
    "null": ("short", {}, 0.0),
    "sft": ("short", {"loss_type": ["sft"]}, 1.0),
    "sft, long before": ("long", {"loss_type": ["sft"]}, 1.0),
    "sigmoid + sft": ("short", {"loss_type": ["sigmoid", "sft"]}, 1.0),
    "gentle": ("short", {}, 0.05),
    "on-policy": ("short", {}, 1.0),
    "dpo": ("short", {}, 1.0),
    "dpo, long before": ("long", {}, 1.0),
    "dpo, fast": ("short", {}, 5.0),
}
BASE: dict[str, Any] = {
    "use_cpu": not torch.cuda.is_available(),
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "per_device_eval_batch_size": 64,
    "logging_steps": 4,
}


@dataclass
class Setting:
    """
    A model, pairs of its own and how long it is trained.

    Args:
        load (`Callable`):
            Makes the model anew, from a seed.
        pairs (`Callable`):
            Training pairs and held-out ones, from a seed.
        learning_rate (`float`):
            Of the arms; that of the supervised stages is `sft_rate`.
        short, long (`int`):
            Steps of the supervised stages.
        batch (`int`):
            Pairs in a step.
        steps, every (`int`):
            Of an arm, and from one pass over the probes to the next.
        probes (`int`):
            Prompts in each of the two probe sets.
    """

    load: Callable[[int], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
    pairs: Callable[[int], tuple[Dataset, Dataset]]
    learning_rate: float
    sft_rate: float
    short: int
    long: int
    batch: int = 4
    steps: int = 64
    every: int = 4
    probes: int = 24


def counting_pairs(seed: int) -> tuple[Dataset, Dataset]:
    """The chosen answer counts up from the prompt's last number, the rejected one down."""
    generator = random.Random(seed)

    def pair() -> dict[str, str]:
        first, *rest = generator.choices(range(1, 49), k=3)
        up, down = ([(rest[-1] + sign * k - 1) % 48 + 1 for k in range(1, 5)] for sign in (1, -1))
        names = ("prompt", "chosen", "rejected")
        ids = ([first, *rest], up, down)
        return {name: "".join(f"w{i} " for i in each) for name, each in zip(names, ids, strict=True)}

    rows = Dataset.from_list([pair() for _ in range(260)])
    return rows.select(range(200)), rows.select(range(200, 260))


def tiny_model(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A Llama of 16 dimensions that knows numbers only."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w49", padding_side="left"
    )
    set_seed(seed)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=None, eos_token_id=49, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def hh_pairs(path: Path, tokenizer: PreTrainedTokenizerBase, seed: int, train: int = 256, held_out: int = 48):
    """Pairs of the authors' probing set: the end of the prompt, the beginning of the answers, 16 tokens each."""

    def cut(text: str, tokens: slice) -> str:
        ids = tokenizer(text.strip(), add_special_tokens=False)["input_ids"][tokens]
        return " " + tokenizer.decode(ids, skip_special_tokens=True).strip()

    with gzip.open(path) as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if min(len(row[side].strip()) for side in ("chosen", "rejected")) > 20]
    random.Random(seed).shuffle(rows)
    pairs = Dataset.from_list(
        [
            {"prompt": cut(row["prompt"], slice(-16, None)).strip()}
            | {side: cut(row[side], slice(16)) for side in ("chosen", "rejected")}
            for row in rows[: train + held_out]
        ]
    )
    return pairs.select(range(train)), pairs.select(range(train, train + held_out))


def settings(data: Path | None) -> dict[str, Setting]:
    """The settings that can be had: the tiny model always, the other two with a folder of data."""
    found = {"counting": Setting(tiny_model, counting_pairs, 2e-3, 3e-3, 150, 600, batch=16, probes=32)}
    if data is None:
        return found
    stories, hh = data / "models" / "stories260k", data / "preference" / HH_FILE

    def load(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = AutoTokenizer.from_pretrained(stories)
        tokenizer.pad_token = tokenizer.unk_token
        return AutoModelForCausalLM.from_pretrained(stories), tokenizer

    def lora(seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_demo_model()  # in bfloat16; the adapter is in float32
        set_seed(seed)
        return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")), tokenizer

    found["stories260k"] = Setting(load, lambda seed: hh_pairs(hh, load(0)[1], seed), 1e-4, 1e-3, 40, 200)
    found["smollm2"] = Setting(
        lora, lambda seed: hh_pairs(hh, load_demo_model()[1], seed, 64, 24), 1e-3, 5e-4, 8, 24, batch=2, steps=32,
        probes=8,
    )  # fmt: skip
    return found


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def supervised(setting: Setting, pairs: Dataset, seed: int, steps: int) -> dict[str, torch.Tensor]:
    """Weights after SFT on the chosen answers."""
    model, tokenizer = setting.load(seed)
    rows = pairs.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")
    args = SFTConfig(
        tempfile.mkdtemp(), seed=seed, max_steps=steps, learning_rate=setting.sft_rate, warmup_steps=4,
        per_device_train_batch_size=4 * setting.batch if setting.batch < 16 else 16,
        **{**BASE, "lr_scheduler_type": "constant_with_warmup", "logging_steps": steps},
    )  # fmt: skip
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return weights_of(trainer.model)


def own_answers(setting: Setting, weights: dict[str, torch.Tensor], pairs: Dataset, seed: int) -> Dataset:
    """The pairs with a sample of this model as the rejected answer."""
    model, tokenizer = setting.load(seed)
    model.load_state_dict(weights, strict=False)
    set_seed(seed)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in pairs["prompt"]]
    longest = max(len(tokenizer(answer)["input_ids"]) for answer in pairs["chosen"])
    ends = [tokenizer.eos_token_id]
    samples = generate_rows(
        model.eval(), prompts, ends, batch_size=64, padding=tokenizer.pad_token_id, do_sample=True, top_k=0,
        max_new_tokens=longest, eos_token_id=ends,
    )  # fmt: skip
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in samples]
    texts = [text if text.strip() else chosen[::-1] for text, chosen in zip(texts, pairs["chosen"], strict=True)]
    return pairs.remove_columns("rejected").add_column("rejected", texts)


def train_arm(
    setting: Setting, weights: dict[str, torch.Tensor], pairs: tuple[Dataset, Dataset], seed: int, rate: float,
    trainer_class: type[SqueezeDPOTrainer] = SqueezeDPOTrainer, **changes: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """One preference run from these weights: its log."""
    train, held_out = pairs
    model, tokenizer = setting.load(seed)
    reference = None
    if not hasattr(model, "peft_config"):
        reference = setting.load(seed)[0]
        reference.load_state_dict(weights, strict=False)
    model.load_state_dict(weights, strict=False)
    args = SqueezeDPOConfig(
        tempfile.mkdtemp(), seed=seed, max_steps=setting.steps, learning_rate=rate * setting.learning_rate,
        per_device_train_batch_size=setting.batch, squeeze_metrics="full", argmax_every=10**6, eval_strategy="steps",
        eval_steps=setting.every, eval_on_start=True, **{**BASE, "logging_steps": setting.every, **changes},
    )  # fmt: skip
    trainer = trainer_class(
        model, reference, args, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    for name, rows, test in (("", train, held_out), ("held_out", held_out, None)):
        probes = build_probe_set(rows, num_probes=setting.probes, seed=seed, test_pairs=test)
        probes = probes.remove_columns(["random_words"] if test else ["random_words", "other_train"])
        options: dict[str, Any] = {"every": setting.every, "probe_budget": 1.0, "decode_every": 0, "batch_size": 128}
        trainer.add_callback(SqueezeProbeCallback({name: probes} if name else probes, trainer=trainer, **options))
    trainer.train()
    return trainer.state.log_history
