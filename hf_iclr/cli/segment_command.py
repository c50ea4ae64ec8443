"""What `hf-iclr segment` does: prompts written as text, and one video to a folder of results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm
from transformers import pipeline

from hf_iclr.vision.formats.annotation_json import write_coco
from hf_iclr.vision.formats.mask_folders import check_palette_numbers, write_davis
from hf_iclr.vision.formats.overlay import write_overlay
from hf_iclr.vision.formats.segment_files import atomic_folder
from hf_iclr.vision.session.prompts import VideoPrompts
from hf_iclr.vision.session.segments import VideoSegments
from hf_iclr.vision.session.videos import open_video


def parse_prompts(points: Sequence[str] = (), boxes: Sequence[str] = (), masks: Sequence[str] = ()) -> VideoPrompts:
    """
    Prompts from what is typed on a command line.

    Args:
        points (`Sequence[str]`, *optional*):
            Such as `0:1:210,350`: frame, object, x and y; with `:0` after it, a click beside the object.
        boxes (`Sequence[str]`, *optional*):
            Such as `0:2:10,10,80,90`.
        masks (`Sequence[str]`, *optional*):
            Such as `40:3:mask.png`; what isn't black is the object.

    Raises:
        ValueError: if one is malformed, there is none, or they do not go together.
    """
    prompts: dict[int, dict[int, dict[str, Any]]] = {}

    def prompt_of(text: str, expected: str) -> tuple[dict[str, Any], str]:
        frame, _, rest = text.partition(":")
        obj, _, rest = rest.partition(":")
        if not frame.isdecimal() or not obj.isdecimal() or not rest:
            raise ValueError(f"Expected {expected}, got {text!r}.")
        return prompts.setdefault(int(frame), {}).setdefault(int(obj), {}), rest

    for text in points:
        expected = "a point as FRAME:OBJECT:X,Y or FRAME:OBJECT:X,Y:LABEL, for instance 0:1:210,350"
        prompt, rest = prompt_of(text, expected)
        place, _, label = rest.partition(":")
        if label not in ("", "0", "1"):
            raise ValueError(f"Expected {expected}, with label 1 (on the object) or 0 (beside it), got {text!r}.")
        prompt.setdefault("points", []).append(_numbers(place, 2, expected, text))
        prompt.setdefault("labels", []).append(int(label or 1))
    for text in boxes:
        expected = "a box as FRAME:OBJECT:X0,Y0,X1,Y1, for instance 0:2:10,10,80,90"
        prompt, rest = prompt_of(text, expected)
        if "box" in prompt:
            raise ValueError(f"Expected one box an object and frame, got another one: {text!r}.")
        prompt["box"] = _numbers(rest, 4, expected, text)
    for text in masks:
        prompt, rest = prompt_of(text, "a mask as FRAME:OBJECT:IMAGE, for instance 40:3:mask.png")
        if not Path(rest).is_file():
            raise ValueError(f"There is no image {rest!r}, which is the mask of {text!r}.")
        prompt["mask"] = Image.open(rest)
    if not prompts:
        raise ValueError(
            "Nothing says what to segment. Add for instance --point 0:1:210,350 or --box 0:1:10,10,80,90."
        )
    return VideoPrompts(prompts)


def segment_video(
    video: str, prompts: VideoPrompts, out: Path, model: Any, direction: str = "forward", rate: float | None = None
) -> VideoSegments:
    """
    Segments a video and writes `overlay.mp4`, `masks` (a palette PNG a frame), `masks.json` (COCO) and `prompts.json`.

    Args:
        video (`str`):
            Anything `open_video` takes as a path.
        prompts (`VideoPrompts`):
            What to segment.
        out (`Path`):
            A new or an empty folder; nothing is left in it if something goes wrong.
        model (`str` or `PreTrainedModel`):
            As `pipeline` takes it.
        direction (`str`, *optional*, defaults to `"forward"`):
            "forward", "backward" or "both".
        rate (`float`, *optional*, defaults to that of the video):
            Frames per second of the overlay.

    Returns:
        [`VideoSegments`] with masks as COCO RLE.

    Raises:
        ValueError: if the folder is not empty, or the video, the prompts or an option is unfit.
    """
    check_palette_numbers(prompts.objects)
    frames = open_video(video)
    with atomic_folder(out) as part:
        prompts.check(frames[0].shape[:2], frames.num_frames)
        pipe = pipeline("promptable-video-segmentation", model=model)
        session = pipe.session(frames, output="rle", keep="window", feature_cache_bytes=0, undo_levels=0)
        for frame, objects in prompts.items():
            for obj, prompt in objects.items():
                session.add(frame, obj, **vars(prompt))
        tracked = list(tqdm(session.iterate(direction), total=session.num_frames, unit=" frames"))
        result = VideoSegments(tracked, frames.damage)
        write_overlay(frames, result, part / "overlay.mp4", rate)
        write_davis(result, part / "masks")
        write_coco({Path(video).stem: result}, part / "masks.json")
        prompts.to_json(part / "prompts.json")
    return result


def _numbers(text: str, count: int, expected: str, whole: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise ValueError(f"Expected {expected}, got {whole!r}.")
    return numbers
