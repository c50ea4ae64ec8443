"""Masklets are proposed, judged, corrected and written once each, whatever happens on the way."""

import hashlib
import json
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset, load_dataset
from PIL import Image
from transformers import pipeline
from typer.testing import CliRunner

from hf_iclr.cli import app as cli
from hf_iclr.models import hash_weights
from hf_iclr.saving import model_revision
from hf_iclr.vision.annotation import store as annotation_store
from hf_iclr.vision.annotation.data_engine import annotate
from hf_iclr.vision.annotation.masklets import (
    CorrectorUnavailable,
    Masklet,
    QualityGate,
    empty_session,
    find_masklets,
    measure_cycles,
    track,
)
from hf_iclr.vision.annotation.sources import name_video
from hf_iclr.vision.annotation.store import AnnotationStore, annotation_statistics, review_queue, to_row
from hf_iclr.vision.session.automatic_masks import AutomaticMaskConfig, generate_masks, new_objects
from hf_iclr.vision.session.prompts import encode_rle
from hf_iclr.vision.session.segments import FrameSegments, VideoSegments, decode_mask
from tests.trainers.distributed import run_in_two
from tests.vision.tiny import clip, tiny_pipe


OPEN = QualityGate(min_object_score=0, min_stability=0, min_cycle_iou=None)
ANYTHING = AutomaticMaskConfig(points_per_side=3, pred_iou_thresh=-9, stability_score_thresh=0, multimask_output=False)
CLICK = {0: {1: {"points": [[18, 20]]}, 2: {"points": [[60, 40]]}}}


def point(video, session):
    return CLICK


def run(videos, out, prompts=point, gate=OPEN, **kwargs) -> Dataset:
    return annotate(videos, tiny_pipe(), prompts, out=out, gate=gate, **kwargs)


def masks_of(row) -> np.ndarray:
    return np.stack([decode_mask(mask, (row["height"], row["width"])) for mask in row["masks"]])


@pytest.fixture
def encoded():
    """Images encoded, one entry each."""
    calls: list[int] = []
    hook = tiny_pipe().model.vision_encoder.register_forward_hook(
        lambda *args: calls.extend(args[2].last_hidden_state)
    )
    yield calls
    hook.remove()


def test_a_row_is_a_masklet_of_the_pipeline(tmp_path):
    """Scores to 1e-4: the model rounds memories to bfloat16, which magnifies last bits."""
    rows = run([clip()], tmp_path)
    expected = tiny_pipe()(clip(), CLICK, output="rle")
    assert len(rows) == 2
    for row in rows:
        obj = row["object"]
        assert row["frames"] == expected.frames == list(range(6))
        assert row["masks"] == [frame.masks[obj] for frame in expected]
        np.testing.assert_allclose(row["scores"], [frame.scores[obj] for frame in expected], rtol=1e-4)
        np.testing.assert_allclose(row["object_scores"], [frame.object_scores[obj] for frame in expected], rtol=1e-4)
        assert (row["num_frames"], row["height"], row["width"]) == (6, 48, 80)
        assert (row["provenance"], row["status"]) == ("manual", "accepted")
        assert (row["clicks"], row["clicked_frames"], row["edited_frames"]) == (1, 1, [0])
        assert json.loads(row["prompts"]) == {"0": {**CLICK[0][obj], "labels": [1]}}
        assert row["cycle_iou"] is None and 0 <= row["uncertainty"] <= 1


def test_every_frame_is_encoded_once_for_all_objects_and_passes(tmp_path, encoded):
    def correct(masklet):
        masklet.session.correct(3, masklet.object, [[30, 20]])

    gate = QualityGate(0, 0, 0)
    run([clip()], tmp_path / "a", gate=gate, verifier=lambda masklet: masklet.rounds, corrector=correct)
    assert len(encoded) == 6
    run([clip()], tmp_path / "b", "auto", gate, automatic=ANYTHING)
    assert len(encoded) == 12


def test_automatic_masklets_are_those_of_the_pipeline(tmp_path):
    config = replace(ANYTHING, box_nms_thresh=1.0, max_overlap=0.95)
    rows = run([clip(3)], tmp_path, "auto", automatic=vars(config))
    expected = tiny_pipe()(clip(3), "auto", automatic=config, output="rle")
    assert len(rows) > 1 and rows["object"][:] == expected.objects
    for row in rows:
        assert row["masks"] == [frame.masks[row["object"]] for frame in expected]
        assert (row["provenance"], row["clicks"], row["edited_frames"]) == ("auto", 0, [])


def test_automatic_masklets_that_become_the_same_object_are_one():
    """Distinct on the first frame, but less than .8 of their pixels of all frames are."""
    config = replace(ANYTHING, box_nms_thresh=1.0, max_overlap=0.8)
    session = tiny_pipe().session(clip(), output="rle")
    masklets = find_masklets(tiny_pipe(), session, config, None, "clip")
    assert {masklet.object for masklet in masklets} == set(session.objects)
    found = generate_masks(tiny_pipe().model, tiny_pipe().processor, clip()[0], config)
    assert 1 < len(masklets) < len(new_objects(found, [], 0.8))
    for index, one in enumerate(masklets):
        for other in masklets[:index]:
            a, b = (np.stack([masklet.binary(frame) for frame in range(6)]) for masklet in (one, other))
            assert (a & b).sum() < 0.8 * (a | b).sum()


def test_threads_that_share_a_model_find_what_each_finds_alone():
    def find(seed: int) -> list[dict]:
        session = tiny_pipe().session(clip(2, seed=seed), output="rle")
        return [masklet.masks for masklet in find_masklets(tiny_pipe(), session, ANYTHING, None, "clip")]

    alone = [find(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(find, range(4))) == alone and alone[0] != alone[1]


def test_objects_that_come_later_are_found_too(monkeypatch):
    """A finder of our own finds one object on frame 0 and another one on frame 4."""
    seen = {0: [(0, 10)], 4: [(30, 48)]}

    def generate(model, processor, image, *args):
        number = int(np.flatnonzero((video == image).all(axis=(1, 2, 3)))[0])
        masks = [np.zeros((48, 80), dtype=bool) for _ in seen[number]]
        for mask, (top, bottom) in zip(masks, seen[number], strict=True):
            mask[top:bottom] = True
        return [{"segmentation": mask} for mask in masks]

    video = clip()
    monkeypatch.setattr("hf_iclr.vision.session.pipeline.generate_masks", generate)
    session = tiny_pipe().session(video, output="rle")
    found = find_masklets(tiny_pipe(), session, AutomaticMaskConfig(every=4, max_overlap=0.99), None, "clip")
    assert [frame for frame, objects in session.prompts.items() for _ in objects] == [0, 4]
    assert all(sorted(masklet.masks) == list(range(6)) for masklet in found)


def test_videos_without_objects_give_no_rows_and_are_not_done_again(tmp_path, encoded):
    nothing = AutomaticMaskConfig(points_per_side=2, pred_iou_thresh=10.0)
    for _ in range(2):
        rows = run([clip(2)], tmp_path, "auto", automatic=nothing)
        assert len(rows) == 0 and rows.column_names[0] == "video"
        assert len(encoded) == 1
    assert json.loads((tmp_path / "skipped.json").read_text()) == []
    assert len(run([clip(2)], tmp_path / "b", lambda video, session: None)) == 0


def test_a_video_without_objects_leaves_nothing_that_readers_die_on(tmp_path):
    """A Parquet file with a group of no rows is none to `load_dataset`; earlier versions left such."""
    videos = [clip(2), clip(2, seed=1)]
    rows = run(videos, tmp_path, lambda video, session: CLICK if (video == videos[0]).all() else None)
    assert (
        len(rows) == 2 and "2 accepted" in rows.info.description and "1 videos have no object" in rows.info.description
    )
    shards = [str(file) for file in tmp_path.rglob("*.parquet")]
    assert len(load_dataset("parquet", data_files=shards, split="train", cache_dir=tmp_path / "hf")) == 2
    (empty,) = (path for path in shards if not pyarrow.parquet.read_metadata(path).num_rows)
    pyarrow.parquet.write_table(annotation_store._SCHEMA.empty_table(), empty)
    assert pyarrow.parquet.read_metadata(empty).num_row_groups == 1
    assert len(run(videos, tmp_path, lambda video, session: 1 / 0)) == 2
    assert pyarrow.parquet.read_metadata(empty).num_row_groups == 0


def test_rows_are_mapped_from_a_file(tmp_path):
    rows = run([clip(2)], tmp_path)
    assert rows.cache_files and rows.filter(lambda row: row["object"] == 2)["object"][:] == [2]


def test_clicks_refine_and_leaves_other_objects_alone(tmp_path):
    seen = []

    def verify(masklet):
        seen.append((masklet.object, masklet.rounds))
        return masklet.object == 2 or masklet.rounds == 2

    def correct(masklet):
        masklet.session.correct(2 + masklet.rounds, masklet.object, points=[[70, 8]], labels=[0])

    rows = run([clip()], tmp_path, verifier=verify, corrector=correct)
    session = tiny_pipe().session(clip(), output="rle")
    for obj, prompt in CLICK[0].items():
        session.add(0, obj, **prompt)
    untouched = session.propagate("both")
    for frame in (2, 3):
        session.correct(frame, 1, points=[[70, 8]], labels=[0])
        corrected = session.propagate("both")
    assert seen == [(1, 0), (1, 1), (1, 2), (2, 0)]
    assert rows[0]["masks"] == [frame.masks[1] for frame in corrected] != [frame.masks[1] for frame in untouched]
    assert rows[1]["masks"] == [frame.masks[2] for frame in untouched]
    assert rows["clicks"][:] == [3, 1] and rows["edited_frames"][:] == [[0, 2, 3], [0]]
    assert rows["status"][:] == ["accepted", "accepted"]


def test_with_a_corrector_what_grows_with_the_video_is_on_the_disk(tmp_path):
    sessions = []

    def correct(masklet):
        sessions.append((masklet.session.config.keep, masklet.session.config.offload))
        masklet.session.correct(3, masklet.object, [[30, 20]])  # a frame that a window has forgotten

    run([clip()], tmp_path, verifier=lambda masklet: masklet.rounds, corrector=correct)
    assert sessions == [("all", "disk")] * 2


def test_time_in_the_functions_is_counted(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("hf_iclr.vision.annotation.data_engine.time.perf_counter", lambda: next(clock))
    rows = run([clip(2)], tmp_path, verifier=lambda masklet: True)
    assert rows["seconds"][:] == [1.5, 1.5]  # half of the second of the prompts, one of the verifier


def test_masks_may_come_from_elsewhere(tmp_path):
    drawn = np.zeros((48, 80), dtype=bool)
    drawn[5:20, 5:20] = True

    def correct(masklet):
        assert masklet.object == 1
        return VideoSegments([FrameSegments(3, (48, 80), {1: drawn}, {1: 1.0}, {1: 10.0})])

    verify = lambda masklet: masklet.object == 2 or masklet.rounds  # noqa: E731
    row = run([clip()], tmp_path, verifier=verify, corrector=correct)[0]
    assert (masks_of(row)[3] == drawn).all() and row["edited_frames"] == [0, 3] and row["clicks"] == 1
    assert row["frames"] == list(range(6)) and row["status"] == "accepted"


def test_a_corrector_may_reject_and_add_objects(tmp_path):
    def correct(masklet):
        masklet.session.remove_object(1)
        masklet.session.add(2, 7, box=[5, 5, 40, 30])
        masklet.session.add(0, 2, points=[[60, 40], [70, 40]])

    rows = run([clip()], tmp_path, verifier=lambda masklet: masklet.object != 1, corrector=correct)
    assert rows["object"][:] == [1, 2, 7]
    assert rows["status"][:] == ["rejected", "accepted", "accepted"]
    assert rows["clicks"][:] == [1, 2, 2] and rows["edited_frames"][:] == [[0], [0], [2]]
    assert rows[2]["provenance"] == "manual" and rows[2]["frames"] == list(range(6))
    session = tiny_pipe().session(clip(), output="rle")
    session.add(0, 2, **CLICK[0][2])
    session.propagate("both")
    session.add(0, 2, points=[[60, 40], [70, 40]])
    assert rows[1]["masks"] == [frame.masks[2] for frame in session.propagate("both")]


def test_what_a_person_finds_good_is_accepted_and_shown_once(tmp_path):
    shown = []

    def look(masklet):
        shown.append(masklet.object)
        session = masklet.session
        if masklet.object == 2:
            session.remove_object(2)
        return VideoSegments(map(session.segments, range(session.num_frames)))

    rows = run([clip(3)], tmp_path, gate=QualityGate(0, 1.01, None), corrector=look)
    assert shown == [1, 2] and rows["status"][:] == ["accepted", "rejected"]
    assert rows["edited_frames"][:] == [[0], [0]]  # as they were pointed at: looking changed nothing


@pytest.mark.parametrize("asked", [1, 2])
def test_what_is_removed_before_a_corrector_fails_is_rejected(tmp_path, asked):
    def correct(masklet):
        masklet.session.remove_object(2)
        masklet.session.correct(2, 2, points=[[70, 8]], labels=[0])

    gate = QualityGate(0, -1, None)
    rows = run([clip(3)], tmp_path, gate=gate, verifier=lambda one: one.object != asked, corrector=correct)
    assert rows["status"][:] == ["waiting" if asked == 1 else "accepted", "rejected"]
    assert rows["reason"][1] == "removed" and (asked == 2 or "no object 2" in rows["reason"][0])


def test_what_is_removed_beside_another_is_rejected_and_may_come_back(tmp_path):
    def correct(masklet):
        if 2 in masklet.session.objects:
            masklet.session.remove_object(2)
        elif masklet.object == 1 and masklet.rounds == 1:
            masklet.session.add(1, 2, points=[[60, 40]])
        masklet.session.correct(2, 1, points=[[70, 8]], labels=[0])

    verify = lambda masklet: masklet.object == 2 or masklet.rounds > 1  # noqa: E731
    rows = run([clip(3)], tmp_path / "a", verifier=lambda one: one.rounds > 0 or one.object == 2, corrector=correct)
    assert rows["status"][:] == ["accepted", "rejected"] and rows["reason"][:] == [None, "removed"]
    rows = run([clip(3)], tmp_path / "b", verifier=verify, corrector=correct)
    assert rows["status"][:] == ["accepted", "accepted"] and 1 in rows["edited_frames"][1]


def test_a_corrector_that_nobody_answers_stops_the_run(tmp_path):
    def away(masklet):
        raise CorrectorUnavailable("The port is taken.")

    videos = [clip(2), clip(2, seed=1)]
    strict = {"gate": QualityGate(0, 1.01, None)}
    with pytest.raises(ValueError, match="port is taken"):
        run(videos, tmp_path, corrector=away, **strict)
    assert not list(tmp_path.rglob("*.parquet"))
    rows = run(
        videos, tmp_path, corrector=lambda masklet: VideoSegments(map(masklet.session.segments, range(2))), **strict
    )
    assert rows["status"][:] == ["accepted"] * 4


def test_a_verifier_that_raises_leaves_its_masklet_in_the_queue(tmp_path, caplog):
    def verify(masklet):
        if masklet.object == 1:
            raise RuntimeError("the annotator went home")
        return True

    rows = run([clip(3)], tmp_path, verifier=verify)
    assert rows["status"][:] == ["waiting", "accepted"]
    assert rows[0]["reason"] == "RuntimeError: the annotator went home"
    assert "Object 1" in caplog.text and "went home" in caplog.text
    assert review_queue(rows)["object"][:] == [1]


def test_what_stays_unsatisfactory_waits(tmp_path):
    def correct(masklet):
        masklet.session.correct(1, masklet.object, [[20, 20]])

    rows = run([clip(3)], tmp_path, verifier=lambda masklet: False, corrector=correct, max_rounds=2)
    assert rows["status"][:] == ["waiting"] * 2 and rows["rounds"][:] == [2, 2]
    assert rows["reason"][:] == ["unsatisfactory"] * 2
    rows = run([clip(3)], tmp_path / "b", verifier=lambda masklet: False, corrector=lambda masklet: None)
    assert rows["status"][:] == ["waiting"] * 2 and rows["rounds"][:] == [1, 1]


def test_the_gate_comes_before_the_verifier_and_stands_in_for_it(tmp_path):
    never = QualityGate(min_object_score=0, min_stability=1.01, min_cycle_iou=None)
    rows = run([clip(3)], tmp_path / "a", gate=never, verifier=lambda masklet: 1 / 0)
    assert all(reason.startswith("stability 0.") for reason in rows["reason"])
    rows = run([clip(3)], tmp_path / "b", gate=QualityGate(0, 0, 1.01))
    assert all(reason.startswith("cycle IoU ") for reason in rows["reason"])
    rows = run([clip(3)], tmp_path / "c", gate=QualityGate(1.01, 0, None))
    assert all(reason.startswith("object score ") for reason in rows["reason"])


def test_cycle_iou_is_that_of_looking_for_the_last_mask_on_the_first_frame():
    session = tiny_pipe().session(clip(), output="rle")
    for obj, prompt in CLICK[0].items():
        session.add(0, obj, **prompt)
    masklets = [Masklet(None, "clip", obj, session) for obj in (1, 2)]
    track(session, masklets)
    measure_cycles(session, masklets)
    for masklet in masklets:
        back = tiny_pipe().session(clip(), output="rle")
        frames = masklet.in_sight
        back.add(frames[-1], 1, mask=masklet.masks[frames[-1]])
        returned = back.propagate("backward", start=frames[0], max_frames=1)[frames[0]].binary(1)
        start = masklet.binary(frames[0])
        assert masklet.cycle_iou == pytest.approx((returned & start).sum() / (returned | start).sum(), abs=1e-9)
    assert empty_session(session).features is session.features


def test_stability_and_uncertainty_of_a_masklet():
    """Stability: pixels of logits above 1 to those above -1, 1 of 4. Uncertainty: 1 - .5 * .25 * .8."""
    session = tiny_pipe().session(clip(), output="rle")
    session.add(0, 1, points=[[20, 20]])
    output = session._memories[1].output(0)
    output["pred_masks"] = torch.tensor([[[[2.0, 0.5], [-0.5, 0.0]]]])
    masklet = Masklet(None, "clip", 1, session)
    segments = FrameSegments(0, (48, 80), {1: encode_rle(np.ones((48, 80)))}, {1: 0.5}, {1: 0.0})
    masklet.take(segments, session)
    masklet.cycle_iou = 0.8
    assert masklet.stability == 0.25 and masklet.visibility == 0.5
    assert masklet.uncertainty == pytest.approx(0.9)


def test_the_queue_begins_with_the_most_uncertain(tmp_path):
    rows = run([clip(3), clip(3, seed=1)], tmp_path, verifier=lambda masklet: False)
    queue = review_queue(rows)
    assert len(queue) == 4 and queue["uncertainty"][:] == sorted(queue["uncertainty"], reverse=True)


def test_bad_videos_among_many_are_listed_and_tried_again(tmp_path, caplog):
    folder = tmp_path / "videos"
    (folder / "frames").mkdir(parents=True)
    for number, frame in enumerate(clip(2)):
        write_png(frame, folder / "frames" / f"{number}.png")
    (folder / "bad.mp4").write_bytes(b"no video at all")
    rows = run(folder, tmp_path / "out")
    assert rows["video"][:] == [str(folder / "frames")] * 2
    (entry,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert entry["name"].startswith("bad-") and "no video that FFmpeg can read" in entry["reason"]
    assert entry["name"] in rows.info.description and entry["name"] in caplog.text
    (folder / "bad.mp4").unlink()
    (folder / "bad.mp4").mkdir()
    write_png(clip(1)[0], folder / "bad.mp4" / "0.png")
    assert len(run(folder, tmp_path / "out")) == 4
    assert json.loads((tmp_path / "out" / "skipped.json").read_text()) == []


def write_png(frame, path):
    Image.fromarray(frame).save(path)


def test_masks_of_other_sizes_raise(tmp_path):
    wrong = {0: {1: {"mask": np.ones((10, 10))}}}
    rows = run([clip(2), clip(2, seed=1)], tmp_path, lambda video, _: wrong if (video == clip(2)).all() else CLICK)
    assert len(rows) == 2
    assert "(10, 10)" in rows.info.description and "(48, 80)" in rows.info.description
    other = VideoSegments([FrameSegments(0, (10, 10), {1: np.ones((10, 10), bool)}, {1: 1.0}, {1: 1.0})])
    rows = run([clip(2)], tmp_path / "b", verifier=lambda masklet: masklet.object == 2, corrector=lambda _: other)
    assert rows["status"][:] == ["waiting", "accepted"] and "(10, 10)" in rows[0]["reason"]


def test_a_full_disk_leaves_no_half_shard(tmp_path, monkeypatch):
    write = pyarrow.parquet.write_table

    def full(table, where, **kwargs):
        write(table, where, **kwargs)
        where.write_bytes(where.read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_iclr.vision.annotation.store.pq.write_table", full)
    with pytest.raises(OSError, match="No space left"):
        run([clip(2)], tmp_path)
    assert list((tmp_path / "shards").iterdir()) == []
    monkeypatch.undo()
    assert len(run([clip(2)], tmp_path)) == 2


def _annotate_until_killed(out):
    count = iter(range(9))

    def write(table, path, **kwargs):
        pyarrow.parquet.write_table(table, path)
        if next(count) == 2:
            path.write_bytes(path.read_bytes()[:100])
            os.kill(os.getpid(), signal.SIGKILL)

    annotation_store.pq = SimpleNamespace(**vars(pyarrow.parquet) | {"write_table": write})
    run([clip(2, seed=seed) for seed in range(5)], out)


def test_a_killed_run_goes_on_without_loss_or_double(tmp_path):
    """A process is killed while it writes its third of five videos."""
    process = multiprocessing.get_context("fork").Process(target=_annotate_until_killed, args=(tmp_path / "a",))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "a" / "shards").glob("*.parquet"))) == 2
    videos = [clip(2, seed=seed) for seed in range(5)]
    pointed = []

    def prompts(video, session):
        pointed.append(video)
        return CLICK

    resumed = run(reversed(videos), tmp_path / "a", prompts)
    assert len(pointed) == 3
    whole = run(videos, tmp_path / "b")
    assert resumed.remove_columns("seconds").to_dict() == whole.remove_columns("seconds").to_dict()
    assert len(whole) == 10 and len(set(whole["name"])) == 5


def test_videos_are_read_lazily_and_twice_the_same_is_one(tmp_path):
    done = []

    def videos():
        for seed in (0, 1, 0):
            assert len(list((tmp_path / "shards").glob("*.parquet"))) == len(done)
            yield clip(2, seed=seed)
            done[:] = sorted({*done, seed})

    assert len(run(videos(), tmp_path)) == 4


def _annotate_in_a_process(out):
    pointed = []

    def prompts(video, session):
        pointed.append(video)
        return CLICK

    rows = run([b"bad", *(clip(2, seed=seed) for seed in range(3))], out, prompts)
    return rows.to_dict(), rows.info.description, len(pointed)


def test_processes_share_the_videos(tmp_path):
    """Videos 1 and 3 are the second process's."""
    *one, first = _annotate_in_a_process(tmp_path / "one")
    (*two, second), (*three, third) = run_in_two(_annotate_in_a_process, tmp_path, tmp_path / "two")
    assert (first, second, third) == (3, 1, 2)
    assert two == three and "Skipped" in two[1]
    for rows in (one[0], two[0]):
        rows.pop("seconds")
    assert one == two


def test_names_depend_on_the_video_alone(tmp_path):
    path = str(tmp_path / "a.mp4")
    (tmp_path / "b").mkdir()
    for file, content in (("a.mp4", b"one"), ("b/a.mp4", b"two"), ("b/c.mp4", b"one")):
        (tmp_path / file).write_bytes(content)
    name, got = name_video(path)
    assert name.startswith("a-") and got == path
    assert name_video(tmp_path / "b" / ".." / "a.mp4")[0] == name
    assert name_video({"video": {"path": path, "bytes": None}}) == (name, path)
    assert name_video(tmp_path / "b" / "a.mp4")[0] != name
    assert name_video(tmp_path / "b" / "c.mp4")[0] == "c" + name[1:]  # the end says what is in it
    write_png(clip(1)[0], tmp_path / "b" / "0.png")
    images = name_video(tmp_path / "b")[0]
    write_png(clip(2)[1], tmp_path / "b" / "1.png")
    assert name_video(tmp_path / "b")[0] != images
    assert name_video(clip(2)) == name_video({"frames": list(clip(2))}) != name_video(clip(2, seed=1))
    one, other = ({"video": {"bytes": data, "path": "0.mp4"}} for data in (b"x", b"y"))
    assert name_video(one) != name_video(other)


@pytest.mark.parametrize("stem", ["a\\b", "A: b", "x" * 250, "é" * 120, "one\ntwo", "why? [720p]"])
def test_names_are_such_as_any_folder_takes(stem, tmp_path):
    (tmp_path / f"{stem}.mp4").write_bytes(b"film")
    name = name_video(tmp_path / f"{stem}.mp4")[0]
    store = AnnotationStore(tmp_path / "out", {})
    store.write(name, [])
    assert store.names() == [name] and len(name.encode()) < 170 and not set(name) & set('\\/:*?"<>|[]\n')


def test_a_folder_that_was_renamed_is_not_annotated_again(tmp_path):
    for number in range(2):
        (tmp_path / "monday" / "park" / str(number)).mkdir(parents=True)
        write_png(clip(1, seed=number)[0], tmp_path / "monday" / "park" / str(number) / "0.png")
    assert len(run(tmp_path / "monday", tmp_path / "out")) == 4
    (tmp_path / "monday").rename(tmp_path / "tuesday")
    (tmp_path / "tuesday" / "park").rename(tmp_path / "tuesday" / "lake")
    rows = run(tmp_path / "tuesday", tmp_path / "out", lambda video, session: 1 / 0)
    lake = tmp_path / "tuesday" / "lake"
    assert len(rows) == 4 and set(rows["video"]) == {str(lake / "0"), str(lake / "1")}


def test_shards_of_earlier_versions_are_read(tmp_path):
    """They had other names and fewer columns."""
    rows = run([clip(1)], tmp_path / "out")
    (shard,) = (tmp_path / "out" / "shards").iterdir()
    table = pyarrow.parquet.read_table(shard).drop_columns(["category", "weights"])
    pyarrow.parquet.write_table(table, shard)
    settings = tmp_path / "out" / "settings.json"
    known = json.loads(settings.read_text())
    settings.write_text(json.dumps({key: known[key] for key in ("model",)}))
    again = run([clip(1)], tmp_path / "out", lambda video, session: 1 / 0)
    assert again["masks"][:] == rows["masks"][:] and again["weights"][:] == [None, None]
    film = tmp_path / "film.mp4"
    film.write_bytes(b"film")
    shard.rename(shard.with_name(f"film-{hashlib.sha256(str(film.resolve()).encode()).hexdigest()[:12]}.parquet"))
    assert AnnotationStore(tmp_path / "out", known).find(*name_video(film)) is not None


def test_the_model_is_known_by_its_weights(tmp_path):
    for name in ("one", "two"):
        tiny_pipe().save_pretrained(tmp_path / name)
    one, two = (pipeline("promptable-video-segmentation", model=str(tmp_path / name)) for name in ("one", "two"))
    (row, *_) = annotate([clip(1)], one, point, out=tmp_path / "out", gate=OPEN)
    assert row["weights"] == hash_weights(one.model) and row["revision"] == f"weights-{row['weights']}"
    annotate([clip(1, seed=1)], two, point, out=tmp_path / "out", gate=OPEN)
    with torch.no_grad():
        next(two.model.parameters()).add_(1.0)
    with pytest.raises(ValueError, match="Take another folder"):
        annotate([clip(1)], two, point, out=tmp_path / "out", gate=OPEN)


def test_the_revision_is_the_one_asked_for(tmp_path, monkeypatch):
    repository = tmp_path / "models--me--sam"
    for commit in ("a" * 40, "b" * 40):
        tiny_pipe().save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    for branch, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for asked, commit in ((None, "a" * 40), ("v2", "b" * 40), ("b" * 40, "b" * 40)):
        pipe = pipeline(
            "promptable-video-segmentation", model="me/sam", revision=asked, model_kwargs={"cache_dir": str(tmp_path)}
        )
        assert model_revision(pipe.model) == commit


def test_rows_of_a_dataset(tmp_path):
    for number, frame in enumerate(clip(2)):
        write_png(frame, tmp_path / f"{number}.png")
    rows = Dataset.from_dict({"images": [[str(tmp_path / "0.png"), str(tmp_path / "1.png")]], "id": ["x"]})
    annotated = run(rows, tmp_path / "out")
    assert annotated["num_frames"][:] == [2, 2] and annotated["video"][:] == [None, None]


def test_streams_are_listed_as_skipped(tmp_path):
    rows = run([iter(clip(2))], tmp_path)
    assert len(rows) == 0 and "list(frames)" in rows.info.description


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"prompts": {0: {}}}, ValueError, "a function"),
        ({"automatic": {"points_per_side": 2}}, ValueError, 'prompts="auto"'),
        ({"max_rounds": -1}, ValueError, "max_rounds"),
        ({"videos": clip(2)}, TypeError, r"Pass \[video\]"),
        ({"videos": "nowhere"}, ValueError, "There is no nowhere"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_bad_arguments_raise_before_any_work(tmp_path, change, error, sentence):
    with pytest.raises(error, match=sentence):
        run(**{"videos": [clip(2)], "out": tmp_path / "out", **change})
    assert not (tmp_path / "out" / "shards").exists()


def test_an_empty_folder_raises(tmp_path):
    with pytest.raises(ValueError, match="folders of images"):
        run(tmp_path, tmp_path / "out")


def test_statistics_by_hand(tmp_path):
    """Two masklets of 4 frames; 3 clicks on 2 frames and a drawn mask: 3 of 8 frames edited, 1.5 clicks a frame."""
    store = AnnotationStore(tmp_path, {})
    session = tiny_pipe().session(clip(4), output="rle")
    rows = []
    for obj, clicks in ((1, {0: 2, 1: 0}), (2, {0: 1})):
        masklet = Masklet(None, "clip", obj, session, provenance="manual", clicks=clicks, seconds=4.0)
        for frame in range(4):
            rle = encode_rle(np.ones((48, 80)))
            masklet.take(FrameSegments(frame, (48, 80), {obj: rle}, {obj: 1.0}, {obj: 1.0}), session)
        rows.append(to_row(masklet, "clip.mp4", "model", "abc", "123"))
    store.write("clip", rows)
    got = annotation_statistics(store.read([]), seconds_per_click=2.0, seconds_per_look=0.5)
    assert got == {
        "masklets": 2,
        "accepted": 0,
        "waiting": 2,
        "rejected": 0,
        "automatic": 0,
        "masks": 8,
        "edited_share": 3 / 8,
        "clicks_per_clicked_frame": 1.5,
        "seconds_per_frame": 1.0,
        "modelled_seconds_per_frame": 0.5 + 2.0 * 3 / 8,
    }
    assert store.read([])["revision"][:] == ["abc", "abc"]


def test_push_to_hub(hub, tmp_path):
    rows = run([clip(2)], tmp_path / "out")
    rows.save_to_disk(tmp_path / "saved")
    hub.run(f"""
        from datasets import load_dataset, load_from_disk
        rows = load_from_disk({str(tmp_path / "saved")!r})
        rows.push_to_hub("tester/masklets")
        assert load_dataset("tester/masklets", split="train").to_dict() == rows.to_dict()
    """)
    assert any(path.endswith(".parquet") for path in hub.files("tester/masklets", "datasets"))
    shards = str(tmp_path / "out/shards/*.parquet")
    local = load_dataset("parquet", data_files=shards, split="train", cache_dir=tmp_path)
    assert local.features == rows.features and local.to_dict() == rows.to_dict()


def test_command(tmp_path, monkeypatch):
    """Videos are found, one is corrupt, and a second run has nothing to do."""
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "videos"
    (folder / "frames").mkdir(parents=True)
    for number, frame in enumerate(clip(2)):
        Image.fromarray(frame).save(folder / "frames" / f"{number}.png")
    (folder / "bad.mp4").write_bytes(b"no video at all")
    tiny_pipe().save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "--points-per-side", "2", "--pred-iou-thresh", "-9"]
    options += ["--stability-score-thresh", "0", "--out", str(tmp_path / "out")]
    for _ in range(2):
        result = CliRunner().invoke(cli.app, ["annotate", str(folder), *options])
        assert result.exit_code == 0, result.output
        assert "masklets of 1 videos" in result.output and "bad-" in result.output
        assert "accepted, " in result.output
    result = CliRunner().invoke(cli.app, ["annotate", str(tmp_path / "nowhere"), *options])
    assert result.exit_code == 2 and "nowhere" in result.output
