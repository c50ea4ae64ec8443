"""
The pipeline on real video: sequences of DAVIS, followed by the package's own small model or by any other.

    python benchmarks/sam2_pipeline.py --data DAVIS
    python benchmarks/sam2_pipeline.py --data DAVIS --model facebook/sam2.1-hiera-tiny

DAVIS is a folder with JPEGImages and Annotations (https://davischallenge.org); without it two drawn clips stand in.
Printed is J&F by prompt on the first frame, and J of the true first mask held still; `--out` gets an overlay of each
sequence. The small model knows drawn blobs of 128 pixels, so it is expected to be weak here. What else the pipeline
claims is measured by sam2_pipeline_speed.py (equality, time, memory), tiny_sam2.py (drawn clips), sam2_interactive.py
(corrections) and sam2_image_claim.py.
"""

import argparse
import os
from pathlib import Path

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, help="folder of DAVIS (default: drawn clips)")
    parser.add_argument("--model", help="folder or repository of a SAM 2 video model (default: the package's own)")
    parser.add_argument("--prompts", nargs="+", default=["mask", "box", "1", "3"])
    parser.add_argument("--frames", type=int, default=16, help="of a drawn clip")
    return parse(parser, frames=5)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import hf_iclr
from common.segmenter import load_segmenter
from hf_iclr.vision.evaluation.j_and_f import region_similarity
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotated_video import AnnotatedVideo
from hf_iclr.vision.formats.annotated_videos import read_videos
from hf_iclr.vision.formats.overlay import write_overlay


def draw_videos(frames: int) -> list[AnnotatedVideo]:
    """A plain and a hard clip that the package's model was not trained on."""
    clips = {name: procedural_clip(2 * 10**13, hard=name == "hard", frames=frames) for name in ("plain", "hard")}
    return [AnnotatedVideo.from_masks(clip.frames, clip.masks, name=name) for name, clip in clips.items()]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pipe = load_segmenter(args.model)
    videos = read_videos(args.data, "val") if args.data else draw_videos(args.frames)
    kinds = [int(kind) if kind.isdigit() else kind for kind in args.prompts]
    result = hf_iclr.evaluate_vos(pipe, videos, kinds)
    result.save(args.out)
    columns = ["clip", "object", "prompt", "j", "f", "j_and_f", "frames", "seconds"]
    print(result.table[columns].to_string(index=False, float_format="{:.3f}".format))
    for clip in videos:
        frames, truth = clip.load()
        masks = truth[1]
        still = region_similarity(np.repeat(masks[:1], len(masks), axis=0), masks)[1:-1].mean()
        print(f"{clip.name}: the first mask held still has J {still:.3f}")
        shown = pipe(frames, prompts={0: {obj: {"mask": mask[0]} for obj, mask in truth.items()}})
        write_overlay(frames, shown, args.out / f"{clip.name}.mp4")


if __name__ == "__main__":
    main(ARGUMENTS)
