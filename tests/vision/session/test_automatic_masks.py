"""Everything in an image, and new objects in a video."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MaskGenerationPipeline, Sam2Config, Sam2Model, Sam2VisionConfig

from hf_iclr.vision.session import pipeline as module
from hf_iclr.vision.session.automatic_masks import AutomaticMaskConfig, crop_boxes, generate_masks, new_objects
from hf_iclr.vision.session.mask_postprocessing import small_regions
from tests.vision.tiny import clip, tiny_pipe


IMAGE = clip(1, 48, 80)[0]
ALL = {"points_per_side": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


def generate(image=IMAGE, **options) -> list[dict]:
    pipe = tiny_pipe()
    return generate_masks(pipe.model, pipe.processor, image, AutomaticMaskConfig(**{**ALL, **options}))


def test_masks_are_those_of_transformers_generator_on_a_square_image():
    pipe = tiny_pipe()
    config = pipe.model.config
    still = Sam2Model(
        Sam2Config(
            vision_config=Sam2VisionConfig(**config.vision_config.to_dict()),
            prompt_encoder_config=config.prompt_encoder_config.to_dict(),
            mask_decoder_config=config.mask_decoder_config.to_dict(),
        )
    ).eval()
    missing = still.load_state_dict(pipe.model.state_dict(), strict=False).missing_keys
    assert not missing
    image = clip(1, 64, 64)[0]
    theirs = MaskGenerationPipeline(model=still, image_processor=pipe.processor.image_processor, device="cpu")(
        image=Image.fromarray(image),
        points_per_crop=3,
        pred_iou_thresh=0.56,
        stability_score_thresh=0.0,
        crops_nms_thresh=0.999,
    )
    ours = generate(image, pred_iou_thresh=0.56, box_nms_thresh=0.999)
    assert 1 < len(ours) == len(theirs["masks"])
    expected = sorted(zip(theirs["scores"].tolist(), theirs["masks"], strict=True), key=lambda pair: -pair[0])
    for record, (score, mask) in zip(ours, expected, strict=True):
        assert record["predicted_iou"] == score and np.array_equal(record["segmentation"], np.asarray(mask))


def test_records_have_the_references_fields():
    record = generate()[0]
    mask = record["segmentation"]
    assert mask.shape == (48, 80) and mask.dtype == bool and record["area"] == mask.sum()
    x, y, width, height = record["bbox"]
    assert mask[int(y) : int(y + height), int(x) : int(x + width)].sum() == mask.sum()
    assert record["crop_box"] == [0, 0, 80, 48] and 0 <= record["stability_score"] <= 1
    grid = [[x, y] for x in (80 / 6, 40, 400 / 6) for y in (8, 24, 40)]
    assert any(np.allclose(record["point_coords"][0], point) for point in grid)
    scores = [record["predicted_iou"] for record in generate()]
    assert scores == sorted(scores, reverse=True)


def test_clicks_reach_the_model_where_they_are():
    """A click of a grid gives the mask that the same click gives as a prompt."""
    pipe = tiny_pipe()
    (record,) = generate(point_grids=[np.array([[0.75, 0.25]])], box_nms_thresh=0.0)
    (frame,) = pipe(IMAGE, prompts={1: {"points": [[60, 12]]}})
    assert np.array_equal(record["segmentation"], frame.masks[1])
    assert record["predicted_iou"] == pytest.approx(frame.scores[1], abs=1e-6)


def test_thresholds_take_away_masks():
    everything = generate(box_nms_thresh=1.0, stability_score_offset=0.02)
    assert len(everything) == 27  # nine clicks, three masks each
    for name, key in (("pred_iou_thresh", "predicted_iou"), ("stability_score_thresh", "stability_score")):
        middle = float(np.median([record[key] for record in everything]))
        some = generate(box_nms_thresh=1.0, stability_score_offset=0.02, **{name: middle})
        assert 0 < len(some) < 27 and min(record[key] for record in some) >= middle
    assert len(generate(box_nms_thresh=0.1)) < len(generate(box_nms_thresh=0.9)) <= 27
    assert len(generate(box_nms_thresh=1.0, multimask_output=False)) == 9
    easy, hard = (generate(box_nms_thresh=1.0, stability_score_offset=offset) for offset in (0.0, 5.0))
    assert {record["stability_score"] for record in easy} == {1.0} and max(r["stability_score"] for r in hard) < 1
    assert all(
        (a["segmentation"] >= b["segmentation"]).all()
        for a, b in zip(
            sorted(everything, key=lambda r: r["predicted_iou"]),
            sorted(generate(box_nms_thresh=1.0, mask_threshold=0.05), key=lambda r: r["predicted_iou"]),
            strict=True,
        )
    )


def test_batches_of_clicks_change_nothing():
    for a, b in zip(generate(), generate(points_per_batch=2), strict=True):
        assert np.array_equal(a["segmentation"], b["segmentation"])


def test_crops_are_cut_as_the_reference_cuts_them():
    # 100 x 60 pixels, overlap int(.2 * 60 * 2 / 2) = 12: two crops of ceil((12 + 100) / 2) = 56 by ceil(72 / 2) = 36.
    assert list(crop_boxes((60, 100), 1, 0.2)) == [
        (0, (0, 0, 100, 60)),
        (1, (0, 0, 56, 36)),
        (1, (0, 24, 56, 60)),
        (1, (44, 0, 100, 36)),
        (1, (44, 24, 100, 60)),
    ]
    assert len(list(crop_boxes((60, 100), 2, 0.2))) == 1 + 4 + 16


def test_crops_find_more_and_stay_off_their_inner_borders():
    large = clip(1, 160, 200)[0]
    thresholds = {"box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
    records = generate(large, crop_n_layers=1, crop_n_points_downscale_factor=3, **thresholds)
    cropped = [record for record in records if record["crop_box"][2:] != [200, 160]]
    for record in cropped:
        x, y, width, _ = record["crop_box"]
        assert not record["segmentation"][:, : max(0, x)].any() and not record["segmentation"][:y].any()
        left, right = record["bbox"][0], record["bbox"][0] + record["bbox"][2]
        assert (left - x > 19) or x == 0
        assert (x + width - right > 19) or x + width == 200
    assert AutomaticMaskConfig(points_per_side=9, crop_n_points_downscale_factor=3).grid(1).shape == (9, 2)


def test_small_regions_go():
    ragged = generate(box_nms_thresh=1.0)
    clean = generate(box_nms_thresh=1.0, min_mask_region_area=40)
    for sign in (False, True):
        assert any(small_regions(record["segmentation"] ^ sign, 40).any() for record in ragged)
    assert clean and not any(small_regions(record["segmentation"], 40).any() for record in clean)
    assert all(record["area"] == record["segmentation"].sum() for record in clean)


def test_masks_can_be_refined_by_themselves():
    plain, refined = generate(box_nms_thresh=1.0), generate(box_nms_thresh=1.0, use_m2m=True)
    assert len(plain) == len(refined) == 27
    assert not np.array_equal(plain[0]["segmentation"], refined[0]["segmentation"])


def test_masks_of_tracked_objects_are_not_new():
    def record(left, right):
        mask = np.zeros((10, 20), bool)
        mask[:, left:right] = True
        return {"segmentation": mask}

    tracked = [record(0, 10)["segmentation"]]
    found = [record(1, 10), record(8, 16), record(9, 16), record(18, 20)]
    assert new_objects(found, tracked, 0.5) == [found[1], found[3]]


def test_an_image_is_segmented_as_it_is_found():
    pipe = tiny_pipe()
    (frame,) = pipe(IMAGE, prompts="auto", automatic=AutomaticMaskConfig(**ALL), output="rle")
    found = generate()
    assert frame.objects == list(range(1, len(found) + 1))
    assert all(np.array_equal(frame.binary(obj), record["segmentation"]) for obj, record in enumerate(found, 1))
    assert list(frame.scores.values()) == [record["predicted_iou"] for record in found]


def test_a_video_is_searched_again_for_new_objects(monkeypatch):
    def square(left):
        mask = np.zeros((48, 80), bool)
        mask[10:30, left : left + 20] = True
        return {"segmentation": mask, "predicted_iou": 1.0, "object_score": 1.0}

    looked = []

    def found(model, processor, image, *args):
        looked.append(int(np.flatnonzero((video == image).all((1, 2, 3)))[0]))
        return [square(5), square(50)] if len(looked) > 1 else [square(5)]

    video = clip(8)
    monkeypatch.setattr(module, "generate_masks", found)
    pipe = tiny_pipe()
    result = pipe(video, prompts="auto", automatic={"frame": 1, "every": 3, "max_overlap": 0.999})
    assert looked == [1, 4, 7] and result.frames == list(range(1, 8))
    assert result[3].objects == [1] and set(result[4].objects) >= {1, 2} and 2 in result[4].prompted
    looked.clear()
    streamed = list(pipe.stream(iter(video), prompts="auto", automatic={"frame": 1}))
    assert looked == [1] and [frame.objects for frame in streamed] == [[]] + [[1]] * 7


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"points_per_side": 0}, "points_per_side of at least 1"),
        ({"every": 0}, "every to be at least 1"),
        ({"expire_after": 0}, "expire_after to be at least 1"),
        ({"point_grids": [np.zeros((1, 2))], "crop_n_layers": 1}, "2 point grids, one a layer, got 1"),
    ],
)
def test_bad_options_are_told(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        AutomaticMaskConfig(**options)


def test_a_video_in_which_nothing_is_found_says_so():
    with pytest.raises(ValueError, match="Nothing was found on frame 0. Lower pred_iou_thresh"):
        tiny_pipe()(clip(3), prompts="auto", automatic={"points_per_side": 1, "pred_iou_thresh": 1.0})


def test_gradients_are_not_kept():
    assert torch.is_grad_enabled()
    generate()
    assert torch.is_grad_enabled() and all(p.grad is None for p in tiny_pipe().model.parameters())


@pytest.mark.parametrize("streaming", [False, True])
def test_objects_out_of_sight_expire_and_their_numbers_are_not_given_again(monkeypatch, streaming):
    pipe, video = tiny_pipe(), clip(12)
    whole = np.zeros((48, 80), bool)
    places = [whole.copy() for _ in range(12)]
    for number, place in enumerate(places):
        place[10:20, 5 * number : 5 * number + 5] = True
    # Every search finds something else; object 1 alone stays in sight.
    found = iter(places)
    monkeypatch.setattr(
        "hf_iclr.vision.session.pipeline.generate_masks", lambda *args: [{"segmentation": next(found)}]
    )
    in_sight = property(lambda segments: {obj: obj == 1 for obj in segments.objects})
    monkeypatch.setattr("hf_iclr.vision.session.segments.FrameSegments.visible", in_sight)

    def objects(**automatic) -> list[list[int]]:
        nonlocal found
        found = iter(places)
        automatic |= {"every": 3, "max_overlap": 0.999}
        frames = iter(video) if streaming else video
        return [segments.objects for segments in pipe(frames, prompts="auto", automatic=automatic)]

    assert objects()[-1] == objects(expire_after=None)[-1] == [1, 2, 3, 4]
    expected = [[1]] * 3 + [[1, 2]] * 2 + [[1]] + [[1, 3]] * 2 + [[1]] + [[1, 4]] * 2 + [[1]]
    assert objects(expire_after=2) == expected
