"""
Does fine-tuning the package's tiny SAM 2 on another look (gray striped bars under noise) help, and does it take video?

    python benchmarks/sam2_finetuning.py                               # about 3 minutes of CPU a run, 6 runs
    python benchmarks/sam2_finetuning.py --steps 400 --out DIR         # about 10 minutes a run
    python benchmarks/sam2_finetuning.py --choose 3e-4 1e-3 --out DIR  # compares learning rates

Two ways, with as many steps and as many frames a step: four clips of 5 frames, which train all parts; and 20 single
frames, which train encoder, prompt encoder and decoder. Each seed draws 100 clips of its own to train on, half of them
hard. J&F of the semi-supervised protocol is reported before and after, on held-out clips of the new look and of the
old one. Intervals are t intervals (95 %) over seeds, of what training changed on the same held-out clips. A run that
has its file in --out is not run again.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=("video", "image"), default=["video", "image"])
    parser.add_argument("--clips", type=int, default=16, help="held-out clips of the new look")
    parser.add_argument("--choose", type=float, nargs="+", metavar="RATE", help="compare learning rates instead")
    return parse(parser, steps=2, seeds=[0], clips=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from common.report import half_interval
from common.sam2_tuning import RATES, WAYS, tune
from hf_iclr import evaluate_vos
from hf_iclr.tour.demo.segmenter import DEMO_SEGMENTER, load_demo_segmenter
from hf_iclr.vision.evaluation.procedural_clips import Clip, procedural_clip


PROMPTS = {"mask": "mask", "1 click": 1}
HELD_OUT, VALIDATION, TRAINING = (
    10**13,
    2 * 10**13,
    3 * 10**13,
)  # first seeds of clips; the model's own are below 2**40
TRAINING_CLIPS = 100


def draw_clips(first: int, count: int, shifted: bool) -> list[Clip]:
    """Every other one is hard."""
    return [procedural_clip(first + number, hard=bool(number % 2), shifted=shifted) for number in range(count)]


def measure(pipe, clips: list[Clip]) -> dict[str, float]:
    """J&F by kind of prompt."""
    values = evaluate_vos(pipe, clips, tuple(PROMPTS.values())).mean()["j_and_f"]
    return {name: float(values[kind]) for name, kind in PROMPTS.items()}


def once(path: Path, made_with: dict[str, Any], function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a file says, or the result of a function, which is written to it."""
    if path.exists():
        known = json.loads(path.read_text())
        if known["made_with"] != made_with:
            raise SystemExit(f"{path} was made with {known['made_with']}, not with {made_with}. Take another --out.")
        return known
    result = {"made_with": made_with, **function()}
    path.write_text(json.dumps(result, indent=1))
    return result


def interval(values: list[float]) -> str:
    """Mean and t interval."""
    mean, half = np.mean(values), half_interval(values)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def choose(args: argparse.Namespace, common: dict[str, Any]) -> None:
    clips = draw_clips(VALIDATION, 10, shifted=True)
    videos = draw_clips(TRAINING + 10**9, TRAINING_CLIPS, shifted=True)
    steps = args.steps // 2

    def run(way: str, rate: float) -> dict[str, Any]:
        return measure(tune(videos, way, rate, steps, 1000, args.out / "trainer")[0], clips)

    before = once(args.out / "before.json", common, lambda: measure(load_demo_segmenter(), clips))
    print(f"Another seed, {steps} steps, 10 other clips\n")
    print(f"| way | learning rate | {' | '.join(PROMPTS)} |\n|---|---|---|---|")
    print(f"| before | | {' | '.join(f'{before[name]:.3f}' for name in PROMPTS)} |")
    for way in args.ways:
        for rate in args.choose:
            made_with = {**common, "steps": steps, "way": way, "rate": rate}
            result = once(args.out / f"rate_{way}_{rate:g}.json", made_with, partial(run, way, rate))
            print(f"| {way} | {rate:g} | {' | '.join(f'{result[name]:.3f}' for name in PROMPTS)} |", flush=True)


def compare(args: argparse.Namespace, common: dict[str, Any]) -> None:
    looks = {
        "new": draw_clips(HELD_OUT, args.clips, shifted=True),
        "old": draw_clips(HELD_OUT, args.clips // 2, shifted=False),
    }
    common = {**common, "clips": args.clips}

    def scores(pipe) -> dict[str, Any]:
        return {look: measure(pipe, clips) for look, clips in looks.items()}

    def run(way: str, seed: int) -> dict[str, Any]:
        videos = draw_clips(TRAINING + 10**6 * seed, TRAINING_CLIPS, shifted=True)
        pipe, seconds = tune(videos, way, RATES[way], args.steps, seed, args.out / "trainer")
        return {"seconds": seconds, **scores(pipe)}

    before = once(args.out / "before.json", common, lambda: scores(load_demo_segmenter()))
    after: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    for seed in args.seeds:
        for way in args.ways:
            made_with = {**common, "steps": args.steps, "rate": RATES[way], "way": way, "seed": seed}
            after[way].append(once(args.out / f"{way}_{seed}.json", made_with, partial(run, way, seed)))

    columns = [(look, name) for look in looks for name in PROMPTS]
    print(
        f"Weights {common['weights'][:12]}; {args.steps} steps; {len(args.seeds)} seeds; J&F on {args.clips} clips of"
    )
    print(f"the new look and {args.clips // 2} of the old\n")
    print(f"| | {' | '.join(f'{look} look, {name}' for look, name in columns)} | CPU s a run |")
    print("|---" * (len(columns) + 2) + "|")
    print(f"| before | {' | '.join(f'{before[look][name]:.3f}' for look, name in columns)} | |")
    for way, runs in after.items():
        cells = [f"{np.mean([run[look][name] for run in runs]):.3f}" for look, name in columns]
        print(f"| {way} | {' | '.join(cells)} | {np.mean([run['seconds'] for run in runs]):.0f} |")
    for way, runs in after.items():
        cells = [interval([run[look][name] - before[look][name] for run in runs]) for look, name in columns]
        print(f"| {way}, change | {' | '.join(cells)} | |")
    if len(after) == len(WAYS):
        pairs = list(zip(after["video"], after["image"], strict=True))
        cells = [interval([video[look][name] - image[look][name] for video, image in pairs]) for look, name in columns]
        print(f"| video over image | {' | '.join(cells)} | |")


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    weights = hashlib.sha256((DEMO_SEGMENTER / "model.safetensors").read_bytes()).hexdigest()
    (choose if args.choose else compare)(args, {"weights": weights})


if __name__ == "__main__":
    main(ARGUMENTS)
