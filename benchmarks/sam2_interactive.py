"""
What it takes to correct a video: clicked frames, clicks and seconds to a J&F, with corrections that hold against those
of transformers' own session.

    python benchmarks/sam2_interactive.py --clips 12

The simulated annotator of `evaluate_interactive` works on drawn clips or the sequences of a folder of DAVIS, offline
and online, once with `VideoSession` and once with the session of transformers as it is: a click on a tracked frame
goes to the model without the mask as it was, the answer does not become a conditioning frame, and the next pass over
the video (offline) tracks that frame anew. Written are the tables and a figure for each mode.
"""

import argparse
import os
from collections.abc import Iterator

from common.arguments import add_clips, make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    add_clips(parser, clips=12, frames=24, first_seed=3 * 10**13)
    parser.add_argument("--max-frames", type=int, default=8, help="frames to click on at most")
    parser.add_argument("--goal", type=float, default=0.8, help="the J&F to reach")
    return parse(parser, clips=1, frames=6, max_frames=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch

import hf_iclr
from common.native_session import NativePipe
from common.segmenter import load_segmenter
from hf_iclr.vision.evaluation.interactive import MODES
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotated_videos import read_videos


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pipe = load_segmenter(args.model)
    efforts = []
    for mode in MODES:
        results = {}
        for name, side in {"held": pipe, "native": NativePipe(pipe)}.items():
            clips = read_videos(args.data, "val") if args.data else drawn(args)
            results[name] = hf_iclr.evaluate_interactive(side, clips, mode, max_frames=args.max_frames)
            results[name].save(args.out / f"{mode}_{name}")
            efforts.append({"mode": mode, "corrections": name, **results[name].effort(args.goal)})
        results["held"].plot(args.out / f"{mode}.png", {f"{mode}, native": results["native"]})
        means = pd.concat({name: result.mean()["j_and_f"] for name, result in results.items()}, axis=1)
        print(f"{mode}: J&F by clicked frames\n{means.T.to_string(float_format='{:.3f}'.format)}")
    print(f"to a J&F of {args.goal}\n{pd.DataFrame(efforts).to_string(index=False, float_format='{:.3f}'.format)}")
    write_json(args.out / "efforts.json", {"arguments": vars(args), "efforts": efforts})


def drawn(args: argparse.Namespace) -> Iterator:
    return (procedural_clip(args.seed + n, hard=True, frames=args.frames) for n in range(args.clips))


if __name__ == "__main__":
    main(ARGUMENTS)
