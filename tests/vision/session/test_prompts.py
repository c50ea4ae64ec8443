"""What counts as a prompt, and what is said about one that does not."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco

from hf_iclr.vision.session.prompts import VideoPrompts, decode_rle, encode_rle, to_boolean_mask


MASK = np.zeros((4, 6), dtype=bool)
MASK[1:3, 2:5] = True


def test_all_forms_of_a_prompt_are_read_and_described():
    prompts = VideoPrompts(
        {
            40: {3: {"mask": MASK}},
            "0": {
                "1": {"points": torch.tensor([[1, 2], [3, 4]]), "labels": np.array([1, 0])},
                2: {"box": (1, 1, 5, 3)},
            },
        }
    )
    assert list(prompts) == [0, 40] and prompts.objects == [1, 2, 3]
    assert prompts[0][1].points == [[1.0, 2.0], [3.0, 4.0]] and prompts[0][1].labels == [1, 0]
    assert prompts.describe() == "frame 0: object 1 by 2 points, object 2 by a box\nframe 40: object 3 by a mask"


def test_labels_are_positive_by_default_and_points_join_a_box():
    (prompt,) = VideoPrompts({0: {1: {"points": [[1, 2]], "box": [0, 0, 4, 4]}}})[0].values()
    assert prompt.labels == [1] and prompt.box == [0.0, 0.0, 4.0, 4.0]


def test_prompts_by_object_alone_are_on_the_first_frame():
    assert VideoPrompts({7: {"box": [0, 0, 1, 1]}}) == VideoPrompts({0: {7: {"box": [0, 0, 1, 1]}}})


def test_json_gives_back_the_prompts_with_their_masks(tmp_path):
    prompts = VideoPrompts({3: {1: {"mask": MASK}, 2: {"points": [[1.5, 2]], "labels": [0]}}})
    text = prompts.to_json(tmp_path / "prompts.json")
    for again in (VideoPrompts.from_json(text), VideoPrompts.from_json(tmp_path / "prompts.json")):
        assert again == prompts and np.array_equal(again[3][1].mask, MASK)
    assert set(json.loads(text)["3"]["2"]) <= set(
        VideoPrompts.SCHEMA["additionalProperties"]["additionalProperties"]["properties"]
    )


def test_the_callers_lists_are_neither_changed_nor_kept():
    given = {0: {1: {"points": [[1, 2]], "labels": [1]}}}
    before = copy.deepcopy(given)
    prompts = VideoPrompts(given)
    prompts[0][1].points.append([9.0, 9.0])
    assert given == before
    given[0][1]["points"][0][0] = 5
    assert prompts[0][1].points[0] == [1.0, 2.0]


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK[None].astype(float), torch.from_numpy(MASK), Image.fromarray(MASK), encode_rle(MASK)],
    ids=["array", "leading dimension", "tensor", "image", "rle"],
)
def test_masks_of_any_form_are_the_same(mask):
    assert np.array_equal(to_boolean_mask(mask), MASK)


def test_run_lengths_are_those_of_coco():
    rle = encode_rle(MASK)
    assert rle["counts"] == coco.encode(np.asfortranarray(MASK.astype(np.uint8)))["counts"].decode()
    # Column by column: 9 pixels of background, then 2 of the mask and 2 of background, three times.
    assert np.array_equal(decode_rle({"size": [4, 6], "counts": [9, 2, 2, 2, 2, 2, 5]}), MASK)


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ({0: {1: {}}}, "at least one of"),
        ({0: {1: {"point": [[1, 2]]}}}, "some of points, labels, box, mask"),
        ({0: {1: {"points": [[1, 2]], "labels": [1, 0]}}}, "1 points and 2 labels"),
        ({0: {1: {"points": [[1, 2]], "labels": [2]}}}, "1 .on the object. or 0"),
        ({0: {1: {"points": [[1, 2, 3]]}}}, r"points as \[\[x, y\], ...\]"),
        ({0: {1: {"points": "here"}}}, r"points as \[\[x, y\], ...\]"),
        ({0: {1: {"box": [5, 1, 2, 3]}}}, "x0 < x1"),
        ({0: {1: {"mask": MASK, "box": [0, 0, 1, 1]}}}, "mask alone"),
        ({0: {1: {"mask": MASK[0]}}}, "shape"),
        ({0: {1: {"mask": {"size": [1, 1]}}}}, "COCO RLE"),
        ({0: {1: {"mask": {"size": [4, 6], "counts": [9, 2]}}}}, "runs of all 24 pixels"),
        ({0: {1: {"mask": {"size": [4, 6], "counts": [-1, 25]}}}}, "runs of all 24 pixels"),
        ({-1: {1: {"box": [0, 0, 1, 1]}}}, "from 0 on"),
        ({1: {1: {"box": [0, 0, 1, 1]}}, "1": {1: {"box": [2, 2, 3, 3]}}}, "each once, got 1"),
        ({float("inf"): {}}, "whole number for the frame, got inf"),
        ({"first": {1: {"box": [0, 0, 1, 1]}}}, "whole number for the frame"),
        ({0: {1.5: {"box": [0, 0, 1, 1]}}}, "whole number for the object"),
    ],
)
def test_a_malformed_prompt_is_told(prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        VideoPrompts(prompts)


def test_what_is_no_mapping_is_told():
    with pytest.raises(TypeError, match="Expected prompts such as"):
        VideoPrompts([[1, 2]])
    with pytest.raises(TypeError, match="by object on frame 0"):
        VideoPrompts({0: [1, 2]})


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        ({5: {1: {"points": [[1, 2]]}}}, r"0\.\.4, got a prompt on frame 5"),
        ({0: {1: {"points": [[7, 2]]}}}, r"x in 0\.\.6 and y in 0\.\.4"),
        ({0: {1: {"points": [[float("nan"), 2]]}}}, r"x in 0\.\.6"),
        ({0: {1: {"box": [0, 5, 6, 7]}}}, r"y in 0\.\.4"),
        ({0: {1: {"mask": MASK.T}}}, r"frame's size \(4, 6\), got \(6, 4\)"),
    ],
)
def test_what_does_not_fit_the_video_is_told(prompts, sentence):
    with pytest.raises(ValueError, match=sentence):
        VideoPrompts(prompts).check((4, 6), 5)


@pytest.mark.parametrize(
    "mask",
    [
        np.full((4, 4), 7.5),
        np.array([[np.nan, 1.0]]),
        np.array([[-1, 3]]),
        [np.zeros((3, 2)), np.zeros((4, 2))],
        "mask",
    ],
    ids=["positive", "not a number", "below zero", "polygons", "text"],
)
def test_masks_that_may_mean_anything_are_refused(mask):
    with pytest.raises(ValueError, match="Expected a mask"):
        VideoPrompts({0: {1: {"mask": mask}}})
