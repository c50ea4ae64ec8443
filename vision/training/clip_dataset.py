"""Annotated videos and images as clips for training, read when they are drawn."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..formats.annotated_video import AnnotatedVideo, to_annotated
from ..formats.annotated_videos import read_rows, stream_videos
from ..session.prompts import to_boolean_mask
from ..session.videos import open_video
from .augmentation import augment_clip
from .prompts import PromptPlan, draw_plan


logger = logging.getLogger(__name__)


class _Clips:
    """What clips are drawn from, and how."""

    def __init__(
        self,
        videos: Any,
        processor: Any,
        num_frames: int = 8,
        max_objects: int = 3,
        seed: int = 0,
        prompts: Mapping[str, Any] | None = None,
        augment: bool = False,
    ):
        self.videos = videos
        self.seed = seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by workers that live on
        self._draw = partial(_draw, processor, num_frames, max_objects, dict(prompts or {}), augment)

    def _chance(self, place: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, int(self.epoch), place))


class ClipDataset(_Clips, Dataset):
    """
    Draws a clip of each video: frames in a row that have masks, beginning where an object is in sight, some of its
    objects, and how they are prompted. What is drawn depends on seed, epoch and place alone, not on the process. A
    video that can't be read, or shows nothing, is logged and replaced by the next.

    Args:
        videos (`Sequence`):
            In the forms of [`~hf_iclr.vision.formats.to_annotated`], or rows as `read_rows` there
            takes them. Images may be among them.
        processor (`ProcessorMixin`):
            Of the model.
        num_frames (`int`, *optional*, defaults to `8`):
            Frames of a clip at most.
        max_objects (`int`, *optional*, defaults to `3`):
            Objects of a clip at most.
        seed (`int`, *optional*, defaults to `0`):
            Where chance comes from.
        prompts (`Mapping`, *optional*):
            Arguments of [`~hf_iclr.vision.training.prompts.draw_plan`].
        augment (`bool`, *optional*, defaults to `False`):
            Whether clips look other at each sight: [`~hf_iclr.vision.training.augmentation.augment_clip`].

    Raises:
        TypeError: if the videos are no sequence.
        ValueError: if there are no videos.
    """

    def __init__(self, videos: Sequence, processor: Any, *args: Any, **kwargs: Any):
        if isinstance(videos, Mapping):
            raise TypeError(
                f"Expected one set of videos, got {type(videos).__name__} of {[*videos]}. Did you mean to pass one of "
                "them, such as dataset['train']?"
            )
        if isinstance(videos, str) or not hasattr(videos, "__len__") or not hasattr(videos, "__getitem__"):
            raise TypeError(
                f"Expected a list or a dataset of videos, got {type(videos).__name__}. Pass read_videos(folder), "
                "list(videos), or an IterableDataset to read them as they come."
            )
        if len(videos) == 0:
            raise ValueError("Expected at least one video to train on, got none.")
        rows = _is_row(videos[0])
        read = read_rows(videos) if rows else [to_annotated(video, n) for n, video in enumerate(videos)]
        if not read:
            raise ValueError(f"Expected at least one accepted masklet to train on, got none in {len(videos)} rows.")
        super().__init__(read, processor, *args, **kwargs)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tensors and plan as [`~hf_iclr.vision.training.predict_clips`] takes them."""
        rng = self._chance(index)
        for place in range(index, index + len(self)):
            try:
                return self._draw(rng, self.videos[place % len(self)])
            except (ValueError, OSError) as error:
                logger.warning("Video %d can't be trained on: %s", place % len(self), error)
        raise ValueError("None of the videos can be trained on; the log says why.")


class ClipStream(_Clips, IterableDataset):
    """
    Draws a clip of each video of a stream, in its order, as [`ClipDataset`] does; a video that can't be trained on is
    logged and left out.

    Args:
        videos (`Iterable`):
            Read anew in each epoch, such as a `datasets.IterableDataset`. Rows of one video follow one another.
        processor, num_frames, max_objects, seed, prompts, augment:
            See [`ClipDataset`].
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        # Streams of torch are whole in each worker; those of `datasets` share their shards out themselves.
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        if isinstance(self.videos, datasets.IterableDataset):
            number, workers = 0, 1
        for place, video in enumerate(stream_videos(self.videos)):
            if place % workers != number:
                continue
            try:
                yield self._draw(self._chance(place), video)
            except (ValueError, OSError) as error:
                logger.warning("Video %d can't be trained on: %s", place, error)


def _is_row(video: Any) -> bool:
    """Whether this is one object of a video rather than a video with masks by object."""
    return isinstance(video, Mapping) and not isinstance(video.get("masks"), Mapping)


def _draw(
    processor: Any,
    num_frames: int,
    max_objects: int,
    prompts: dict[str, Any],
    augment: bool,
    rng: np.random.Generator,
    video: AnnotatedVideo,
) -> dict[str, Any]:
    frames, masks = _draw_frames(num_frames, max_objects, rng, video)
    if augment:
        frames, masks = augment_clip(rng, frames, masks)
    if hasattr(processor, "video_processor"):
        pixels = processor.video_processor(np.stack(frames), return_tensors="pt")["pixel_values_videos"][0]
    else:
        pixels = processor.image_processor(frames, return_tensors="pt")["pixel_values"]
    truth = torch.from_numpy(masks).float()
    resized = F.interpolate(truth, pixels.shape[-2:], mode="bilinear", antialias=True, align_corners=False)
    plan: PromptPlan = draw_plan(rng, len(frames), **prompts)
    noise = rng.random((len(masks), len(frames), 1 + plan.clicks, 4), dtype=np.float32)
    return {"pixel_values": pixels, "masks": resized >= 0.5, "noise": torch.from_numpy(noise), "plan": plan}


def _draw_frames(
    num_frames: int, max_objects: int, rng: np.random.Generator, video: AnnotatedVideo
) -> tuple[list[np.ndarray], np.ndarray]:
    length = min(num_frames, len(video.frames))
    for start in rng.permutation(len(video.frames) - length + 1):
        first = {obj: to_boolean_mask(mask) for obj, mask in video.masks(video.frames[start]).items()}
        visible = sorted(obj for obj, mask in first.items() if mask.any())
        if visible:
            break
    else:
        raise ValueError("no object is in sight where a clip may begin")
    objects = sorted(rng.permutation(visible)[:max_objects])
    numbers = video.frames[start : start + length]
    pictures = open_video(video.video)
    frames = [pictures[number] for number in numbers]
    masks = video.stacked(numbers, frames[0].shape[:2], objects)
    return frames, np.stack([masks[obj] for obj in objects])


def collate_clips(clips: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Clips of any lengths and numbers of objects as one batch."""
    return {"clips": clips}
