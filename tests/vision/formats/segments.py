"""Masks of a short video for tests of files: two objects that overlap, one with a hole, one in pieces and late."""

import numpy as np

from hf_iclr.vision.session.prompts import encode_rle
from hf_iclr.vision.session.segments import FrameSegments, VideoSegments


SIZE = (24, 37)


def masks(frame: int) -> dict[int, np.ndarray]:
    first, second = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    first[4:16, 3 + frame : 17 + frame] = True
    first[8:11, 8 + frame : 10 + frame] = False
    if frame >= 2:
        second[10:22, 12:20] = True
        second[0, 36] = second[20:, 30:] = True
    return {1: first, 2: second}


def video(rle: bool = False, numbers=(0, 1, 2, 3)) -> VideoSegments:
    frames = []
    for number in numbers:
        shown = {obj: encode_rle(mask) if rle else mask for obj, mask in masks(number).items()}
        scores = {1: 0.75, 2: 0.5}
        logits = {obj: 3.0 if mask.any() else -3.0 for obj, mask in masks(number).items()}
        frames.append(FrameSegments(number, SIZE, shown, scores, logits))
    return VideoSegments(frames)


def same_masks(one: VideoSegments, other: VideoSegments) -> bool:
    """The same frames with the same masks; an object without a mask is one that is out of sight."""
    if one.frames != other.frames:
        return False
    objects = {*one.objects, *other.objects}
    nothing = np.zeros(SIZE, bool)
    return all(
        np.array_equal(*(f.binary(obj) if obj in f.masks else nothing for f in (one[number], other[number])))
        for number in one.frames
        for obj in objects
    )
