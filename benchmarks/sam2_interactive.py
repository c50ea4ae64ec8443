"""
What it takes to correct a video: clicked frames, clicks and seconds to a J&F, with corrections that hold against those
of transformers' own session.

    python benchmarks/sam2_interactive.py --clips 12 --out interactive

The simulated annotator of `evaluate_interactive` works on drawn clips or the sequences of a folder of DAVIS, offline
and online, once with `VideoSession` and once with the session of transformers as it is: a click on a tracked frame
goes to the model without the mask as it was, the answer does not become a conditioning frame, and the next pass over
the video (offline) tracks that frame anew. Written are the tables and a figure for each mode.
"""

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path


os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
from transformers import pipeline

import hf_iclr
from hf_iclr.vision.annotated_videos import read_videos
from hf_iclr.vision.demo_segmenter import load_demo_segmenter
from hf_iclr.vision.interactive_evaluation import MODES
from hf_iclr.vision.procedural_clips import procedural_clip
from hf_iclr.vision.video_segments import FrameSegments


class NativePipe:
    """Opens sessions of transformers in place of ours, for `evaluate_interactive` and `evaluate_vos`."""

    def __init__(self, pipe):
        self.pipe = pipe

    def session(self, video, **options) -> "NativeSession":
        return NativeSession(self.pipe.model, self.pipe.processor, video)


class NativeSession:
    """The calls a user of transformers makes, in the form of a [`VideoSession`] with a single object."""

    def __init__(self, model, processor, video):
        self.model, self.processor = model, processor
        self.inner = processor.init_video_session(video=list(video), dtype=model.dtype)

    def add(self, frame: int, obj: int, points=None, labels=None, box=None, mask=None) -> FrameSegments:
        return self._prompt(
            frame,
            obj,
            input_points=None if points is None else [[points]],
            input_labels=None if points is None else [[labels]],
            input_boxes=None if box is None else [[box]],
            input_masks=None if mask is None else [mask],
        )

    def correct(self, frame: int, obj: int, points, labels) -> FrameSegments:
        clicks = {"input_points": [[points]], "input_labels": [[labels]]}
        return self._prompt(frame, obj, **clicks, clear_old_inputs=False)

    def iterate(self) -> Iterator[FrameSegments]:
        for output in self.model.propagate_in_video_iterator(self.inner):
            yield self.segments(output.frame_idx)

    def segments(self, frame: int) -> FrameSegments:
        outputs = self.inner.output_dict_per_obj[0]
        output = outputs["cond_frame_outputs"].get(frame) or outputs["non_cond_frame_outputs"][frame]
        size = self.inner.video_height, self.inner.video_width
        mask = self.processor.post_process_masks([output["pred_masks"]], [list(size)])[0][0, 0].cpu().numpy()
        obj = self.inner.obj_ids[0]
        return FrameSegments(frame, size, {obj: mask}, {}, {obj: float(output["object_score_logits"])})

    def _prompt(self, frame: int, obj: int, **inputs) -> FrameSegments:
        self.processor.add_inputs_to_inference_session(self.inner, frame, [obj], **inputs)
        self.model(self.inner, frame_idx=frame)
        return self.segments(frame)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or repository of a SAM 2 video model; left out, the package's own")
    parser.add_argument("--data", type=Path, help="folder of DAVIS instead of drawn clips")
    parser.add_argument("--clips", type=int, default=12, help="drawn clips, all of the hard kind")
    parser.add_argument("--frames", type=int, default=24, help="frames of a drawn clip")
    parser.add_argument("--max-frames", type=int, default=8, help="frames to click on at most")
    parser.add_argument("--goal", type=float, default=0.8, help="the J&F to reach")
    parser.add_argument("--seed", type=int, default=3 * 10**13, help="of the first clip; training draws below 2**40")
    parser.add_argument("--out", type=Path, default=Path("interactive"), help="folder for tables and figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = "promptable-video-segmentation"
    pipe = pipeline(task, model=args.model, dtype=torch.float32) if args.model else load_demo_segmenter()
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
    report = {"arguments": vars(args), "efforts": efforts}
    (args.out / "efforts.json").write_text(json.dumps(report, indent=2, default=str) + "\n")


def drawn(args: argparse.Namespace) -> Iterator:
    return (procedural_clip(args.seed + n, hard=True, frames=args.frames) for n in range(args.clips))


if __name__ == "__main__":
    main()
