"""Images with masks, each a video of one frame: COCO as others lay it out, and folders of masks."""

import json

import numpy as np
import pytest
from PIL import Image

from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotated_images import read_coco_images, read_image_masks
from hf_iclr.vision.formats.annotated_videos import read_videos
from hf_iclr.vision.formats.mask_folders import save_labels
from hf_iclr.vision.session.prompts import encode_rle, to_boolean_mask
from hf_iclr.vision.training.clip_dataset import ClipDataset
from tests.vision.tiny import SIDE, tiny_processor


CLIP = procedural_clip(0, frames=3, size=48)


def write_coco(images, path, names=("a.jpg", "b.jpg", "c.jpg")):
    """Object 1 as runs, object 2 as text, a crowd, and nothing on the last image."""
    record: dict = {"images": [], "annotations": []}
    for number, name in enumerate(names):
        images.mkdir(parents=True, exist_ok=True)
        Image.fromarray(CLIP.frames[number]).save(images / name)
        record["images"].append({"id": 10 + number, "file_name": name, "height": 48, "width": 48})
        if number < 2:
            for obj, crowd in ((1, 0), (2, 0), (2, 1)):
                shown = {
                    "image_id": 10 + number,
                    "segmentation": encode_rle(CLIP.masks[obj][number]),
                    "iscrowd": crowd,
                }
                record["annotations"].append(shown)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("images", "file", "read"),
    [
        ("train2017", "annotations/instances_train2017.json", "."),
        ("images", "annotations/instances_train.json", "."),
        ("train", "train/_annotations.coco.json", "."),
        (".", "_annotations.coco.json", "."),
        ("images", "labels.json", "labels.json"),
    ],
)
def test_coco_is_read_as_others_lay_it_out(tmp_path, images, file, read):
    write_coco(tmp_path / images, tmp_path / file)
    first, second = read_videos(tmp_path / read)
    assert first.name == "a.jpg" and list(first.frames) == [0] and sorted(first.masks(0)) == [1, 2]
    for obj in (1, 2):
        assert np.array_equal(to_boolean_mask(second.masks(0)[obj]), CLIP.masks[obj][1])
    item = ClipDataset([first], tiny_processor())[0]
    assert item["masks"].shape == (2, 1, SIDE, SIDE) and item["plan"].kind != "mask"


def test_masks_beside_images_are_object_numbers_or_one_object_in_white(tmp_path):
    for name, labels in {"a": CLIP.masks[1][0] * 1 + CLIP.masks[2][0] * 2, "b": CLIP.masks[1][1] * 255}.items():
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(CLIP.frames["ab".index(name)]).save(tmp_path / "images" / f"{name}.jpg")
        if name == "a":
            save_labels(labels.astype(np.uint8), tmp_path / "masks" / "a.png")
        else:
            Image.fromarray(labels.astype(np.uint8)).save(tmp_path / "masks" / "b.png")
    Image.fromarray(CLIP.frames[2]).save(tmp_path / "images" / "bare.jpg")
    first, second = read_videos(tmp_path)
    assert np.array_equal(first.masks(0)[2], CLIP.masks[2][0]) and sorted(second.masks(0)) == [1]
    frames, masks = second.load()
    assert frames.num_frames == 1 and np.array_equal(masks[1][0], CLIP.masks[1][1])


def test_what_is_missing_or_leads_out_gets_a_sentence(tmp_path):
    write_coco(tmp_path / "elsewhere", tmp_path / "annotations" / "a.json")
    with pytest.raises(ValueError, match="Pass read_coco_images"):
        read_coco_images(tmp_path / "annotations" / "a.json")
    assert len(read_coco_images(tmp_path / "annotations" / "a.json", tmp_path / "elsewhere")) == 2
    write_coco(tmp_path / "images", tmp_path / "b.json", names=("a.jpg", "b.jpg"))
    text = (tmp_path / "b.json").read_text().replace("b.jpg", "../elsewhere/b.jpg")
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(ValueError, match="elsewhere"):
        read_coco_images(tmp_path / "b.json", tmp_path / "images")
    (tmp_path / "c.json").write_text(json.dumps({"images": [{"id": 1}], "annotations": []}))
    with pytest.raises(ValueError, match="Expected objects"):
        read_coco_images(tmp_path / "c.json")
    with pytest.raises(ValueError, match="no such pair"):
        read_image_masks(tmp_path / "images", tmp_path / "annotations")
