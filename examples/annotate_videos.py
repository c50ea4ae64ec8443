"""
Annotate videos with a model in the loop: propose, judge, correct, push.

    python examples/annotate_videos.py --model facebook/sam2.1-hiera-tiny clips/        # a folder of videos
    python examples/annotate_videos.py --model MODEL clips/ --browser                   # correct doubtful ones by hand
    python examples/annotate_videos.py                                                  # drawn clips, simulated hand
"""

import argparse
import webbrowser

from transformers import pipeline

import hf_iclr  # noqa: F401
from hf_iclr.tour.demo.segmenter import DEMO_SEGMENTER
from hf_iclr.vision.annotation import (
    SimulatedAnnotator,
    annotate,
    annotate_in_browser,
    annotation_statistics,
    review_queue,
)
from hf_iclr.vision.evaluation import procedural_clip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", nargs="?", help="folder of videos, or of folders of images")
    parser.add_argument("--model", default=str(DEMO_SEGMENTER), help="repository or folder of a SAM 2 video model")
    parser.add_argument("--phase", type=int, default=3, help="of the data engine, with drawn clips: 1, 2 or 3")
    parser.add_argument("--browser", action="store_true", help="correct what does not pass the gate")
    parser.add_argument("--out", default="annotations")
    parser.add_argument("--push", help="dataset repository for the accepted masklets")
    args = parser.parse_args()

    pipe = pipeline("promptable-video-segmentation", model=args.model)
    if args.videos is None:
        hand = SimulatedAnnotator(phase=args.phase)
        videos = (procedural_clip(seed) for seed in range(3))
        masklets = annotate(videos, pipe, hand.point, hand.verify, hand.correct, out=args.out)
    else:

        def by_hand(masklet):
            print(f"{masklet.name}, object {masklet.object}: {masklet.reason}")
            return annotate_in_browser(pipe, masklet.session, on_ready=webbrowser.open)

        masklets = annotate(args.videos, pipe, corrector=by_hand if args.browser else None, out=args.out)

    print(masklets.info.description)
    for name, value in annotation_statistics(masklets).items():
        print(f"{name.replace('_', ' ')}: {value:.4g}")
    for row in review_queue(masklets).select_columns(["name", "object", "uncertainty", "reason"]):
        print("waits:", row)
    if args.push:
        masklets.filter(lambda row: row["status"] == "accepted").push_to_hub(args.push)


if __name__ == "__main__":
    main()
