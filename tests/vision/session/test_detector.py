"""A detector in the place of a person: new objects get numbers, tracked ones keep theirs, lost ones go."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ObjectDetectionPipeline, ResNetConfig

from hf_iclr.vision.session.automatic_masks import detect_objects
from hf_iclr.vision.session.pipeline import Sam2VideoPipeline
from tests.vision.session.test_memory import kept_bytes
from tests.vision.tiny import clip, tiny_pipe


VIDEO = clip(9)
LEFT, RIGHT = [8, 12, 28, 30], [50, 5, 75, 40]
NEVER_OVERLAPS = {"max_overlap": 1.01}


def record(box, label="cat", score=0.9) -> dict:
    return {"score": score, "label": label, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}


class Detector:
    """Gives what is written down for each frame, and remembers which were shown to it."""

    def __init__(self, found: dict[int, list], video=VIDEO):
        self.found, self.video, self.asked = found, video, []

    def __call__(self, image) -> list:
        self.asked.append(next(n for n, frame in enumerate(self.video) if np.array_equal(frame, np.array(image))))
        return self.found.get(self.asked[-1], [])


def logits(segments, obj) -> dict[int, np.ndarray]:
    return {frame.frame: frame.masks[obj] for frame in segments if obj in frame.masks}


@pytest.mark.parametrize("streaming", [False, True])
def test_boxes_of_a_detector_are_those_given_by_hand_bit_for_bit(streaming):
    pipe = tiny_pipe()

    def video():
        return iter(VIDEO) if streaming else VIDEO

    detector = Detector({0: [record(LEFT)], 4: [record(RIGHT, "dog")], 8: []})
    found = pipe(video(), detector=detector, automatic={"every": 4} | NEVER_OVERLAPS, output="logits")
    by_hand = pipe(video(), prompts={0: {1: {"box": LEFT}}, 4: {2: {"box": RIGHT}}}, output="logits")
    assert detector.asked == [0, 4, 8] and found.objects == by_hand.objects == [1, 2]
    for obj in (1, 2):
        own, expected = logits(found, obj), logits(by_hand, obj)
        assert list(own) == list(expected) == [*range(0 if obj == 1 else 4, 9)]
        assert all(np.array_equal(own[frame], expected[frame]) for frame in own)
    assert found[3].labels == {1: "cat"} and found[8].labels == {1: "cat", 2: "dog"}
    assert found[4].prompted == {2} and found[8].to_dicts()[1]["label"] == "dog"


def test_a_tracked_object_keeps_its_number_and_another_gets_the_next():
    pipe = tiny_pipe()
    # What the model makes of the boxes decides: the same box again is the same object, whatever its label.
    seen = Detector({0: [record(LEFT)]})
    tracked = pipe(VIDEO, detector=seen, automatic={"every": 3}).to_dicts()
    masks = {row["frame"]: row["mask"] for row in tracked}
    again = Detector({0: [record(LEFT)], 3: [record(LEFT, "dog")], 6: [record(LEFT)]})
    result = pipe(VIDEO, detector=again, automatic={"every": 3, "max_overlap": 0.05})
    assert result.objects == [1] and result[8].labels == {1: "cat"}
    assert all(np.array_equal(result[frame].masks[1], mask) for frame, mask in masks.items())
    # Of two boxes of one object, the surer one is taken.
    both = Detector({0: [record(LEFT, "dog", 0.2), record(LEFT, "cat", 0.8)], 3: [record(RIGHT)]})
    result = pipe(VIDEO, detector=both, automatic={"every": 3, "max_overlap": 0.999})
    assert result.objects == [1, 2] and result[5].labels == {1: "cat", 2: "cat"} and result[2].objects == [1]


@pytest.mark.parametrize("streaming", [False, True])
def test_lost_objects_expire_and_numbers_are_not_given_again(monkeypatch, streaming):
    in_sight = property(lambda segments: {obj: obj != 1 or segments.frame < 2 for obj in segments.objects})
    monkeypatch.setattr("hf_iclr.vision.session.segments.FrameSegments.visible", in_sight)
    detector = Detector({0: [record(LEFT)], 6: [record(LEFT, "dog")]})
    video = iter(VIDEO) if streaming else VIDEO
    result = tiny_pipe()(video, detector=detector, automatic={"every": 3, "expire_after": 2})
    assert [frame.objects for frame in result] == [[1]] * 4 + [[]] * 2 + [[2]] * 3
    assert result[3].labels == {1: "cat"} and result[8].labels == {2: "dog"}


def test_a_video_may_begin_without_an_object():
    late = Detector({4: [record(LEFT)]})
    assert tiny_pipe()(VIDEO, detector=late, automatic={"every": 4}).frames == [4, 5, 6, 7, 8]
    late.asked.clear()
    streamed = tiny_pipe().stream(iter(VIDEO), detector=late, automatic={"every": 4})
    assert [frame.objects for frame in streamed] == [[]] * 4 + [[1]] * 5 and late.asked == [0, 4, 8]
    with pytest.raises(ValueError, match="found on any of frames 0, 4, 8. Lower the threshold of the detector"):
        tiny_pipe()(VIDEO, detector=Detector({}), automatic={"every": 4})
    (image,) = tiny_pipe()(VIDEO[4], detector=late)
    assert image.objects == [1] and image.labels == {1: "cat"}


def test_a_stream_without_a_person_is_flat(monkeypatch):
    """A new object every five frames, out of sight after three."""
    found, sizes = np.array([LEFT]), []
    pipe = tiny_pipe()
    session = None

    def opened(video, **options):
        nonlocal session
        session = Sam2VideoPipeline.session(pipe, video, **options)
        return session

    monkeypatch.setattr(pipe, "session", opened)
    born = {}
    in_sight = property(
        lambda s: {obj: s.frame - born.setdefault(obj, s.frame) < 3 for obj in s.objects},
    )
    monkeypatch.setattr("hf_iclr.vision.session.segments.FrameSegments.visible", in_sight)
    camera = (VIDEO[number % 9] for number in range(50))
    for frame in pipe.stream(camera, detector=lambda image: found, automatic={"every": 5, "expire_after": 1}):
        sizes.append(kept_bytes(session))
        assert len(frame.objects) <= 1 and len(session._prompts) <= 1
    assert max(born) > 7 and max(sizes[30:]) <= max(sizes[:30])


def test_a_pipeline_of_transformers_is_a_detector():
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], layer_type="basic")
    backbone.out_features = ["stage4"]
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 3, "id2label": {0: "cat"}}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    torch.manual_seed(0)
    model = DetrForObjectDetection(
        DetrConfig(backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, **sizes, **layers)
    ).eval()
    processor = DetrImageProcessor(size={"shortest_edge": 32, "longest_edge": 64})
    detector = ObjectDetectionPipeline(model=model, image_processor=processor, device="cpu", threshold=0.0)
    boxes = [row["box"] for row in detector(Image.fromarray(VIDEO[0]))]
    expected = [[box[key] for key in ("xmin", "ymin", "xmax", "ymax")] for box in boxes]
    detections = detect_objects(detector, VIDEO[0])
    assert 0 < len(detections) <= 3 and {label for _, label in detections} == {"cat"}
    assert all(prompt.box in expected for prompt, _ in detections)
    assert tiny_pipe()(VIDEO[:2], detector=detector).objects


def test_boxes_are_taken_in_any_form_and_those_off_the_image_left_out():
    boxes = [[1, 2, 30, 40], [90, 3, 99, 9], [5, 5, 5, 9], [-4.5, 12, 99, 30]]
    for given in (boxes, np.array(boxes), torch.tensor(boxes), [{"box": box} for box in boxes]):
        found = detect_objects(lambda image, given=given: given, VIDEO[0])
        assert [prompt.box for prompt, _ in found] == [boxes[0], boxes[3]]
    for bad in ([{"bbox": boxes[0]}], [[1, 2, 3]], None, [record(["a", 1, 2, 3])]):
        with pytest.raises(ValueError, match="Expected the detector to give"):
            detect_objects(lambda image, bad=bad: bad, VIDEO[0])
    with pytest.raises(TypeError, match="detector that takes an image and gives boxes, got str"):
        tiny_pipe()(VIDEO, detector="yolo")


def test_prompts_by_hand_leave_the_detector_out():
    detector = Detector({0: [record(LEFT)]})
    pipe = Sam2VideoPipeline(model=tiny_pipe().model, processor=tiny_pipe().processor, device="cpu", detector=detector)
    assert pipe(VIDEO, prompts={0: {7: {"box": RIGHT}}}).objects == [7] and not detector.asked
    assert pipe(VIDEO).objects == pipe(VIDEO, prompts="auto").objects == [1] and detector.asked == [0, 0]


def test_results_go_out_as_rows_of_coco_and_as_detections(monkeypatch):
    detector = Detector({0: [record(LEFT), record(RIGHT, "dog", 0.5)]})
    result = tiny_pipe()(VIDEO[:2], detector=detector, automatic=NEVER_OVERLAPS)
    rows = result.to_coco({"cat": 3, "dog": 7})
    assert [(row["image_id"], row["object"], row["category_id"]) for row in rows] == [
        (0, 1, 3), (0, 2, 7), (1, 1, 3), (1, 2, 7),
    ]  # fmt: skip
    for row in rows:
        frame, obj = result[row["image_id"]], row["object"]
        assert row["segmentation"] == frame.rle(obj) and row["score"] == frame.scores[obj]
        x0, y0, x1, y1 = frame.boxes[obj]
        assert row["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    assert {row["category_id"] for row in result.to_coco()} == {1}
    with pytest.raises(ValueError, match="number of each label in categories, got none of 'dog'"):
        result.to_coco({"cat": 3})
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="Type `pip install supervision`"):
        result[0].to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    shown = result[0].to_supervision({"cat": 3, "dog": 7})
    assert shown.xyxy.tolist() == list(result[0].boxes.values()) and shown.tracker_id.tolist() == [1, 2]
    assert shown.class_id.tolist() == [3, 7] and shown.data["class_name"].tolist() == ["cat", "dog"]
    assert np.array_equal(shown.mask, np.stack([result[0].masks[1], result[0].masks[2]]))
    assert shown.confidence.tolist() == pytest.approx(list(result[0].scores.values()))
