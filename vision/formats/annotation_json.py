"""Masks of videos as JSON: SA-V, COCO and YouTube-VIS."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco

from ..session.prompts import decode_rle, encode_rle
from ..session.segments import VideoSegments
from .segment_files import given_segments, read_json, write_json


SAV_STRIDE = 4  # SA-V annotates every fourth frame
SAV_FRAMES = "masklet_frames"  # our field: numbers of the frames, where those of SA-V don't tell them
Videos = Mapping[str, VideoSegments]


def write_sav(segments: VideoSegments, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """
    Writes the masklets of a video as SA-V does, with what follows from them: sizes, visibility, first appearance.
    Where the numbers of the frames don't follow from those of SA-V, they are written as `masklet_frames`.

    Args:
        segments (`VideoSegments`):
            Of the frames that count as annotated, in SA-V every fourth.
        path (`str` or `Path`):
            The JSON file.
        about (`Mapping[str, Any]`, *optional*):
            Other fields of the file, such as `video_id` or `masklet_type`, and any that shall not be counted anew.

    Raises:
        ValueError: if there are no masks.
    """
    if not segments.objects:
        raise ValueError("Expected masks of at least one object, got none.")
    objects, size = segments.objects, next(iter(segments)).size
    empty = encode_rle(np.zeros(size, bool))
    masklet = [[frame.rle(obj) if obj in frame.masks else empty for obj in objects] for frame in segments]
    areas = np.array([[int(coco.area(rle)) for rle in frame] for frame in masklet]).T
    sizes = [float(area[area > 0].mean()) if area.any() else 0.0 for area in areas]
    visible = [np.flatnonzero(area) for area in areas]
    first = [int(seen[0]) if len(seen) else len(segments) for seen in visible]
    pixels = size[0] * size[1]
    record = {
        "video_id": Path(path).stem,
        "video_frame_count": float(segments.frames[-1] + 1),
        "video_height": float(size[0]),
        "video_width": float(size[1]),
        "video_resolution": float(pixels),
        "masklet": masklet,
        "masklet_id": objects,
        "masklet_size_rel": [round(value / pixels, 10) for value in sizes],
        "masklet_size_abs": [round(value, 10) for value in sizes],
        "masklet_size_bucket": ["small" if s < 32**2 else "medium" if s < 96**2 else "large" for s in sizes],
        "masklet_visibility_changes": [
            int(np.count_nonzero(np.diff(area[start:] > 0))) for area, start in zip(areas, first, strict=True)
        ],
        "masklet_first_appeared_frame": [float(start) for start in first],
        "masklet_frame_count": [len(segments)] * len(objects),
        "masklet_num": len(objects),
    }
    record |= about or {}
    if _sav_frames(record) != segments.frames:
        record[SAV_FRAMES] = segments.frames
    write_json(record, path)


def read_sav(path: str | Path, stride: int | None = None) -> tuple[VideoSegments, dict[str, Any]]:
    """
    Reads the masklets of a video of SA-V.

    Args:
        path (`str` or `Path`):
            A JSON file such as `sav_000001_manual.json`.
        stride (`int`, *optional*):
            Frames of the video from one annotated frame to the next. Left out, the file tells: `masklet_frames` as
            `write_sav` writes it, else how many frames the video has, 4 where that fits.

    Returns:
        `tuple`: [`VideoSegments`] with masks as COCO RLE, and the fields beside the masklets, for `write_sav`.

    Raises:
        ValueError: if the file has no masklets, or doesn't tell which frames they are of.
    """
    record = read_json(path, ("masklet", "masklet_id"))
    objects = [int(obj) for obj in record["masklet_id"]]
    count = len(record["masklet"])
    if stride is not None and stride < 1:
        raise ValueError(f"Expected a stride of at least 1, got {stride}.")
    numbers = _sav_frames(record) if stride is None else [*range(0, count * stride, stride)]
    if numbers is None:
        raise ValueError(
            f"Expected {path} to tell which frames its {count} annotated ones are, got video_frame_count "
            f"{record.get('video_frame_count')!r} and {SAV_FRAMES} {record.get(SAV_FRAMES)!r:.80}. Pass stride=."
        )
    frames, size = [], (int(record.get("video_height", 0)), int(record.get("video_width", 0)))
    for number, masks in zip(numbers, record["masklet"], strict=True):
        if len(masks) != len(objects):
            raise ValueError(f"Expected {len(objects)} masks on frame {number} of {path}, got {len(masks)}.")
        size = tuple(masks[0]["size"]) if masks else size
        frames.append(given_segments(number, size, dict(zip(objects, masks, strict=True))))
    ours = ("masklet", "masklet_id", SAV_FRAMES)
    return VideoSegments(frames), {key: value for key, value in record.items() if key not in ours}


def _sav_frames(record: Mapping[str, Any]) -> list[int] | None:
    """The numbers of annotated frames: as they are listed, else evenly from frame 0 to near the end of the video."""
    count = len(record["masklet"])
    if (listed := record.get(SAV_FRAMES)) is not None:
        whole = isinstance(listed, list) and all(type(number) is int and number >= 0 for number in listed)
        return listed if whole and len(listed) == count and sorted({*listed}) == listed else None
    length = record.get("video_frame_count")
    if count == 1:
        return [0]
    if not isinstance(length, (int, float)) or not count <= length < 2**31:
        return None
    last = int(length) - 1
    fits = (count - 1) * SAV_STRIDE <= last < count * SAV_STRIDE
    stride = SAV_STRIDE if fits else last // (count - 1)
    return [*range(0, count * stride, stride)] if last < (count + 2) * stride else None  # two may be missing


def write_coco(videos: Videos, path: str | Path, categories: Mapping[int, str] | None = None) -> None:
    """
    Writes videos as images of a COCO detection file: an annotation for each object in sight, its mask as RLE.

    Args:
        videos (`Mapping[str, VideoSegments]`):
            By name; frame 7 of "park" is the image `park/00007.jpg`.
        path (`str` or `Path`):
            The JSON file.
        categories (`Mapping[int, str]`, *optional*, defaults to "object" for all):
            What each object is.
    """
    numbers, described = _categories(videos, categories)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, segments in videos.items():
        for frame in segments:
            height, width = frame.size
            image = {"id": len(images) + 1, "file_name": f"{name}/{frame.frame:05}.jpg", "height": height}
            images.append({**image, "width": width, "video": name, "frame": frame.frame})
            for obj in frame.objects:
                rle = frame.rle(obj)
                if coco.area(rle):
                    annotation = {"id": len(annotations) + 1, "image_id": len(images), "category_id": numbers(obj)}
                    annotation |= {"segmentation": rle, "area": int(coco.area(rle)), "iscrowd": 0}
                    annotation |= {"bbox": coco.toBbox(rle).tolist(), "object": obj, "score": frame.scores[obj]}
                    annotations.append(annotation)
    write_json({"images": images, "annotations": annotations, "categories": described}, path)


def read_coco(path: str | Path) -> dict[str, VideoSegments]:
    """
    Reads a COCO file: what `write_coco` writes by video and object; of any other file each image is a video of one
    frame, named by its file, with its annotations as objects from 1 on.

    Raises:
        ValueError: if the file has no images and annotations.
    """
    record = read_json(path, ("images", "annotations"))
    by_image = annotations_by(record, "image_id")
    videos: dict[str, list] = {}
    for image in record["images"]:
        size = image["height"], image["width"]
        masks, scores = {}, {}
        for number, annotation in enumerate(by_image.get(image["id"], []), start=1):
            obj = int(annotation.get("object", number))
            masks[obj] = as_rle(annotation["segmentation"], size)
            scores[obj] = float(annotation.get("score", 1.0))
        name = image.get("video", image["file_name"])
        videos.setdefault(name, []).append(given_segments(image.get("frame", 0), size, masks, scores))
    return {name: VideoSegments(frames) for name, frames in videos.items()}


def write_ytvis(videos: Videos, path: str | Path, categories: Mapping[int, str] | None = None) -> None:
    """
    Writes videos in the form of YouTube-VIS: an annotation for each object, with an RLE or null for each frame. As in
    its own files, RLE have a list of runs, which evaluations such as TrackEval read.

    Args:
        videos (`Mapping[str, VideoSegments]`):
            By name; the files of "park" are `park/00000.jpg` and so on.
        path (`str` or `Path`):
            The JSON file.
        categories (`Mapping[int, str]`, *optional*, defaults to "object" for all):
            What each object is.
    """
    numbers, described = _categories(videos, categories)
    records: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, segments in videos.items():
        height, width = next(iter(segments)).size
        files = [f"{name}/{frame.frame:05}.jpg" for frame in segments]
        video = {"id": len(records) + 1, "width": width, "height": height, "length": len(segments)}
        records.append({**video, "file_names": files})
        for obj in segments.objects:
            shown = [frame.areas.get(obj, 0) > 0 for frame in segments]
            masks = [frame.rle(obj) if seen else None for frame, seen in zip(segments, shown, strict=True)]
            scores = [frame.scores[obj] for frame in segments if obj in frame.scores]
            annotation = {"id": len(annotations) + 1, "video_id": len(records), "category_id": numbers(obj)}
            annotation |= {"object": obj, "iscrowd": 0, "width": width, "height": height}
            runs = [None if rle is None else _with_list(rle) for rle in masks]
            annotation |= {"score": float(np.mean(scores)), "segmentations": runs}
            annotation |= {"bboxes": [None if rle is None else coco.toBbox(rle).tolist() for rle in masks]}
            annotation |= {"areas": [None if rle is None else int(coco.area(rle)) for rle in masks]}
            annotations.append(annotation)
    write_json({"videos": records, "annotations": annotations, "categories": described}, path)


def read_ytvis(path: str | Path) -> dict[str, VideoSegments]:
    """
    Reads a file of YouTube-VIS, by the folder that a video's files are in. Frames have the numbers of their files, or
    of their places where files have other names; objects have their own numbers if the file tells them, else 1 and on.

    Raises:
        ValueError: if the file has no videos and annotations.
    """
    record = read_json(path, ("videos", "annotations"))
    by_video = annotations_by(record, "video_id")
    videos = {}
    for video in record["videos"]:
        size = video["height"], video["width"]
        tracks = enumerate(by_video.get(video["id"], []), start=1)
        objects = {int(track.get("object", number)): track for number, track in tracks}
        frames = []
        for place, file in enumerate(video["file_names"]):
            masks = {o: track["segmentations"][place] for o, track in objects.items()}
            masks = {o: as_rle(mask, size) for o, mask in masks.items() if mask is not None}
            scores = {o: float(track.get("score", 1.0)) for o, track in objects.items()}
            stem = Path(file).stem  # OVIS' files are no bare numbers
            frames.append(given_segments(int(stem) if stem.isdigit() else place, size, masks, scores))
        videos[Path(video["file_names"][0]).parent.name] = VideoSegments(frames)
    return videos


def annotations_by(record: Mapping[str, Any], key: str) -> dict[Any, list[dict[str, Any]]]:
    """The annotations of a COCO or YouTube-VIS file by the number of their image or video."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for annotation in record["annotations"]:
        found.setdefault(annotation[key], []).append(annotation)
    return found


def _categories(videos: Videos, categories: Mapping[int, str] | None):
    """Gives the number of an object's category, and all of them as COCO describes them."""
    objects = {obj for segments in videos.values() for obj in segments.objects}
    of = {obj: (categories or {}).get(obj, "object") for obj in objects}
    names = sorted({*(categories or {}).values(), *of.values()})
    described = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    return (lambda obj: names.index(of[obj]) + 1), described


def _with_list(rle: Mapping[str, Any]) -> dict[str, Any]:
    """An RLE whose `counts` are the lengths of runs, down the columns, the first of what is not in the mask."""
    pixels = decode_rle(rle).ravel(order="F")
    ends = np.flatnonzero(np.diff(pixels, prepend=False, append=not pixels[-1]))
    return {"size": list(rle["size"]), "counts": np.diff(ends, prepend=0).tolist()}


def as_rle(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Any segmentation of COCO (polygons, RLE with a list or with text) as RLE with text, of an image of a size."""
    if isinstance(segmentation, Mapping) and isinstance(segmentation["counts"], str):
        return dict(segmentation)
    if not isinstance(segmentation, Mapping):  # pycocotools trusts polygons with its memory
        if not segmentation:
            raise ValueError("Expected a mask of each object, got an annotation whose segmentation is empty.")
        reach = 2 * max(size)
        for polygon in segmentation:
            points = np.asarray(polygon, dtype=float)
            if points.ndim != 1 or len(points) < 6 or len(points) % 2 or not (np.abs(points) <= reach).all():
                raise ValueError(f"Expected polygons as [x, y, ...] of an image of {size}, got {polygon!r:.80}.")
    rle = coco.frPyObjects(segmentation, *size)
    rle = coco.merge(rle) if isinstance(rle, list) else rle
    return {"size": list(size), "counts": rle["counts"].decode("ascii")}
