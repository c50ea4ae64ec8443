"""What readers and writers of masks share: files that are whole or not there, colours, frames of given masks."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from hf_iclr.saving import atomic_file
from hf_iclr.untrusted import parse_json

from ..session.prompts import check_rle
from ..session.segments import FrameSegments


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """
    A folder to write to that becomes `path` once everything went well.

    Args:
        path (`str` or `Path`):
            A folder that is not there yet, or is empty.

    Raises:
        ValueError: if there is something in it already.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"Expected a new or an empty folder to write to, got {path}, which holds something.")
    part = path.with_name(f".{os.getpid()}.{path.name}")
    part.mkdir(parents=True)
    try:
        yield part
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_json(record: Any, path: str | Path) -> None:
    """Writes a record as JSON, whole or not at all."""
    with atomic_file(path) as part:
        part.write_text(json.dumps(record), encoding="utf-8")


def read_json(path: str | Path, keys: tuple[str, ...]) -> dict[str, Any]:
    """
    Reads a record of JSON.

    Raises:
        ValueError: if it is no JSON or lacks a key.
    """
    record = parse_json(Path(path).read_bytes(), path, nan=True)
    if not isinstance(record, dict) or not set(keys) <= set(record):
        raise ValueError(
            f"Expected {', '.join(keys)} in {path}, got {list(record) if isinstance(record, dict) else type(record)}."
        )
    return record


def given_segments(
    frame: int, size: tuple[int, int], masks: Mapping[int, Any], scores: Mapping[int, float] | None = None
) -> FrameSegments:
    """
    The [`FrameSegments`] of masks that a file gives: their score is 1 unless the file has another, their object score
    10 where there is something, else -10, which is how SAM 2 scores a given mask.

    Args:
        frame (`int`):
            Number of the frame.
        size (`tuple[int, int]`):
            Height and width.
        masks (`Mapping[int, np.ndarray or dict]`):
            By object, boolean arrays or COCO RLE.
        scores (`Mapping[int, float]`, *optional*):
            By object.
    """
    for mask in masks.values():
        if isinstance(mask, Mapping):
            check_rle(mask)
    visible = {obj: coco.area(mask) > 0 if isinstance(mask, Mapping) else mask.any() for obj, mask in masks.items()}
    return FrameSegments(
        frame,
        size,
        dict(masks),
        {obj: 1.0 if scores is None else scores.get(obj, 1.0) for obj in masks},
        {obj: 10.0 if seen else -10.0 for obj, seen in visible.items()},
    )


def _davis_palette() -> np.ndarray:
    """The colours of PASCAL VOC and DAVIS: the bits of a number, spread over red, green and blue from the top."""
    numbers = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((numbers >> channel & 1) << (7 - bit)).astype(np.uint8)
        numbers = numbers >> 3
    return palette


PALETTE = _davis_palette()  # shape (256, 3), by object number; 0 is the background
