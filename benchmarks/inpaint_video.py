"""
What `inpaint_video` paints without weights, against the true background of procedural clips.

    python benchmarks/inpaint_video.py

Every object is removed, by its true masks. Reported are L1 (of 255) and PSNR over the pixels of the objects: of the
video as it is, of each frame filled on its own from the border of its hole, and of `inpaint_video`; and of the noise
on the pixels beside them. Times are of the CPU, on one thread; bytes are the peak of what Python and numpy hold beside
the video, by tracemalloc in a run of its own.
"""

import argparse
import json
import os
import time
import tracemalloc

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--clips", type=int, default=5, help="of each kind and length")
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 24, 48])
    parser.add_argument("--size", type=int, default=128)
    return parse(parser, clips=1, frames=[6], size=64)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
from tqdm import tqdm

from common.report import print_frame
from hf_iclr.vision.evaluation.procedural_clips import Clip, procedural_clip
from hf_iclr.vision.formats.segment_files import given_segments
from hf_iclr.vision.inpainting.background_plate import fill_smoothly, soften
from hf_iclr.vision.inpainting.inpainting import inpaint_video
from hf_iclr.vision.session.segments import VideoSegments


def true_segments(clip: Clip) -> VideoSegments:
    size = clip.frames.shape[1:3]
    masks = ({obj: mask[number] for obj, mask in clip.masks.items()} for number in range(len(clip.frames)))
    return VideoSegments(given_segments(number, size, given) for number, given in enumerate(masks))


def errors(image: np.ndarray, truth: np.ndarray, where: np.ndarray) -> dict[str, float]:
    difference = (image.astype(float) - truth)[where]
    return {"l1": np.abs(difference).mean(), "psnr": 10 * np.log10(255**2 / (difference**2).mean())}


def measure(clip: Clip) -> list[dict]:
    segments = true_segments(clip)
    truth = np.repeat(clip.background[None], len(clip.frames), axis=0)
    hole = np.any(list(clip.masks.values()), axis=0)

    start = time.process_time()
    alone = np.stack(
        [fill_smoothly(frame, soften(mask, 4, 0) > 0) for frame, mask in zip(clip.frames, hole, strict=True)]
    )
    middle = time.process_time()
    painted = inpaint_video(clip.frames, segments)
    images = np.stack(list(painted))
    end = time.process_time()
    seconds = {"each frame alone": middle - start, "inpaint_video": end - middle}
    rows = [
        {"painted": "nothing", **errors(clip.frames, truth, hole)},
        {"painted": "each frame alone", **errors(alone, truth, hole)},
        {"painted": "inpaint_video", **errors(images, truth, hole), "seen": painted.sources["seen"]},
        {"painted": "(noise beside the objects)", **errors(clip.frames, truth, ~hole)},
    ]
    for row in rows:
        row["ms a frame"] = 1000 * seconds.get(row["painted"], np.nan) / len(clip.frames)
    return rows


def peak_bytes(clip: Clip) -> int:
    """What is held beside the video and the masks while frames are painted and let go one by one."""
    segments = true_segments(clip)
    tracemalloc.start()
    for _ in inpaint_video(clip.frames, segments):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main(args: argparse.Namespace) -> None:
    rows = []
    for hard in (False, True):
        for frames in args.frames:
            for seed in tqdm(range(args.clips), desc=f"{'hard' if hard else 'plain'}, {frames} frames"):
                clip = procedural_clip(10_000 + seed, hard=hard, frames=frames, size=args.size)
                about = {"clips": "hard" if hard else "plain", "frames": frames, "seed": seed}
                rows += [{**about, **row} for row in measure(clip)]
    table = pd.DataFrame(rows)
    means = table.drop(columns="seed").groupby(["clips", "frames", "painted"], sort=False).mean()
    print_frame(means.reset_index(), digits=2)

    lengths = (max(args.frames), 4 * max(args.frames))
    memory = {frames: peak_bytes(procedural_clip(10_000, frames=frames, size=args.size)) for frames in lengths}
    for frames, peak in memory.items():
        print(f"{frames} frames of {args.size} pixels: {peak / 2**20:.2f} MB beside the video")
    write_json(args.out / "inpaint_video.json", {"rows": json.loads(table.to_json(orient="records")), "bytes": memory})


if __name__ == "__main__":
    main(ARGUMENTS)
