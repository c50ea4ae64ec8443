"""Follow an object from one click, or what a detector finds, and write masks, an overlay and an annotation file.

    python examples/segment_video.py --model facebook/sam2.1-hiera-tiny --video clip.mp4 --click 210 350
    python examples/segment_video.py --model MODEL --video clip.mp4 --detector facebook/detr-resnet-50

Without arguments: the package's own small model on a clip that is drawn on the spot.
"""

import argparse
from pathlib import Path

from transformers import pipeline

import hf_iclr  # registers the pipeline's task  # noqa: F401
from hf_iclr.tour.demo.segmenter import DEMO_SEGMENTER
from hf_iclr.vision.evaluation import middle_click, procedural_clip
from hf_iclr.vision.formats import write_overlay, write_sav


parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(DEMO_SEGMENTER))
parser.add_argument("--video")
parser.add_argument("--click", type=float, nargs=2, metavar=("X", "Y"))
parser.add_argument("--detector", help="a detector of objects, in the place of a click")
parser.add_argument("--correct", type=float, nargs=3, metavar=("FRAME", "X", "Y"), help="a click beside the object")
parser.add_argument("--out", type=Path, default=Path("segments"))
args = parser.parse_args()

video, click = args.video, args.click
if video is None:
    clip = procedural_clip(seed=7, frames=24)
    video, click = clip.frames, middle_click(clip.masks[1][0])
elif click is None and args.detector is None:
    parser.error("--video needs a click on the object, --click X Y, or a --detector")

pipe = pipeline("promptable-video-segmentation", model=args.model)
args.out.mkdir(parents=True, exist_ok=True)
if args.detector:
    detector = pipeline("object-detection", model=args.detector)
    segments = pipe(video, detector=detector, automatic={"every": 10}, output="rle")
else:
    session = pipe.session(video, output="rle")
    session.add(frame=0, obj=1, points=[click])
    segments = session.propagate()
    if args.correct:
        frame, x, y = args.correct
        session.correct(frame=int(frame), obj=1, points=[[x, y]], labels=[0])
        segments = session.propagate("both")
    session.save(args.out / "session.safetensors")
write_overlay(video, segments, args.out / "overlay.mp4")
write_sav(segments, args.out / "masklets.json")
print(segments, {obj: track["visible"] for obj, track in segments.tracks().items()})
