"""Videos with true masks, read from what others publish, in the one form that training and evaluations take."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from glob import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from datasets import load_dataset
from PIL import Image

from hf_iclr.untrusted import check_links

from ..session.videos import list_images
from .annotated_images import find_annotated_images, read_coco_images
from .annotated_video import AnnotatedVideo, to_annotated
from .annotation_json import read_sav
from .mask_folders import labelled_masks


def read_videos(folder: str | Path, split: str = "train") -> list[AnnotatedVideo]:
    """
    The annotated videos of a folder, by what is in it.

    Args:
        folder (`str` or `Path`):
            `JPEGImages` and `Annotations` of DAVIS, MOSE or YouTube-VOS; SA-V's JSON beside its videos, manual
            masklets if there are any; what [`annotate`] wrote, of which the accepted masklets count; a COCO file, or a
            folder with `annotations/instances_{split}*.json` or `_annotations.coco.json` in it; or folders `images`
            and `masks` with files of the same names.
        split (`str`, *optional*, defaults to `"train"`):
            Which of DAVIS' lists, `ImageSets/2017/{split}.txt`, of COCO's files or of the folders in `images` to keep
            to; folders without lists are taken whole.

    Raises:
        ValueError: if there are none, or one that [`annotate`] wrote down is no file or folder.
    """
    folder = Path(folder)
    if folder.suffix.lower() == ".json" and folder.is_file():
        return read_coco_images(folder)
    if (folder / "shards").is_dir():
        check_links(folder)
        files = [file for file in sorted(folder.glob("shards/*.parquet")) if pq.read_metadata(file).num_rows]
        shards = [escape(str(file)) for file in files]  # else brackets in a name are a pattern, which finds nothing
        rows = load_dataset("parquet", data_files=shards, split="train") if shards else []
        videos = read_rows(row for row in rows if row["video"] is not None)
        for video in videos:
            if not (Path(video.video).is_file() or Path(video.video).is_dir()):
                raise ValueError(
                    f"Expected the videos of {folder} to be files or folders here, got {video.video!r:.80}, which is "
                    "none; nothing else that a folder names is opened. Pass rows of your own: `read_rows(rows)`."
                )
        if not videos:
            raise ValueError(f"Expected accepted masklets of videos that have a path in {folder}, got none.")
        return videos
    if (folder / "Annotations").is_dir():
        inner = "480p" if (folder / "Annotations" / "480p").is_dir() else ""
        videos = read_png_videos(folder / "JPEGImages" / inner, folder / "Annotations" / inner)
        names = folder / "ImageSets" / "2017" / f"{split}.txt"
        if names.exists():
            listed = names.read_text().split()
            videos = [video for video in videos if video.name in listed]
        return videos
    if images := find_annotated_images(folder, split):
        return images
    for kind in ("manual", "auto"):
        if any(folder.rglob(f"*_{kind}.json")):
            return read_sav_videos(folder, kind)
    raise ValueError(
        "Expected a folder with JPEGImages and Annotations, with name_manual.json beside name.mp4, with a COCO file, "
        f"with images and masks, or with the shards that `annotate` writes, got {folder}."
    )


def read_png_videos(frames: str | Path, masks: str | Path) -> list[AnnotatedVideo]:
    """
    The videos of DAVIS, MOSE and YouTube-VOS: for each video a folder of images and one of PNGs, whose pixels are
    object numbers, 255 void; in gray images without any number between, 255 is object 1. Or, as in the validation and
    test sets of SA-V, one with a folder of PNGs for each object, whose pixels are the object's where they aren't 0.

    Args:
        frames (`str` or `Path`): Folder of folders of images, such as `JPEGImages/480p`.
        masks (`str` or `Path`): Folder of folders of the same names, such as `Annotations/480p` with
            `video/00000.png` in it, or `Annotations_6fps` with `video/000/00000.png`.

    Raises:
        ValueError: if no folder of masks has images of its name.
    """
    videos = []
    for folder in sorted(path for path in Path(masks).iterdir() if path.is_dir()):
        images = list_images(Path(frames) / folder.name)
        places = {image.stem: place for place, image in enumerate(images)}
        files = {places[file.stem]: file for file in folder.glob("*.png") if file.stem in places}
        by_object: dict[int, dict[int, Path]] = {}
        for file in sorted(folder.glob("[0-9]*/*.png")):
            if file.stem in places:
                by_object.setdefault(places[file.stem], {})[int(file.parent.name)] = file
        if files or by_object:
            masks_of = partial(labelled_masks, files) if files else partial(_object_masks, by_object)
            videos.append(AnnotatedVideo(images, sorted(files or by_object), masks_of, folder.name))
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
            videos.append(AnnotatedVideo.from_segments(str(video), read_sav(file)[0], video.stem))
    if not videos:
        raise ValueError(f"Expected name_{kind}.json beside name.mp4 in {folder}, got no such pair.")
    return videos


def read_rows(rows: Iterable[Mapping[str, Any]]) -> list[AnnotatedVideo]:
    """
    The videos of a `datasets.Dataset` with a row for each object, as `annotate` makes it.

    Args:
        rows (`Iterable[Mapping]`): Each with `video` (anything `open_video` takes), `frames` (numbers of those with a
            mask) and `masks` (as many COCO RLEs); *optional* are `object`, its number, `name`: rows of one name, or of
            one path, are of one video, and `status`: what is not "accepted" is left out.

    Raises:
        ValueError: if a row has no such columns, as many masks as frames, or no video.
    """
    groups: dict[Any, tuple[Any, dict[int, dict[int, Any]]]] = {}
    for number, row in enumerate(rows):
        if not {"video", "frames", "masks"} <= set(row) or len(row["frames"]) != len(row["masks"]):
            raise ValueError(f"Expected video, frames and as many masks in row {number}, got columns {sorted(row)}.")
        if row.get("status", "accepted") != "accepted":
            continue
        if (video := row["video"]) is None:
            raise ValueError(f"Row {number} has no video, for it was annotated in memory. Put its frames there.")
        key = row.get("name") or (video if isinstance(video, (str, Path)) else number)
        _, masks = groups.setdefault(key, (video, {}))
        objects = {obj for frame in masks.values() for obj in frame}
        obj = row.get("object", max(objects, default=0) + 1)
        for frame, mask in zip(row["frames"], row["masks"], strict=True):
            masks.setdefault(frame, {})[obj] = mask
    return [
        AnnotatedVideo(video, sorted(masks), masks.__getitem__, str(key)) for key, (video, masks) in groups.items()
    ]


def stream_videos(videos: Iterable[Any]) -> Iterator[AnnotatedVideo]:
    """
    Videos as they come, in the forms of [`to_annotated`], or joined from rows as [`read_rows`] takes them; rows of one
    video must follow one another.
    """

    def key(numbered: tuple[int, Any]) -> Any:
        number, video = numbered
        if not isinstance(video, Mapping) or isinstance(video.get("masks"), Mapping):
            return number
        path = video.get("video")
        return video.get("name") or (path if isinstance(path, (str, Path)) else number)

    for _, group in groupby(enumerate(videos), key):
        number, video = next(group)
        if isinstance(video, Mapping) and not isinstance(video.get("masks"), Mapping):
            yield from read_rows([video, *(row for _, row in group)])
        else:
            yield to_annotated(video, number)


def _object_masks(files: Mapping[int, Mapping[int, Path]], frame: int) -> dict[int, np.ndarray]:
    return {obj: np.asarray(Image.open(file)) != 0 for obj, file in files[frame].items()}
