"""
What do in-run Data Shapley values find, and is it more than cheaper scores find?

    python benchmarks/data_shapley.py --stages a b c d e

a. digits: a fifth of 1000 handwritten digits has a wrong label. AUROC for finding them beside KNN-Shapley, final loss
   and gradient norm, five seeds; accuracy after training on what each keeps, always as many rows and steps; and the
   exact values of short runs, from the losses of all 256 subsets of each batch.
b. shuffled answers: SmolLM2-135M with LoRA on 160 questions of which a quarter has the answer of another one.
c. who breaks safety: SmolLM2 that was taught to refuse questions about mushrooms (as in deep_safety.py) is fine-tuned
   on 72 rows, of which 8 answer such a question. Target: held-out refusals. Ranks of the 8, and refusals after
   training without the lowest rows. With deep_safety.py's `--out` as `--out`, its taught models are used.
d. two sources: a small Llama from scratch on prose and code. Timeline of what each was worth for prose, beside what
   ten steps on either source alone really do from there.
e. paraphrases: ranks of rows that a validation text copies, paraphrases or shares its topic with, beside BM25.

Real text for b, d and e comes from `--data`: `prompts/` with self_instruct_*.jsonl of
https://github.com/yizhongw/self-instruct, and `editing/` with the two files of text that alphaedit.py wants. Without
it docstrings and SmolLM2's own answers stand in. Rows that are in `--out` already are not run again.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.arguments import make_parser, parse


STAGES = ("a", "b", "c", "d", "e")


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--data", type=Path, help="folder with prompts/ and editing/ of real text")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of stages b and c; a has five (--quick: one)"
    )
    return parse(parser, seeds=[0])


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch

from common.data_shapley_report import print_report


class Results:
    """Rows by name, kept in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> None:
        """Compute a row unless it is known, and keep it with the CPU seconds it took."""
        if name in self.rows:
            return
        started = time.process_time()
        self.rows[name] = compute() | {"cpu_seconds": round(time.process_time() - started, 1)}
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1))
        temporary.replace(self.path)
        print(f"{name}: {self.rows[name]['cpu_seconds']} CPU seconds", flush=True)


def run(stage: str, results: Results, args: argparse.Namespace) -> None:
    """Run a stage; its imports are its own, those of TRL take seconds."""
    if stage == "a":
        from common.data_shapley_digits import GAME_RATES, find_noise, play_games

        for seed in range(1 if args.quick else 5):
            results.once(f"digits {seed}", lambda seed=seed: find_noise(seed))
            for lr in GAME_RATES:
                results.once(f"games {lr} {seed}", lambda seed=seed, lr=lr: play_games(seed, lr))
    elif stage in ("b", "c"):
        from common.data_shapley_chat import shuffled_answers, who_breaks_safety

        name, run_seed = {
            "b": ("shuffled answers", functools.partial(shuffled_answers, args.out, args.data, args.quick)),
            "c": ("safety", functools.partial(who_breaks_safety, args.out, args.quick)),
        }[stage]
        for seed in args.seeds:
            results.once(f"{name} {seed}", functools.partial(run_seed, seed))
    else:
        from common.data_shapley_text import paraphrases, two_sources

        if stage == "d":
            results.once("two sources", lambda: two_sources(args.out, args.data, args.quick))
        else:
            results.once("paraphrases", lambda: paraphrases(args.out, args.data, args.quick))


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    results = {stage: Results(args.out / f"{stage}.json") for stage in STAGES}
    for stage in args.stages:
        run(stage, results[stage], args)
    print_report({name: row for part in results.values() for name, row in part.rows.items()}, args.out)


if __name__ == "__main__":
    main(ARGUMENTS)
