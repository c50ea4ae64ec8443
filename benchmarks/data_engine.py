"""
The three phases of SAM 2's data engine compared with a simulated annotator, and what the engine costs.

    python benchmarks/data_engine.py
    python benchmarks/data_engine.py --hard --clips 10

Each phase annotates the same procedural clips until every frame of every masklet has an IoU of 0.75 with the truth, or
its frames with less were all clicked, or the rounds are spent. Reported, as in the paper's table 1: the modelled
seconds a frame, the share of frames edited, the clicks a clicked frame, and the share of masks that agree (IoU above
0.75) with those of phase 1; beside them the mean IoU with the truth. The seconds are not measured: they are a look at
every frame and a price a click, from the line of least squares through the paper's own table, which is printed.

Then throughput: `annotate` with automatic masklets against a loop of `pipe(video, prompts="auto")`, in random order
within each repeat, in CPU seconds of one thread, with the number of images encoded. "gate" is the same with the
default gate, whose check of what comes back of a mask the loop does not make.

Last, what a click on the page costs beside the model: over HTTP, on a video of 1280 x 720 with tracked objects, from
the request to the answer with the new masks, all of it saved, less the time in the session itself; wall clock and CPU.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from typing import Any

from common.arguments import add_clips, make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    add_clips(parser, clips=20, frames=8)
    parser.add_argument("--hard", action="store_true", help="three objects that cross and leave the frame")
    parser.add_argument(
        "--first-seed", type=int, default=50_000, help="of the clips; none that the model was trained on"
    )
    parser.add_argument("--throughput-clips", type=int, default=6)
    parser.add_argument("--throughput-frames", type=int, default=32, help="of each clip")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clicks", type=int, default=60, help="on the page")
    return parse(parser, clips=1, frames=3, throughput_clips=1, throughput_frames=4, repeats=1, clicks=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import numpy as np
import torch
from aiohttp.test_utils import TestClient, TestServer

from common.report import print_table
from common.segmenter import load_segmenter
from hf_iclr.vision.annotation import project as annotation_project
from hf_iclr.vision.annotation.data_engine import annotate
from hf_iclr.vision.annotation.masklets import QualityGate
from hf_iclr.vision.annotation.page import AnnotationPage
from hf_iclr.vision.annotation.simulated_annotator import SimulatedAnnotator
from hf_iclr.vision.annotation.sources import name_video
from hf_iclr.vision.annotation.store import annotation_statistics
from hf_iclr.vision.evaluation.j_and_f import region_similarity
from hf_iclr.vision.evaluation.procedural_clips import Clip, procedural_clip
from hf_iclr.vision.session.prompts import decode_rle


# Clicks a clicked frame, share of frames edited, seconds a frame: table 1 of https://huggingface.co/papers/2408.00714.
PAPER = {1: (4.8, 1.0, 37.8), 2: (3.6, 0.23, 7.4), 3: (2.7, 0.19, 4.5)}
ANY_QUALITY = QualityGate(min_object_score=0, min_stability=0, min_cycle_iou=None)
AUTOMATIC = {"points_per_side": 8, "pred_iou_thresh": 0.6, "stability_score_thresh": 0.8}


def fit_paper() -> tuple[float, float]:
    """Seconds a click and seconds a look that explain the paper's three phases best."""
    clicks, seconds = zip(*((clicks * share, seconds) for clicks, share, seconds in PAPER.values()), strict=True)
    slope, intercept = np.polyfit(clicks, seconds, 1)
    return float(slope), float(intercept)


def masks_of(row: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Masks of a row on all frames, empty where it has none."""
    masks = np.zeros(shape, dtype=bool)
    for frame, mask in zip(row["frames"], row["masks"], strict=True):
        masks[frame] = decode_rle(mask)
    return masks


def compare_phases(pipe, clips: list[Clip], per_click: float, per_look: float) -> dict[int, dict[str, float]]:
    measured: dict[int, dict[str, float]] = {}
    first: dict[tuple[str, int], np.ndarray] = {}
    truth = {name_video(clip)[0]: clip.masks for clip in clips}
    for phase in (1, 2, 3):
        hand = SimulatedAnnotator(phase=phase)
        started = time.process_time()
        with tempfile.TemporaryDirectory() as out:
            hooks = {"prompts": hand.point, "verifier": hand.verify, "corrector": hand.correct}
            rows = annotate(clips, pipe, out=out, gate=ANY_QUALITY, **hooks)
        masks = {(row["name"], row["object"]): masks_of(row, truth[row["name"]][row["object"]].shape) for row in rows}
        first = first or masks
        agreement = np.concatenate([region_similarity(masks[key], first[key]) for key in masks])
        accuracy = np.concatenate([region_similarity(masks[key], truth[key[0]][key[1]]) for key in masks])
        measured[phase] = {
            **annotation_statistics(rows, per_click, per_look),
            "agreement_with_phase_1": float((agreement > 0.75).mean()),
            "mean_iou": float(accuracy.mean()),
            "cpu_seconds": time.process_time() - started,
        }
    return measured


def measure_throughput(pipe, clips: list[Clip], repeats: int) -> dict[str, dict[str, float]]:
    encoded: list[int] = []
    hook = pipe.model.vision_encoder.register_forward_hook(
        lambda *args: encoded.extend([1] * len(args[2].last_hidden_state))
    )

    def loop() -> None:
        for clip in clips:
            try:
                pipe(clip.frames, prompts="auto", automatic=AUTOMATIC, output="rle")
            except ValueError:  # nothing was found
                continue

    def engine(gate: QualityGate) -> datasets.Dataset:
        with tempfile.TemporaryDirectory() as out:
            return annotate(clips, pipe, out=out, automatic=AUTOMATIC, gate=gate)

    ways = {"loop": loop, "annotate": lambda: engine(ANY_QUALITY), "gate": lambda: engine(QualityGate())}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    calls: dict[str, int] = {}
    for _ in range(repeats):
        for name in random.sample(sorted(ways), len(ways)):
            encoded.clear()
            started = time.process_time()
            ways[name]()
            seconds[name].append(time.process_time() - started)
            calls[name] = len(encoded)
    hook.remove()
    frames = sum(len(clip.frames) for clip in clips)
    return {
        name: {
            "frames_per_second": frames / min(seconds[name]),
            "encoded_per_frame": calls[name] / frames,
            "median_speed_to_loop": statistics.median(
                a / b for a, b in zip(seconds["loop"], seconds[name], strict=True)
            ),
        }
        for name in ways
    }


def judge_gate(pipe, clips: list[Clip]) -> dict[str, float]:
    """How good automatic masklets are that pass the gate, and those that wait: mean IoU with the nearest object."""
    with tempfile.TemporaryDirectory() as out:
        rows = annotate(clips, pipe, out=out, automatic=AUTOMATIC)
    truth = {name_video(clip)[0]: clip.masks for clip in clips}
    values: dict[str, list[float]] = {"accepted": [], "waiting": []}
    for row in rows:
        objects = truth[row["name"]]
        best = max(region_similarity(masks_of(row, true.shape), true).mean() for true in objects.values())
        values[row["status"]].append(float(best))
    measured: dict[str, float] = {f"{status}_masklets": len(ious) for status, ious in values.items()}
    return measured | {f"{status}_mean_iou": statistics.fmean(ious) for status, ious in values.items() if ious}


def measure_clicks(pipe, clicks: int) -> dict[str, float]:
    """Milliseconds of a click beside the session's own work, on 24 frames of 720p with three tracked objects."""
    y, x = np.mgrid[:720, :1280]
    frames = np.stack([np.where(np.hypot(x - 300 - 9 * t, y - 300) < 90, 230, 60) for t in range(24)]).astype(np.uint8)
    session = pipe.session(np.repeat(frames[..., None], 3, axis=3), output="rle", undo_levels=100)
    for obj, (left, top) in enumerate([(300, 300), (800, 200), (640, 600)], start=1):
        session.add(0, obj, box=[left - 90, top - 90, left + 90, top + 90])
    session.propagate()
    apply, spent = annotation_project.apply_edit, []

    def timed(*args: Any) -> None:
        started = time.perf_counter(), time.thread_time()
        try:
            apply(*args)
        finally:
            spent.append((time.perf_counter() - started[0], time.thread_time() - started[1]))

    async def click(folder: str) -> list[tuple[float, float]]:
        project = annotation_project.AnnotationProject(folder, pipe)
        page = AnnotationPage(project, project.adopt(session))
        values = []
        async with TestClient(TestServer(page.app())) as client:
            for number in range(clicks):
                point = [300 + number % 20, 300 + number // 20]
                body = {"frame": number % 24, "obj": 1 + number % 3, "points": [point], "labels": [number % 2]}
                started = time.perf_counter(), time.process_time()
                response = await client.post("/prompt", json=body)
                await response.read()
                took = time.perf_counter() - started[0], time.process_time() - started[1]
                assert response.status == 200, await response.text()
                values.append((1e3 * (took[0] - spent[-1][0]), 1e3 * (took[1] - spent[-1][1])))
        await page.close()
        return values

    annotation_project.apply_edit = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            values = np.array(asyncio.run(click(folder)))
    finally:
        annotation_project.apply_edit = apply
    names = ("wall_median", "wall_95", "cpu_median", "cpu_95")
    found = [np.percentile(values[:, kind], share) for kind in (0, 1) for share in (50, 95)]
    return dict(zip(names, map(float, found), strict=True)) | {"clicks": clicks}


def main(args: argparse.Namespace) -> None:

    torch.set_num_threads(1)
    random.seed(0)
    pipe = load_segmenter(args.model)
    clips = [procedural_clip(args.first_seed + seed, args.hard, args.frames) for seed in range(args.clips)]
    per_click, per_look = fit_paper()
    print(f"Seconds a frame = {per_look:.2f} + {per_click:.2f} a click, from the paper's table:")
    for phase, (clicks, share, seconds) in PAPER.items():
        print(f"  phase {phase}: {per_look + per_click * clicks * share:.1f} for its {seconds}")
    results: dict[str, Any] = {
        "model": args.model or "the package's own",
        "hard": args.hard,
        "clips": args.clips,
        "frames": args.frames,
    }
    results |= {"seconds_per_click": per_click, "seconds_per_look": per_look}

    results["phases"] = phases = compare_phases(pipe, clips, per_click, per_look)
    head = ("phase", "seconds a frame", "edited", "clicks a clicked frame", "agrees with 1", "mean IoU", "accepted")
    print_table(head, [
        [
            phase, f"{row['modelled_seconds_per_frame']:.1f}", f"{row['edited_share']:.1%}",
            f"{row['clicks_per_clicked_frame']:.2f}", f"{row['agreement_with_phase_1']:.1%}", row["mean_iou"],
            f"{row['accepted']} of {row['masklets']}",
        ]
        for phase, row in phases.items()
    ])  # fmt: skip
    few = range(args.first_seed, args.first_seed + args.throughput_clips)
    longer = [procedural_clip(seed, args.hard, args.throughput_frames) for seed in few]
    results["throughput"] = measure_throughput(pipe, longer, args.repeats)
    columns = ("frames_per_second", "encoded_per_frame", "median_speed_to_loop")
    head = ("", "frames a second", "images encoded a frame", "speed to loop (median)")
    rows = results["throughput"].items()
    print_table(head, [[name, *(row[column] for column in columns)] for name, row in rows])
    results["click_ms_beside_the_model"] = clicked = measure_clicks(pipe, args.clicks)
    print(f"\nA click at 720p beside the model, ms: {', '.join(f'{k} {v:.0f}' for k, v in clicked.items())}")
    results["gate"] = judge_gate(pipe, clips)
    print(f"\nAutomatic masklets: {results['gate']}")
    write_json(args.out / "data_engine.json", results)


if __name__ == "__main__":
    main(ARGUMENTS)
