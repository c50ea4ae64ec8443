"""Annotated images, each a video of one frame: files of COCO, and a folder of images beside one of masks."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hf_iclr.untrusted import inside

from ..session.videos import list_images
from .annotated_video import AnnotatedVideo
from .annotation_json import annotations_by, as_rle
from .mask_folders import labelled_masks
from .segment_files import read_json


def read_coco_images(path: str | Path, images: str | Path | None = None) -> list[AnnotatedVideo]:
    """
    The images of a COCO file with their objects, whose masks are made of polygons or runs when they are asked for.
    Crowds (`iscrowd`) are no objects, and images without an object are left out.

    Args:
        path (`str` or `Path`):
            A file such as `instances_train2017.json` or `_annotations.coco.json`.
        images (`str` or `Path`, *optional*):
            The folder that names of files are of. Left out: that of the file, `images` in or beside it, or the one
            beside it with the name of its set, such as `train2017`, whichever has the first image.

    Raises:
        ValueError: if the file has no images and annotations, or no folder has its images.
    """
    path = Path(path)
    record = read_json(path, ("images", "annotations"))
    by_image = annotations_by(record, "image_id")
    shown = [
        image for image in record["images"] if any(not one.get("iscrowd") for one in by_image.get(image["id"], []))
    ]
    if not shown:
        raise ValueError(f"Expected objects on the images of {path}, got none.")
    name = path.stem.removeprefix("instances_")
    nearby = [path.parent, path.parent / "images", path.parent.parent / "images", path.parent.parent / name]
    folders = nearby if images is None else [Path(images)]
    found = [folder for folder in folders if inside(folder, shown[0]["file_name"]).is_file()]
    if not found:
        raise ValueError(
            f"Expected the image {shown[0]['file_name']!r:.80} of {path} in {' or '.join(map(str, folders))}, found "
            "it in none. Pass read_coco_images(path, images=folder)."
        )
    return [
        AnnotatedVideo(
            str(inside(found[0], image["file_name"])),
            [0],
            partial(_coco_masks, by_image[image["id"]], (image["height"], image["width"])),
            image["file_name"],
        )
        for image in shown
    ]


def read_image_masks(images: str | Path, masks: str | Path) -> list[AnnotatedVideo]:
    """
    The images of a folder with masks of the same names in another, PNGs whose pixels are object numbers as in DAVIS;
    in gray ones with 0 and 255 alone, 255 is object 1.

    Args:
        images (`str` or `Path`): Folder of images.
        masks (`str` or `Path`): Folder of PNGs.

    Raises:
        ValueError: if no mask has an image of its name.
    """
    files = {mask.stem: mask for mask in Path(masks).glob("*.png")}
    pairs = [(image, files[image.stem]) for image in list_images(images) if image.stem in files]
    if not pairs:
        raise ValueError(f"Expected images in {images} and PNGs of the same names in {masks}, got no such pair.")
    return [AnnotatedVideo(str(image), [0], partial(labelled_masks, {0: mask}), mask.stem) for image, mask in pairs]


def find_annotated_images(folder: Path, split: str) -> list[AnnotatedVideo] | None:
    """
    The annotated images of a folder, `None` if it holds none of these: `annotations/instances_<split>*.json` of COCO,
    `_annotations.coco.json` in it or in `<split>` (`valid` for "val"), or `images` and `masks`.
    """
    splits = [split, "valid"] if split == "val" else [split]
    listed = [file for name in splits for file in sorted(folder.glob(f"annotations/instances_{name}*.json"))]
    listed += [folder / name / "_annotations.coco.json" for name in [*splits, ""]]
    for file in listed:
        if file.is_file():
            return read_coco_images(file)
    if (folder / "images").is_dir() and (folder / "masks").is_dir():
        inner = next((name for name in splits if (folder / "images" / name).is_dir()), "")
        return read_image_masks(folder / "images" / inner, folder / "masks" / inner)
    return None


def _coco_masks(annotations: Sequence[Mapping[str, Any]], size: tuple[int, int], frame: int) -> dict[int, Any]:
    objects = [annotation for annotation in annotations if not annotation.get("iscrowd")]
    return {number: as_rle(one["segmentation"], size) for number, one in enumerate(objects, start=1)}
