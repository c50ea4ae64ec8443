"""The semi-supervised protocol: what is prompted, what counts, and what is reported."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hf_iclr import evaluate_vos
from hf_iclr.vision.evaluation.j_and_f import j_and_f
from hf_iclr.vision.formats.annotated_video import AnnotatedVideo
from tests.vision.session.drifting import DriftingPipe, iou, pixels, truth
from tests.vision.tiny import clip, tiny_pipe


def test_objects_are_followed_from_one_prompt():
    """Three clicks are exact; one is two pixels off where it is made, but not after."""
    pipe = DriftingPipe()
    result = evaluate_vos(pipe, [(pixels(5), {1: truth(5)})], prompts=("mask", 1, 5))
    assert [session.passes for session in pipe.sessions] == [1, 1, 1]
    assert list(result.table["clicks"]) == [0, 1, 3]  # the fourth had nothing left to correct
    assert result.table["j"].tolist() == pytest.approx([np.mean([iou(1), iou(2), iou(3)])] * 3)
    rows = result.frames[result.frames["prompt"] == "mask"]
    assert rows["frame"].tolist() == [1, 2, 3] and rows["j"].tolist() == [iou(1), iou(2), iou(3)]


def test_all_frames_may_count():
    result = evaluate_vos(DriftingPipe(), [(pixels(3), {1: truth(3)})], [1], skip_first_and_last=False)
    assert result.frames["j"].tolist() == [iou(2), iou(1), iou(2)] and result.table["frames"].tolist() == [3]


def test_objects_are_shown_where_they_come_first(caplog):
    """And an object that is there too late to be counted, or not at all, is left out."""
    pipe = DriftingPipe(start=2)
    masks = {1: truth(6, 2), 2: truth(6, 4), 3: np.zeros_like(truth(6))}
    result = evaluate_vos(pipe, [(pixels(6), masks)], ["box"])
    assert pipe.sessions[0].clicks == {1: {2: [None] * 3}}
    assert result.frames[["frame", "since"]].to_numpy().tolist() == [[3, 1], [4, 2]]
    assert "Object 2 of clip 0 is left out" in caplog.text and "Object 3" in caplog.text


def test_only_annotated_frames_count():
    every_other = AnnotatedVideo.from_masks(pixels(9), {1: truth(5)}, [0, 2, 4, 6, 8])
    result = evaluate_vos(DriftingPipe(), [every_other], ["mask"])
    assert result.frames["frame"].tolist() == [2, 4, 6]
    assert result.frames["j"].tolist() == [iou(2), iou(4), iou(6)]


def test_equal_to_the_pipeline_by_hand():
    video = clip(5)
    masks = {1: np.zeros((5, 48, 80), bool), 2: np.zeros((5, 48, 80), bool)}
    masks[1][:, 12:30, 8:28] = masks[2][:, 20:40, 40:70] = True
    result = evaluate_vos(tiny_pipe(), [(video, masks)], ["mask", "box"], smoothing=0.5)
    for kind, prompts in (
        ("mask", {obj: {"mask": masks[obj][0]} for obj in masks}),
        ("box", {1: {"box": [8, 12, 28, 30]}, 2: {"box": [40, 20, 70, 40]}}),
    ):
        segments = tiny_pipe()(video, prompts=prompts, smoothing=0.5)
        for obj, true in masks.items():
            expected = j_and_f([np.stack([frame.masks[obj] for frame in segments])], [true], True)
            row = result.table.query(f"object == {obj} and prompt == '{kind}'").iloc[0]
            assert {name: row[name] for name in expected} == expected
            assert row["seconds"] > 0
    assert result.mean().loc["mask", "j"] == result.table.query("prompt == 'mask'")["j"].mean()
    assert result.mean().index.tolist() == ["mask", "box"]


def test_tables_and_plot_are_saved(tmp_path):
    result = evaluate_vos(DriftingPipe(), [(pixels(5), {1: truth(5)})] * 2, prompts=("mask", 1, 3))
    result.save(tmp_path / "vos")
    assert {file.name for file in (tmp_path / "vos").iterdir()} == {"table.csv", "frames.csv", "mean.csv", "plot.png"}
    table = pd.read_csv(tmp_path / "vos" / "table.csv")
    assert table["clip"].tolist() == ["clip 0"] * 3 + ["clip 1"] * 3 and table["j"].tolist() == list(result.table["j"])
    assert Image.open(tmp_path / "vos" / "plot.png").size == (1350, 540)


@pytest.mark.parametrize(
    ("clips", "prompts", "words"),
    [
        ([], ["mask"], "clips with visible objects"),
        ([(pixels(5), {1: np.zeros_like(truth(5))})], ["mask"], "clips with visible objects"),
        ([(pixels(5), {1: truth(5)})], [], "kinds of prompts such as"),
        ([(pixels(5), {1: truth(5)})], "mask", "kinds of prompts such as"),
        ([(pixels(5), {1: truth(5)})], ["scribble"], "number of clicks from 1 on"),
    ],
)
def test_bad_input_gets_a_sentence(clips, prompts, words):
    with pytest.raises(ValueError, match=words):
        evaluate_vos(DriftingPipe(), clips, prompts)
