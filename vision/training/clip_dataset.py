"""Annotated videos and images as a data set of clips for training, read when they are drawn."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ..formats.annotated_videos import AnnotatedVideo, read_rows, to_annotated
from ..session.prompts import to_boolean_mask
from ..session.videos import open_video
from .prompts import PromptPlan, draw_plan


logger = logging.getLogger(__name__)


class ClipDataset(Dataset):
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

    Raises:
        ValueError: if there are no videos.
    """

    def __init__(
        self, videos, processor, num_frames=8, max_objects=3, seed=0, prompts: Mapping[str, Any] | None = None
    ):
        if len(videos) == 0:
            raise ValueError("Expected at least one video to train on, got none.")
        rows = isinstance(videos[0], Mapping)
        self.videos = read_rows(videos) if rows else [to_annotated(video, n) for n, video in enumerate(videos)]
        self.processor = processor
        self.num_frames = num_frames
        self.max_objects = max_objects
        self.seed = seed
        self.prompts = dict(prompts or {})
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # seen by workers that live on

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Tensors and plan as [`~hf_iclr.vision.training.predict_clips`] takes them."""
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
        masks = video.stacked(numbers, frames[0].shape[:2], objects)
        return frames, np.stack([masks[obj] for obj in objects])

    def _pixels(self, frames: list[np.ndarray]) -> torch.Tensor:
        if hasattr(self.processor, "video_processor"):
            return self.processor.video_processor(np.stack(frames), return_tensors="pt")["pixel_values_videos"][0]
        return self.processor.image_processor(frames, return_tensors="pt")["pixel_values"]


def collate_clips(clips: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Clips of any lengths and numbers of objects as one batch."""
    return {"clips": clips}
