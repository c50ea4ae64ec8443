"""Masks as folders of images and labels: DAVIS, a folder an object (SA-V), YouTube-VOS, YOLO."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from contourpy import contour_generator
from PIL import Image
from scipy.spatial import cKDTree

from hf_iclr.untrusted import as_written_by, inside

from ..session.segments import FrameSegments, VideoSegments, fill_polygon
from .segment_files import PALETTE, atomic_folder, given_segments, read_json


VOID = 255  # of DAVIS: pixels that belong to nothing
Videos = Mapping[str, VideoSegments]


def write_davis(segments: Iterable[FrameSegments], folder: str | Path) -> None:
    """
    Writes a palette PNG a frame, `00000.png` and so on, whose pixels are object numbers. Where masks overlap, the
    lowest object number wins, as in the reference code of SAM 2.

    Args:
        segments (`Iterable[FrameSegments]`):
            [`VideoSegments`] or an iterator, which is read lazily.
        folder (`str` or `Path`):
            New or empty.

    Raises:
        ValueError: if an object's number isn't in 1..254 or there is something in the folder.
    """
    if isinstance(segments, VideoSegments):
        check_palette_numbers(segments.objects)
    with atomic_folder(folder) as part:
        for frame in segments:
            check_palette_numbers(frame.objects)
            save_labels(to_labels(frame), part / f"{frame.frame:05}.png")


def check_palette_numbers(objects: Iterable[int]) -> None:
    """Raises `ValueError` for object numbers that a palette PNG can't hold; those of SA-V begin at 0."""
    if unfit := [obj for obj in objects if not 0 < obj < VOID]:
        raise ValueError(
            f"Expected object numbers in 1..{VOID - 1}, which a palette PNG can hold, got {unfit[0]}. Number the "
            "objects from 1 on, or write a folder an object: write_object_folders."
        )


def to_labels(segments: FrameSegments) -> np.ndarray:
    """Object numbers by pixel in uint8, 0 the background; the lowest wins where masks overlap."""
    labels = np.zeros(segments.size, np.uint8)
    for obj in sorted(segments.objects, reverse=True):
        labels[segments.binary(obj)] = obj
    return labels


def read_davis(folder: str | Path) -> VideoSegments:
    """
    Reads a folder of PNGs whose pixels are object numbers, 0 the background and 255 void; in gray images such as those
    of DAVIS 2016 without any number between, 255 is object 1. Every object has a mask on every frame.

    Raises:
        ValueError: if there are no PNGs numbered by their names.
    """
    images = {number: read_labels(file) for number, file in _numbered(folder).items()}
    return _from_labels(images)


def write_object_folders(segments: Iterable[FrameSegments], folder: str | Path) -> None:
    """
    Writes a folder an object with a PNG a frame, `001/00000.png`, whose pixels are 1 on the object: the form of the
    validation and test sets of SA-V. Overlaps are kept.

    Args:
        segments (`Iterable[FrameSegments]`):
            [`VideoSegments`] or an iterator, which is read lazily.
        folder (`str` or `Path`):
            New or empty.
    """
    with atomic_folder(folder) as part:
        for frame in segments:
            for obj in frame.objects:
                (part / f"{obj:03}").mkdir(exist_ok=True)
                save_labels(frame.binary(obj).astype(np.uint8), part / f"{obj:03}" / f"{frame.frame:05}.png")


def read_object_folders(folder: str | Path) -> VideoSegments:
    """
    Reads what `write_object_folders` writes; any pixel that isn't 0 is the object's.

    Raises:
        ValueError: if there are no numbered folders with numbered PNGs.
    """
    masks: dict[int, dict[int, np.ndarray]] = {}
    for obj, files in sorted((int(path.name), path) for path in Path(folder).iterdir() if path.name.isdigit()):
        for number, file in _numbered(files).items():
            masks.setdefault(number, {})[obj] = np.asarray(Image.open(file)) != 0
    if not masks:
        raise ValueError(f"Expected a folder for each object, such as 001, in {folder}, got none.")
    return VideoSegments(given_segments(n, next(iter(m.values())).shape, m) for n, m in masks.items())


def write_youtube_vos(videos: Videos, folder: str | Path, categories: Mapping[int, str] | None = None) -> None:
    """
    Writes `meta.json` and `Annotations/<video>/00000.png`: the form of YouTube-VOS. Overlaps go as in `write_davis`.

    Args:
        videos (`Mapping[str, VideoSegments]`):
            By name.
        folder (`str` or `Path`):
            New or empty.
        categories (`Mapping[int, str]`, *optional*, defaults to "object" for all):
            What each object is.
    """
    meta: dict[str, Any] = {"videos": {}}
    check_palette_numbers(obj for segments in videos.values() for obj in segments.objects)
    with atomic_folder(folder) as part:
        for name, segments in videos.items():
            write_davis(segments, inside(part / "Annotations", name))
            meta["videos"][name] = {
                "objects": {
                    str(obj): {
                        "category": (categories or {}).get(obj, "object"),
                        "frames": [f"{frame.frame:05}" for frame in segments if frame.areas.get(obj)],
                    }
                    for obj in segments.objects
                }
            }
        (part / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def read_youtube_vos(folder: str | Path) -> dict[str, VideoSegments]:
    """
    Reads a folder with `meta.json` and `Annotations`, by name of the video. An object has a mask from the first frame
    that `meta.json` names for it.

    Raises:
        ValueError: if `meta.json` or the PNGs of a video are missing, or a video's name leads out of the folder.
    """
    videos, path = {}, Path(folder) / "meta.json"
    with as_written_by("YouTube-VOS", path):
        for name, record in read_json(path, ("videos",))["videos"].items():
            files = _numbered(inside(Path(folder) / "Annotations", name))
            images = {number: read_labels(file) for number, file in files.items()}
            first = {int(obj): min(map(int, about["frames"]), default=0) for obj, about in record["objects"].items()}
            videos[name] = _from_labels(images, first)
    return videos


def write_yolo(
    segments: Iterable[FrameSegments], folder: str | Path, categories: Mapping[int, str] | None = None
) -> None:
    """
    Writes a text file a frame, `00000.txt`, for YOLO segmentation: a line an object in sight, with its class and its
    outline in shares of width and height, through the outermost pixels of the mask: readers cut it to whole pixels and
    fill it with its border. All pieces and holes are in one outline, joined where they are nearest by lines that run
    to and fro; between pieces, these are read as part of the mask. `classes.txt` has the names of the classes.

    Args:
        segments (`Iterable[FrameSegments]`):
            [`VideoSegments`] or an iterator, which is read lazily.
        folder (`str` or `Path`):
            New or empty.
        categories (`Mapping[int, str]`, *optional*, defaults to a class for each object):
            What each object is; classes are numbered in the order of their names.
    """
    classes = sorted(set(categories.values())) if categories else []
    with atomic_folder(folder) as part:
        for frame in segments:
            lines = []
            for obj in frame.objects:
                name = f"object {obj}" if categories is None else categories.get(obj, "object")
                if name not in classes:
                    classes.append(name)
                if len(outline := _joined_outline(frame.binary(obj))):
                    shares = (outline + 0.5) / np.array(frame.size[::-1])
                    lines.append(f"{classes.index(name)} " + " ".join(f"{share:.7g}" for share in shares.ravel()))
            (part / f"{frame.frame:05}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        (part / "classes.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")


def read_yolo(folder: str | Path, size: tuple[int, int]) -> VideoSegments:
    """
    Reads the labels of a video: pixels whose middles lie within an outline or on it. Labels know classes, not objects:
    object number 1 is all of class 0, and so on.

    Args:
        folder (`str` or `Path`):
            With a numbered text file a frame.
        size (`tuple[int, int]`):
            Height and width of the frames.

    Raises:
        ValueError: if there is no such file, or a line is no class and at least three points.
    """
    frames = []
    for number, file in _numbered(folder, ".txt").items():
        masks: dict[int, np.ndarray] = {}
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                label, *values = line.split()
                obj, points = int(label) + 1, np.array(values, dtype=float).reshape(-1, 2)
            except ValueError:
                points = np.empty((0, 2))
            if len(points) < 3:
                raise ValueError(f"Expected a class and at least three pairs of x and y in {file}, got {line!r:.80}.")
            masks[obj] = masks.get(obj, np.zeros(size, bool)) | _fill_closed(points * size[::-1] - 0.5, size)
        frames.append(given_segments(number, size, masks))
    return VideoSegments(frames)


def save_labels(labels: np.ndarray, path: Path) -> None:
    """Writes object numbers by pixel as a palette PNG in the colours of DAVIS."""
    image = Image.fromarray(labels, mode="P")
    image.putpalette(PALETTE.ravel().tolist())
    image.save(path)


def read_labels(file: Path) -> np.ndarray:
    """The object numbers of an image's pixels, as [`read_davis`] understands them."""
    image = Image.open(file)
    if image.mode not in ("P", "L", "1"):
        raise ValueError(f"Expected a palette or gray PNG, got {file} in mode {image.mode}.")
    labels = np.array(image.convert("L") if image.mode == "1" else image)
    binary = image.mode != "P" and not ((labels > 0) & (labels < VOID)).any()
    return np.where(labels == VOID, 1 if binary else 0, labels)


def labelled_masks(files: Mapping[int, Path], frame: int) -> dict[int, np.ndarray]:
    """The masks of a frame by object, from one of `files` as [`read_labels`] reads it."""
    labels = read_labels(files[frame])
    return {int(number): labels == number for number in np.unique(labels) if number}


def _from_labels(images: Mapping[int, np.ndarray], first: Mapping[int, int] | None = None) -> VideoSegments:
    objects = sorted({int(obj) for labels in images.values() for obj in np.unique(labels)} - {0})
    return VideoSegments(
        given_segments(
            number,
            labels.shape,
            {obj: labels == obj for obj in objects if first is None or number >= first.get(obj, 0)},
        )
        for number, labels in images.items()
    )


def _numbered(folder: str | Path, suffix: str = ".png") -> dict[int, Path]:
    """The files of a kind by the number that is their name."""
    files = Path(folder).glob(f"*{suffix}") if Path(folder).is_dir() else []
    numbered = {int(file.stem): file for file in files if file.stem.isdigit()}
    if not numbered:
        raise ValueError(f"Expected files such as 00000{suffix} in {folder}, got none.")
    return dict(sorted(numbered.items()))


def _joined_outline(mask: np.ndarray) -> np.ndarray:
    """
    All outlines of a mask through the middles of its outermost pixels as one, `(n, 2)` of x, y: each goes into the
    first at the two points that are nearest, there and back.
    """
    lines: Any = contour_generator(z=np.pad(mask.astype(float), 1)).lines(1 - 1e-6)  # all but at the pixels within
    outlines = [_corners(np.rint(line[:-1] - 1)) for line in lines]
    if not outlines:
        return np.empty((0, 2))
    joined, rest = outlines[0], outlines[1:]
    nearest = [_nearest(joined, outline) for outline in rest]
    while rest:
        place = min(range(len(rest)), key=lambda number: nearest[number][0])
        (_, at, start), outline = nearest.pop(place), rest.pop(place)
        around = np.roll(outline, -start, axis=0)
        between = (joined[at : at + 1] + around[:1]) / 2 + 0.25  # no middle of a pixel: not a border to `read_yolo`
        joined = np.concatenate([joined[: at + 1], between, around, around[:1], between, joined[at:]])
        nearest = [_nearest(joined, outline) for outline in rest]
    return np.resize(joined, (max(len(joined), 3), 2))  # of one pixel or two


def _fill_closed(points: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose middles (whole numbers) lie within a polygon or on its border."""
    whole = np.rint(points)
    near = (np.abs(points - whole) < 0.01).all(axis=1)
    filled = fill_polygon(np.where(near[:, None], whole, points), size)
    starts = whole.astype(int)
    ways = np.roll(starts, -1, axis=0) - starts
    starts, ways = (ends[near & np.roll(near, -1)] for ends in (starts, ways))  # from one middle of a pixel to another
    steps = np.maximum(np.gcd(*ways.T), 1)
    edges = np.repeat(np.arange(len(steps)), steps)
    places = np.arange(len(edges)) - np.repeat(steps.cumsum() - steps, steps)
    x, y = (starts[edges] + places[:, None] * (ways // steps[:, None])[edges]).T
    inside = (x >= 0) & (y >= 0) & (x < size[1]) & (y < size[0])
    filled[y[inside], x[inside]] = True
    return filled


def _corners(points: np.ndarray) -> np.ndarray:
    """A closed outline without the points that lie between their neighbours or on them."""
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)] if (points != points[0]).any() else points[:1]
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turns = (before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]) | ((before * after).sum(axis=1) < 0)
    return points[turns] if turns.any() else points


def _nearest(one: np.ndarray, other: np.ndarray) -> tuple[float, int, int]:
    """The distance of two outlines' nearest corners, and which they are."""
    distances, places = cKDTree(one).query(other)
    start = int(distances.argmin())
    return float(distances[start]), int(places[start]), start
