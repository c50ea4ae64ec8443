"""
Does DPO squeeze probability mass out of answers nobody trains on, and does the paper's "extend" help?

    python benchmarks/squeeze.py --seeds 3 --data DIR

SmolLM2-135M-Instruct with LoRA, 16 preference pairs with short answers. Four arms a seed, each a supervised stage and
then DPO with the same pairs, steps and optimiser (RMSprop as in the authors' code):

- sft: supervised on the chosen answers;
- extend: on chosen and rejected ones, for as many steps, so compute is matched but each chosen answer is seen half as
  often;
- half: on the chosen ones for half the steps. Each chosen answer is seen as often as in "extend", so only what
  "extend" gains over this arm is owed to the rejected answers;
- on-policy: from the model of "sft", with its own samples as the rejected answers.

The pairs are those of the package, or with `--data` the authors' probing set: DIR then holds
`learning_dynamics_hh_formal_prob_train.jsonl.gz`, from `src/data/helpful-base` of
https://github.com/Joshua-Ren/Learning_dynamics_LLM. Probes are scored on 6 training prompts and, for the first two
arms, on 6 held-out ones. All intervals are 95 % t intervals over seeds; a seed draws the pairs, the adapter, the order
and the samples. Every bar is printed as reached or not.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common.arguments import make_parser, parse


ARMS = ("sft", "extend", "half", "on-policy")


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=30, help="of DPO")
    parser.add_argument("--sft-steps", type=int, default=12)
    parser.add_argument("--probes", type=int, default=6)
    parser.add_argument(
        "--data", type=Path, help="folder with the authors' probing set (default: the package's pairs)"
    )
    parser.add_argument("--tables", action="store_true", help="only print the tables of the runs in --out again")
    return parse(parser, seeds=1, steps=2, sft_steps=2, probes=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from common.squeeze_data import MAX_ANSWER, load_pairs, make_probes
from common.squeeze_tables import print_tables, write_plots
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.squeeze import SqueezeDPOConfig, SqueezeDPOTrainer, SqueezeProbeCallback, extend_for_sft
from hf_iclr.trainers.squeeze.probe_scoring import decode_answers


SETTINGS: dict[str, Any] = {
    "use_cpu": not torch.cuda.is_available(),
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 5,
    "disable_tqdm": True,
    "max_grad_norm": 10.0,
    "lr_scheduler_type": "constant_with_warmup",
    "per_device_eval_batch_size": 16,
}


class AdapterAt(TrainerCallback):
    """Keeps a copy of the adapter after some step."""

    def __init__(self, step: int) -> None:
        self.step, self.weights = step, {}

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if state.global_step == self.step:
            self.weights = adapter(model)


def adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def new_model(seed: int, weights: dict[str, torch.Tensor] | None = None) -> PeftModel:
    """SmolLM2 in float32 with a fresh adapter, or with these weights."""
    base, _ = load_demo_model(torch.float32)
    set_seed(seed)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model


def supervised(rows: Dataset, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace, seed: int, steps: int):
    """Adapter weights after half of the steps and after all of them, and the trainer."""
    args = SFTConfig(
        str(options.out / "checkpoints"), seed=seed, max_steps=steps, learning_rate=4e-4, weight_decay=0.0,
        per_device_train_batch_size=4, **SETTINGS,
    )  # fmt: skip
    middle = AdapterAt(steps // 2)
    trainer = SFTTrainer(new_model(seed), args, train_dataset=rows, processing_class=tokenizer, callbacks=[middle])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return middle.weights, adapter(trainer.model), trainer


def own_samples(trainer: SFTTrainer, pairs: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """The pairs with one sample of the trainer's model as the rejected answer."""
    prompts = [tokenizer(prompt)["input_ids"] for prompt in pairs["prompt"]]
    samples = decode_answers(trainer, tokenizer, prompts, MAX_ANSWER, 16, do_sample=True)
    texts = tokenizer.batch_decode(samples, skip_special_tokens=True)
    return pairs.remove_columns("rejected").add_column("rejected", [text if text.strip() else " ?" for text in texts])


def dpo(
    arm: str, weights, pairs: Dataset, probes, tokenizer, options: argparse.Namespace, seed: int
) -> dict[str, Any]:
    inside, outside = probes
    args = SqueezeDPOConfig(
        str(options.out / "checkpoints"), seed=seed, max_steps=options.steps, learning_rate=6e-5, warmup_steps=6,
        optim="rmsprop", beta=0.1, per_device_train_batch_size=2, precompute_ref_log_probs=True,
        squeeze_metrics="full", argmax_every=5, **SETTINGS,
    )  # fmt: skip
    trainer = SqueezeDPOTrainer(
        new_model(seed, weights),
        args=args,
        train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    every = options.steps if arm == "on-policy" else max(options.steps // 3, 1)
    trainer.add_callback(
        SqueezeProbeCallback(
            inside,
            trainer=trainer,
            every=every,
            probe_budget=1.0,
            decode_every=options.steps,
            max_new_tokens=20,
        )
    )
    if arm in ("sft", "extend"):
        held_out = {"held_out": outside}
        trainer.add_callback(SqueezeProbeCallback(held_out, trainer=trainer, every=options.steps, decode_every=0))
    begin = time.perf_counter()
    trainer.train()
    history = trainer.state.log_history
    return {"arm": arm, "seed": seed, "seconds": time.perf_counter() - begin, "log_history": history}


def run_seed(seed: int, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> list[dict[str, Any]]:
    pairs, held_out, source = load_pairs(options.data, tokenizer, seed)
    probes = make_probes(pairs, held_out, options.probes, seed)
    columns = pairs.select_columns(["prompt", "chosen", "rejected"])
    chosen = extend_for_sft(columns, rejected_ratio=0.0, seed=seed)
    both = extend_for_sft(columns, match_compute=False, seed=seed)  # the steps match
    half, sft, trainer = supervised(chosen, tokenizer, options, seed, options.sft_steps)
    set_seed(seed)
    samples = own_samples(trainer, columns, tokenizer)
    extend = supervised(both, tokenizer, options, seed, options.sft_steps)[1] if "extend" in options.arms else {}
    starts = {"sft": (sft, columns), "extend": (extend, columns), "half": (half, columns), "on-policy": (sft, samples)}
    runs = []
    for arm in options.arms:
        (weights, rows), own = starts[arm], probes
        if arm == "on-policy":  # its rejected probes are the samples, too
            by_prompt = dict(zip(rows["prompt"], rows["rejected"], strict=True))
            inside = probes[0].map(lambda row, by_prompt=by_prompt: {"rejected": by_prompt[row["prompt"]]})
            own = (inside, probes[1])
        run = dpo(arm, weights, rows, own, tokenizer, options, seed) | {"source": source}
        path = options.out / f"{arm}_{seed}.json"
        path.write_text(json.dumps(run))
        print(f"seed {seed} {arm}: {run['seconds']:.0f} s, in {path}", flush=True)
        runs.append(run)
    return runs


def main(args: argparse.Namespace) -> None:
    if args.tables:
        runs = [json.loads(path.read_text()) for arm in ARMS for path in sorted(args.out.glob(f"{arm}_*.json"))]
    else:
        _, tokenizer = load_demo_model(torch.float32)
        seeds = range(args.first_seed, args.first_seed + args.seeds)
        runs = [run for seed in seeds for run in run_seed(seed, tokenizer, args)]
    print_tables(runs)
    write_plots(runs, args.out)


if __name__ == "__main__":
    main(ARGUMENTS)
