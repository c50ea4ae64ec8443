"""Datasets in the layouts of others: what is written, how it is scored, and that a kill costs one video."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_iclr.cli import app as cli
from hf_iclr.vision.evaluation import vos_inference
from hf_iclr.vision.evaluation.j_and_f import j_and_f
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.evaluation.vos import evaluate_vos
from hf_iclr.vision.evaluation.vos_inference import segment_dataset
from hf_iclr.vision.formats.annotated_videos import read_videos
from tests.vision.tiny import tiny_pipe


CLIPS = {name: procedural_clip(seed, frames=6, size=48) for seed, name in enumerate(("cat", "dog", "elk"))}


def write_images(folder: Path, clip, step: int = 1) -> None:
    folder.mkdir(parents=True)
    for number, frame in enumerate(clip.frames):
        Image.fromarray(frame).save(folder / f"{number * step:05}.jpg", quality=95)


def labels_of(clip, number: int) -> np.ndarray:
    labels = np.zeros(clip.frames[0].shape[:2], np.uint8)
    for obj, masks in clip.masks.items():
        labels[masks[number] & (labels == 0)] = obj
    return labels


def save(labels: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels, mode="P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    image.save(path)


def davis(folder: Path) -> Path:
    for name, clip in CLIPS.items():
        write_images(folder / "JPEGImages" / "480p" / name, clip)
        for number in range(6):
            save(labels_of(clip, number), folder / "Annotations" / "480p" / name / f"{number:05}.png")
    (folder / "ImageSets" / "2017").mkdir(parents=True)
    (folder / "ImageSets" / "2017" / "val.txt").write_text("cat\nelk\n")
    return folder


def youtube_vos(folder: Path) -> Path:
    """The validation set: frames by fives, and masks only where an object is shown first; object 2 comes at 00010."""
    clip = CLIPS["cat"]
    write_images(folder / "JPEGImages" / "cat", clip, step=5)
    save(clip.masks[1][0].astype(np.uint8), folder / "Annotations" / "cat" / "00000.png")
    save(clip.masks[2][2].astype(np.uint8) * 2, folder / "Annotations" / "cat" / "00010.png")
    return folder


def sa_v(folder: Path) -> Path:
    """Objects are numbered from 0 and annotated on every second frame."""
    for name in ("cat", "dog"):
        clip = CLIPS[name]
        write_images(folder / "JPEGImages_24fps" / name, clip)
        for obj, masks in clip.masks.items():
            for number in (0, 2, 4):
                file = folder / "Annotations_6fps" / name / f"{obj - 1:03}" / f"{number:05}.png"
                save(masks[number].astype(np.uint8), file)
    (folder / "sav_val.txt").write_text("cat\ndog\n")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def tracked(frames, prompts: dict) -> dict[int, dict[int, np.ndarray]]:
    """Masks by frame and object, by the pipeline itself."""
    given = {frame: {obj: {"mask": mask} for obj, mask in masks.items()} for frame, masks in prompts.items()}
    return {s.frame: {obj: s.binary(obj) for obj in s.objects} for s in tiny_pipe()(str(frames), prompts=given)}


def test_davis_is_segmented_and_scored(tmp_path):
    data = davis(tmp_path / "data")
    table = segment_dataset(tiny_pipe(), data, tmp_path / "out")
    expected = evaluate_vos(tiny_pipe(), read_videos(data, "val"), ["mask"]).table
    assert table["video"].tolist() == ["cat", "cat", "elk", "elk"] == expected["clip"].tolist()
    for column in ("object", "j", "f", "j_and_f", "frames"):
        assert np.allclose(table[column], expected[column], atol=1e-12), column
    assert pd.read_csv(tmp_path / "out" / "table.csv").equals(table)
    first = labels_of(CLIPS["elk"], 0)
    masks = tracked(data / "JPEGImages" / "480p" / "elk", {0: {obj: first == obj for obj in (1, 2)}})
    files = sorted((tmp_path / "out" / "masks" / "elk").iterdir())
    assert [file.name for file in files] == [f"{number:05}.png" for number in range(6)]
    for number, file in enumerate(files):
        one, two = masks[number].values()
        assert np.array_equal(np.asarray(Image.open(file)), np.where(one, 1, np.where(two, 2, 0)))


def test_youtube_vos_has_objects_that_come_later_and_nothing_to_score(tmp_path):
    data = youtube_vos(tmp_path / "data")
    assert segment_dataset(tiny_pipe(), data, tmp_path / "out") is None
    clip = CLIPS["cat"]
    masks = tracked(data / "JPEGImages" / "cat", {0: {1: clip.masks[1][0]}, 2: {2: clip.masks[2][2]}})
    files = sorted((tmp_path / "out" / "masks" / "cat").iterdir())
    assert [file.name for file in files] == [f"{5 * number:05}.png" for number in range(6)]
    for number, file in enumerate(files):
        labels = np.asarray(Image.open(file))
        assert np.array_equal(labels == 1, masks[number][1])
        assert not (labels == 2).any() if number < 2 else np.array_equal(labels == 2, masks[number][2] & (labels != 1))
    assert not (tmp_path / "out" / "table.csv").exists()


def test_sa_v_keeps_a_folder_an_object_from_number_0(tmp_path):
    data = sa_v(tmp_path / "data")
    table = segment_dataset(tiny_pipe(), data, tmp_path / "out")
    assert table[["video", "object"]].to_numpy().tolist() == [["cat", 0], ["cat", 1], ["dog", 0], ["dog", 1]]
    clip = CLIPS["dog"]
    given = {obj - 1: masks[0] for obj, masks in clip.masks.items()}
    masks = tracked(data / "JPEGImages_24fps" / "dog", {0: given})
    for obj in (0, 1):
        files = sorted((tmp_path / "out" / "masks" / "dog" / f"{obj:03}").iterdir())
        found = np.stack([np.asarray(Image.open(file)) != 0 for file in files])
        assert np.array_equal(found, np.stack([masks[number][obj] for number in range(6)]))
        row = table[(table["video"] == "dog") & (table["object"] == obj)].iloc[0]
        truth = np.stack([clip.masks[obj + 1][number] for number in (0, 2, 4)])
        assert row["j_and_f"] == pytest.approx(j_and_f([found[[0, 2, 4]]], [truth], True)["j_and_f"])
        assert row["frames"] == 1


@pytest.mark.parametrize("moment", ["amid a video", "before its scores"])
def test_a_killed_run_goes_on_as_if_unbroken(tmp_path, monkeypatch, moment):
    data = davis(tmp_path / "data")
    (data / "ImageSets" / "2017" / "val.txt").write_text("cat dog elk")
    segment_dataset(tiny_pipe(), data, tmp_path / "whole")
    calls, pipe = [], tiny_pipe()
    name = "save_labels" if moment == "amid a video" else "j_and_f"
    works, limit = getattr(vos_inference, name), {"save_labels": 9, "j_and_f": 4}[name]

    def dies(*args, **kwargs):
        calls.append(args)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return works(*args, **kwargs)

    monkeypatch.setattr(vos_inference, name, dies)
    with pytest.raises(KeyboardInterrupt):
        segment_dataset(pipe, data, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out" / "scores").iterdir()] == ["cat.csv"]
    monkeypatch.setattr(vos_inference, name, works)
    opened, session = [], pipe.session
    monkeypatch.setattr(pipe, "session", lambda video, **options: opened.append(video) or session(video, **options))
    table = segment_dataset(pipe, data, tmp_path / "out")
    assert len(opened) == 2 and len(table) == 6  # the video that was whole is not done again
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_pipe().save_pretrained(folder)
    return str(folder)


def test_two_share_the_videos(tmp_path, monkeypatch):
    """Threads in the place of processes."""
    data = davis(tmp_path / "data")
    alone = segment_dataset(tiny_pipe(), data, tmp_path / "one", split="train")
    barrier, mine, opened = threading.Barrier(2), threading.local(), []
    monkeypatch.setattr(vos_inference, "processes", lambda: mine.state)
    session = tiny_pipe().session
    monkeypatch.setattr(
        tiny_pipe(), "session", lambda video, **options: opened.append(mine.rank) or session(video, **options)
    )

    def run(rank: int) -> pd.DataFrame:
        mine.rank = rank
        mine.state = SimpleNamespace(
            process_index=rank, num_processes=2, is_main_process=rank == 0, wait_for_everyone=barrier.wait
        )
        return segment_dataset(tiny_pipe(), data, tmp_path / "two", split="train")

    with ThreadPoolExecutor(2) as pool:
        assert all(table.equals(alone) for table in pool.map(run, (0, 1)))
    assert sorted(opened) == [0, 0, 1] and contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_torchrun_shares_the_videos(tmp_path, model):
    data = davis(tmp_path / "data")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    command = ["-m", "hf_iclr", "vos", str(data), "--model", model, "--split", "train", "--out"]
    printed = {}
    for name, launcher in {"one": [], "two": ["-m", "torch.distributed.run", "--nproc_per_node", "2"]}.items():
        done = subprocess.run(
            [sys.executable, *launcher, *command, str(tmp_path / name)],
            env=environment, capture_output=True, check=False, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        printed[name] = done.stdout.replace(str(tmp_path / name), "OUT")
    assert printed["one"] == printed["two"] and printed["one"].count("all objects") == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_the_command_says_what_is_wrong(tmp_path, model):
    def run(*args):
        return CliRunner().invoke(cli.app, ["vos", *map(str, args), "--model", model], env={"COLUMNS": "200"})

    data = davis(tmp_path / "data")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "none").mkdir()
    for args, words in {
        (tmp_path / "nowhere", "--out", tmp_path / "a"): "There is no folder",
        (tmp_path / "none", "--out", tmp_path / "a"): "JPEGImages and Annotations",
        (data, "--out", tmp_path / "full"): "Expected a new folder",
    }.items():
        result = run(*args)
        assert result.exit_code == 2 and words in " ".join(result.output.split()), result.output
    assert not (tmp_path / "a").exists()
    assert run(data, "--out", tmp_path / "b").exit_code == 0
    result = run(data, "--out", tmp_path / "b", "--non-overlap")
    assert result.exit_code == 2 and "of this very run" in result.output
