"""Files and folders are whole or not there."""

import os

import pytest
import torch
from safetensors.torch import load_file

from hf_iclr.saving import atomic_file, write_safetensors
from hf_iclr.vision.formats.segment_files import PALETTE, atomic_folder, read_json, write_json


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with atomic_file(path) as part:
        part.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_file(path) as part:
        part.write_text("tw")
        raise RuntimeError
    assert path.read_text() == "one" and list(path.parent.iterdir()) == [path]


def test_who_may_read_a_file_follows_the_umask(tmp_path):
    """Also of safetensors, whose writer keeps its files to oneself."""
    before = os.umask(0o027)
    try:
        write_safetensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
        with atomic_file(tmp_path / "b.txt") as part:
            part.write_text("b")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in sorted(tmp_path.iterdir())] == [0o640, 0o640]
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [1, 1]


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "masks"
    with pytest.raises(RuntimeError), atomic_folder(path) as part:
        (part / "file").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    path.mkdir()
    with atomic_folder(path) as part:
        (part / "file").touch()
    assert [file.name for file in path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="new or an empty folder"), atomic_folder(path):
        pass
    assert [file.name for file in path.iterdir()] == ["file"]


def test_json_without_what_is_needed_gets_a_sentence(tmp_path):
    path = tmp_path / "a.json"
    write_json({"masklet": []}, path)
    assert read_json(path, ("masklet",)) == {"masklet": []}
    with pytest.raises(ValueError, match="Expected masklet, video_id in .*got \\['masklet'\\]"):
        read_json(path, ("masklet", "video_id"))
    path.write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        read_json(path, ())


def test_colours_are_those_of_davis():
    expected = [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128]]
    assert PALETTE[:5].tolist() == expected and PALETTE[255].tolist() == [224, 224, 192]
