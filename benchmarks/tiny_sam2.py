"""
How well a tiny SAM 2 (examples/train_tiny_sam2.py) tracks procedural clips that it has not seen.

    python benchmarks/tiny_sam2.py                                 # the package's own, 60 clips of each kind
    python benchmarks/tiny_sam2.py --model tiny_sam2 --clips 20

J of the first object, whose frame-0 mask has over 100 pixels, on frame 0, as a mean over the later frames, and on the
last frame, after one prompt on frame 0. "Held still" keeps the true mask of frame 0. Then what corrections bring:
J&F of every object by `evaluate_interactive`, offline, after the first pass and after one and two corrected frames,
and the same of those objects that had less than .8 at first. Last, why: of these, the IoU on the worst frame after
frame 0 before one click there, after it as a correction, and as a prompt that leaves out what is remembered.
"""

import argparse
import os
import time

from common.arguments import add_clips, make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    add_clips(parser, clips=60, frames=8)
    parser.add_argument("--shifted", action="store_true", help="the other look")
    parser.add_argument("--first-seed", type=int, default=10**13, help="of the clips; training draws below 2**40")
    return parse(parser, clips=2, frames=4)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from common.report import print_frame
from common.segmenter import load_segmenter
from hf_iclr.vision.evaluation.interactive import evaluate_interactive
from hf_iclr.vision.evaluation.j_and_f import j_and_f, region_similarity
from hf_iclr.vision.evaluation.procedural_clips import Clip, procedural_clip
from hf_iclr.vision.evaluation.simulated_prompts import first_prompt, next_click


PROMPTS = {"mask": "mask", "box": "box", "click": 1}


def draw_clips(count: int, hard: bool, frames: int, shifted: bool, seed: int) -> list[Clip]:
    """Clips whose first object is there to be shown."""
    clips: list[Clip] = []
    while len(clips) < count:
        clip = procedural_clip(seed, hard=hard, frames=frames, shifted=shifted)
        if clip.masks[1][0].sum() > 100:
            clips.append(clip)
        seed += 1
    return clips


def measure(pipe, clips: list[Clip]) -> list[dict]:
    """Mean J by prompt."""
    rows = []
    truths = [clip.masks[1] for clip in clips]
    held = np.stack([region_similarity(np.repeat(truth[:1], len(truth), axis=0), truth) for truth in truths])
    rows.append({"prompt": "held still", "first": held[:, 0], "later": held[:, 1:], "last": held[:, -1]})
    for name, kind in PROMPTS.items():
        scores = []
        for clip, truth in zip(tqdm(clips, desc=name, leave=False), truths, strict=True):
            result = pipe(clip.frames, prompts={0: {1: first_prompt(truth[0], kind)}})
            scores.append(region_similarity(np.stack([frame.masks[1] for frame in result]), truth))
        j = np.stack(scores)
        rows.append({"prompt": name, "first": j[:, 0], "later": j[:, 1:], "last": j[:, -1]})
    return [{key: value if key == "prompt" else float(np.mean(value)) for key, value in row.items()} for row in rows]


def measure_corrections(pipe, clips: list[Clip], clicks: int) -> dict:
    """Mean J&F by the number of corrected frames, of all objects and of those below .8 after the first pass."""
    table = evaluate_interactive(pipe, clips, clicks_per_frame=clicks, max_frames=3).table
    scores = table.pivot_table(index="frames", columns=["clip", "object"], values="j_and_f").ffill()
    low = scores.loc[:, scores.loc[1] < 0.8]
    sides = {"all": scores, "below .8": low}
    return {name: {"objects": side.shape[1], "j_and_f": side.mean(axis=1).tolist()} for name, side in sides.items()}


def measure_clicks(pipe, clips: list[Clip]) -> pd.DataFrame:
    """Means by what is wrong on the frame and where the click is."""
    rows = []
    for clip in tqdm(clips, leave=False):
        for obj, truth in clip.masks.items():
            if not truth[0].any():
                continue
            session = pipe.session(clip.frames)
            session.add(0, obj, **first_prompt(truth[0], 1))
            masks = np.stack([segments.binary(obj) for segments in session.iterate()])
            ious = region_similarity(masks, truth)
            worst = 1 + int(ious[1:].argmin())
            click = next_click(masks[worst], truth[worst])
            if click is None or j_and_f([masks], [truth])["j_and_f"] >= 0.8:
                continue
            row = {"mask": "lost" if ious[worst] < 0.1 else "partly right", "click": ("beside it", "on it")[click[1]]}
            row["before"] = ious[worst]
            for name, answer in {"corrected": session.correct, "shown anew": session.add}.items():
                shown = answer(worst, obj, points=[click[0]], labels=[click[1]])
                row[name] = region_similarity(shown.binary(obj)[None], truth[worst][None])[0]
                session.undo()
            rows.append(row)
    groups = pd.DataFrame(rows).groupby(["mask", "click"])
    return groups.mean().assign(objects=groups.size()).reset_index()


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pipe = load_segmenter(args.model)
    began = time.process_time()
    report = {}
    print(f"| clips | prompt | J on frame 0 | on frames 1..{args.frames - 1} | on the last |\n|---|---|---|---|---|")
    for name, hard in (("plain", False), ("hard", True)):
        report[name] = measure(pipe, draw_clips(args.clips, hard, args.frames, args.shifted, args.first_seed))
        for row in report[name]:
            print(f"| {name} | {row['prompt']} | {row['first']:.3f} | {row['later']:.3f} | {row['last']:.3f} |")
    print("\n| clips | clicks a frame | objects | first pass | 1 corrected | 2 corrected | gain |")
    print("|---|---|---|---|---|---|---|")
    for name, hard in (("plain", False), ("hard", True)):
        clips = draw_clips(args.clips, hard, args.frames, args.shifted, args.first_seed)
        for clicks in (1, 3):
            report[f"{name}, {clicks} clicks"] = sides = measure_corrections(pipe, clips, clicks)
            for side, row in sides.items():
                first, *_, last = row["j_and_f"]
                means = " | ".join(f"{value:.3f}" for value in row["j_and_f"])
                print(f"| {name} | {clicks} | {row['objects']} {side} | {means} | {last - first:+.3f} |", flush=True)
    clicks = measure_clicks(pipe, draw_clips(args.clips, True, args.frames, args.shifted, args.first_seed))
    report["clicks"] = clicks.to_dict("records")
    print_frame(clicks)
    print(f"{args.clips} clips of each kind, {time.process_time() - began:.0f} CPU seconds.")
    write_json(args.out / "tiny_sam2.json", report)


if __name__ == "__main__":
    main(ARGUMENTS)
