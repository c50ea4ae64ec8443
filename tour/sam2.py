"""The segmentation section of `hf-iclr tour`: objects are followed, corrected, and taken out of a clip."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_iclr.vision.evaluation.interactive import evaluate_interactive
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.evaluation.vos import evaluate_vos
from hf_iclr.vision.formats.overlay import draw_overlay
from hf_iclr.vision.inpainting.inpainting import inpaint_video

from .demo.segmenter import load_demo_segmenter


FIRST_SEED = 50_000  # the model was trained on none of these clips


def section(out_dir: Path, quick: bool, progress):
    """
    Segments drawn clips with the package's own small SAM 2.

    Args:
        out_dir (`pathlib.Path`):
            Where the figures go.
        quick (`bool`):
            Fewer and shorter clips.
        progress (`Callable`):
            A tqdm.

    Returns:
        [`~hf_iclr.tour.TourSection`]
    """
    from .pages import TourSection

    pipe = load_demo_segmenter()
    count, length = (2, 8) if quick else (4, 16)
    clips = [procedural_clip(FIRST_SEED + number, hard=True, frames=length) for number in range(count)]
    vos = evaluate_vos(pipe, clips, prompts=("mask", "box", 1, 3))
    clicked = evaluate_interactive(pipe, clips, "offline", max_frames=3 if quick else 4)
    vos.plot(out_dir / "sam2_vos.png")
    clicked.plot(out_dir / "sam2_interactive.png")

    clip = clips[0]
    segments: Any = pipe(clip.frames, prompts={0: {obj: {"mask": masks[0]} for obj, masks in clip.masks.items()}})
    filled = np.stack(list(inpaint_video(clip.frames, segments)))
    hidden = np.any(list(clip.masks.values()), axis=0)
    error = np.abs(filled.astype(float) - clip.background)[hidden].mean()
    overlay = np.stack([draw_overlay(clip.frames[frame.frame], frame) for frame in segments])
    strip = np.concatenate([clip.frames, overlay, filled], axis=2).repeat(2, axis=1).repeat(2, axis=2)
    images = [Image.fromarray(frame) for frame in strip]
    images[0].save(out_dir / "sam2_clip.gif", save_all=True, append_images=images[1:], duration=160, loop=0)

    effort, objects = clicked.effort(0.8), sum(len(c.masks) for c in clips)
    return TourSection(
        title="SAM 2: promptable segmentation of videos",
        headline=f"{effort['reached']:.0%} of {objects} drawn objects reach a J&F of .8, with "
        f"{effort['clicks']:.1f} clicks each.",
        command="hf-iclr segment VIDEO --point 0:1:210,350 --out DIR",
        summary=[
            f"{objects} objects in {count} drawn clips, which cross, hide and leave, are followed by a model of 1.6 "
            + "million parameters that this project trained in half an hour.",
            f"A simulated annotator brought {effort['reached']:.0%} of them to a J&F of 0.8, by "
            + f"{effort['clicks']:.1f} clicks on {effort['frames']:.1f} frames.",
            "The clip shows the video, the masks, and the video without the objects: the median of what was seen of "
            + f"the background, {error:.1f} of 255 off the true one.",
        ],
        table=vos.mean().reset_index().rename(columns={"seconds": "CPU seconds an object"}),
        figures=[out_dir / "sam2_clip.gif", out_dir / "sam2_vos.png", out_dir / "sam2_interactive.png"],
        data={"effort": effort.to_dict(), "interactive": clicked.mean().reset_index().to_dict("records")},
    )
