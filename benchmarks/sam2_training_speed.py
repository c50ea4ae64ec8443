"""
What a training step of SAM 2 costs: the share of its parts, and peak memory with and without checkpointing.

    python benchmarks/sam2_training_speed.py                            # the tiny model of the package, 128 pixels
    python benchmarks/sam2_training_speed.py --hiera-tiny 256           # 39 million random weights, minutes

One clip of 8 frames and 3 objects, shown by a click, with 7 corrective clicks on frame 0 and on the middle one; CPU
seconds of one thread. Memory is what the process holds at its highest (VmHWM) above what it held before the step, each
way in a fresh process.
"""

import argparse
import multiprocessing
import os
import re
import time
from collections import defaultdict
from pathlib import Path

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--hiera-tiny", type=int, metavar="SIDE", help="its shape, images of so many pixels")
    parser.add_argument("--frames", type=int, default=8)
    return parse(parser, frames=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import Sam2VideoConfig, Sam2VideoModel, Sam2VisionConfig

from hf_iclr.tour.demo.segmenter import load_demo_segmenter
from hf_iclr.vision.training import clip_forward as sam2_clip_forward
from hf_iclr.vision.training.clip_forward import predict_clips
from hf_iclr.vision.training.loss import sam2_loss
from hf_iclr.vision.training.prompts import PromptPlan


def make_step(side: int | None, frames: int) -> tuple[Sam2VideoModel, list[dict]]:
    """A model, of hiera-tiny's shape with images of `side` pixels if that is given, and a clip of noise."""
    torch.manual_seed(0)
    if side is None:
        model = load_demo_segmenter().model
        side = model.config.image_size
    else:
        sizes = [[side // stride] * 2 for stride in (4, 8, 16)]
        config = Sam2VideoConfig(
            vision_config=Sam2VisionConfig(backbone_feature_sizes=sizes),
            image_size=side,
            memory_attention_rope_feat_sizes=sizes[-1],
        )
        config.vision_config.backbone_config.image_size = [side, side]
        config.prompt_encoder_config.image_size = side
        model = Sam2VideoModel(config)
    masks = torch.zeros(3, frames, side, side, dtype=torch.bool)
    for obj in range(3):
        masks[obj, :, obj * side // 4 : obj * side // 4 + side // 3, side // 4 : side // 2] = True
    plan = PromptPlan("click", corrected=(0, frames // 2), clicks=7)
    noise = torch.rand(3, frames, 1 + plan.clicks, 4)
    clip = {"pixel_values": torch.randn(frames, 3, side, side), "masks": masks, "noise": noise, "plan": plan}
    return model.train(), [clip]


def run_step(model: Sam2VideoModel, clips: list[dict], checkpointing: bool, seconds: dict[str, float]) -> None:
    """One step, its parts timed."""

    def timed(name: str, function):
        def run(*args, **kwargs):
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.process_time() - began

        return run

    for name in ("memory_attention", "mask_decoder", "memory_encoder"):
        part = getattr(model, name)
        part.forward = timed(name.replace("_", " "), type(part).forward.__get__(part))
    began = time.process_time()
    sam2_clip_forward._features = timed("vision encoder", ENCODE)
    losses = [timed("loss", sam2_loss)(prediction) for prediction in predict_clips(model, clips, checkpointing)]
    loss = sum(20 * part.focal + part.dice + part.iou + part.object for part in losses)
    whole = time.process_time() - began
    if not checkpointing:
        seconds["other forward"] += whole - sum(seconds.values())
        loss.backward()
        seconds["backward"] += time.process_time() - began - whole
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6)
        timed("optimizer", optimizer.step)()
    else:
        loss.backward()
        seconds.clear()
        seconds["whole step"] = time.process_time() - began


ENCODE = sam2_clip_forward._features


def _memory(field: str) -> float:
    """Of this process, in megabytes."""
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1000


def measure(side: int | None, frames: int, checkpointing: bool) -> tuple[dict[str, float], float]:
    """Seconds by part, and megabytes above the start."""
    torch.set_num_threads(1)
    model, clips = make_step(side, frames)
    before = _memory("VmRSS")
    seconds: dict[str, float] = defaultdict(float)
    run_step(model, clips, checkpointing, seconds)
    return dict(seconds), _memory("VmHWM") - before


def main(args: argparse.Namespace) -> None:
    results = {}
    for checkpointing in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results[checkpointing] = pool.apply(measure, (args.hiera_tiny, args.frames, checkpointing))
    (plain, without), (checkpointed, with_it) = results[False], results[True]
    total = sum(plain.values())
    print("| part of a step | CPU seconds | share |\n|---|---|---|")
    for name, value in plain.items():
        print(f"| {name} | {value:.2f} | {value / total:.0%} |")
    print(f"| whole step | {total:.2f} | |")
    print(f"Peak memory, {args.frames} frames and 3 objects: {without:.0f} MB; with checkpointing {with_it:.0f} MB,")
    print(f"{with_it / without:.2f} x, and {checkpointed['whole step']:.2f} s without the optimizer.")
    report = {"seconds": plain, "seconds, checkpointed": checkpointed, "MB": without, "MB, checkpointed": with_it}
    write_json(args.out / "sam2_training_speed.json", report)


if __name__ == "__main__":
    main(ARGUMENTS)
