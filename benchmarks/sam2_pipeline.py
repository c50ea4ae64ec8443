"""
The pipeline on real video: sequences of DAVIS, followed by the package's own small model or by any other.

    python benchmarks/sam2_pipeline.py --data DAVIS --out sam2_pipeline
    python benchmarks/sam2_pipeline.py --data DAVIS --model facebook/sam2.1-hiera-tiny

Printed is J&F by prompt on the first frame, and J of the true first mask held still; `--out` gets an overlay of each
sequence. The small model knows drawn blobs of 128 pixels, so it is expected to be weak here. What else the pipeline
claims is measured by sam2_pipeline_speed.py (equality, time, memory), tiny_sam2.py (drawn clips), sam2_interactive.py
(corrections), sam2_memory_policies.py and sam2_image_claim.py.
"""

import argparse
import os
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from transformers import pipeline

import hf_iclr
from hf_iclr.vision.annotated_videos import read_videos
from hf_iclr.vision.demo_segmenter import DEMO_SEGMENTER
from hf_iclr.vision.j_and_f import region_similarity
from hf_iclr.vision.overlay import write_overlay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of DAVIS")
    parser.add_argument("--model", default=str(DEMO_SEGMENTER), help="a SAM 2 video model: folder or repository")
    parser.add_argument("--prompts", nargs="+", default=["mask", "box", "1", "3"])
    parser.add_argument("--out", type=Path, default=Path("sam2_pipeline"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = pipeline("promptable-video-segmentation", model=args.model, dtype=torch.float32)
    kinds = [int(kind) if kind.isdigit() else kind for kind in args.prompts]
    result = hf_iclr.evaluate_vos(pipe, read_videos(args.data, "val"), kinds)
    result.save(args.out)
    columns = ["clip", "object", "prompt", "j", "f", "j_and_f", "frames", "seconds"]
    print(result.table[columns].to_string(index=False, float_format="{:.3f}".format))
    for clip in read_videos(args.data, "val"):
        frames, truth = clip.load()
        masks = truth[1]
        still = region_similarity(np.repeat(masks[:1], len(masks), axis=0), masks)[1:-1].mean()
        print(f"{clip.name}: the first mask held still has J {still:.3f}")
        shown = pipe(frames, prompts={0: {obj: {"mask": mask[0]} for obj, mask in truth.items()}})
        write_overlay(frames, shown, args.out / f"{clip.name}.mp4")


if __name__ == "__main__":
    main()
