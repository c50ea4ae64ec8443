"""Folders that were damaged, or made to harm: refused in a sentence, with nothing outside read or written."""

import json
import os
import resource
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_iclr.untrusted import check_links, inside, parse_json, read_safetensors, whole_number
from tests import hostile
from tests.hostile import KINDS


OUTSIDE_NAMES = [
    "../../../escaped", "/etc/passwd", "..", ".", "", "a/../b", "a//b", "a/", "a\\b", "C:x", "a\0b", "\ud800",
    "a" * 300, 3, None, ["a"],
]  # fmt: skip
FILES = [(kind, name) for kind, about in KINDS.items() for name in about.files]
JSON_FILES = [(kind, name) for kind, name in FILES if "json" in name or (name in KINDS[kind].counts)]
COUNTS = [(kind, name, key) for kind, about in KINDS.items() for name, keys in about.counts.items() for key in keys]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each kind of folder once, made when it is first wanted."""
    parent = tmp_path_factory.mktemp("made")

    def get(kind: str) -> Path:
        if not (parent / kind).exists():
            KINDS[kind].make(parent / kind)
        return parent / kind

    return get


@pytest.fixture
def copied(made, tmp_path):
    def copy(kind: str) -> Path:
        return Path(shutil.copytree(made(kind), tmp_path / "given" / kind))

    return copy


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_folder_is_read(copied, kind):
    assert KINDS[kind].load(copied(kind)) is not None


@pytest.mark.parametrize(("kind", "name"), FILES)
@pytest.mark.parametrize(
    "spoil", [hostile.truncate, hostile.link_out, hostile.link_to_device, hostile.pipe, hostile.folder_instead]
)
def test_a_spoiled_file_is_refused(copied, kind, name, spoil):
    folder = copied(kind)
    if spoil is hostile.truncate and name.endswith(".jsonl"):
        pytest.skip("a ledger or journal cut short by a kill loses its last line, as it should")
    if spoil is hostile.link_out and kind == "session":
        pytest.skip("a session is one file, which may be a link")
    spoil(folder / name)
    with pytest.raises(ValueError, match=name.split("/")[-1]):
        KINDS[kind].load(folder)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in FILES if name.endswith(".safetensors")])
def test_a_huge_header_is_not_read(copied, kind, name):
    folder = copied(kind)
    hostile.huge_header(folder / name)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="no safetensors file"):
        KINDS[kind].load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**19  # half a GiB, in KiB


@pytest.mark.parametrize(("kind", "name"), JSON_FILES)
@pytest.mark.parametrize("way", ["twice", "deep", "list", "text", "null"])
def test_other_json_is_refused(copied, kind, name, way):
    folder = copied(kind)
    text = hostile.json_of(folder / name)
    other = {"deep": "[" * 200_000, "list": "[1, 2]", "text": '"hello"', "null": "null"}
    hostile.put_json(folder / name, hostile.repeat_first_key(text) if way == "twice" else other[way])
    with pytest.raises(ValueError, match="twice" if way == "twice" else "Expected|holds annotations made with"):
        KINDS[kind].load(folder)


@pytest.mark.parametrize(("kind", "name", "key"), COUNTS)
@pytest.mark.parametrize("value", ["NaN", "1e999", "-7", "1.5", '"3"', "null", "[]", "9" * 60])
def test_what_is_no_count_is_refused(copied, kind, name, key, value):
    folder = copied(kind)
    record = json.loads(hostile.json_of(folder / name))
    assert key in record
    if kind == "edits" and "config" in name and value == "9" * 60:
        pytest.skip("any number of steps may be asked for")
    hostile.put_json(folder / name, json.dumps(record | {key: "HERE"}).replace('"HERE"', value))
    with pytest.raises(ValueError, match="Expected|is no number"):
        KINDS[kind].load(folder)


@pytest.mark.parametrize("name", OUTSIDE_NAMES)
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="Expected a file name without"):
        inside(tmp_path, name)


def test_names_that_stay_are_joined(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert inside(tmp_path, "a.json") == tmp_path / "a.json"
    assert inside(str(tmp_path), "link/..b/ü c.json") == tmp_path / "link" / "..b" / "ü c.json"
    (tmp_path / "out").symlink_to("/etc")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("out", "out/passwd"):
        with pytest.raises(ValueError, match="a link to /etc"):
            inside(tmp_path, name)
    with pytest.raises(ValueError, match="a link to /etc"):
        check_links(tmp_path)
    assert not inside(tmp_path, "loop").exists()
    assert check_links(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_a_snapshot_of_the_hubs_cache_is_no_link_out(tmp_path, made):
    """The cache keeps a file under its hash and a link to it by name."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(made("edits"), snapshot)
    blobs.mkdir()
    for number, path in enumerate([path for path in snapshot.rglob("*") if path.is_file()]):
        shutil.move(path, blobs / str(number))
        path.symlink_to(os.path.relpath(blobs / str(number), path.parent))
    assert len(hostile.load_edits(snapshot).edits) == 2
    (snapshot / "ledger.jsonl").unlink()
    (snapshot / "ledger.jsonl").symlink_to("../../../other")
    with pytest.raises(ValueError, match="a link to"):
        hostile.load_edits(snapshot)


@pytest.mark.parametrize("name", OUTSIDE_NAMES)
def test_a_ledger_names_files_of_its_folder(copied, name):
    folder = copied("edits")
    lines = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    lines[0]["batches"][0]["name"] = name
    (folder / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    hostile.sign(folder)
    before = sorted(folder.parent.parent.rglob("*"))
    with pytest.raises(
        ValueError, match=r"Expected a file name without|Expected .*safetensors, of which|got other contents"
    ):
        hostile.load_edits(folder)
    assert sorted(folder.parent.parent.rglob("*")) == before


def test_two_batches_have_two_files(copied):
    folder = copied("edits")
    lines = (folder / "ledger.jsonl").read_text().replace("edit_0002_0002", "edit_0001_0001")
    (folder / "ledger.jsonl").write_text(lines)
    hostile.sign(folder)
    with pytest.raises(ValueError, match="a file of its own for each batch"):
        hostile.load_edits(folder)


@pytest.mark.parametrize("name", ["edits.0", "__class__.0", "factors.x", "factors", "residuals.1"])
def test_tensors_of_a_batch_have_known_names_and_shapes(copied, name):
    folder = copied("edits")
    path = folder / "batches" / "edit_0001_0001.safetensors"
    save_file(load_file(path) | {name: torch.ones(3, 3)}, path)
    with pytest.raises(ValueError, match=r"as AlphaEditor writes it|updates of shapes|invalid literal|finite float32"):
        hostile.load_edits(folder)


def test_nothing_is_written_through_a_link(copied, tmp_path):
    editor = hostile.load_edits(copied("edits"))
    target, victim = tmp_path / "target", tmp_path / "victim"
    for name in ("ledger.jsonl", "README.md", "tokenizer.json", "alpha_edit_config.json"):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        victim.write_text("mine")
        (target / name).symlink_to(victim)
        with pytest.raises(ValueError, match="a link to"):
            editor.save_pretrained(target)
        assert victim.read_text() == "mine" and len(list(target.iterdir())) == 1


def test_a_store_removes_nothing_elsewhere(copied, tmp_path):
    from hf_iclr.trainers.data_shapley.store import ShapleyStore
    from hf_iclr.trainers.data_shapley.trained_rows import TrainedRows

    folder, mine = copied("store"), tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    (folder / "shapley" / hostile.SHAPLEY_RUN / "more").symlink_to(mine)
    with pytest.raises(ValueError, match="a link to"):
        ShapleyStore(folder, TrainedRows()).resume(1, hostile.SHAPLEY_RUN, folder / "checkpoint-1")
    assert (mine / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("tokens", [3.0, float("nan")]), ("step", [-1, 1]), ("index", ["a", "b"]), ("value", ["x", "y"]),
        ("value_safety", [1, 2]), ("step", None),
    ],
)  # fmt: skip
def test_columns_of_values_are_checked(copied, column, values):
    folder = copied("values")
    rows = pd.read_parquet(folder / "rows.parquet")
    rows = rows.drop(columns=column) if values is None else rows.assign(**{column: values})
    rows.to_parquet(folder / "rows.parquet")
    with pytest.raises(ValueError, match=r"as DataShapleyResult.save_pretrained writes it"):
        hostile.load_values(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"measures": [{"attack": "none"}]},
        {"measures": [{"attack": "none", "setting": "", "judged": "continuation", "refused": [2]}]},
        {"measures": [{"attack": "prefill", "setting": "many", "judged": "continuation", "refused": []}]},
        {"measures": 3},
        {"settings": []},
        {"other": 1},
        {"before": {"measures": []}},
    ],
)
def test_a_report_of_another_form_is_refused(copied, change):
    folder = copied("report")
    content = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps(content | {"report": content["report"] | change}))
    with pytest.raises(ValueError, match=r"as SafetyReport.save writes it|invalid literal"):
        hostile.load_report(folder)


@pytest.mark.parametrize(
    "source", ["http://127.0.0.1:9/clip.mp4", "/dev/zero", "concat:/etc/passwd", "pipe:0", "a\0b", 3]
)
def test_a_session_opens_no_address(copied, source):
    from hf_iclr import VideoSession
    from tests.vision.tiny import tiny_pipe

    path = copied("session") / "session.safetensors"
    hostile.put_json(path, json.dumps(json.loads(hostile.json_of(path)) | {"source": source}))
    with pytest.raises(
        ValueError, match=r"nothing else that a session names is opened|as VideoSession.save writes it"
    ):
        VideoSession.load(tiny_pipe(), path)


@pytest.mark.parametrize(
    "change",
    [
        {"objects": {"1": {"cond_frame_outputs": [[7, {}]], "ways": {}}}},
        {"objects": {"1": {"waiting": [[0, {"pred_masks": "none"}]], "ways": {}}}},
        {"objects": {"1": {"ways": {"99": {"reverse": False}}}}},
        {"objects": {}},
        {"corrected": [[9, 1]]},
        {"corrected": [1]},
        {"prompts": {"0": {"1": {"points": [[1e9, 0]]}}}},
        {"prompts": {"0": {"1": {"mask": {"size": [100000, 100000], "counts": "0"}}}}},
        {"config": {"feature_cache_dtype": "load"}},
        {"config": {"feature_cache_dtype": "", "unknown": 1}},
    ],
)
def test_a_session_of_another_form_is_refused(copied, change):
    folder = copied("session")
    path = folder / "session.safetensors"
    state = json.loads(hostile.json_of(path))
    (state if "config" in change else state["moments"]["present"][0]).update(change)
    hostile.put_json(path, json.dumps(state))
    with pytest.raises(ValueError, match="Expected"):
        hostile.load_session(folder)


def test_videos_of_annotations_are_files(tmp_path):
    from hf_iclr.vision.annotation.store import FEATURES, AnnotationStore
    from hf_iclr.vision.formats.annotated_videos import read_videos

    row = dict.fromkeys(FEATURES) | {
        "video": "http://127.0.0.1:9/a.mp4",
        "status": "accepted",
        "frames": [],
        "masks": [],
    }
    AnnotationStore(tmp_path, {}).write("a", [row])
    with pytest.raises(ValueError, match="nothing else that a folder names is opened"):
        read_videos(tmp_path)


@pytest.mark.parametrize("name", ["../outside", "/etc", "a\\b"])
def test_names_of_videos_stay_in_the_folder(tmp_path, name):
    from hf_iclr.vision.annotation.store import AnnotationStore
    from hf_iclr.vision.formats.mask_folders import read_youtube_vos, write_youtube_vos
    from tests.vision.formats.segments import video

    with pytest.raises(ValueError, match="Expected a file name without"):
        write_youtube_vos({name: video()}, tmp_path / "new" / "folder")
    assert list((tmp_path / "new").iterdir()) == []
    write_youtube_vos({"park": video()}, tmp_path / "masks")
    record = json.loads((tmp_path / "masks" / "meta.json").read_text())
    (tmp_path / "masks" / "meta.json").write_text(json.dumps({"videos": {name: record["videos"]["park"]}}))
    with pytest.raises(ValueError, match="Expected a file name without"):
        read_youtube_vos(tmp_path / "masks")
    with pytest.raises(ValueError, match="Expected a file name without"):
        AnnotationStore(tmp_path / "store", {}).write(name, [])


@pytest.mark.parametrize(
    "segmentation",
    [
        [[0, 0, 1e9, 0, 1e9, 1e9]], [[0, 0, 1e300, 5, 7, 7]], [[0, 0, float("nan"), 5, 7, 7]], [[1, 2]], [["a"] * 6],
        {"size": [100_000, 100_000], "counts": "0"}, {"size": [-1, 5], "counts": "0"},
    ],
)  # fmt: skip
def test_masks_ask_for_no_more_memory_than_a_frame(tmp_path, segmentation):
    from hf_iclr.vision.formats.annotation_json import read_coco

    image = {"id": 1, "file_name": "x.jpg", "height": 20, "width": 40}
    record = {"images": [image], "annotations": [{"image_id": 1, "segmentation": segmentation}]}
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"Expected|could not convert"):
        read_coco(tmp_path / "a.json")["x.jpg"][0].binary(1)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    from hf_iclr import SpeculativeCascadeForCausalLM
    from tests.generation.toy import tiny_llama

    folder = tmp_path_factory.mktemp("references")
    for name, seed in (("large", 1), ("small", 2)):
        tiny_llama(seed).save_pretrained(folder / name)
    halves = [str(folder / name) for name in ("large", "small")]
    SpeculativeCascadeForCausalLM.from_cascade_pretrained(*halves, as_reference=True).save_pretrained(folder / "pair")
    return folder / "pair"


@pytest.mark.parametrize(
    "name", ["../../x", "/dev/zero", "user/../x", "https://host/x", "a\0b", "", 3, {"a": 1}, ["a"]]
)
def test_a_composite_refers_to_models_only(references, tmp_path, name):
    from transformers import AutoModelForCausalLM

    shutil.copytree(references, tmp_path / "pair")
    config = json.loads((references / "config.json").read_text()) | {"small_name_or_path": name}
    (tmp_path / "pair" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="to refer to repositories such as"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "pair")


def test_a_repository_refers_to_no_folder_and_lends_no_trust(references, monkeypatch):
    from hf_iclr.generation import modeling_speculative_cascade as modeling

    model_class = modeling.SpeculativeCascadeForCausalLM
    config = model_class.config_class.from_pretrained(references)
    with pytest.raises(ValueError, match="Expected user/pair to refer to repositories"):
        model_class.from_pretrained("user/pair", config=config)
    passed, load = [], modeling.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        modeling.AutoModelForCausalLM, "from_pretrained", lambda *args, **kw: passed.append(kw) or load(*args, **kw)
    )
    model_class.from_pretrained(references, trust_remote_code=True)
    assert len(passed) == 2
    assert all("trust_remote_code" not in kwargs and kwargs["use_safetensors"] for kwargs in passed)


def test_what_is_no_json_or_count_has_a_sentence(tmp_path):
    for text in ("NaN", "[Infinity]", "1" * 5000, '{"a": {"b": 1, "b": 2}}', "{", b"\xff"):
        with pytest.raises(ValueError, match="Expected JSON in there"):
            parse_json(text, "there")
    assert parse_json('{"a": [1, {"a": 2}], "b": {}}', "there") == {"a": [1, {"a": 2}], "b": {}}
    assert parse_json("[-Infinity]", "there", nan=True) == [float("-inf")]
    for value in (True, 2.0, "2", None, -1, 11):
        with pytest.raises(ValueError, match="Expected the length to be a whole number from 0 to 10, got"):
            whole_number(value, "the length", most=10)
    with pytest.raises(ValueError, match="got none"):
        read_safetensors(tmp_path / "none.safetensors")
