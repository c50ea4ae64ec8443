"""`hf-iclr train-sam2`: a file says what is trained, folders say by what is in them how they are read."""

import json

import pytest
import torch
import yaml
from PIL import Image
from transformers import Sam2VideoModel, Sam2VideoProcessor
from typer.testing import CliRunner

from hf_iclr import annotate
from hf_iclr.cli import app as cli
from hf_iclr.cli.train_command import read_videos
from hf_iclr.vision.annotation.masklets import QualityGate
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotation_json import write_sav
from hf_iclr.vision.session.videos import open_video
from tests.vision.session.test_frames import write_video
from tests.vision.tiny import SIDE, tiny_model, tiny_pipe, tiny_processor
from tests.vision.training.test_clip_dataset import segments_of, write_images


CLIPS = {name: procedural_clip(seed, frames=4, size=SIDE) for seed, name in enumerate(("cat", "dog"))}
LONG = procedural_clip(2, frames=9, size=SIDE)  # masks of SA-V lie on every fourth frame
QUICK = {"use_cpu": True, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "num_frames": 3}
QUICK |= {"corrective_clicks": 0, "max_steps": 1, "per_device_train_batch_size": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """The same two clips in each of the layouts."""
    root = tmp_path_factory.mktemp("data")
    for name, clip in CLIPS.items():
        write_images(root / "mose" / "JPEGImages" / name, clip)
        write_pngs(root / "mose" / "Annotations" / name, clip)
        write_images(root / "davis" / "JPEGImages" / "480p" / name, clip)
        write_pngs(root / "davis" / "Annotations" / "480p" / name, clip)
        (root / "sav").mkdir(exist_ok=True)
        write_video(root / "sav" / f"{name}.mp4", LONG.frames)
        write_sav(segments_of(LONG, [0, 4, 8]), root / "sav" / f"{name}_manual.json")
    (root / "davis" / "ImageSets" / "2017").mkdir(parents=True)
    (root / "davis" / "ImageSets" / "2017" / "train.txt").write_text("dog\n")
    (root / "davis" / "ImageSets" / "2017" / "val.txt").write_text("cat\n")
    middle = {0: {1: {"points": [[SIDE // 2, SIDE // 2]]}}}
    annotate(
        root / "mose" / "JPEGImages",
        tiny_pipe(),
        lambda video, session: middle,
        verifier=lambda masklet: "cat" in str(masklet.video),
        gate=QualityGate(min_object_score=0, min_stability=0, min_cycle_iou=None),
        out=root / "annotated",
    )
    return {folder.name: str(folder) for folder in root.iterdir()}


def write_pngs(folder, clip):
    folder.mkdir(parents=True)
    for number in range(len(clip.frames)):
        labels = sum(obj * mask[number].astype("uint8") for obj, mask in clip.masks.items())
        Image.fromarray(labels).save(folder / f"{number:05}.png")


def run(*arguments):
    return CliRunner().invoke(cli.app, ["train-sam2", *map(str, arguments)])


def test_a_yaml_file_trains_on_several_folders_and_flags_count_more(model, folders, tmp_path):
    data = [folders[name] for name in ("mose", "davis", "sav", "annotated")]
    settings = {**QUICK, "model": model, "data": data, "eval_data": folders["davis"], "eval_strategy": "steps"}
    text = yaml.safe_dump({**settings, "eval_steps": 1, "output_dir": "elsewhere", "freeze": ["vision_encoder"]})
    (tmp_path / "run.yaml").write_text(text + "learning_rate: 1e-3\n")  # a string to YAML
    result = run(tmp_path / "run.yaml", "--output_dir", tmp_path / "tuned", "--max_steps", 2)
    assert result.exit_code == 0, result.output
    assert "Saved to" in result.output and "eval_loss" in result.output
    before, after = Sam2VideoModel.from_pretrained(model), Sam2VideoModel.from_pretrained(tmp_path / "tuned")
    state = after.state_dict()
    moved = {name for name, value in before.state_dict().items() if not torch.equal(value, state[name])}
    assert any(name.startswith("memory_encoder") for name in moved)
    assert not any(name.startswith("vision_encoder") for name in moved)
    assert Sam2VideoProcessor.from_pretrained(tmp_path / "tuned").target_size == SIDE


def test_a_json_file_goes_on_from_a_checkpoint(model, folders, tmp_path):
    settings = {**QUICK, "model": model, "data": folders["mose"], "output_dir": str(tmp_path / "tuned")}
    settings |= {"save_strategy": "steps", "save_steps": 1}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    assert run(tmp_path / "run.json").exit_code == 0
    checkpoint = tmp_path / "tuned" / "checkpoint-1"
    result = run(tmp_path / "run.json", "--resume_from_checkpoint", checkpoint, "--max_steps", 2)
    assert result.exit_code == 0, result.output
    state = json.loads((tmp_path / "tuned" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2


def test_folders_are_read_by_what_is_in_them(folders):
    for name, frames in (("mose", [0, 1, 2, 3]), ("sav", [0, 4, 8])):
        videos = read_videos(folders[name])
        assert len(videos) == 2 and all(list(video.frames) == frames for video in videos)
        assert open_video(videos[1].video).num_frames == frames[-1] + 1


def test_davis_keeps_to_its_lists(folders):
    (train,), (val,) = read_videos(folders["davis"]), read_videos(folders["davis"], "val")
    assert train.video[0].parent.name == "dog" and val.video[0].parent.name == "cat"


def test_of_annotations_only_the_accepted_count(folders, tmp_path):
    (video,) = read_videos(folders["annotated"])
    assert video.video.endswith("cat")
    annotate(
        [CLIPS["cat"].frames],
        tiny_pipe(),
        lambda video, session: {0: {1: {"points": [[9, 9]]}}},
        gate=QualityGate(min_object_score=0, min_stability=0, min_cycle_iou=None),
        out=tmp_path / "pathless",
    )
    with pytest.raises(ValueError, match="accepted masklets of videos that have a path"):
        read_videos(tmp_path / "pathless")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": []}, "Nothing says what to train on"),
        ({"data": "nowhere"}, "Expected a folder with JPEGImages and Annotations"),
        ({"nun_frames": 3}, "--nun_frames"),
        ({"mask_share": 0.9, "box_share": 0.9}, "at most 1 together with box_share"),
        ({"num_frames": "four"}, "invalid int value: 'four'"),
        ({"model": "./nothing-here"}, "nothing-here"),
        ("a: [", "YAML or JSON"),
        (None, "Expected a file or folder at"),
    ],
)
def test_what_is_wrong_gets_a_sentence(model, folders, tmp_path, settings, words):
    if isinstance(settings, dict):
        settings = yaml.safe_dump({**QUICK, "model": model, "data": folders["mose"], **settings})
    if settings is not None:
        (tmp_path / "run.yaml").write_text(settings)
    result = run(tmp_path / "run.yaml", "--output_dir", tmp_path / "tuned")
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "tuned").exists()


def test_help_lists_the_settings():
    result = run("--help")
    assert result.exit_code == 0
    for name in ("--eval_data", "--max_corrected_frames", "--learning_rate"):
        assert name in result.output
