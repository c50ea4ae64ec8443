"""
Does the model in the loop get better by what it annotated? Annotate, train, annotate again, on drawn videos.

    python benchmarks/sam2_flywheel.py  # 15 minutes of CPU

Each round annotates videos it has not seen, of a look that the package's tiny SAM 2 was not trained on (gray striped
bars under noise), with `annotate` and an annotator who knows the truth: a click on each object, then one at
a time on the frame with the lowest IoU of those not clicked yet, all tracked anew after each, until J&F of the object
over the video reaches 0.8. Where 4 clicks do not get there, he draws the worst frame by hand, and the next worst, and
so on. On all masklets so far, as the engine wrote them, the first model is then trained with the settings of
sam2_finetuning.py. Printed of each round, of its own videos and of videos that are the same in all rounds and never
trained on: clicks an object, the share of objects that reached 0.8 by clicks alone, masks drawn by hand an object. The
rounds are compared object by object on the latter.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections import defaultdict
from typing import Any

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--videos", type=int, default=60, help="to annotate in a round")
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="of training")
    parser.add_argument("--steps", type=int, default=200, help="of a training")
    parser.add_argument("--way", choices=("video", "image"), default="video", help="to train; of sam2_finetuning.py")
    parser.add_argument("--seed", type=int, default=0)
    return parse(parser, videos=2, held_out=1, rounds=1, steps=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import pandas as pd
import torch
from scipy import stats

from common.sam2_tuning import RATES, tune
from hf_iclr import annotate
from hf_iclr.tour.demo.segmenter import DEMO_SEGMENTER, load_demo_segmenter
from hf_iclr.vision.annotation.masklets import Masklet, QualityGate
from hf_iclr.vision.annotation.simulated_annotator import SimulatedAnnotator
from hf_iclr.vision.annotation.sources import name_video
from hf_iclr.vision.evaluation.j_and_f import j_and_f, region_similarity
from hf_iclr.vision.evaluation.procedural_clips import Clip, procedural_clip


GOAL, CLICKS, FRAMES = 0.8, 4, 8
ANY_QUALITY = QualityGate(min_object_score=0, min_stability=0, min_cycle_iou=None)
HELD_OUT, FRESH = 4 * 10**13, 5 * 10**13  # first seeds of videos; those of the model are below 2**40


def draw_videos(first: int, count: int) -> list[Clip]:
    return [procedural_clip(first + number, frames=FRAMES, shifted=True) for number in range(count)]


def annotate_videos(pipe, videos: list[Clip]) -> tuple[datasets.Dataset, pd.DataFrame]:
    """All objects, satisfactory; and by video and object the clicks and the masks drawn by hand that it took."""
    hand = SimulatedAnnotator(min_iou=1.0, max_clicks=1, per_frame=False)
    drawn: dict[tuple[str, int], list[int]] = defaultdict(list)

    def masks_of(masklet: Masklet) -> np.ndarray:
        return np.stack([masklet.binary(frame) for frame in range(FRAMES)])

    def verify(masklet: Masklet) -> bool:
        return j_and_f([masks_of(masklet)], [masklet.video.masks[masklet.object]])["j_and_f"] >= GOAL

    def correct(masklet: Masklet) -> None:
        if masklet.rounds < CLICKS - 1:
            hand.correct(masklet)
            return
        truth = masklet.video.masks[masklet.object]
        values = region_similarity(masks_of(masklet), truth)
        done = drawn[masklet.name, masklet.object]
        values[done] = 1.0
        worst = int(values.argmin())
        masklet.session.add(worst, masklet.object, mask=truth[worst])
        done.append(worst)

    with tempfile.TemporaryDirectory() as out:
        rows = annotate(
            videos, pipe, hand.point, verify, correct, out=out, gate=ANY_QUALITY, max_rounds=CLICKS - 1 + FRAMES
        )
    table = rows.select_columns(["name", "object", "clicks", "status"]).to_pandas().set_index(["name", "object"])
    table["drawn"] = [len(drawn[key]) for key in table.index]
    return rows, table


def verdict(tables: list[pd.DataFrame]) -> list[str]:
    """What the rounds' tables of the same objects say in words."""
    lines = []
    for column, name in (("clicks", "clicks"), ("drawn", "masks drawn by hand")):
        for number, table in enumerate(tables[1:], start=1):
            change = table[column] - tables[0][column]
            low, high = stats.ttest_1samp(change, 0).confidence_interval()
            way = "fell" if high < 0 else "rose" if low > 0 else "did not fall beyond chance"
            lines.append(
                f"Round {number} against round 0, same {len(change)} objects: {name} {way}, {change.mean():+.2f} an "
                f"object (95 % interval {low:+.2f} to {high:+.2f})."
            )
    return lines


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    weights = hashlib.sha256((DEMO_SEGMENTER / "model.safetensors").read_bytes()).hexdigest()
    print(f"Weights {weights[:12]}; {args.videos} videos a round, {args.held_out} held out; trained on {args.way}s,")
    print(f"{args.steps} steps.\n")
    print("| round | videos | objects | clicks an object | by clicks alone | masks drawn an object |")
    print("|---|---|---|---|---|---|")

    pipe = load_demo_segmenter()
    held_out = draw_videos(HELD_OUT, args.held_out)
    learnt: list[dict[str, Any]] = []
    same: list[pd.DataFrame] = []
    began = time.process_time()
    for number in range(args.rounds + 1):
        fresh = draw_videos(FRESH + 10**6 * args.seed + 1000 * number, args.videos)
        rows, table = annotate_videos(pipe, fresh)
        same.append(annotate_videos(pipe, held_out)[1])
        for name, scores in {"fresh": table, "held out": same[-1]}.items():
            scores.to_csv(args.out / f"{name.replace(' ', '_')}_{number}.csv")
            alone = (scores["drawn"].eq(0) & scores["status"].eq("accepted")).mean()
            print(
                f"| {number} | {name} | {len(scores)} | {scores['clicks'].mean():.2f} | {alone:.0%} | "
                f"{scores['drawn'].mean():.2f} |",
                flush=True,
            )
        if number < args.rounds:
            frames = {name_video(video)[0]: video.frames for video in fresh}
            learnt += [{**row, "video": frames[row["name"]]} for row in rows if row["status"] == "accepted"]
            pipe, _ = tune(learnt, args.way, RATES[args.way], args.steps, args.seed + number, args.out / "trainer")
    print()
    print("\n".join(verdict(same)))
    print(f"{time.process_time() - began:.0f} CPU seconds.")


if __name__ == "__main__":
    main(ARGUMENTS)
