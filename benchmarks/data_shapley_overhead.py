"""What scoring rows costs a training step, beside the ghost dot product on concatenated batches.

    python benchmarks/data_shapley_overhead.py --steps 4 --rows 4 --tokens 256

Steps of all variants take turns, so that a change of the machine's speed meets all of them. Printed: median CPU time
of a step and its ratio to plain training; `counted`, by the time that the engine counts in its hooks and checks, which
differs less from run to run but leaves out what they put out of caches; the validation pass alone and spread over
`refresh_every` steps, memory of the direction, how fast thin products are, and floating-point operations, counted on
meta tensors also for Llamas of 1 and 8 billion parameters.
SmolLM2-135M in float32, one thread.
"""

import argparse
import functools
import statistics
import time

from common.adapters import ADAPTERS
from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--kinds", nargs="+", choices=tuple(ADAPTERS), default=tuple(ADAPTERS))
    parser.add_argument("--optimizers", nargs="+", choices=("SGD", "AdamW"), default=("SGD", "AdamW"))
    parser.add_argument("--skip-times", action="store_true", help="count operations only")
    parser.add_argument("--skip-flops", action="store_true", help="measure times only")
    return parse(parser, steps=2, rows=2, tokens=32)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.data_shapley.directions import EngineSettings
from hf_iclr.trainers.data_shapley.engine import ShapleyEngine
from hf_iclr.trainers.data_shapley.gradients.direction import LowRank, inner
from hf_iclr.trainers.data_shapley.gradients.rows import find_layout
from hf_iclr.trainers.data_shapley.gradients.taps import Taps


BARS = {"LoRA": 1.02, "LoRA by default": 1.02, "full, sketch": 1.05}
FLOP_BARS = {"LoRA": 1.005, "full, sketch": 1.02}
REFRESH_EVERY = 20
LLAMAS = {
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "Llama 1B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "Llama 8B": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def language_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


class Plain:
    """Forward, backward and optimizer step."""

    def __init__(
        self, model: nn.Module, batch: dict[str, torch.Tensor], val: dict[str, torch.Tensor], optimizer: str
    ) -> None:
        self.model, self.batch, self.val = model, batch, val
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = getattr(torch.optim, optimizer)(trained, lr=1e-5)

    def step(self) -> None:
        self.model.train()
        language_loss(self.model, self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Scored(Plain):
    """The same with taps, at steps that don't refresh the direction, which is measured apart."""

    def __init__(self, model: nn.Module, batch, val, optimizer: str) -> None:
        super().__init__(model, batch, val, optimizer)
        Plain.step(self)  # after which Adam has moments
        targets = {"validation": [(val, len(val["input_ids"]))]}
        settings = EngineSettings(refresh_every=10**9, adam_warmup=1)
        self.engine = ShapleyEngine(model, self.optimizer, targets, language_loss, settings)
        self.count = 1
        self.engine.begin_step(1)
        self.engine.close_step()
        self.counted: list[float] = []  # seconds in hooks and checks, by step

    def step(self) -> None:
        self.count += 1
        before = self.engine.meter.seconds
        self.engine.begin_step(self.count)
        self.engine.begin_micro_batch(range(len(self.batch["input_ids"])))
        self.engine.attach()
        self.model.train()
        language_loss(self.model, self.batch).backward()
        self.engine.finish_step()
        self.optimizer.step()
        self.engine.commit()
        self.optimizer.zero_grad()
        self.counted.append(self.engine.meter.seconds - before)

    def direction_bytes(self) -> int:
        size = 0
        for direction in self.engine.targets.found[0]:
            parts = [direction.left, direction.right] if isinstance(direction, LowRank) else [direction]
            size += sum(part.numel() * part.element_size() for part in parts)
        return size


class Ghost(Plain):
    """
    The paper's way (section 4.2, appendix D.1): training and validation rows in one batch, one backward pass to the
    layers' outputs with gradients by weights turned off, products of all pairs of tokens, and the training gradient
    rebuilt from the kept inputs and output gradients of the training rows.
    """

    def __init__(self, model: nn.Module, batch, val, optimizer: str) -> None:
        super().__init__(model, batch, val, optimizer)
        self.rows = len(batch["input_ids"])
        self.both = {name: torch.cat([batch[name], val[name]]) for name in batch}
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
        self.values = torch.zeros(self.rows)

    def step(self) -> None:
        self.model.train()
        self.values.zero_()
        handles = [layer.register_forward_hook(self._keep) for layer in self.layers]
        for layer in self.layers:
            layer.weight.requires_grad_(False)
        embeddings = self.model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        logits = self.model(input_ids=self.both["input_ids"]).logits[:, :-1]
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), self.both["labels"][:, 1:].flatten(), reduction="none"
        ).view(len(logits), -1)
        (losses[: self.rows].mean() + losses[self.rows :].mean()).backward()
        for handle in handles:
            handle.remove()
        embeddings._forward_hooks.clear()
        for layer in self.layers:
            layer.weight.requires_grad_(True)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _keep(self, layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = args[0].detach()

        def contract(b: torch.Tensor) -> None:
            mine, theirs = slice(0, self.rows), slice(self.rows, None)
            inputs = x[mine].flatten(0, 1) @ x[theirs].flatten(0, 1).T
            outputs = b[mine].flatten(0, 1) @ b[theirs].flatten(0, 1).T
            self.values += (inputs * outputs).view(self.rows, -1).sum(1)
            gradient = b[mine].flatten(0, 1).T @ x[mine].flatten(0, 1)
            layer.weight.grad = gradient if layer.weight.grad is None else layer.weight.grad + gradient

        output.register_hook(contract)


def with_lora(model: nn.Module, **settings) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))


def rows(count: int, tokens: int, vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(vocabulary, (count, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


def timed(function) -> float:
    """CPU seconds, on one thread, which other processes of the machine change little."""
    begin = time.process_time()
    function()
    return time.process_time() - begin


def flops(function) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def measure_times(kind: str, optimizer: str, args: argparse.Namespace) -> pd.DataFrame:
    table = []
    model, _ = load_demo_model(torch.float32)
    if (adapter := ADAPTERS[kind]) is not None:
        model = with_lora(model, **adapter)
    batch = rows(args.rows, args.tokens, model.config.vocab_size)
    val = rows(1, args.tokens, model.config.vocab_size)
    plain = Plain(model, batch, val, optimizer)
    variants = {"plain": plain}
    mine = "full, sketch" if kind == "full" else kind
    scored = variants[mine] = Scored(model, batch, val, optimizer)
    if kind == "full" and optimizer == "SGD":  # which its formula is of
        variants["full, ghost"] = Ghost(model, batch, val, optimizer)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(args.steps + 1):
        for name, variant in variants.items():
            took = timed(variant.step)
            if turn:  # the first warms up
                seconds[name].append(took)
    refresh = min(timed(functools.partial(scored.engine.targets.refresh, 1)) for _ in range(2))
    base = seconds["plain"]
    counted = 1 + statistics.median(scored.counted[1:]) / statistics.median(base)
    for name, times in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True))
        table.append(
            {
                "trained": kind,
                "optimizer": optimizer,
                "variant": name,
                "step (s)": statistics.median(times),
                "ratio": ratio,
                "ratio of medians": statistics.median(times) / statistics.median(base),
                "counted": counted if name == mine else None,
                "refresh, one row (s)": refresh if name == mine else None,
                "with refresh": ratio + refresh / REFRESH_EVERY / statistics.median(base) if name == mine else None,
                "direction (MB)": variants[name].direction_bytes() / 1e6 if name == mine else None,
                "bar": BARS.get(name),
            }
        )
    return pd.DataFrame(table)


def measure_products(tokens: int = 1024) -> pd.DataFrame:
    """Operations a second of the products that scoring adds, of 16 to 48 columns, beside those of the layers."""
    table = []
    for inputs in (576, 1536):
        for columns in (16, 32, 48, inputs):
            x, weight = torch.randn(tokens, inputs), torch.randn(columns, inputs)
            seconds = min(timed(functools.partial(nn.functional.linear, x, weight)) for _ in range(20))
            table.append({"inputs": inputs, "columns": columns, "GFLOP/s": 2e-9 * x.numel() * columns / seconds})
    return pd.DataFrame(table)


def count_flops(name: str, settings: dict, tokens: int) -> list[dict]:
    """Operations of a step of 4 rows on meta tensors, with and without taps and self-check, from one layer and two."""
    table = []
    for kind in ("LoRA", "full, sketch", "full, exact"):
        counts = [[0, 0], [0, 0]]
        for layers in (1, 2):
            with torch.device("meta"):
                model = meta_model(name, {**settings, "num_hidden_layers": layers})
                model = with_lora(model, **ADAPTERS[kind]) if kind == "LoRA" else model
                batch = {"input_ids": torch.zeros(4, tokens, dtype=torch.long)}
                batch["labels"] = batch["input_ids"]
                counts[0][layers - 1] = flops(functools.partial(meta_plain, model, batch))
                counts[1][layers - 1] = flops(functools.partial(meta_scored, model, batch, kind))
        plain, scored = (one + (settings["num_hidden_layers"] - 1) * (two - one) for one, two in counts)
        table.append(
            {
                "model": name,
                "variant": kind,
                "tokens a row": tokens,
                "step (TFLOP)": plain / 1e12,
                "FLOP ratio": scored / plain,
                "bar": FLOP_BARS.get(kind) if "Llama" in name else None,
            }
        )
    return table


def meta_plain(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    language_loss(model.train(), batch).backward()
    model.zero_grad()


def meta_model(name: str, settings: dict) -> nn.Module:
    config = LlamaConfig(tie_word_embeddings="8B" not in name, **settings)
    return LlamaForCausalLM._from_config(config, attn_implementation="eager")


def meta_scored(model: nn.Module, batch: dict[str, torch.Tensor], kind: str) -> None:
    """Forward and backward with taps along directions of the right shapes, and the self-check."""
    taps = Taps(model.train())
    directions = {}
    for tapped in taps.modules:
        for parameter in tapped.parameters.values():
            low = kind == "full, sketch" and parameter.dim() == 2
            directions[id(parameter)] = (
                LowRank(torch.empty(len(parameter), 16), torch.empty(16, parameter.shape[1]))
                if low
                else parameter.detach()
            )
        tapped.directions = [{name: directions[id(p)] for name, p in tapped.parameters.items()}]
        tapped.is_rms = tapped.kind == "scale"  # which its first call's numbers would tell
    taps.start(find_layout(batch, 4), 1)
    taps.attach()
    taps.on = True
    language_loss(model, batch).backward()
    taps.detach()
    if taps.misfits:
        raise RuntimeError(str(taps.misfits))
    for parameter in model.parameters():
        if parameter.requires_grad:
            inner(directions[id(parameter)], parameter.grad)
    model.zero_grad()


def report(table: pd.DataFrame, column: str) -> list[dict]:
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4f}", na_rep=""), flush=True)
    for line in table.dropna(subset=["bar"]).to_dict("records"):
        verdict = "reached" if line[column] <= line["bar"] else "NOT reached"
        print(f"{line.get('model', '')} {line['variant']}: {column} {line[column]:.4f}, bar {line['bar']}: {verdict}")
    return table.to_dict("records")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    tables = {}
    if not args.skip_flops:
        counted = pd.DataFrame([line for name, found in LLAMAS.items() for line in count_flops(name, found, 512)])
        tables["flops"] = report(counted, "FLOP ratio")
    if not args.skip_times:
        products = measure_products()
        print(products.to_string(index=False, float_format=lambda value: f"{value:.1f}"), flush=True)
        tables["products"] = products.to_dict("records")
        tables["times"] = [
            line
            for kind in args.kinds
            for optimizer in args.optimizers
            for line in report(measure_times(kind, optimizer, args), "ratio of medians")
        ]
    write_json(args.out / "data_shapley_overhead.json", tables)


if __name__ == "__main__":
    main(ARGUMENTS)
