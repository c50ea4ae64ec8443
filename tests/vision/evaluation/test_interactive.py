"""The interactive protocols: which frames are clicked on, how often, and what it brings."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from benchmarks.common.native_session import NativePipe
from hf_iclr import evaluate_interactive
from hf_iclr.vision.evaluation.interactive import InteractiveResult
from hf_iclr.vision.evaluation.j_and_f import j_and_f
from hf_iclr.vision.evaluation.simulated_prompts import correct_object, next_click, prompt_object
from hf_iclr.vision.session.memory import ObjectMemory
from tests.vision.session.drifting import DriftingPipe, iou, pixels, truth
from tests.vision.tiny import clip, near_pipe, tiny_pipe


CLIP = pixels(7), {1: truth(7)}
MOVING = np.zeros((5, 48, 80), bool)
for number in range(5):
    MOVING[number, 12:30, 8 + 2 * number : 28 + 2 * number] = True


def means(*drifts: int) -> float:
    return pytest.approx(np.mean([iou(drift) for drift in drifts]))


def test_offline_the_worst_frame_is_next():
    pipe = DriftingPipe()
    result = evaluate_interactive(pipe, [CLIP], "offline", max_frames=3)
    assert result.table["clicked"].tolist() == [0, 6, 5] and result.table["frames"].tolist() == [1, 2, 3]
    assert result.table["clicks"].tolist() == [3, 6, 9]
    expected = [means(0, 1, 2, 3, 4, 5, 6), means(0, 1, 2, 3, 4, 5, 0), means(0, 1, 2, 3, 4, 0, 0)]
    assert result.table["j"].tolist() == expected
    assert len(pipe.sessions) == 1 and pipe.sessions[0].passes == 3
    assert result.table["seconds"].is_monotonic_increasing


def test_offline_ends_when_all_is_exact():
    result = evaluate_interactive(DriftingPipe(), [(pixels(3), {1: truth(3)})], max_frames=8)
    assert result.table["clicked"].tolist() == [0, 2, 1] and result.table["j_and_f"].iloc[-1] == 1


def test_online_pauses_where_it_is_wrong_and_goes_on():
    """Two pixels off are an IoU of 0.67, one is 0.82."""
    pipe = DriftingPipe()
    result = evaluate_interactive(pipe, [CLIP], "online", max_frames=3)
    assert result.table["clicked"].tolist() == [0, 2, 4] and result.table["clicks"].tolist() == [3, 6, 9]
    expected = [means(0, 1, 2, 3, 4, 5, 6), means(0, 1, 0, 1, 2, 3, 4), means(0, 1, 0, 1, 0, 1, 2)]
    assert result.table["j"].tolist() == expected
    (session,) = pipe.sessions
    assert list(session.clicks[1]) == [0, 2, 4] and session.passes == 3
    assert session.shown == [*range(7), *range(3, 7), *range(5, 7)]  # nothing is tracked twice that stays as it was


def test_online_ends_when_no_pause_is_needed():
    result = evaluate_interactive(DriftingPipe(), [CLIP], "online", max_frames=8, pause_below=0.5)
    assert result.table["clicked"].tolist() == [0, 4]  # an IoU of 0.43


def test_clicks_stop_where_the_mask_is_exact():
    result = evaluate_interactive(DriftingPipe(), [CLIP], clicks_per_frame=5, max_frames=2)
    assert result.table["clicks"].tolist() == [3, 6]
    result = evaluate_interactive(DriftingPipe(), [CLIP], clicks_per_frame=1, max_frames=2)
    assert result.table["clicks"].tolist() == [1, 2]


def test_each_object_is_alone():
    pipe = DriftingPipe(start=1)
    result = evaluate_interactive(pipe, [(pixels(5), {1: truth(5, 1), 2: truth(5, 1)})], max_frames=1)
    assert [list(session.clicks) for session in pipe.sessions] == [[1], [2]]
    assert result.table["j"].tolist() == [means(0, 1, 2, 3)] * 2  # from frame 1 on


def test_offline_is_the_session_by_hand():
    result = evaluate_interactive(tiny_pipe(), [(clip(5), {4: MOVING})], "offline", max_frames=2)
    session = tiny_pipe().session(clip(5))
    clicks = prompt_object(session, 0, 4, MOVING[0], 3)
    masks = np.stack([frame.masks[4] for frame in session.propagate()])
    rows = [(0, clicks, j_and_f([masks], [MOVING]))]
    ious = [(a & b).sum() / (a | b).sum() for a, b in zip(masks[1:], MOVING[1:], strict=True)]
    worst = 1 + int(np.argmin(ious))
    for _ in range(3):
        point, label = next_click(session.segments(worst).masks[4], MOVING[worst])
        session.correct(worst, 4, points=[point], labels=[label])
    masks = np.stack([frame.masks[4] for frame in session.propagate()])
    rows.append((worst, clicks + 3, j_and_f([masks], [MOVING])))
    for (_, row), (clicked, clicks, scores) in zip(result.table.iterrows(), rows, strict=True):
        assert (row["clicked"], row["clicks"]) == (clicked, clicks)
        assert (row["j"], row["f"]) == (scores["j"], scores["f"])


def test_online_is_the_session_by_hand():
    result = evaluate_interactive(tiny_pipe(), [(clip(5), {4: MOVING})], "online", 2, 2)
    session = tiny_pipe().session(clip(5))
    prompt_object(session, 0, 4, MOVING[0], 2)
    masks, left = [], 1
    for frame in session.iterate():
        mask, true = frame.masks[4], MOVING[frame.frame]
        if frame.frame and left and (mask & true).sum() / (mask | true).sum() < 0.75:
            left -= 1
            for _ in range(2):
                point, label = next_click(mask, true)
                mask = session.correct(frame.frame, 4, points=[point], labels=[label]).masks[4]
        masks.append(mask)
    assert left == 0 and result.table["j"].iloc[1] == j_and_f([np.stack(masks)], [MOVING])["j"]


def test_online_passes_are_those_from_the_start_with_fewer_steps(monkeypatch):
    """Each row as by a session of its own, with fewer passes of frames through the model."""
    video, steps = clip(12), []
    moving = np.stack([np.roll(MOVING[0], 2 * number, axis=1) for number in range(12)])
    track = ObjectMemory.track
    monkeypatch.setattr(ObjectMemory, "track", lambda *args: steps.append(1) or track(*args))
    result = evaluate_interactive(near_pipe(), [(video, {4: moving})], "online", 1, 4)
    few, expected = len(steps), []
    steps.clear()
    for allowed in range(1, 5):
        session = near_pipe().session(video, keep="window")
        clicks, clicked, masks = prompt_object(session, 0, 4, moving[0], 1), 1, []
        for frame in session.iterate():
            mask, true = frame.binary(4), moving[frame.frame]
            if frame.frame and clicked < allowed and (mask & true).sum() / (mask | true).sum() < 0.75:
                clicked += 1
                clicks += correct_object(session, frame, 4, true, 1)
                mask = session.segments(frame.frame).binary(4)
            masks.append(mask)
        expected.append((clicks, j_and_f([np.stack(masks)], [moving])["j_and_f"]))
    assert [tuple(row) for row in result.table[["clicks", "j_and_f"]].to_numpy()] == expected and len(expected) == 4
    assert few < 0.9 * len(steps), (few, len(steps))


def test_native_corrections_are_lost_by_the_next_pass():
    """The session that the benchmark compares with: as transformers has it, offline clicks change nothing."""
    native = NativePipe(tiny_pipe())
    held, lost = (
        evaluate_interactive(pipe, [(clip(5), {4: MOVING})], "offline", 1, 3).table for pipe in (tiny_pipe(), native)
    )
    assert lost["clicks"].tolist() == held["clicks"].tolist() == [1, 2, 3]
    assert lost["j"].nunique() == 1 and held["j"].nunique() == 3 and lost["j"][0] == held["j"][0]
    online = evaluate_interactive(native, [(clip(5), {4: MOVING})], "online", 1, 2).table
    assert online["j"].nunique() == 2  # a click counts for the frames that come


@pytest.fixture
def measured() -> InteractiveResult:
    rows = [("a", 1, 0.5, 3, 1.0), ("a", 2, 0.85, 6, 2.0), ("a", 3, 0.9, 9, 3.0), ("b", 1, 0.6, 3, 2.0)]
    columns = ["clip", "frames", "j_and_f", "clicks", "seconds"]
    table = pd.DataFrame(rows, columns=columns).assign(object=1, clicked=0)
    return InteractiveResult("offline", table.assign(j=table["j_and_f"], f=table["j_and_f"]))


def test_an_object_that_is_done_counts_on(measured):
    means = measured.mean()
    assert means["j_and_f"].tolist() == pytest.approx([0.55, 0.725, 0.75])
    assert means["clicks"].tolist() == [3, 4.5, 6] and means["seconds"].tolist() == [1.5, 2, 2.5]


def test_effort_to_a_goal(measured):
    assert measured.effort(0.8).to_dict() == {"reached": 0.5, "frames": 1.5, "clicks": 4.5, "seconds": 2.0}
    assert measured.effort(0.55).to_dict() == {"reached": 1.0, "frames": 1.5, "clicks": 4.5, "seconds": 2.0}


def test_tables_and_plot_are_saved(measured, tmp_path):
    measured.save(tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"table.csv", "mean.csv", "plot.png"}
    assert pd.read_csv(tmp_path / "out" / "mean.csv")["frames"].tolist() == [1, 2, 3]
    measured.plot(tmp_path / "both.png", {"other": measured})
    assert Image.open(tmp_path / "both.png").size == (1500, 510)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "live"}, "offline, online, got 'live'"),
        ({"clicks_per_frame": 0}, "at least 1"),
        ({"max_frames": 0}, "at least 1"),
        ({"pause_below": 75}, "in 0..1"),
    ],
)
def test_bad_options_get_a_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        evaluate_interactive(DriftingPipe(), [CLIP], **options)
    with pytest.raises(ValueError, match="visible objects"):
        evaluate_interactive(DriftingPipe(), [])
