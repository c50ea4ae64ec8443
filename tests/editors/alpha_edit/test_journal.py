"""The journal is only ever added to and says everything; a kill leaves the last whole batch."""

import multiprocessing
import time

import pytest
import torch

from hf_iclr import saving
from hf_iclr.editors.alpha_edit.editor import AlphaEditor
from hf_iclr.editors.alpha_edit.journal import append_event, batches_of, read_events
from tests.editors.alpha_edit.test_editor import logits, make_editor
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


def test_a_line_cut_short_is_as_if_it_were_not_there(tmp_path):
    append_event(tmp_path, {"event": "edit", "undone": 0, "batches": [{"name": "a"}]})
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "edit", "undone": 0, "bat')
    assert len(read_events(tmp_path)) == 1
    append_event(tmp_path, {"event": "edit", "undone": 0, "batches": [{"name": "b"}]})
    assert [batch["name"] for batch in batches_of(read_events(tmp_path))] == ["a", "b"]


def edit_until(moment, tokenizer, folder, reached):
    """Edits four batches and hangs at a moment, in the middle of what it does there."""

    def hang(*_, **__):
        reached.set()
        time.sleep(60)

    made, save = [], saving.save_file

    def save_and_count(tensors, path, *args, **kwargs):
        made.append(path)
        if moment == "in a file" and len(made) == 4:  # the null space and two batches are there
            path.write_bytes(b"half")
            hang()
        save(tensors, path, *args, **kwargs)
        if moment == "before the journal" and len(made) == 4:
            hang()

    saving.save_file = save_and_count
    model = tiny_model("llama")
    statistics = tiny_statistics(model, tokenizer, layers=[1, 2])
    editor = AlphaEditor(model, tokenizer, quick_config(), statistics, folder=folder)
    editor.edit(REQUESTS, batch_size=1, progress=False)
    editor.tokenizer.save_pretrained = hang
    editor.save_pretrained(folder)


@pytest.mark.parametrize(("moment", "whole"), [("in a file", 2), ("before the journal", 2), ("in save_pretrained", 4)])
def test_a_kill_leaves_the_last_whole_batch(moment, whole, word_tokenizer, tmp_path):
    fork = multiprocessing.get_context("fork")
    reached = fork.Event()
    process = fork.Process(target=edit_until, args=(moment, word_tokenizer, tmp_path / "edits", reached))
    process.start()
    assert reached.wait(60)
    process.kill()
    process.join()
    loaded = AlphaEditor.from_pretrained(tmp_path / "edits", model=tiny_model("llama"), tokenizer=word_tokenizer)
    assert [edit.id for edit in loaded.edits] == [request.id for request in REQUESTS[:whole]]
    memory = make_editor(word_tokenizer)
    memory.edit(REQUESTS[:whole], batch_size=1, progress=False)
    assert torch.equal(logits(loaded.model), logits(memory.model))
