"""
What the video pipeline costs against the loop a user writes with `Sam2VideoModel`: equality, time, memory.

    python benchmarks/sam2_pipeline_speed.py
    python benchmarks/sam2_pipeline_speed.py --stream 2000 --direct-stream 300
    python benchmarks/sam2_pipeline_speed.py --shape hiera-tiny --side 512 --frames 3 --repeats 1 --stream 0
    PYTHONPATH=.:REFERENCE python benchmarks/sam2_pipeline_speed.py --reference

Weights are random: time and memory do not depend on them. First the masks of both must be equal bit for bit. Then each
repeat runs both in one process and in random order, on frames in memory, with preprocessing and with boolean masks in
the size of the video as the result; reported are the medians of the ratios within a repeat, and fastest to fastest, in
CPU seconds of one thread. A round of correction is a click on the middle frame and a pass over the whole video; the
direct loop's click is forgotten by that pass, which costs the same. Bytes kept are counted over the tensors of the
session. `--compile` also times the pipeline with the parts of the model compiled, after passes that warm it up, and
counts what is compiled later. `--reference` also times the reference predictor with the same weights and frames; where
to get it says tests/vision/session/make_reference_masks.py.
"""

import argparse
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--shape", choices=["tiny", "hiera-tiny"], default="tiny")
    parser.add_argument("--side", type=int, help="pixels of the model's square (default: 128, or 1024 of hiera-tiny)")
    parser.add_argument("--objects", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--reference", action="store_true", help="also time PyPI's sam2")
    parser.add_argument("--compile", action="store_true", help="also time the pipeline with a compiled model")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--stream", type=int, default=300, help="streamed frames; 0 leaves this out")
    parser.add_argument("--direct-stream", type=int, default=100, help="frames streamed by the direct loop")
    return parse(parser, frames=4, repeats=2, stream=20, direct_stream=10)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import av
import numpy as np
import torch
from torch._dynamo.utils import counters
from tqdm import tqdm
from transformers import Sam2VideoConfig, Sam2VideoModel

from hf_iclr.tiny_models import sam2_processor, tiny_sam2_config
from hf_iclr.vision.session.pipeline import Sam2VideoPipeline
from hf_iclr.vision.session.videos import open_video


CLICK, LABEL = [60, 50], 1


def make_pipe(shape: str, side: int | None) -> Sam2VideoPipeline:
    """A pipeline of random weights: 1.6 M parameters at 128 pixels, or the 38.9 M of Hiera-tiny at 1024."""
    torch.manual_seed(0)
    if shape == "tiny":
        side, scale = side or 128, 1e-6  # of the memory's fuser, as in SAM 2
        config = tiny_sam2_config(
            side, 16, 256, memory_attention_num_layers=2, memory_fuser_layer_scale_init_value=scale
        )
    else:
        side, config = side or 1024, Sam2VideoConfig()
        config.image_size = config.prompt_encoder_config.image_size = side
        config.vision_config.backbone_config.image_size = [side, side]
        config.vision_config.backbone_feature_sizes = [[side // stride] * 2 for stride in (4, 8, 16)]
        config.memory_attention_rope_feat_sizes = [side // 16] * 2
    model = Sam2VideoModel(config).eval()
    with torch.no_grad():
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(3.0)  # the object is in sight
    return Sam2VideoPipeline(model=model, processor=sam2_processor(side), device="cpu")


def make_video(frames: int, height: int = 240, width: int = 320) -> np.ndarray:
    """A disc that crosses a fixed textured ground."""
    ground = np.random.default_rng(0).integers(0, 120, (height, width, 3), dtype=np.uint8)
    rows, columns = np.mgrid[:height, :width]
    video = np.repeat(ground[None], frames, axis=0)
    for number in range(frames):
        video[number][(rows - 50) ** 2 + (columns - 60 - number % 180) ** 2 < 900] = (240, 200, 40)
    return video


def direct_session(pipe, video: np.ndarray, objects: int):
    session = pipe.processor.init_video_session(video=video)
    ids = list(range(1, objects + 1))
    points, labels = [[[CLICK]] * objects], [[[LABEL]] * objects]
    pipe.processor.add_inputs_to_inference_session(session, 0, ids, input_points=points, input_labels=labels)
    pipe.model(session, frame_idx=0)
    return session


def direct_pass(pipe, session) -> Iterator[np.ndarray]:
    size = [session.video_height, session.video_width]
    for output in pipe.model.propagate_in_video_iterator(session):
        yield pipe.processor.post_process_masks([output.pred_masks], [size])[0][:, 0].numpy()


def direct_loop(pipe, video: np.ndarray, objects: int) -> list[np.ndarray]:
    return list(direct_pass(pipe, direct_session(pipe, video, objects)))


def pipeline_loop(pipe, video, objects: int, **options) -> list[np.ndarray]:
    prompts = {0: {obj: {"points": [CLICK], "labels": [LABEL]} for obj in range(1, objects + 1)}}
    return [np.stack(list(frame.masks.values())) for frame in pipe(video, prompts=prompts, **options)]


def make_reference_loop(pipe) -> Callable[[np.ndarray, int], list[np.ndarray]]:
    """The loop a user writes with the reference predictor, on frames that are preprocessed as ours are."""
    import sam2.sam2_video_predictor as reference

    from tests.vision.session.make_reference_masks import reference_predictor

    predictor = reference_predictor(pipe.model)
    reference.tqdm = lambda frames, desc: frames

    def loop(video: np.ndarray, objects: int) -> list[np.ndarray]:
        frames = pipe.processor.video_processor(video, return_tensors="pt")["pixel_values_videos"][0]
        reference.load_video_frames = lambda **kwargs: (frames, *video.shape[1:3])
        state = predictor.init_state("a folder")
        for obj in range(1, objects + 1):
            predictor.add_new_points_or_box(state, 0, obj, [CLICK], [LABEL])
        return [(masks > 0).numpy() for _, _, masks in predictor.propagate_in_video(state)]

    return loop


def compiled_pipe(shape: str, side: int | None) -> Sam2VideoPipeline:
    """The pipeline of `make_pipe` with the parts compiled that take the time."""
    pipe = make_pipe(shape, side)
    model = pipe.model
    for part in (model.vision_encoder.backbone, model.memory_attention, model.mask_decoder, model.memory_encoder):
        part.compile()
    return pipe


def compare(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU seconds of two sides, "direct" and "pipeline", and their ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in tqdm(range(repeats), leave=False):
        for name in random.sample(list(sides), len(sides)):
            start = time.process_time()
            sides[name]()
            seconds[name].append(time.process_time() - start)
    ratios = [own / direct for own, direct in zip(seconds["pipeline"], seconds["direct"], strict=True)]
    return {
        "direct": statistics.median(seconds["direct"]),
        "pipeline": statistics.median(seconds["pipeline"]),
        "ratio": statistics.median(ratios),
        "fastest": min(seconds["pipeline"]) / min(seconds["direct"]),
    }


def compare_rounds(pipe, video: np.ndarray, repeats: int) -> dict[str, float]:
    """The same for a round of correction, each on a session that has seen one pass."""
    middle, click = len(video) // 2, [100, 60]
    direct = direct_session(pipe, video, 1)
    list(direct_pass(pipe, direct))
    ours = pipe.session(video, feature_cache_bytes=2**32)
    ours.add(0, 1, points=[CLICK])
    ours.propagate()

    def direct_round() -> None:
        pipe.processor.add_inputs_to_inference_session(
            direct, middle, 1, input_points=[[[click]]], input_labels=[[[0]]]
        )
        pipe.model(direct, frame_idx=middle)
        list(direct_pass(pipe, direct))

    def our_round() -> None:
        ours.correct(middle, 1, points=[click], labels=[0])
        ours.propagate()
        ours.undo()

    return compare({"direct": direct_round, "pipeline": our_round}, repeats)


def kept_bytes(tensors: Iterator[torch.Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def session_tensors(memory) -> Iterator[torch.Tensor]:
    yield from (memory.processed_frames or {}).values()
    for kinds in memory.output_dict_per_obj.values():
        for outputs in kinds.values():
            for output in outputs.values():
                yield from output.values()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def corrected_stream(pipe, frames: int, every: int = 10) -> dict[str, float]:
    """What a stream keeps and takes that is corrected every few frames: after a tenth of it, and at its end."""
    video = make_video(180)
    session = pipe.session(video[number % len(video)] for number in range(frames))
    session.add(0, 1, points=[CLICK])
    kept, seconds, start = [], [], time.process_time()
    for segments in tqdm(session.iterate(), total=frames, leave=False):
        if segments.frame % every == every - 1:
            session.correct(segments.frame, 1, points=[[60 + segments.frame % 180, 50]])
        features = [*session.features._latest[1], *session.features._positions]
        kept.append(kept_bytes(iter([*session_tensors(session._memories[1]), *features])))
        seconds.append(time.process_time() - start)
        start = time.process_time()
    tenth = frames // 10
    return {
        "kept early": max(kept[tenth : 2 * tenth]),
        "kept late": max(kept[-tenth:]),
        "seconds early": statistics.mean(seconds[tenth : 2 * tenth]),
        "seconds late": statistics.mean(seconds[-tenth:]),
    }


def stream_memory(pipe, frames: int, direct_frames: int) -> dict[str, float]:
    """Bytes that a streamed object keeps after each frame: ours must be flat; how the direct session's grow."""
    video = make_video(180)
    camera = (video[number % len(video)] for number in range(frames))
    session = pipe.session(camera)
    session.add(0, 1, points=[CLICK])
    kept, resident = [], []
    for _ in tqdm(session.iterate(), total=frames, leave=False):
        features = [*session.features._latest[1], *session.features._positions]
        kept.append(kept_bytes(iter([*session_tensors(session._memories[1]), *features])))
        resident.append(resident_bytes())
    settled = min(100, frames // 2)
    direct = pipe.processor.init_video_session()
    grown = []
    for number in range(direct_frames):
        inputs = pipe.processor(images=video[number % len(video)], return_tensors="pt")
        if number == 0:
            pipe.processor.add_inputs_to_inference_session(
                direct, 0, 1, input_points=[[[CLICK]]], input_labels=[[[1]]], original_size=video.shape[1:3]
            )
        pipe.model(direct, frame=inputs["pixel_values"][0])
        grown.append(kept_bytes(session_tensors(direct)))
    return {
        "frames": frames,
        "kept": kept[-1],
        "kept grows per 1000 frames": (kept[-1] - kept[settled]) / (frames - settled) * 1000,
        "resident grows per 1000 frames": (resident[-1] - resident[settled]) / (frames - settled) * 1000,
        "direct frames": direct_frames,
        "direct grows per 1000 frames": (grown[-1] - grown[0]) / (direct_frames - 1) * 1000,
    }


def decode_share(pipe, frames: int) -> dict[str, float]:
    """CPU seconds of decoding a 480p file by PyAV, and of segmenting it."""
    video = make_video(frames, 480, 848)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "clip.mp4")
        with av.open(path, "w") as container:
            stream = container.add_stream("libx264", rate=24, options={"threads": "1"})
            stream.height, stream.width, stream.pix_fmt = 480, 848, "yuv420p"
            for frame in video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        start = time.process_time()
        assert len(list(open_video(path))) == frames
        decode = time.process_time() - start
        start = time.process_time()
        pipeline_loop(pipe, path, 1)
        whole = time.process_time() - start
    return {"decode": decode / frames, "whole": whole / frames, "share": decode / whole}


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    random.seed(0)
    pipe = make_pipe(args.shape, args.side)
    video = make_video(args.frames)
    report: dict = {"arguments": vars(args)}

    expected, found = direct_loop(pipe, video, 1), pipeline_loop(pipe, video, 1)
    if not all(np.array_equal(own, direct) for own, direct in zip(found, expected, strict=True)):
        raise SystemExit("The pipeline's masks are not those of the direct loop: no time is worth telling.")
    print(f"masks of {len(found)} frames equal bit for bit")
    times = {
        f"{objects} object{'s' * (objects > 1)}": compare(
            {
                "direct": lambda objects=objects: direct_loop(pipe, video, objects),
                "pipeline": lambda objects=objects: pipeline_loop(pipe, video, objects),
            },
            args.repeats,
        )
        for objects in args.objects
    }
    if args.compile:
        compiled = compiled_pipe(args.shape, args.side)
        for _ in range(2):
            for objects in args.objects:
                pipeline_loop(compiled, video, objects)
        graphs = counters["stats"]["unique_graphs"]
        for objects in args.objects:
            times[f"{objects}, compiled"] = compare(
                {
                    "direct": lambda objects=objects: direct_loop(pipe, video, objects),
                    "pipeline": lambda objects=objects: pipeline_loop(compiled, video, objects),
                },
                args.repeats,
            )
        report["compiled later"] = counters["stats"]["unique_graphs"] - graphs
        print(f"{graphs} graphs compiled to warm up, {report['compiled later']} later")
    if args.reference:
        reference = make_reference_loop(pipe)
        for objects in args.objects:
            times[f"{objects}, reference"] = compare(
                {
                    "direct": lambda objects=objects: reference(video, objects),
                    "pipeline": lambda objects=objects: pipeline_loop(pipe, video, objects),
                },
                args.repeats,
            )
    times["round of correction"] = compare_rounds(pipe, video, args.repeats)
    for name, row in times.items():
        milliseconds = [1000 * row[side] / args.frames for side in ("direct", "pipeline")]
        print(
            f"{name:20} {milliseconds[0]:8.2f} ms a frame direct, {milliseconds[1]:8.2f} by the pipeline: "
            f"x {row['ratio']:.3f}, fastest to fastest x {row['fastest']:.3f}"
        )
    report["seconds"] = times
    report["decode"] = row = decode_share(pipe, args.frames)
    print(f"decoding 480p        {1000 * row['decode']:8.2f} ms a frame, {row['share']:.1%} of the pipeline's time")
    if args.stream:
        report["stream"] = row = stream_memory(pipe, args.stream, args.direct_stream)
        print(
            f"stream of {row['frames']} frames: {row['kept'] / 1e6:.2f} MB kept; per 1000 frames the tensors grow "
            f"by {row['kept grows per 1000 frames'] / 1e6:.2f} MB, the process by "
            f"{row['resident grows per 1000 frames'] / 1e6:.1f} MB, the direct session by "
            f"{row['direct grows per 1000 frames'] / 1e6:.0f} MB"
        )
        report["corrected stream"] = row = corrected_stream(pipe, args.stream)
        print(
            f"corrected: {row['kept early'] / 1e6:.2f} MB and {1000 * row['seconds early']:.1f} ms a frame "
            f"in its second tenth, {row['kept late'] / 1e6:.2f} MB and {1000 * row['seconds late']:.1f} ms in its last"
        )
    print(f"{torch.get_num_threads()} thread, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}")
    write_json(args.out / "sam2_pipeline_speed.json", report)


if __name__ == "__main__":
    main(ARGUMENTS)
