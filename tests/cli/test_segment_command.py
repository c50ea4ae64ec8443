"""`hf-iclr segment`: prompts as text, files in a folder, sentences for what is wrong."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_iclr import VideoPrompts
from hf_iclr.cli import app as cli
from hf_iclr.cli.segment_command import parse_prompts
from hf_iclr.vision.formats.annotation_json import read_coco
from hf_iclr.vision.formats.mask_folders import read_davis
from hf_iclr.vision.session.videos import open_video
from tests.vision.session.test_frames import smooth, write_video
from tests.vision.tiny import tiny_pipe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipe().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(monkeypatch, model):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: CliRunner().invoke(cli.app, ["segment", *map(str, args), "--model", model])


@pytest.fixture(scope="module")
def movie(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("video") / "park.mp4"
    write_video(path, smooth(4))
    return str(path)


def test_a_video_becomes_a_folder(run, movie, tmp_path):
    out = tmp_path / "new" / "out"
    result = run(movie, "--point", "1:1:20,20", "--point", "1:1:3,3:0", "--box", "0:2:5,5,30,40", "--out", out)
    assert result.exit_code == 0, result.output
    assert {file.name for file in out.iterdir()} == {"overlay.mp4", "masks", "masks.json", "prompts.json"}
    prompts = {1: {1: {"points": [[20, 20], [3, 3]], "labels": [1, 0]}}, 0: {2: {"box": [5, 5, 30, 40]}}}
    assert VideoPrompts.from_json(out / "prompts.json") == VideoPrompts(prompts)
    expected = tiny_pipe()(movie, prompts=prompts)
    found = read_coco(out / "masks.json")["park"]
    assert found.frames == expected.frames == read_davis(out / "masks").frames
    for frame in expected:
        for obj in frame.objects:
            nothing = np.zeros(frame.size, bool)
            mask = found[frame.frame].binary(obj) if obj in found[frame.frame].masks else nothing
            assert np.array_equal(mask, frame.masks[obj])
    assert open_video(str(out / "overlay.mp4")).num_frames == 4
    assert "4 frames" in result.output and "overlay.mp4" in result.output


def test_a_mask_on_the_last_frame_goes_backward(run, movie, tmp_path):
    mask = np.zeros(open_video(movie)[0].shape[:2], np.uint8)
    mask[10:20, 10:30] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    result = run(movie, "--mask", f"3:5:{tmp_path / 'm.png'}", "--direction", "backward", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert read_davis(tmp_path / "out" / "masks").frames == [0, 1, 2, 3]
    assert json.loads((tmp_path / "out" / "prompts.json").read_text())["3"]["5"]["mask"]["size"] == list(mask.shape)


def test_prompts_of_a_command_line():
    prompts = parse_prompts(["0:1:2.5,3"], ["0:1:1,1,9,9", "4:2:0,0,5,5"])
    assert prompts[0][1].points == [[2.5, 3]] and prompts[0][1].box == [1, 1, 9, 9] and prompts[4][2].box
    assert isinstance(prompts, VideoPrompts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Nothing says what to segment"),
        (["--point", "1:20,20"], "a point as FRAME:OBJECT:X,Y"),
        (["--point", "0:1:20"], "for instance 0:1:210,350"),
        (["--point", "0:1:20,20:2"], "label 1 (on the object) or 0"),
        (["--point", "-1:1:20,20"], "got '-1:1:20,20'"),
        (["--box", "0:1:5,5,30"], "a box as FRAME:OBJECT:X0,Y0,X1,Y1"),
        (["--box", "0:1:5,5,30,40", "--box", "0:1:5,5,30,41"], "one box an object"),
        (["--box", "0:1:30,5,5,40"], "x0 < x1"),
        (["--mask", "0:1:none.png"], "no image 'none.png'"),
        (["--point", "9:1:20,20"], "a frame in 0..3"),
        (["--point", "0:1:2000,20"], "the frame's pixels"),
        (["--point", "0:0:20,20"], "object numbers in 1..254"),
        (["--point", "0:255:20,20"], "object numbers in 1..254"),
        (["--point", "0:1:20,20", "--direction", "sideways"], "got 'sideways'"),
        (["--point", "0:1:20,20", "--rate", "0"], "0.1"),
    ],
)
def test_bad_options_get_a_sentence(run, movie, tmp_path, options, words):
    out = tmp_path / "out"
    result = run(movie, *options, "--out", out)
    assert result.exit_code == 2 and words in result.output, result.output
    assert not out.exists() and not list(tmp_path.iterdir())


def test_a_missing_video_and_a_full_folder_get_a_sentence(run, movie, tmp_path):
    result = run(tmp_path / "none.mp4", "--point", "0:1:20,20", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "There is no video" in result.output
    (tmp_path / "file").touch()
    result = run(movie, "--point", "0:1:20,20", "--out", tmp_path)
    assert result.exit_code == 2 and "new or an empty folder" in result.output


def test_a_damaged_video_gives_what_can_be_read(run, tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (16, 64, 96, 3), dtype=np.uint8)
    path = tmp_path / "whole.mp4"
    write_video(path, frames, movflags="faststart")
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = run(tmp_path / "cut.mp4", "--point", "0:1:20,20", "--out", tmp_path / "out")
    assert result.exit_code == 0 and "frames could be read and were delivered" in " ".join(result.output.split())
    masks = read_davis(tmp_path / "out" / "masks").frames
    assert 0 < len(masks) < 16 and open_video(str(tmp_path / "out" / "overlay.mp4")).num_frames == len(masks)
