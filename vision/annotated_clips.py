"""Videos with true masks, in the forms that evaluations take."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .mask_folders import read_davis
from .video_frames import StreamedFrames, VideoFrames, open_video
from .video_prompts import to_boolean_mask
from .video_segments import VideoSegments


@dataclass
class AnnotatedClip:
    """
    A video and the true masks of its objects.

    Args:
        frames (`Any`):
            The video, in any form that `open_video` takes, but for an iterator.
        masks (`Mapping[int, Sequence]`):
            By object, one mask for each annotated frame: a boolean array `(frames, height, width)`, or a list of masks
            or COCO RLEs. A mask is empty where the object is out of sight.
        name (`str`, *optional*):
            For tables.
        annotated (`Sequence[int]`, *optional*, defaults to all from frame 0 on):
            Numbers of the frames that the masks belong to, ascending.

    Raises:
        TypeError: if `masks` is no mapping.
        ValueError: if there are no masks, or not as many for each object as frames are annotated.
    """

    frames: Any = field(repr=False)
    masks: Mapping[int, Any] = field(repr=False)
    name: str = "clip"
    annotated: Sequence[int] = ()

    def __post_init__(self):
        if not isinstance(self.masks, Mapping):
            raise TypeError(f"Expected masks by object, such as {{1: masks}}, got {type(self.masks).__name__}.")
        if not self.masks:
            raise ValueError(f"Expected masks of at least one object in {self.name}, got none.")
        self.masks = {
            int(obj): np.stack([to_boolean_mask(mask) for mask in masks]) for obj, masks in self.masks.items()
        }
        counts = {obj: len(masks) for obj, masks in self.masks.items()}
        self.annotated = list(self.annotated) or list(range(max(counts.values())))
        if set(counts.values()) != {len(self.annotated)}:
            raise ValueError(
                f"Expected {len(self.annotated)} masks of each object in {self.name}, one an annotated frame, got "
                f"{counts}."
            )

    def open(self) -> VideoFrames:
        """
        The frames, to be read more than once.

        Raises:
            ValueError: if they are an iterator, fewer than annotated, or of another size than the masks.
        """
        video = open_video(self.frames)
        if isinstance(video, StreamedFrames):
            raise ValueError(f"The frames of {self.name} can be read only once. Pass `list(frames)`.")  # noqa: TRY004
        if video.num_frames is not None and self.annotated[-1] >= video.num_frames:
            raise ValueError(
                f"Expected at least {self.annotated[-1] + 1} frames in {self.name}, as many as there are masks, got "
                f"{video.num_frames}."
            )
        size = video[0].shape[:2]
        if other := {masks.shape[1:] for masks in self.masks.values()} - {size}:
            raise ValueError(f"Expected masks of the frames' size {size} in {self.name}, got {other.pop()}.")
        return video

    def first_visible(self, obj: int) -> int | None:
        """Which of the annotated frames is the first to show an object, as a place among them; `None` if none is."""
        seen = np.flatnonzero(self.masks[obj].any(axis=(1, 2)))
        return int(seen[0]) if len(seen) else None

    @classmethod
    def from_segments(cls, frames: Any, segments: VideoSegments, name: str = "clip") -> "AnnotatedClip":
        """
        A clip whose true masks a reader gave, such as `read_sav` or `read_youtube_vos`. An object without a mask on a
        frame is out of sight there.
        """
        size = next(iter(segments)).size
        nothing = np.zeros(size, bool)
        masks = {
            obj: np.stack([frame.binary(obj) if obj in frame.masks else nothing for frame in segments])
            for obj in segments.objects
        }
        return cls(frames, masks, name, segments.frames)


def to_clip(clip: Any, number: int = 0) -> AnnotatedClip:
    """
    Any form of a clip as an [`AnnotatedClip`].

    Args:
        clip (`AnnotatedClip`, `tuple`, `Mapping` or `Any`):
            One; or (frames, masks by object); or a row of a dataset with `frames` (or `video`) and `masks`; or
            anything with attributes `frames` and `masks`.
        number (`int`, *optional*, defaults to `0`):
            Names clips without a name.

    Raises:
        TypeError: if it is none of these.
    """
    if isinstance(clip, AnnotatedClip):
        return clip
    name = f"clip {number}"
    if isinstance(clip, tuple) and len(clip) == 2:
        return AnnotatedClip(*clip, name)
    if isinstance(clip, Mapping) and "masks" in clip and ("frames" in clip or "video" in clip):
        return AnnotatedClip(clip.get("frames", clip.get("video")), clip["masks"], clip.get("name", name))
    if hasattr(clip, "frames") and hasattr(clip, "masks"):
        return AnnotatedClip(clip.frames, clip.masks, getattr(clip, "name", name))
    raise TypeError(f"Expected a clip as (frames, {{object: masks}}) or an AnnotatedClip, got {type(clip).__name__}.")


def davis_clips(root: str | Path, names: Sequence[str] | None = None) -> Iterator[AnnotatedClip]:
    """
    The sequences of a folder of DAVIS, read one by one.

    Args:
        root (`str` or `Path`):
            With `JPEGImages/480p/<name>` and `Annotations/480p/<name>`.
        names (`Sequence[str]`, *optional*, defaults to all that have frames and masks):
            Which sequences.

    Raises:
        ValueError: if a sequence is not there, or none is.
    """
    frames, masks = Path(root) / "JPEGImages" / "480p", Path(root) / "Annotations" / "480p"
    there = sorted(path.name for path in masks.glob("*") if (frames / path.name).is_dir())
    if not there or not set(names or ()) <= set(there):
        raise ValueError(f"Expected frames and masks of {list(names or ['a sequence'])} in {root}, got {there}.")
    return (AnnotatedClip.from_segments(frames / name, read_davis(masks / name), name) for name in (names or there))
