"""Annotated videos and images as a data set of clips for training, read when they are drawn."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset

from .annotation_json import read_sav
from .mask_folders import VOID
from .procedural_clips import Clip
from .training_prompts import PromptPlan, draw_plan
from .video_frames import IMAGE_SUFFIXES, open_video
from .video_prompts import to_boolean_mask
from .video_segments import VideoSegments


logger = logging.getLogger(__name__)


@dataclass
class AnnotatedVideo:
    """
    A video or an image with true masks.

    Args:
        video (`Any`): Anything `open_video` takes.
        frames (`Sequence[int]`): Numbers of the frames with masks, in order.
        masks (`Callable[[int], Mapping[int, Any]]`): Gives the masks of a frame by object, boolean or COCO RLE. An
            object that is missing there is out of sight.
    """

    video: Any
    frames: Sequence[int]
    masks: Callable[[int], Mapping[int, Any]]

    @classmethod
    def from_segments(cls, video: Any, segments: VideoSegments) -> "AnnotatedVideo":
        """Masks as any reader of this package gives them."""
        return cls(video, segments.frames, lambda frame: {o: segments[frame].binary(o) for o in segments[frame].masks})

    @classmethod
    def from_clip(cls, clip: Clip) -> "AnnotatedVideo":
        """A procedural clip."""
        masks = clip.masks
        return cls(clip.frames, range(len(clip.frames)), lambda frame: {o: mask[frame] for o, mask in masks.items()})


def read_png_videos(frames: str | Path, masks: str | Path) -> list[AnnotatedVideo]:
    """
    The videos of DAVIS, MOSE and YouTube-VOS: for each video a folder of images and one of PNGs, whose pixels are
    object numbers. Pixels of 255 are void, or object 1 if there is no other.

    Args:
        frames (`str` or `Path`): Folder of folders of images, such as `JPEGImages/480p`.
        masks (`str` or `Path`): Folder of folders of PNGs of the same names, such as `Annotations/480p`.

    Raises:
        ValueError: if no folder of masks has images of its name.
    """
    videos = []
    for folder in sorted(path for path in Path(masks).iterdir() if path.is_dir()):
        images = {file.stem: file for file in (Path(frames) / folder.name).glob("*") if file.suffix in IMAGE_SUFFIXES}
        files = [file for file in sorted(folder.glob("*.png")) if file.stem in images]
        if files:
            ordered = sorted(images)
            places = {ordered.index(file.stem): file for file in files}
            pictures = [images[stem] for stem in ordered]
            videos.append(AnnotatedVideo(pictures, sorted(places), partial(_labels, places)))
    if not videos:
        raise ValueError(f"Expected folders of the same names with images in {frames} and PNGs in {masks}, got none.")
    return videos


def read_sav_videos(folder: str | Path, kind: str = "manual") -> list[AnnotatedVideo]:
    """
    The videos of SA-V: `sav_000001.mp4` beside `sav_000001_manual.json`, at any depth of a folder.

    Args:
        folder (`str` or `Path`): The folder.
        kind (`str`, *optional*, defaults to `"manual"`): "manual" or "auto" masklets.

    Raises:
        ValueError: if there are no such pairs.
    """
    videos = []
    for file in sorted(Path(folder).rglob(f"*_{kind}.json")):
        video = file.with_name(file.name.replace(f"_{kind}.json", ".mp4"))
        if video.exists():
            videos.append(AnnotatedVideo.from_segments(str(video), read_sav(file)[0]))
    if not videos:
        raise ValueError(f"Expected name_{kind}.json beside name.mp4 in {folder}, got no such pair.")
    return videos


def read_rows(rows: Iterable[Mapping[str, Any]]) -> list[AnnotatedVideo]:
    """
    The videos of a `datasets.Dataset` with a row for each object, as `annotate` makes it.

    Args:
        rows (`Iterable[Mapping]`): Each with `video` (anything `open_video` takes), `frames` (numbers of those with a
            mask) and `masks` (as many COCO RLEs); *optional* are `object`, its number, and `name`: rows of one name,
            or of one path, are of one video.

    Raises:
        ValueError: if a row has no such columns, or as many masks as frames.
    """
    groups: dict[Any, tuple[Any, dict[int, dict[int, Any]]]] = {}
    for number, row in enumerate(rows):
        if not {"video", "frames", "masks"} <= set(row) or len(row["frames"]) != len(row["masks"]):
            raise ValueError(f"Expected video, frames and as many masks in row {number}, got columns {sorted(row)}.")
        video = row["video"]
        key = row.get("name") or (video if isinstance(video, (str, Path)) else number)
        _, masks = groups.setdefault(key, (video, {}))
        objects = {obj for frame in masks.values() for obj in frame}
        obj = row.get("object", max(objects, default=0) + 1)
        for frame, mask in zip(row["frames"], row["masks"], strict=True):
            masks.setdefault(frame, {})[obj] = mask
    return [AnnotatedVideo(video, sorted(masks), masks.__getitem__) for video, masks in groups.values()]


class ClipDataset(Dataset):
    """
    Draws a clip of each video: frames in a row that have masks, beginning where an object is in sight, some of its
    objects, and how they are prompted. What is drawn depends on seed, epoch and place alone, not on the process. A
    video that can't be read, or shows nothing, is logged and replaced by the next.

    Args:
        videos (`Sequence`):
            [`AnnotatedVideo`]s, procedural clips, or rows as [`read_rows`] takes them. Images may be among them.
        processor (`ProcessorMixin`):
            Of the model.
        num_frames (`int`, *optional*, defaults to `8`):
            Frames of a clip at most.
        max_objects (`int`, *optional*, defaults to `3`):
            Objects of a clip at most.
        seed (`int`, *optional*, defaults to `0`):
            Where chance comes from.
        prompts (`Mapping`, *optional*):
            Arguments of [`~hf_iclr.vision.training_prompts.draw_plan`].

    Raises:
        ValueError: if there are no videos.
    """

    def __init__(
        self, videos, processor, num_frames=8, max_objects=3, seed=0, prompts: Mapping[str, Any] | None = None
    ):
        if len(videos) == 0:
            raise ValueError("Expected at least one video to train on, got none.")
        if isinstance(videos[0], Clip):
            videos = [AnnotatedVideo.from_clip(clip) for clip in videos]
        elif isinstance(videos[0], Mapping):
            videos = read_rows(videos)
        self.videos: list[AnnotatedVideo] = list(videos)
        self.processor = processor
        self.num_frames = num_frames
        self.max_objects = max_objects
        self.seed = seed
        self.prompts = dict(prompts or {})
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by workers that live on

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tensors and plan as [`~hf_iclr.vision.sam2_clip_forward.predict_clips`] takes them."""
        rng = np.random.default_rng((self.seed, int(self.epoch), index))
        for place in range(index, index + len(self)):
            video = self.videos[place % len(self)]
            try:
                frames, masks = self._draw(rng, video)
            except (ValueError, OSError) as error:
                logger.warning("Video %d can't be trained on: %s", place % len(self), error)
                continue
            pixels = self._pixels(frames)
            resized = F.interpolate(
                torch.from_numpy(masks).float(),
                pixels.shape[-2:],
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
            plan: PromptPlan = draw_plan(rng, len(frames), **self.prompts)
            noise = rng.random((len(masks), len(frames), 1 + plan.clicks, 4), dtype=np.float32)
            return {"pixel_values": pixels, "masks": resized >= 0.5, "noise": torch.from_numpy(noise), "plan": plan}
        raise ValueError("None of the videos can be trained on; the log says why.")

    def _draw(self, rng: np.random.Generator, video: AnnotatedVideo) -> tuple[list[np.ndarray], np.ndarray]:
        length = min(self.num_frames, len(video.frames))
        for start in rng.permutation(len(video.frames) - length + 1):
            first = {obj: to_boolean_mask(mask) for obj, mask in video.masks(video.frames[start]).items()}
            visible = sorted(obj for obj, mask in first.items() if mask.any())
            if visible:
                break
        else:
            raise ValueError("no object is in sight where a clip may begin")
        objects = sorted(rng.permutation(visible)[: self.max_objects])
        numbers = video.frames[start : start + length]
        pictures = open_video(video.video)
        frames = [pictures[number] for number in numbers]
        size = frames[0].shape[:2]
        masks = np.zeros((len(objects), length, *size), dtype=bool)
        for place, number in enumerate(numbers):
            known = video.masks(number)
            for row, obj in enumerate(objects):
                if obj in known:
                    mask = to_boolean_mask(known[obj])
                    if mask.shape != size:
                        raise ValueError(f"frames of size {size} have masks of size {mask.shape}")
                    masks[row, place] = mask
        return frames, masks

    def _pixels(self, frames: list[np.ndarray]) -> torch.Tensor:
        if hasattr(self.processor, "video_processor"):
            return self.processor.video_processor(np.stack(frames), return_tensors="pt")["pixel_values_videos"][0]
        return self.processor.image_processor(frames, return_tensors="pt")["pixel_values"]


def collate_clips(clips: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Clips of any lengths and numbers of objects as one batch."""
    return {"clips": clips}


def _labels(files: Mapping[int, Path], frame: int) -> dict[int, np.ndarray]:
    labels = np.array(Image.open(files[frame]))
    numbers = set(np.unique(labels).tolist()) - {0}
    if numbers != {VOID}:
        numbers -= {VOID}
    return {1 if number == VOID else int(number): labels == number for number in sorted(numbers)}
