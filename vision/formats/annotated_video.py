"""A video with true masks, in the one form that training and evaluations take."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..session.frames import StreamedFrames, VideoFrames
from ..session.prompts import to_boolean_mask
from ..session.segments import VideoSegments
from ..session.videos import open_video


@dataclass
class AnnotatedVideo:
    """
    A video or an image with true masks, which are read when they are needed.

    Args:
        video (`Any`):
            Anything `open_video` takes, but for an iterator.
        frames (`Sequence[int]`):
            Numbers of the frames with masks, ascending.
        masks (`Callable[[int], Mapping[int, Any]]`):
            Gives the masks of a frame by object, boolean or COCO RLE. An object that is missing there is out of sight.
        name (`str`, *optional*, defaults to `"video"`):
            For tables.
    """

    video: Any = field(repr=False)
    frames: Sequence[int]
    masks: Callable[[int], Mapping[int, Any]] = field(repr=False)
    name: str = "video"

    @classmethod
    def from_segments(cls, video: Any, segments: VideoSegments, name: str = "video") -> "AnnotatedVideo":
        """Masks as a reader of this package gives them, such as `read_sav` or `read_youtube_vos`."""

        def masks(frame: int) -> dict[int, np.ndarray]:
            return {obj: segments[frame].binary(obj) for obj in segments[frame].masks}

        return cls(video, segments.frames, masks, name)

    @classmethod
    def from_masks(
        cls, video: Any, masks: Mapping[int, Any], frames: Sequence[int] | None = None, name: str = "video"
    ) -> "AnnotatedVideo":
        """
        Args:
            video (`Any`):
                Anything `open_video` takes, but for an iterator.
            masks (`Mapping[int, Sequence]`):
                By object, one mask for each annotated frame: a boolean array `(frames, height, width)`, or a list of
                masks or COCO RLEs. A mask is empty where the object is out of sight.
            frames (`Sequence[int]`, *optional*, defaults to all from frame 0 on):
                Numbers of the annotated frames, ascending.
            name (`str`, *optional*, defaults to `"video"`):
                For tables.

        Raises:
            TypeError: if `masks` is no mapping.
            ValueError: if there are no masks, or not as many for each object as frames are annotated.
        """
        if not isinstance(masks, Mapping):
            raise TypeError(f"Expected masks by object, such as {{1: masks}}, got {type(masks).__name__}.")
        counts = {int(obj): len(own) for obj, own in masks.items()}
        if not any(counts.values()):
            raise ValueError(f"Expected masks of at least one object in {name}, got none.")
        numbers = list(range(max(counts.values()))) if frames is None else list(frames)
        if set(counts.values()) != {len(numbers)}:
            raise ValueError(
                f"Expected {len(numbers)} masks of each object in {name}, one an annotated frame, got {counts}."
            )
        places = {number: place for place, number in enumerate(numbers)}
        return cls(video, numbers, lambda frame: {int(obj): own[places[frame]] for obj, own in masks.items()}, name)

    def load(self) -> tuple[VideoFrames, dict[int, np.ndarray]]:
        """
        The frames, to be read more than once, and all masks by object, boolean of shape `(annotated frames, height,
        width)`.

        Raises:
            ValueError: if the frames are an iterator, fewer than annotated, or of another size than the masks.
        """
        video = open_video(self.video)
        if isinstance(video, StreamedFrames):
            raise ValueError(f"The frames of {self.name} can be read only once. Pass `list(frames)`.")  # noqa: TRY004
        if video.num_frames is not None and self.frames[-1] >= video.num_frames:
            raise ValueError(
                f"Expected at least {self.frames[-1] + 1} frames in {self.name}, as many as there are masks, got "
                f"{video.num_frames}."
            )
        return video, self.stacked(self.frames, video[self.frames[0]].shape[:2])

    def stacked(
        self, frames: Sequence[int], size: tuple[int, int], wanted: Sequence[int] | None = None
    ) -> dict[int, np.ndarray]:
        """Masks of all or some objects, boolean of shape `(frames, *size)`, empty where an object is missing."""
        known = [
            {obj: to_boolean_mask(mask) for obj, mask in self.masks(frame).items() if wanted is None or obj in wanted}
            for frame in frames
        ]
        if others := {mask.shape for masks in known for mask in masks.values()} - {size}:
            raise ValueError(f"Expected masks of the frames' size {size} in {self.name}, got {others.pop()}.")
        nothing = np.zeros(size, bool)
        objects = sorted({obj for masks in known for obj in masks})
        return {obj: np.stack([masks.get(obj, nothing) for masks in known]) for obj in objects}


def to_annotated(video: Any, number: int = 0) -> AnnotatedVideo:
    """
    Any form of a video with true masks as an [`AnnotatedVideo`].

    Args:
        video (`AnnotatedVideo`, `tuple`, `Mapping` or `Any`):
            One; or (frames, masks by object); or a row of a dataset with `frames` (or `video`) and `masks`; or
            anything with attributes `frames` and `masks`, such as a procedural clip.
        number (`int`, *optional*, defaults to `0`):
            Names videos without a name.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(video, AnnotatedVideo):
        return video
    name = f"clip {number}"
    if isinstance(video, tuple) and len(video) == 2:
        return AnnotatedVideo.from_masks(*video, name=name)
    if isinstance(video, Mapping) and "masks" in video and ("frames" in video or "video" in video):
        frames = video.get("frames", video.get("video"))
        return AnnotatedVideo.from_masks(frames, video["masks"], name=video.get("name", name))
    if hasattr(video, "frames") and hasattr(video, "masks"):
        return AnnotatedVideo.from_masks(video.frames, video.masks, name=getattr(video, "name", name))
    raise TypeError(
        f"Expected a video as (frames, {{object: masks}}) or an AnnotatedVideo, got {type(video).__name__}."
    )
