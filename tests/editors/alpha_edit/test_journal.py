"""The journal says everything and loses nothing: kills, several writers, folders and repositories."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_iclr import saving
from hf_iclr.editors.alpha_edit import EditRequest
from hf_iclr.editors.alpha_edit.editor import AlphaEditor
from hf_iclr.editors.records import ledger
from hf_iclr.editors.records.ledger import batches_of, read_events
from tests.editors.alpha_edit.test_editor import Int8Linear, logits, make_editor
from tests.editors.tiny import REQUESTS, quick_config, tiny_model, tiny_statistics


def test_the_journal_is_append_only_and_says_everything(word_tokenizer, tmp_path):
    model = tiny_model("llama")
    statistics = tiny_statistics(model, word_tokenizer, layers=[1, 2])
    editor = AlphaEditor(model, word_tokenizer, quick_config(), statistics, folder=tmp_path)
    editor.edit(REQUESTS[:2], batch_size=1, progress=False)
    lines = (tmp_path / "ledger.jsonl").read_bytes()
    editor.remove(REQUESTS[0].id)
    editor.undo()
    assert (tmp_path / "ledger.jsonl").read_bytes().startswith(lines)
    events = read_events(tmp_path)
    assert [event["event"] for event in events] == ["edit", "edit", "remove", "undo"]
    assert batches_of(events) == [] and len(batches_of(events[:3])) == 1
    first = events[0]["batches"][0]
    assert first["requests"][0]["subject"] == REQUESTS[0].subject and events[0]["seed"] == 0
    assert {"p_before", "p_after", "loss", "collision"} <= set(first["edits"][0])
    assert {"layer", "residual", "editable", "preserved"} <= set(first["layers"][0])


def test_a_line_cut_short_is_as_if_it_were_not_there(word_tokenizer, tmp_path):
    make_editor(word_tokenizer, folder=tmp_path).edit(REQUESTS[:1], progress=False)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "edit", "undone": 0, "bat')
    assert len(read_events(tmp_path)) == 1
    loaded = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))
    loaded.edit(REQUESTS[1:2], progress=False)
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert [json.loads(line)["batches"][0]["requests"][0]["id"] for line in lines] == [r.id for r in REQUESTS[:2]]


def test_a_ledger_that_lost_or_changed_lines_is_refused(word_tokenizer, tmp_path):
    """The adapter would be made anew of what is left, and edits that were reported would be gone without a word."""
    editor = make_editor(word_tokenizer, folder=tmp_path, num_steps=1)
    for request in REQUESTS[:3]:
        editor.edit([request], progress=False)
    path = tmp_path / "ledger.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    spoiled = {
        "line 2": [lines[0], lines[1][:50] + "\n", lines[2]],
        "got 0 others": [],
        "got 2 others": lines[:2],
        "got 3 others": [lines[0], lines[2], lines[1]],
    }
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    for words, left in spoiled.items():
        path.write_text("".join(left))
        with pytest.raises(ValueError, match=words):
            AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))
        with pytest.raises(ValueError, match=words):
            editor.edit(REQUESTS[3:], progress=False)
        assert path.read_text() == "".join(left) and (tmp_path / "adapter_model.safetensors").read_bytes() == adapter
    path.write_text("\n".join(lines))  # blank lines say nothing
    assert ids(AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))) == ids(editor)
    path.write_text("".join(lines[:2]))
    (tmp_path / "adapter_model.safetensors").unlink()  # as the sentence says
    loaded = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))
    assert ids(loaded) == ids(editor)[:2]
    assert_adapter_is(tmp_path, loaded)


def killed_at(moment, editor, folder, sender):
    """Keep a folder, edit twice, undo, edit; the process ends before its step of this number on the disk."""
    steps = itertools.count()

    def counted(function):
        def call(*args, **kwargs):
            if next(steps) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.replace, os.fsync, saving.save_file = counted(os.replace), counted(os.fsync), counted(saving.save_file)
    editor._journal.save(folder)
    editor._journal.folder = folder
    for first, last in ((0, 1), (1, 2)):
        editor.edit(REQUESTS[first:last], progress=False)
        sender.send(ids(editor))
    editor.undo()
    sender.send(ids(editor))
    editor.edit(MANY, progress=False)  # one more than the adapter's rank had room for
    sender.send(ids(editor))


MANY = [EditRequest(f"w{i} {{}}", f"w{i + 20}", "w5") for i in range(8)]


def ids(editor):
    return [edit.id for edit in editor.edits]


def adapter_of(folder):
    """What a reader of the adapter alone gets: the update of each layer."""
    tensors = load_file(folder / "adapter_model.safetensors")
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    updates = {}
    for layer in (1, 2):
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora"
        assert len(tensors[f"{name}_A.weight"]) == rank in (8, 16)
        updates[layer] = tensors[f"{name}_B.weight"] @ tensors[f"{name}_A.weight"]
    return updates


def assert_adapter_is(folder, editor):
    for layer, update in adapter_of(folder).items():
        total = sum((b.residuals[layer] @ b.factors[layer] for b in editor.batches), torch.zeros_like(update))
        torch.testing.assert_close(update, total, rtol=1e-5, atol=1e-6)


def test_a_kill_at_any_step_leaves_what_was_reported_and_an_adapter_that_says_the_same(word_tokenizer, tmp_path):
    fork, model = multiprocessing.get_context("fork"), tiny_model("llama")
    statistics = tiny_statistics(model, word_tokenizer, layers=[1, 2])
    for moment in itertools.count():
        editor = AlphaEditor(tiny_model("llama"), word_tokenizer, quick_config(num_steps=1), statistics)
        folder = tmp_path / str(moment)
        receiver, sender = fork.Pipe(duplex=False)
        process = fork.Process(target=killed_at, args=(moment, editor, folder, sender))
        process.start()
        sender.close()
        told = [[]]
        with contextlib.suppress(EOFError):
            while True:
                told.append(receiver.recv())
        process.join()
        if not (folder / "ledger.jsonl").exists():
            assert told == [[]]
            continue
        # While the adapter is made anew in a larger rank there is none.
        before = adapter_of(folder) if (folder / "adapter_config.json").exists() else None
        loaded = AlphaEditor.from_pretrained(folder, model=tiny_model("llama"))
        everything = [[], *([r.id for r in REQUESTS[:n]] for n in (1, 2, 1)), [r.id for r in [REQUESTS[0], *MANY]]]
        assert told == everything[: len(told)]
        assert ids(loaded) in everything[len(told) - 1 : len(told) + 1]  # nothing told is lost
        if before is not None:  # whoever read the adapter before had the same edits
            assert all(torch.equal(update, before[layer]) for layer, update in adapter_of(folder).items())
        assert_adapter_is(folder, loaded)
        assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
        loaded.edit(REQUESTS[3:], progress=False)
        again = AlphaEditor.from_pretrained(folder, model=tiny_model("llama"))
        assert ids(again) == [*ids(loaded)] and torch.equal(logits(again.model), logits(loaded.model))
        if process.exitcode == 0:
            break
    assert moment > 20 and told == everything


def keep_editing(editor, folder, requests, count):
    loaded = AlphaEditor.from_pretrained(folder, model=editor.model, tokenizer=editor.tokenizer)
    for request in requests:
        loaded.edit([request], progress=False)
        with count.get_lock():
            count.value += 1


def test_a_kill_amid_the_tokenizers_files_leaves_no_edits_without_one(word_tokenizer, tmp_path, monkeypatch):
    editor = make_editor(word_tokenizer, folder=tmp_path, num_steps=1)
    editor.edit(REQUESTS[:1], progress=False)

    def killed(folder, *args, **kwargs):
        (folder / "tokenizer.json").write_text("{")
        raise KeyboardInterrupt

    monkeypatch.setattr(editor.tokenizer, "save_pretrained", killed)
    editor.save_pretrained(tmp_path)
    assert ids(AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))) == ids(editor)
    with pytest.raises(KeyboardInterrupt):
        editor.save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match="no editor was saved there"):
        AlphaEditor.from_pretrained(tmp_path / "new", model=tiny_model("llama"))


def test_two_processes_write_to_one_folder(word_tokenizer, tmp_path):
    fork = multiprocessing.get_context("fork")
    editor = make_editor(word_tokenizer, folder=tmp_path, num_steps=1)
    count, halves = fork.Value("i"), (MANY[:4], MANY[4:])
    processes = [fork.Process(target=keep_editing, args=(editor, tmp_path, half, count)) for half in halves]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    loaded = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))
    assert count.value == 8 and sorted(ids(loaded)) == sorted(request.id for request in MANY)
    assert_adapter_is(tmp_path, loaded)
    # As if one had made them all, one after the other.
    states = {r.id: state for batch in loaded.batches for r, state in zip(batch.requests, batch.states, strict=True)}
    alone = make_editor(word_tokenizer, num_steps=1)
    for request in loaded.edits:
        alone.batches.append(alone._solver.solve("a", [request], states[request.id][None], alone.batches))
    assert torch.equal(logits(alone.model), logits(loaded.model))
    # The first editor has them too, before it makes its own.
    editor.edit(REQUESTS[:1], progress=False)
    assert ids(editor) == [*ids(loaded), REQUESTS[0].id]


def test_who_has_to_wait_too_long_is_told(word_tokenizer, tmp_path, monkeypatch, caplog):
    editor, other = (make_editor(word_tokenizer, folder=tmp_path) for _ in range(2))
    monkeypatch.setattr(ledger, "WAIT", 0.7)
    told = pytest.raises(TimeoutError, match="free within 0.7 seconds, but another editor")
    with editor._writing(), caplog.at_level(logging.WARNING), told:
        other.edit(REQUESTS[:1], progress=False)
    assert "waiting for it" in caplog.text and ids(other) == []
    other.edit(REQUESTS[:1], progress=False)
    assert ids(AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))) == [REQUESTS[0].id]


def test_an_undo_takes_back_what_its_user_knew(word_tokenizer, tmp_path):
    first, second = (make_editor(word_tokenizer, folder=tmp_path) for _ in range(2))
    first.edit(REQUESTS[:1], progress=False)
    second.edit(REQUESTS[1:2], progress=False)
    with pytest.raises(ValueError, match=f"another editor has made some since; of the edits \\['{REQUESTS[1].id}'\\]"):
        first.undo()
    assert ids(first) == ids(second) and torch.equal(logits(first.model), logits(second.model))
    assert first.undo() == [REQUESTS[1].id]
    second.remove(REQUESTS[0].id)
    assert ids(second) == [] and torch.equal(logits(second.model), logits(tiny_model("llama")))
    assert_adapter_is(tmp_path, second)


def test_a_folder_has_one_kind_of_settings(word_tokenizer, tmp_path):
    narrow = make_editor(word_tokenizer, folder=tmp_path, nullspace_rank=4)
    wide = make_editor(word_tokenizer, folder=tmp_path)  # nothing was edited: these settings are the folder's now
    with pytest.raises(ValueError, match="other nullspace_rank. Load those edits by"):
        narrow.edit(REQUESTS[:1], progress=False)
    wide.edit(REQUESTS[:1], progress=False)
    loaded = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))
    assert all(torch.equal(loaded.setup.preserved[layer], wide.setup.preserved[layer]) for layer in (1, 2))
    assert {basis.shape[1] for basis in loaded.setup.preserved.values()} == {8}


def test_another_adapter_is_not_overwritten(word_tokenizer, tmp_path):
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="got .* with another adapter"):
        make_editor(word_tokenizer, folder=tmp_path)
    with pytest.raises(ValueError, match="got .* with another adapter"):
        make_editor(word_tokenizer).save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["residuals.1", "factors.2", "keys.1", "states"])
@pytest.mark.parametrize("way", ["nan", "shape", "type", "missing"])
def test_tensors_of_another_form_are_refused(name, way, word_tokenizer, tmp_path):
    editor = make_editor(word_tokenizer, folder=tmp_path, num_steps=1)
    editor.edit(REQUESTS[:2], progress=False)
    (path,) = (tmp_path / "batches").iterdir()
    tensors = load_file(path)
    spoiled = {
        "nan": {name: tensors[name] * float("nan")}, "shape": {name: tensors[name][1:]},
        "type": {name: tensors[name].half()}, "missing": {},
    }  # fmt: skip
    save_file({key: value for key, value in tensors.items() if key != name} | spoiled[way], path)
    with pytest.raises(ValueError, match="Expected"):
        AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))


@pytest.mark.parametrize("way", ["nan", "shape", "type", "scale", "layer", "gone"])
def test_a_null_space_of_another_form_is_refused(way, word_tokenizer, tmp_path):
    make_editor(word_tokenizer, folder=tmp_path)
    path = tmp_path / "null_space.safetensors"
    basis = load_file(path)
    spoiled = {
        "nan": {"1": basis["1"] * float("nan")},
        "shape": {"1": basis["1"][1:]},
        "type": {"1": basis["1"].float()},
        "scale": {"1": 1.1 * basis["1"]},
        "layer": {"7": basis["1"].clone()},
    }
    save_file(basis | spoiled.get(way, {}), path)
    if way == "gone":
        path.unlink()
    with pytest.raises(ValueError, match="null_space.safetensors"):
        AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))


def test_a_folder_is_written_after_it_was_loaded_and_undone(word_tokenizer, tmp_path):
    make_editor(word_tokenizer, folder=tmp_path).edit(REQUESTS[:1], progress=False)
    loaded = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"))
    loaded.edit(REQUESTS[1:2], progress=False)
    adapted = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    torch.testing.assert_close(logits(adapted), logits(loaded.model), rtol=1e-4, atol=1e-4)
    assert REQUESTS[1].id in (tmp_path / "README.md").read_text()
    loaded.undo(2)
    adapted = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert torch.equal(logits(adapted), logits(tiny_model("llama")))


def test_neighbours_as_pairs_are_the_same_in_memory_and_on_the_disk(word_tokenizer, tmp_path):
    asked = EditRequest("w1 {}", "w3", "w5", neighborhood=(("w7 w8", "w9"), "w10"))
    editor = make_editor(word_tokenizer, folder=tmp_path)
    editor.edit([asked], progress=False)
    editor.save_pretrained(tmp_path)
    assert AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama")).edits == editor.edits == [asked]


def test_a_quantised_base_is_saved_again_and_again(word_tokenizer, tmp_path):
    """The change relative to integer weights is no number, and not even equal to itself."""
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = Int8Linear(layer.mlp.down_proj)
    editor = make_editor(word_tokenizer, model=model, folder=tmp_path)
    for request in REQUESTS[:2]:
        editor.edit([request], progress=False)
        editor.save_pretrained(tmp_path)
    assert editor.batches[0].layers[0]["change"] != editor.batches[0].layers[0]["change"]


SETUP = """
    import torch
    from pathlib import Path
    from unittest import mock
    from huggingface_hub import HfApi
    from hf_iclr import AlphaEditor
    from tests.editors.alpha_edit.test_editor import IDS, logits, make_editor
    from tests.editors.alpha_edit.test_journal import assert_adapter_is, ids
    from tests.editors.tiny import REQUESTS, tiny_model
    from hf_iclr.tiny_models import word_tokenizer
    from huggingface_hub import snapshot_download

    def load():
        return AlphaEditor.from_pretrained("user/edits", model=tiny_model("llama"))
"""


def test_pushes_of_several_editors_are_merged(hub):
    said = hub.run(
        SETUP
        + """
    first, second = make_editor(word_tokenizer("w0")), make_editor(word_tokenizer("w0"), folder="kept")
    first.edit(REQUESTS[:2], batch_size=1, progress=False)
    first.push_to_hub("user/edits")
    second.edit(REQUESTS[1:3], batch_size=1, progress=False)  # the first of them is there already
    commit = second.push_to_hub("user/edits", rank=1)
    print(commit.oid, HfApi().repo_info("user/edits").sha)
    loaded = load()
    print(ids(loaded) == ids(second) == [request.id for request in REQUESTS[:3]])
    print(torch.equal(logits(loaded.model), logits(second.model)))
    kept = AlphaEditor.from_pretrained("kept", model=tiny_model("llama"))
    print(ids(kept) == ids(second), assert_adapter_is(Path("kept"), kept))
    # The first takes one back, while the second adds one: both hold.
    second.edit(REQUESTS[3:], progress=False)
    second.push_to_hub("user/edits")
    first.remove(REQUESTS[0].id)
    first.push_to_hub("user/edits")
    print(ids(first) == ids(load()) == [request.id for request in REQUESTS[1:]])
    folder = Path(snapshot_download("user/edits"))
    assert not (folder / ".lock").exists()
    print(assert_adapter_is(folder, first), torch.equal(logits(load().model), logits(first.model)))
    second.push_to_hub("user/edits")
    print(ids(second) == ids(first), torch.equal(logits(second.model), logits(first.model)))
    first.undo(len(first.batches))
    first.push_to_hub("user/edits")
    print(ids(load()), torch.equal(logits(load().model), logits(tiny_model("llama"))))
    """
    ).splitlines()
    assert len({*said[0].split()}) == 1
    assert said[1:] == ["True", "True", "True None", "True", "None True", "True True", "[] True"]


def test_another_adapter_of_a_repository_is_not_replaced(hub):
    said = hub.run(
        SETUP
        + """
    from peft import LoraConfig, get_peft_model
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])).push_to_hub("user/edits")
    editor = make_editor(word_tokenizer("w0"), num_steps=1)
    editor.edit(REQUESTS[:1], progress=False)
    before = HfApi().repo_info("user/edits").sha
    try:
        editor.push_to_hub("user/edits")
    except ValueError as error:
        print(error)
    print(HfApi().repo_info("user/edits").sha == before)
    """
    ).splitlines()
    assert said == ["Expected a new repository or one with edits, got user/edits with another adapter.", "True"]


def test_a_correction_is_merged_with_what_others_add(hub):
    said = hub.run(
        SETUP
        + """
    from dataclasses import replace
    first, second = (make_editor(word_tokenizer("w0"), num_steps=1) for _ in range(2))
    first.edit([replace(REQUESTS[0], id="row 7")], progress=False)
    first.push_to_hub("user/edits")
    second.push_to_hub("user/edits")  # nothing of its own: it has the first's now
    second.edit(REQUESTS[1:2], progress=False)
    second.push_to_hub("user/edits")
    first.edit([replace(REQUESTS[0], target_new="w40", id="row 7")], progress=False)  # under the same name
    first.push_to_hub("user/edits")
    print([edit.target_new for edit in load().edits])
    second.edit([replace(REQUESTS[0], target_new="w41", id="row 7")], progress=False)
    try:
        second.push_to_hub("user/edits")
    except ValueError as error:
        print(error)
    second.remove("row 7")
    second.edit([replace(REQUESTS[0], target_new="w40", id="another name")], progress=False)
    second.push_to_hub("user/edits")
    print([(edit.id == "row 7", edit.target_new) for edit in load().edits])
    """
    ).splitlines()
    assert said[0] == "['w15 w16', 'w40']" and said[2] == "[(False, 'w15 w16'), (True, 'w40')]"
    assert "row 7 says 'w1 w3 w4 w2' is 'w41', row 7 'w40'" in said[1]


def test_a_push_in_between_is_merged_and_a_contradiction_named(hub):
    said = hub.run(
        SETUP
        + """
    from dataclasses import replace
    first, second, third = (make_editor(word_tokenizer("w0")) for _ in range(3))
    first.edit(REQUESTS[:1], progress=False)
    second.edit(REQUESTS[1:2], progress=False)
    upload = HfApi.upload_folder

    def first_pushes_just_before(self, **kwargs):
        with mock.patch.object(HfApi, "upload_folder", upload):
            if not first_pushed:
                first_pushed.append(first.push_to_hub("user/edits"))
        return upload(self, **kwargs)

    first_pushed = []
    with mock.patch.object(HfApi, "upload_folder", first_pushes_just_before):
        second.push_to_hub("user/edits")
    print(ids(load()) == [request.id for request in REQUESTS[:2]])
    third.edit([replace(REQUESTS[0], target_new="w40", id="")], progress=False)
    before = logits(third.model)
    try:
        third.push_to_hub("user/edits")
    except ValueError as error:
        print(error)
    print(torch.equal(logits(third.model), before), len(third.edits), len(load().edits))
    other = make_editor(word_tokenizer("w0"), l2=1.0)
    try:
        other.push_to_hub("user/edits")
    except ValueError as error:
        print(error)
    """
    ).splitlines()
    assert said[0] == "True" and said[2] == "True 1 2"
    assert f"says 'w1 w3 w4 w2' is 'w40', {REQUESTS[0].id} 'w5'" in said[1] and "editor.remove(" in said[1]
    assert "user/edits to have edits made with this editor's settings, got other l2" in said[3]
