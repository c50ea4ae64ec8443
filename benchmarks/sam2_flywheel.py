"""
Does the model in the loop get better by what it annotated? Annotate, train, annotate again, on drawn videos.

    python benchmarks/sam2_flywheel.py --seeds 1 2 3  # 10 minutes of CPU a seed

Each round annotates videos it has not seen, of a look that the package's tiny SAM 2 was not trained on (gray striped
bars under noise), with `annotate` and an annotator who knows the truth: a click on each object, then one at
a time on the frame with the lowest IoU of those not clicked yet, all tracked anew after each, until J&F of the object
over the video reaches 0.8. Where 4 clicks do not get there, he draws the worst frame by hand, and the next worst, and
so on. On all masklets so far, as the engine wrote them, the first model is then trained with the settings of
sam2_finetuning.py, but with corrective clicks. Printed of each round, of its new videos and of videos that are the
same in all rounds and never trained on: clicks an object, the share of objects that reached 0.8 by clicks alone, masks
drawn by hand an object. The rounds are compared object by object on the latter, over all seeds. A seed whose tables
are in `--out` is not run again.
"""

import argparse
import hashlib
import os
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--videos", type=int, default=30, help="to annotate in a round")
    parser.add_argument("--held-out", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2, help="of training")
    parser.add_argument("--steps", type=int, default=300, help="of a training")
    parser.add_argument("--clicks", type=int, default=3, help="corrective, on up to two frames of a clip of training")
    parser.add_argument("--augment", action="store_true", help="train on flipped, turned, recoloured clips")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="each with videos of its own")
    return parse(parser, videos=2, held_out=1, rounds=1, steps=2, seeds=[1, 2])


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
KINDS = ("held out", "new")
HELD_OUT, NEW = 4 * 10**13, 5 * 10**13  # first seeds of videos; those of the model are below 2**40


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
    table["unaided"] = table["drawn"].eq(0) & table["status"].eq("accepted")
    return rows, table


def verdict(rounds: list[pd.DataFrame]) -> list[str]:
    """What the rounds' tables of the same objects say in words; by seed, name and object."""
    lines = []
    for column, name in (
        ("clicks", "clicks"),
        ("drawn", "masks drawn by hand"),
        ("unaided", "objects done by clicks"),
    ):
        for number, table in enumerate(rounds[1:], start=1):
            change = table[column].astype(float) - rounds[0][column]
            low, high = stats.ttest_1samp(change, 0).confidence_interval()
            way = "fell" if high < 0 else "rose" if low > 0 else "did not change beyond chance"
            seeds = change.groupby(level=0).mean()
            least, most = stats.ttest_1samp(seeds, 0).confidence_interval()
            lines.append(
                f"Round {number} against round 0, same {len(change)} objects: {name} {way}, {change.mean():+.2f} an "
                f"object (95 % interval over objects {low:+.2f} to {high:+.2f}, over {len(seeds)} seeds {least:+.2f} "
                f"to {most:+.2f})."
            )
    return lines


def run_seed(seed: int, args: argparse.Namespace) -> list[Path]:
    """Annotates and trains where that was not done; tables of each round's own videos and of those held out."""
    tables = [args.out / f"{KINDS[n % 2].replace(' ', '_')}_{seed}_{n // 2}.csv" for n in range(2 * args.rounds + 1)]
    if all(table.exists() for table in tables):
        return tables
    pipe = load_demo_segmenter()
    held_out = draw_videos(HELD_OUT + 10**6 * seed, args.held_out)
    learnt: list[dict[str, Any]] = []
    for number in range(args.rounds):
        videos = draw_videos(NEW + 10**6 * seed + 1000 * number, args.videos)
        annotate_videos(pipe, held_out)[1].to_csv(tables[2 * number])
        rows, table = annotate_videos(pipe, videos)
        table.to_csv(tables[2 * number + 1])
        frames = {name_video(video)[0]: video.frames for video in videos}
        learnt += [{**row, "video": frames[row["name"]]} for row in rows if row["status"] == "accepted"]
        recipe = {"clicks": args.clicks, "augment": args.augment}
        pipe, _ = tune(
            learnt, "video", RATES["video"], args.steps, seed + number, args.out / f"trainer_{seed}", **recipe
        )
    annotate_videos(pipe, held_out)[1].to_csv(tables[-1])
    return tables


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    weights = hashlib.sha256((DEMO_SEGMENTER / "model.safetensors").read_bytes()).hexdigest()
    print(f"Weights {weights[:12]}; {args.videos} videos a round, {args.held_out} held out; {args.steps} steps,")
    print(f"{args.clicks} corrective clicks, {'with' if args.augment else 'without'} augmentation.\n", flush=True)
    began = time.process_time()
    tables = {
        seed: [pd.read_csv(table, index_col=["name", "object"]) for table in run_seed(seed, args)]
        for seed in args.seeds
    }
    print("| round | videos | objects | clicks an object | by clicks alone | masks drawn an object |")
    print("|---|---|---|---|---|---|")
    rounds = [pd.concat({seed: of[place] for seed, of in tables.items()}) for place in range(2 * args.rounds + 1)]
    for place, scores in enumerate(rounds):
        print(
            f"| {place // 2} | {KINDS[place % 2]} | {len(scores)} | {scores['clicks'].mean():.2f} | "
            f"{scores['unaided'].mean():.0%} | {scores['drawn'].mean():.2f} |"
        )
    print()
    print("\n".join(verdict(rounds[::2])))
    print(f"{time.process_time() - began:.0f} CPU seconds.")


if __name__ == "__main__":
    main(ARGUMENTS)
