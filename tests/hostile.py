"""Small folders of every kind that is read, how each is read, and ways to spoil one."""

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


HUGE_HEADER = struct.pack("<Q", 2**60) + b"{}"


@dataclass
class Kind:
    """A kind of folder: how it is made and read, and the files that reading it needs."""

    make: Callable[[Path], None]
    load: Callable[[Path], Any]
    files: tuple[str, ...]
    counts: dict[str, tuple[str, ...]] = field(default_factory=dict)  # places of counts in a file's JSON


def make_edits(folder: Path) -> None:
    """Two batches."""
    from hf_iclr import AlphaEditor
    from hf_iclr.tiny_models import word_tokenizer
    from tests.editors.tiny import REQUESTS, quick_config, tiny_model, tiny_statistics

    tokenizer, model = word_tokenizer(), tiny_model("llama")
    config = quick_config(num_steps=2)
    editor = AlphaEditor(model, tokenizer, config, tiny_statistics(model, tokenizer, layers=[1, 2]))
    editor.edit(REQUESTS[:2], batch_size=1, progress=False)
    editor.save_pretrained(folder)
    for number, batch in enumerate(editor.batches, 1):  # a name that tests can know
        file, name = folder / "batches" / f"{batch.name}.safetensors", f"edit_{number:04d}_{number:04d}"
        file.rename(file.with_stem(name))
        ledger = folder / "ledger.jsonl"
        ledger.write_text(ledger.read_text().replace(batch.name, name))
    sign(folder)


def sign(folder: Path) -> None:
    """Say in the adapter's header that it is made of what the ledger has, as who changes both can."""
    from hf_iclr.editors.records.ledger import MARK, digests

    events, adapter = [*map(json.loads, (folder / "ledger.jsonl").open())], folder / "adapter_model.safetensors"
    save_file(load_file(adapter), adapter, {"format": "pt", MARK: digests(events)[-1]})


def load_edits(folder: Path):
    from hf_iclr import AlphaEditor
    from hf_iclr.tiny_models import word_tokenizer
    from tests.editors.tiny import tiny_model

    return AlphaEditor.from_pretrained(folder, model=tiny_model("llama"), tokenizer=word_tokenizer())


def make_statistics(folder: Path) -> None:
    from hf_iclr import KeyStatistics

    sums = {1: torch.eye(4, dtype=torch.float64)}
    KeyStatistics(sums, {1: "model.layers.1.mlp.down_proj"}, 9, 3, "org/model", None, "abc", ["text"]).save_pretrained(
        folder
    )


def load_statistics(folder: Path):
    from hf_iclr import KeyStatistics

    return KeyStatistics.from_pretrained(folder)


SHAPLEY_RUN = "run-20260101T000000-00000000"


def make_values(folder: Path) -> None:
    import pandas as pd

    from hf_iclr import DataShapleyResult

    rows = pd.DataFrame({"step": [1, 1], "index": [0, 1], "value": [0.5, -1.0], "tokens": [3, 4]})
    DataShapleyResult(rows, pd.DataFrame({"step": [1], "loss_validation": [2.0]})).save_pretrained(folder)


def load_values(folder: Path):
    from hf_iclr import DataShapleyResult

    return DataShapleyResult.from_pretrained(folder)


def make_store(folder: Path) -> None:
    import pandas as pd

    from hf_iclr.trainers.data_shapley.store import ShapleyStore
    from hf_iclr.trainers.data_shapley.trained_rows import TrainedRows

    store = ShapleyStore(folder, TrainedRows())
    store.run = SHAPLEY_RUN
    rows = pd.DataFrame({"step": [1], "index": [0], "tokens": [3], "value": [1.0]})
    store.add([rows], [{"step": 1, "lr": 0.1}])


def load_store(folder: Path):
    from hf_iclr import DataShapleyResult

    return DataShapleyResult.from_store(folder)


def make_report(folder: Path) -> None:
    from tests.trainers.safety_audit.test_audit import hand_made

    hand_made(before=hand_made()).save(folder)


def load_report(folder: Path):
    from hf_iclr import SafetyReport

    return SafetyReport.load(folder)


def make_audit(folder: Path) -> None:
    (folder / "unfinished").mkdir(parents=True)
    lines = [json.dumps({"stage": name, "rows": [[0, [[1, 2]]], [1, None]]}) for name in ("one", "two")]
    (folder / "unfinished" / "0.jsonl").write_text("\n".join(lines) + "\n")


def load_audit(folder: Path):
    from hf_iclr.trainers.safety_audit.asking.journal import Journal

    with Journal(folder).keep() as journal:
        return journal


def make_session(folder: Path) -> None:
    from tests.vision.tiny import clip, tiny_pipe

    folder.mkdir()
    session = tiny_pipe().session(clip(3))
    session.add(0, 1, points=[[20, 20]])
    session.save(folder / "session.safetensors")


def load_session(folder: Path):
    from hf_iclr import VideoSession
    from tests.vision.tiny import clip, tiny_pipe

    return VideoSession.load(tiny_pipe(), folder / "session.safetensors", video=clip(3))


def make_project(folder: Path) -> None:
    from hf_iclr import AnnotationProject
    from tests.vision.session.test_frames import smooth, write_video
    from tests.vision.tiny import tiny_pipe

    project = AnnotationProject(folder, tiny_pipe())
    (name,) = project.add_videos(write_video(folder / "clip.mp4", smooth(3)))
    project.edit(name, "prompt", {"frame": 0, "obj": 1, "points": [[20, 20]], "labels": [1]})
    project.close()


def load_project(folder: Path):
    from hf_iclr import AnnotationProject
    from tests.vision.tiny import tiny_pipe

    project = AnnotationProject(folder, tiny_pipe())
    (video,) = project.queue.videos()
    return project.session(video["name"])


def make_annotations(folder: Path) -> None:
    from hf_iclr.vision.annotation.store import FEATURES, AnnotationStore

    row = dict.fromkeys(FEATURES) | {"name": "clip", "status": "waiting", "frames": [], "masks": []}
    AnnotationStore(folder, {"phase": 3}).write("clip", [row])


def load_annotations(folder: Path):
    from hf_iclr.vision.annotation.store import AnnotationStore

    return AnnotationStore(folder, {"phase": 3}).read([])


def make_masks(folder: Path) -> None:
    from hf_iclr.vision.formats.mask_folders import write_youtube_vos
    from tests.vision.formats.segments import video

    write_youtube_vos({"park": video()}, folder)


def load_masks(folder: Path):
    from hf_iclr.vision.formats.mask_folders import read_youtube_vos

    return read_youtube_vos(folder)


KINDS = {
    "edits": Kind(
        make_edits,
        load_edits,
        ("ledger.jsonl", "alpha_edit_config.json", "null_space.safetensors", "batches/edit_0001_0001.safetensors"),
        {"ledger.jsonl": ("undone",), "alpha_edit_config.json": ("num_steps", "context_length")},
    ),
    "statistics": Kind(
        make_statistics,
        load_statistics,
        ("key_statistics.safetensors",),
        {"key_statistics.safetensors": ("tokens", "rows")},
    ),
    "values": Kind(make_values, load_values, ("rows.parquet", "steps.parquet")),
    "store": Kind(
        make_store,
        load_store,
        (f"shapley/{SHAPLEY_RUN}/part-000000001.parquet",),
    ),
    "report": Kind(make_report, load_report, ("report.json",)),
    "audit": Kind(make_audit, load_audit, ("unfinished/0.jsonl",)),
    "session": Kind(
        make_session, load_session, ("session.safetensors",), {"session.safetensors": ("num_frames", "latest")}
    ),
    "project": Kind(make_project, load_project, ("settings.json", "project.sqlite")),
    "annotations": Kind(make_annotations, load_annotations, ("settings.json", "shards/clip.parquet")),
}


def json_of(path: Path) -> str:
    """The JSON of a file: all of it, its first line, or what stands in the header of safetensors."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            return metadata.get("hf_iclr") or metadata["state"]
    return path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text()


def put_json(path: Path, text: str) -> None:
    """Put other JSON in its place."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        save_file(tensors, path, metadata | {"hf_iclr" if "hf_iclr" in metadata else "state": text})
    elif path.suffix == ".jsonl":
        path.write_text("\n".join([text, *path.read_text().splitlines()[1:]]) + "\n")
    else:
        path.write_text(text)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def link_out(path: Path) -> None:
    """The same contents, but elsewhere."""
    outside = Path(tempfile.mkdtemp(), path.name)
    shutil.move(path, outside)
    path.symlink_to(outside)


def link_to_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pipe(path: Path) -> None:
    """A file that has no end: whoever opens it waits."""
    path.unlink()
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def huge_header(path: Path) -> None:
    """Says that 2^60 bytes of names come first; the file is 8 GiB long and takes no room."""
    path.write_bytes(HUGE_HEADER)
    os.truncate(path, 2**33)


def repeat_first_key(text: str) -> str:
    key, value = next(iter(json.loads(text).items()))
    return text.replace("{", "{" + f"{json.dumps(key)}: {json.dumps(value)}, ", 1)
