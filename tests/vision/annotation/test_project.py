"""An annotation project: what was answered is on the disk, people get different videos, rows follow decisions."""

import os
import time

import numpy as np
import pytest
import torch
from datasets import load_dataset

from hf_iclr import AnnotationProject, annotate
from hf_iclr.vision.annotation.masklets import QualityGate
from hf_iclr.vision.annotation.queue import StaleEdit
from hf_iclr.vision.session.segments import decode_mask
from tests.vision.annotation.killed_server import kill_again_and_again
from tests.vision.session.test_frames import smooth, write_video
from tests.vision.tiny import tiny_pipe


CLICK = {"frame": 0, "obj": 1, "points": [[20, 20]], "labels": [1]}


def everything(session) -> list:
    return [session.segments(frame).to_dicts() for frame in range(session.num_frames)]


def video(tmp_path, name="clip.mp4", frames=6):
    return write_video(tmp_path / name, smooth(frames))


def open_project(tmp_path, *videos):
    project = AnnotationProject(tmp_path / "project", tiny_pipe())
    return project, [name for one in videos for name in project.add_videos(one)]


def track(project, name):
    for _ in project.session(name).iterate("both"):
        pass
    project.checkpoint(name)


def do_everything(project, name):
    """Edits of every kind, tracked and written in between."""
    project.edit(name, "prompt", CLICK)
    project.edit(name, "prompt", {"frame": 2, "obj": 2, "box": [30, 5, 70, 40]})
    track(project, name)
    project.edit(name, "prompt", {"frame": 4, "obj": 1, "points": [[60, 30]], "labels": [0]})
    project.edit(name, "brush", {"frame": 3, "obj": 2, "stroke": [[20, 20], [40, 20]], "radius": 3, "erase": True})
    project.edit(name, "name", {"obj": 2, "category": "dog"})
    project.edit(name, "undo", {})
    project.edit(name, "prompt", {"frame": 1, "obj": 3, "points": [[5, 5]], "labels": [1]})
    project.edit(name, "remove", {"obj": 3})
    project.edit(name, "undo", {})
    project.edit(name, "redo", {})
    project.edit(name, "clear", {"frame": 4, "obj": 1})


def test_a_project_that_was_never_closed_is_as_it_was_left(tmp_path):
    film = video(tmp_path)
    project, (name,) = open_project(tmp_path, film)
    do_everything(project, name)
    session = project.session(name)
    again, (same,) = open_project(tmp_path, film)  # nothing was closed: as after a kill
    assert same == name and everything(again.session(name)) == everything(session)
    assert again.session(name).prompts == session.prompts
    assert again.queue.masklets(name)[2]["category"] == "dog"
    while session.can_undo:
        session.undo()
        again.edit(name, "undo", {})
        assert everything(again.session(name)) == everything(session)
    third, _ = open_project(tmp_path, film)
    for _ in range(4):
        session.redo()
        third.edit(name, "redo", {})
    assert everything(third.session(name)) == everything(session)


def test_what_can_not_be_done_is_not_written(tmp_path, monkeypatch):
    project, (name,) = open_project(tmp_path, video(tmp_path))
    project.edit(name, "prompt", CLICK)
    with pytest.raises(ValueError, match="There is no object 7"):
        project.edit(name, "remove", {"obj": 7})
    before = everything(project.session(name))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(project.queue, "add_edit", full)
    with pytest.raises(OSError, match="No space"):
        project.edit(name, "prompt", {**CLICK, "points": [[40, 20]]})
    monkeypatch.undo()
    assert everything(project.session(name)) == before and project.queue.video(name)["version"] == 1


def test_another_process_that_edited_is_noticed(tmp_path):
    film = video(tmp_path)
    one, (name,) = open_project(tmp_path, film)
    two, _ = open_project(tmp_path, film)
    one.edit(name, "prompt", CLICK)
    two.edit(name, "prompt", {**CLICK, "obj": 2, "points": [[60, 40]]})
    assert one.session(name).objects == [1, 2]
    with pytest.raises(StaleEdit, match="another tab"):
        one.edit(name, "remove", {"obj": 1}, version=1)


def test_two_people_get_different_videos_until_a_lease_ends(tmp_path, monkeypatch):
    project, names = open_project(tmp_path, video(tmp_path, "a.mp4", 2), video(tmp_path, "b.mp4", 3))
    first, second = project.next("ann"), project.next("bob")
    assert [first.video, second.video] == names and project.next("eve") is None
    assert project.next("ann").video == names[0]  # still hers
    with pytest.raises(StaleEdit, match="bob works on this video"):
        project.edit(names[1], "prompt", CLICK, "ann")
    now = time.time()
    monkeypatch.setattr("hf_iclr.vision.annotation.queue.time.time", lambda: now + 601)
    assert project.next("eve").video == names[0]
    with pytest.raises(StaleEdit, match="eve works on this video"):
        project.edit(names[0], "prompt", CLICK, "ann")
    project.queue.release(names[0], "eve")
    project.edit(names[0], "prompt", CLICK, "ann")


@pytest.fixture
def doubtful(tmp_path):
    """Two videos of two objects each, none of which passed the gate."""
    films = [video(tmp_path, f"{number}.mp4", 3 + number) for number in range(2)]
    click = {0: {1: {"points": [[18, 20]]}, 2: {"points": [[60, 40]]}}}
    gate = QualityGate(0, 1.01, None)
    annotate(
        [str(film) for film in films], tiny_pipe(), lambda video, session: click, out=tmp_path / "project", gate=gate
    )
    return tmp_path


def test_the_queue_of_annotate_is_served_most_uncertain_first_and_its_rows_follow(doubtful):
    project, _ = open_project(doubtful)
    rows = project.store.read([])
    ranked = zip(rows["uncertainty"], rows["name"], rows["object"], strict=True)
    order = sorted(ranked, key=lambda row: (-row[0], *row[1:]))
    for number, (_, name, obj) in enumerate(order):
        item = project.next("ann")
        assert (item.video, item.object) == (name, obj) and item.reason.startswith("stability")
        project.decide(name, ("accept", "reject", "skip", "accept")[number], [obj], "ann")
    assert project.next("ann")[:2] == order[2][1:]  # skipped: behind all others
    statuses = {(row["name"], row["object"]): row["status"] for row in project.read()}
    assert [statuses[name, obj] for _, name, obj in order] == ["accepted", "rejected", "waiting", "accepted"]
    masks = {(row["name"], row["object"]): row["masks"] for row in rows}
    assert all(row["masks"] == masks[row["name"], row["object"]] for row in project.read())
    again, _ = open_project(doubtful)  # decisions are on the disk too
    assert again.queue.counts() == {"waiting": 1, "accepted": 2, "rejected": 1, "videos": 2, "finished": 0}


def test_what_was_corrected_by_hand_is_in_the_rows(doubtful):
    project, _ = open_project(doubtful)
    item = project.next("ann")
    name, obj = item.video, item.object
    assert project.untracked(name)
    track(project, name)  # the same masks as those of the rows
    session = project.session(name)
    assert not project.untracked(name) and not session.can_undo
    for row in project.store.rows(name):
        known = [session.segments(frame).masks[row["object"]] for frame in row["frames"]]
        assert known == row["masks"]
    project.edit(name, "prompt", {"frame": 2, "obj": obj, "points": [[40, 20], [42, 22]], "labels": [1, 0]}, "ann")
    other = 3 - obj
    project.edit(name, "remove", {"obj": other}, "ann")
    project.edit(name, "name", {"obj": obj, "category": "bar"}, "ann")
    track(project, name)
    project.decide(name, "accept", [obj], "ann")
    rows = {row["object"]: row for row in project.read() if row["name"] == name}
    row = rows[obj]
    assert (row["status"], row["category"], row["provenance"], row["clicks"]) == ("accepted", "bar", "manual", 3)
    assert (
        row["edited_frames"] == [0, 2] and rows[other]["status"] == "rejected" and rows[other]["reason"] == "removed"
    )
    assert np.array_equal(decode_mask(row["masks"][2], session.size), project.session(name).segments(2).binary(obj))
    project.edit(name, "prompt", {"frame": 1, "obj": obj, "points": [[40, 20]], "labels": [1]}, "ann")
    assert project.queue.masklets(name)[obj]["status"] == "waiting"  # it was changed since
    project.edit(name, "undo", {}, "ann")
    project.edit(name, "undo", {}, "ann")
    assert project.queue.masklets(name)[other]["status"] == "waiting"  # and this one is back


def test_what_was_written_between_edits_is_not_done_again_on_top_of_itself(tmp_path):
    """Decided on and written as rows, never tracked: the edits make the session, not the rows with their prompts."""
    project, (name,) = open_project(tmp_path, video(tmp_path))
    for number in range(2):
        project.edit(name, "prompt", {**CLICK, "points": [[20 + number, 20]]})
        project.decide(name, "accept")
        (row,) = project.read()
        assert (row["clicks"], row["edited_frames"], row["rounds"]) == (1 + number, [0], 0)
    again, _ = open_project(tmp_path)
    assert again.session(name).prompts == project.session(name).prompts
    assert everything(again.session(name)) == everything(project.session(name))


def test_what_annotate_found_after_a_video_was_added_waits_too(tmp_path):
    film = video(tmp_path)
    project, (name,) = open_project(tmp_path, film)
    project.close()
    annotate([str(film)], tiny_pipe(), lambda *_: {0: {1: {"points": [[18, 20]]}}}, out=tmp_path / "project")
    again, _ = open_project(tmp_path)
    assert set(again.queue.masklets(name)) == {1} and again.session(name).objects == [1]


def test_videos_pointed_at_by_hand_become_a_dataset(tmp_path):
    project, (name, empty) = open_project(tmp_path, video(tmp_path, "a.mp4"), video(tmp_path, "b.mp4", 2))
    project.edit(name, "prompt", CLICK)
    track(project, name)
    project.decide(name, "accept")
    project.decide(empty, "accept")  # looked at: there is nothing in it
    assert project.next() is None
    project.close()
    files = str(tmp_path / "project" / "shards" / "*.parquet")
    (row,) = load_dataset("parquet", data_files=files, split="train", cache_dir=tmp_path / "hf")
    assert row["status"] == "accepted" and row["frames"] == list(range(6)) and row["prompts"].startswith('{"0"')
    asked = []
    rows = annotate(
        [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")],
        tiny_pipe(),
        lambda *_: asked.append(1),
        out=tmp_path / "project",
    )
    assert len(rows) == 1 and not asked


def test_a_project_follows_its_videos(tmp_path):
    film = video(tmp_path)
    project, (name,) = open_project(tmp_path, film)
    project.edit(name, "prompt", CLICK)
    project.close()
    (tmp_path / "moved").mkdir()
    os.rename(film, tmp_path / "moved" / "film.mp4")
    again = AnnotationProject(tmp_path / "project", tiny_pipe())
    with pytest.raises(ValueError, match=r"clip\.mp4"):
        again.session(name)
    assert again.add_videos(tmp_path / "moved") == [name]
    assert again.session(name).objects == [1]


def test_a_video_nobody_has_looked_at_has_no_rows(tmp_path):
    project, (name,) = open_project(tmp_path, video(tmp_path, frames=2))
    project.queue.mark(name, unwritten=1)
    project.write_all()
    assert project.store.names() == [] and not project.queue.video(name)["unwritten"]
    project.decide(name, "skip")
    assert not project.queue.video(name)["finished"]
    project.decide(name, "accept")
    project.write_all()
    assert project.store.names() == [name] and project.queue.video(name)["finished"]
    with pytest.raises(ValueError, match="accept, reject or skip, got 'keep'"):
        project.decide(name, "keep")


def test_thirty_edits_are_many_to_do_again(tmp_path):
    project, (name,) = open_project(tmp_path, video(tmp_path, frames=2))
    for number, long in ((29, False), (30, True)):
        project._versions[name] = 5 + number
        project._saved[name] = 5
        assert project.is_long(name) is long


def test_a_damaged_database_raises(tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "project.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match="Expected a project's database"):
        AnnotationProject(tmp_path / "project", tiny_pipe())


def test_a_database_of_which_one_page_is_damaged_raises(tmp_path):
    project, _ = open_project(tmp_path, video(tmp_path, frames=2))
    project.close()
    path = tmp_path / "project" / "project.sqlite"
    whole = path.read_bytes()
    path.write_bytes(whole[:4088] + whole[4089:])  # all that follows is moved by a byte
    with pytest.raises(ValueError, match="Expected a project's database"):
        AnnotationProject(tmp_path / "project", tiny_pipe())


def test_nothing_that_was_answered_is_lost_when_the_server_is_killed(tmp_path):
    """Two people click, draw, name, undo, track and decide; what was answered last is there after every SIGKILL."""
    torch.set_num_threads(1)
    films = [video(tmp_path, f"{number}.mp4", 4 + number) for number in range(2)]
    stages, counts = kill_again_and_again(tiny_pipe(), tmp_path / "project", films, kills=4, longest=0.8)
    assert stages.total() == counts["kills"] == 4 and counts["edits answered"] and counts["states compared"]
    wrong = ("answered edits lost", "answered decisions lost", "edits that nobody made", "states that differ")
    assert not any(counts[name] for name in (*wrong, "masks that differ")), counts
