"""
What the memory policies of the video session are worth: J&F of each against the model's own rule, "exact".

    python benchmarks/sam2_memory_policies.py --clips 30 --frames 24
    python benchmarks/sam2_memory_policies.py --model DIR --data DAVIS

Objects are shown on frame 0 by their true mask or one click, and followed by each policy on the same clips: drawn by
program, plain and hard (crossings, objects that leave, distractors of the same colour), or the sequences of a folder
of DAVIS. Reported are means over objects of J&F on the frames between the first and the last, and the mean difference
from "exact" with its 95 % interval (bootstrap over objects). The policies need no training, and none was done for
them.
"""

import argparse
import os
from collections.abc import Iterable

from common.arguments import add_clips, make_parser, parse, write_json


def prompt_kind(text: str) -> str | int:
    return int(text) if text.isdigit() else text


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    add_clips(parser, clips=30, frames=24, first_seed=2 * 10**13)
    parser.add_argument("--prompts", nargs="+", type=prompt_kind, default=["mask", 1])
    return parse(parser, clips=2, frames=6)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from scipy import stats

import hf_iclr
from common.segmenter import load_segmenter
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotated_videos import read_videos
from hf_iclr.vision.session.memory import MEMORY_POLICIES


def make_clips(kind: str, args: argparse.Namespace) -> Iterable:
    if args.data is not None:
        return read_videos(args.data, "val")
    return (procedural_clip(args.seed + n, hard=kind == "hard", frames=args.frames) for n in range(args.clips))


def compare(kind: str, pipe, args: argparse.Namespace) -> list[dict]:
    """A row for each kind of prompt and policy."""
    tables = []
    for policy in MEMORY_POLICIES:
        result = hf_iclr.evaluate_vos(pipe, make_clips(kind, args), args.prompts, memory=policy)
        tables.append(result.table.assign(policy=policy))
    wide = pd.concat(tables).pivot_table(index=["prompt", "clip", "object"], columns="policy", values="j_and_f")
    rows = []
    for prompt in args.prompts:
        values = wide.loc[prompt]
        for policy in MEMORY_POLICIES:
            difference = (values[policy] - values["exact"]).to_numpy()
            low = high = 0.0
            if np.ptp(difference) > 0:
                draw = stats.bootstrap((difference,), np.mean, rng=np.random.default_rng(0), method="percentile")
                low, high = map(float, draw.confidence_interval)
            row = {"clips": kind, "prompt": prompt, "policy": policy, "objects": len(values)}
            row |= {"j_and_f": float(values[policy].mean()), "difference": float(difference.mean())}
            rows.append({**row, "low": low, "high": high})
    return rows


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pipe = load_segmenter(args.model)
    rows = [row for kind in (["davis"] if args.data else ["plain", "hard"]) for row in compare(kind, pipe, args)]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.3f}".format))
    write_json(args.out / "sam2_memory_policies.json", {"arguments": vars(args), "rows": rows})


if __name__ == "__main__":
    main(ARGUMENTS)
