"""Sessions: what is prompted, corrected, removed, undone and saved, and what stays as it was."""

import copy

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from hf_iclr.vision.session.pipeline import Sam2VideoPipeline
from hf_iclr.vision.session.session import VideoSession
from tests.vision.session.direct import corrected_masks, direct_masks
from tests.vision.session.test_frames import smooth, write_video
from tests.vision.tiny import clip, near_pipe, tiny_pipe


VIDEO = clip(8)
CLICK = {"points": [[20, 20]], "labels": [1]}


def session(video=VIDEO, **options) -> VideoSession:
    return tiny_pipe().session(video, output="logits", **options)


def logits(segments, obj=1) -> dict[int, np.ndarray]:
    return {frame.frame: frame.masks[obj] for frame in segments if obj in frame.masks}


def same(left, right) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[frame], right[frame]) for frame in left)


def near(left, right, most: float = 1e-4) -> bool:
    """
    As `same`, but for objects tracked together: products of many rows round otherwise, and where that moves a memory's
    last bit in bfloat16, logits of -.5 to .5 move by up to 3e-5.
    """
    return left.keys() == right.keys() and all(np.abs(left[frame] - right[frame]).max() < most for frame in left)


@pytest.fixture(params=[1e-5, 1e-4], ids=["memories in float32", "memories in bfloat16"])
def most(request, monkeypatch) -> float:
    """How far logits may be apart."""
    if request.param == 1e-5:
        monkeypatch.setattr(torch, "bfloat16", torch.float32)  # what the model rounds memories to
    return request.param


def test_fixed_use(tmp_path):
    pipe = tiny_pipe()
    s = pipe.session(write_video(tmp_path / "clip.mp4", smooth(16)))
    s.add(frame=0, obj=1, points=[[30, 30]])
    assert [frame.frame for frame in list(s.propagate())] == list(range(16))
    s.correct(frame=12, obj=1, points=[[50, 40]], labels=[0])
    s.propagate()
    s.add(frame=2, obj=2, box=[3, 3, 40, 30])
    s.remove_object(2)
    s.clear(frame=12, obj=1)
    s.undo()
    assert s.prompts.describe() == "frame 0: object 1 by 1 point\nframe 12: object 1 by 1 point"
    s.save(tmp_path / "state.safetensors")
    again = VideoSession.load(pipe, tmp_path / "state.safetensors")
    assert again.prompts == s.prompts and again.segments(12).corrected == {1}


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        (CLICK, {"input_points": [[[[20, 20]]]], "input_labels": [[[1]]]}),
        ({"box": [8, 12, 28, 30]}, {"input_boxes": [[[8.0, 12.0, 28.0, 30.0]]]}),
        (
            {"points": [[20, 20], [60, 40]], "labels": [1, 0], "box": [8, 12, 28, 30]},
            {
                "input_points": [[[[20, 20], [60, 40]]]],
                "input_labels": [[[1, 0]]],
                "input_boxes": [[[8.0, 12.0, 28.0, 30.0]]],
            },
        ),
        ({"mask": VIDEO[2, :, :, 0] > 200}, {"input_masks": VIDEO[2, :, :, 0] > 200}),
    ],
    ids=["click", "box", "clicks and box", "mask"],
)
def test_every_prompt_equals_the_direct_loop(prompt, inputs):
    pipe = tiny_pipe()
    s = session()
    s.add(2, 1, **prompt)
    expected = direct_masks(pipe.model, pipe.processor, VIDEO, 2, ways=(False, True), **inputs)
    assert same(logits(s.propagate("both")), expected)


@pytest.mark.parametrize("ways", [(False,), (False, True)], ids=["forward", "both"])
def test_a_correction_equals_the_reference_predictor(ways):
    pipe = tiny_pipe()
    s = session()
    s.add(1, 1, **CLICK)
    s.propagate()
    s.correct(5, 1, points=[[60, 30], [30, 20]], labels=[1, 0])
    expected = corrected_masks(
        pipe.model, pipe.processor, VIDEO, 1, [20, 20], 5, [[60, 30], [30, 20]], [1, 0], ways=ways
    )
    ours = logits(s.propagate("both" if True in ways else "forward"))
    assert same(ours, expected)


def test_a_correction_changes_later_frames_and_survives_both_directions():
    s = session()
    s.add(0, 1, **CLICK)
    before = logits(s.propagate())
    preview = s.correct(4, 1, points=[[60, 30]], labels=[1])
    assert preview.prompted == preview.corrected == {1}
    after = logits(s.propagate())
    assert not np.array_equal(before[4], after[4]) and not np.array_equal(before[6], after[6])
    for direction in ("backward", "forward", "both"):
        assert np.array_equal(logits(s.propagate(direction))[4], preview.masks[1])


@pytest.mark.parametrize("prompt", [{"points": [[60, 30]]}, {"box": [40, 5, 70, 40]}])
def test_a_prompt_on_a_tracked_frame_shows_the_object_anew_and_a_correction_goes_on(prompt):
    fresh, corrected, shown = session(), session(), session()
    for s in (corrected, shown):
        s.add(0, 1, **CLICK)
        s.propagate()
    expected = fresh.add(4, 1, **prompt).masks[1]
    left, right = corrected.correct(4, 1, **prompt), shown.add(4, 1, **prompt)
    assert np.array_equal(right.masks[1], expected) and not right.corrected
    assert not np.array_equal(left.masks[1], expected) and left.corrected == {1}
    assert np.array_equal(shown.propagate()[4].masks[1], expected)


def test_a_box_takes_the_place_of_the_clicks():
    s = session()
    s.add(0, 1, **CLICK)
    s.correct(0, 1, points=[[60, 30]], labels=[0])
    s.correct(0, 1, box=[8, 12, 40, 30])
    assert s.prompts.describe() == "frame 0: object 1 by a box"
    s.correct(0, 1, points=[[10, 20]])
    assert s.prompts.describe() == "frame 0: object 1 by 1 point and a box"


def test_a_correction_of_the_first_prompt_joins_its_clicks():
    s = session()
    s.add(0, 1, **CLICK)
    s.propagate()
    old = s.segments(0).masks[1]
    s.correct(0, 1, points=[[60, 30]], labels=[0])
    assert s.prompts[0][1].points == [[20.0, 20.0], [60.0, 30.0]] and s.prompts[0][1].labels == [1, 0]
    new = s.segments(0).masks[1]
    assert not np.array_equal(old, new)
    assert np.array_equal(s.propagate()[0].masks[1], new)
    memory = s._memories[1]
    assert list(memory.conditioning) == [0] and 0 not in memory.tracked  # not two outputs of one frame
    assert "maskmem_features" in memory.conditioning[0]


def test_objects_on_other_frames_leave_the_others_alone(most):
    alone, together = session(), session()
    alone.add(0, 1, **CLICK)
    together.add(0, 1, **CLICK)
    together.add(0, 2, box=[40, 5, 70, 40])
    together.add(3, 3, mask=VIDEO[3, :, :, 1] > 100)
    expected = logits(alone.propagate("both"))
    assert near(logits(together.propagate("both")), expected, most)
    together.add(5, 4, points=[[70, 40]])  # after tracking has begun
    together.correct(6, 2, points=[[50, 30]], labels=[0])
    assert near(logits(together.propagate("both")), expected, most)
    together.remove_object(2)
    assert near(logits(together.propagate("both")), expected, most) and together.objects == [1, 3, 4]


def test_prompts_queue_and_the_order_of_adding_does_not_matter():
    first, second = session(), session()
    prompts = [(0, 1, CLICK), (0, 2, {"box": [40, 5, 70, 40]}), (4, 2, CLICK), (2, 3, CLICK)]
    for frame, obj, prompt in prompts:
        first.add(frame, obj, **prompt)
    for frame, obj, prompt in [prompts[3], prompts[1], prompts[0], prompts[2]]:
        second.add(frame, obj, **prompt)
    left, right = first.propagate("both"), second.propagate("both")
    for obj in (1, 2, 3):
        assert same(logits(left, obj), logits(right, obj)) and len(logits(left, obj)) == len(VIDEO)
    assert [frame.prompted for frame in left][:5] == [{1, 2}, set(), {3}, set(), {2}]


def test_the_callers_lists_are_not_changed():
    given = {"points": [[20, 20], [60, 40]], "labels": [1, 0], "box": [8, 12, 28, 30]}
    before = copy.deepcopy(given)
    s = session()
    s.add(0, 1, **given)
    s.propagate()
    clicks = [[60, 30]]
    s.correct(3, 1, points=clicks)
    s.correct(3, 1, points=clicks)
    assert given == before and clicks == [[60, 30]]
    assert len(s.prompts[3][1].points) == 2


def test_backwards_before_the_first_prompt_is_defined():
    s = session()
    s.add(3, 1, **CLICK)
    s.add(5, 2, box=[40, 5, 70, 40])
    forward = s.propagate("forward")
    assert [frame.objects for frame in forward] == [[1], [1], [1, 2], [1, 2], [1, 2]]
    assert list(s._memories[1].conditioning) == [3]  # frames without a prompt never condition
    backward = s.propagate("backward")
    assert backward.frames == [0, 1, 2, 3, 4, 5] and all(2 in frame.masks for frame in backward)
    assert s.segments(0).objects == [1, 2]


def test_a_pass_can_start_and_stop_anywhere():
    s = session()
    s.add(0, 1, **CLICK)
    whole = logits(s.propagate())
    assert s.propagate(start=2, max_frames=3).frames == [2, 3, 4]
    assert same(logits(s.propagate()), whole)
    known = logits(s.propagate("backward", start=4, max_frames=2))  # the object's last prompt is frame 0: none is new
    assert same(known, {frame: whole[frame] for frame in (3, 4)})


def test_a_pass_is_lazy_and_takes_corrections_while_it_runs():
    s = session()
    s.add(0, 1, **CLICK)
    frames = s.iterate()
    next(frames), next(frames)
    assert 2 not in s._memories[1].tracked
    s.correct(1, 1, points=[[60, 30]])
    s.add(1, 2, box=[40, 5, 70, 40])
    assert next(frames).objects == [1, 2]


def test_clear_takes_a_prompt_back_and_the_last_one_the_object():
    s = session()
    s.add(0, 1, **CLICK)
    before = logits(s.propagate())
    s.correct(4, 1, points=[[60, 30]])
    s.propagate()
    s.clear(4, 1)
    assert s.prompts.describe() == "frame 0: object 1 by 1 point"
    assert same(logits(s.propagate()), before)
    s.clear(0, 1)
    assert s.objects == []


@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("right", [{"points": [[60, 30]]}, {"mask": VIDEO[0, :, :, 0] > 200}], ids=["click", "mask"])
def test_a_cleared_prompt_leaves_nothing_behind(right, passes):
    fresh, edited = session(), session()
    fresh.add(5, 1, **CLICK)
    expected = [fresh.add(0, 1, **right).masks[1], *logits(fresh.propagate()).values()]
    edited.add(5, 1, **CLICK)
    edited.add(0, 1, points=[[10, 40]])
    if passes:
        edited.propagate("both")
    edited.clear(0, 1)
    assert edited.segments(5).objects == [1] and not any(edited.segments(f).objects for f in range(8) if f != 5)
    found = [edited.add(0, 1, **right).masks[1], *logits(edited.propagate()).values()]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("wrong", [{"points": [[60, 30]]}, {"mask": VIDEO[0, :, :, 0] > 200}], ids=["click", "mask"])
def test_a_prompt_that_is_given_anew_leaves_nothing_of_the_old_one(wrong):
    fresh, edited = session(), session()
    fresh.add(5, 1, **CLICK)
    edited.add(5, 1, **wrong)
    edited.propagate("both")
    edited.add(5, 1, **CLICK)
    assert not any(edited.segments(frame).objects for frame in range(8) if frame != 5)
    expected, found = (logits(one.propagate("both")) for one in (fresh, edited))
    assert same(found, expected)


def test_frames_tracked_before_a_cleared_correction_stay():
    s = session()
    s.add(0, 1, **CLICK)
    before = logits(s.propagate())
    s.correct(4, 1, points=[[60, 30]])
    s.propagate(start=4)
    s.clear(4, 1)
    assert all(np.array_equal(s.segments(f).masks[1], before[f]) for f in range(4))
    assert not any(s.segments(f).objects for f in range(4, 8))


def test_undo_goes_back_edit_by_edit_with_the_masks_of_that_time():
    s = session(undo_levels=3)
    s.add(0, 1, **CLICK)
    before = logits(s.propagate())
    s.correct(4, 1, points=[[60, 30]])
    s.propagate()
    s.remove_object(1)
    s.undo()
    assert s.objects == [1] and s.segments(4).corrected == {1}
    s.undo()
    assert not s.segments(4).corrected
    assert same({frame: s.segments(frame).masks[1] for frame in before}, before)
    assert same(logits(s.propagate()), before)
    s.undo()
    assert s.objects == []
    with pytest.raises(ValueError, match="nothing to undo"):
        s.undo()


def test_a_saved_session_goes_on_as_if_it_had_not_been(tmp_path):
    pipe = tiny_pipe()
    s = session(max_hole_area=3, feature_cache_bytes=10)
    s.add(3, 1, **CLICK)
    s.add(1, 1, points=[[60, 20]], labels=[0])  # conditioning frames out of order
    s.add(0, 2, mask=VIDEO[0, :, :, 0] > 200)
    s.propagate("both")
    s.correct(5, 1, points=[[60, 30]])
    s.save(tmp_path / "state.safetensors")
    again = VideoSession.load(pipe, tmp_path / "state.safetensors", video=VIDEO)
    assert again.config == s.config and again.prompts == s.prompts and again.objects == s.objects
    assert same({f: again.segments(f).masks[1] for f in range(8)}, {f: s.segments(f).masks[1] for f in range(8)})
    left, right = again.propagate("both"), s.propagate("both")
    assert near(logits(left, 1), logits(right, 1)) and near(logits(left, 2), logits(right, 2))
    assert left[5].corrected == {1} and left[0].prompted == {2}


def test_a_second_pass_encodes_no_frame_again():
    pipe = tiny_pipe()
    s = session()
    s.add(0, 1, **CLICK)
    first = logits(s.propagate())
    encoded = []
    hook = pipe.model.vision_encoder.register_forward_hook(lambda *args: encoded.append(1))
    try:
        assert same(logits(s.propagate()), first)
        assert not encoded
        uncached = session(feature_cache_bytes=0)
        uncached.add(0, 1, **CLICK)
        uncached.propagate()
        assert len(encoded) == len(VIDEO)
        assert same(logits(uncached.propagate()), first) and len(encoded) == 2 * len(VIDEO) - 1  # frame 0 has a prompt
    finally:
        hook.remove()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s: s.add(8, 1, **CLICK), r"frame in 0\.\.7, got 8"),
        (lambda s: s.add(-1, 1, **CLICK), "frame numbers from 0 on"),
        (lambda s: s.add(0, 1), "at least one of"),
        (lambda s: s.add(0, 1, points=[[81, 3]]), r"x in 0\.\.80"),
        (lambda s: s.add(0, 1, mask=np.ones((4, 4))), r"frame's size \(48, 80\)"),
        (lambda s: s.correct(0, 9, points=[[1, 1]]), r"no object 9; there are \[1\]"),
        (lambda s: s.correct(7, 1, points=[[1, 1]]), "no mask on frame 7 to correct"),
        (lambda s: s.correct(12, 1, points=[[1, 1]]), r"frame in 0\.\.7, got 12"),
        (lambda s: s.correct(0, 1, points=[[1, 60]]), r"y in 0\.\.48"),
        (lambda s: s.remove_object(2), "no object 2"),
        (lambda s: s.clear(3, 1), "no prompt on frame 3. Its prompts: frame 0"),
        (lambda s: s.propagate("sideways"), "forward, backward, both"),
        (lambda s: s.propagate(start=8), r"frame in 0\.\.7, got 8"),
    ],
)
def test_bad_calls_are_told_and_leave_the_session_usable(call, sentence):
    s = session()
    s.add(0, 1, **CLICK)
    with pytest.raises(ValueError, match=sentence):
        call(s)
    fresh = session()
    fresh.add(0, 1, **CLICK)
    assert s.prompts == fresh.prompts and same(logits(s.propagate()), logits(fresh.propagate()))


def test_a_failure_inside_the_model_leaves_the_session_as_it_was(monkeypatch):
    s = session()
    s.add(0, 1, **CLICK)
    before = logits(s.propagate())
    monkeypatch.setattr(s.model.mask_decoder, "forward", lambda **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        s.correct(4, 1, points=[[60, 30]])
    monkeypatch.undo()
    assert s.prompts.describe() == "frame 0: object 1 by 1 point"
    assert not s.model.mask_decoder._forward_hooks and not s.model.prompt_encoder._forward_pre_hooks
    assert same(logits(s.propagate()), before)


def test_a_video_of_one_frame_has_a_size():
    assert session(VIDEO[:1]).size == VIDEO.shape[1:3]


def test_a_session_without_prompts_says_so():
    with pytest.raises(ValueError, match="Add a prompt first"):
        session().propagate()


def test_a_frame_of_another_size_is_told_and_the_frames_before_it_stay():
    video = [*VIDEO[:4], VIDEO[4, :20], *VIDEO[5:]]
    s = session(video)
    s.add(0, 1, **CLICK)
    with pytest.raises(ValueError, match="on frame 4"):
        s.propagate()
    assert s.segments(3).objects == [1]
    assert s.propagate(max_frames=4).frames == [0, 1, 2, 3]


def test_a_truncated_file_is_tracked_up_to_the_damage(tmp_path):
    path = write_video(tmp_path / "a.mp4", clip(40, 96, 128), movflags="faststart")
    with open(path, "rb") as file:
        whole = file.read()
    s = session(whole[: len(whole) // 2])
    s.add(0, 1, **CLICK)
    result = s.propagate()
    assert 5 < len(result) < 40 and f"{len(result)} of" in result.damage
    assert len(s.propagate("both")) == len(result)
    with pytest.raises(ValueError, match="frame in"):
        s.add(39, 1, **CLICK)


@pytest.mark.parametrize(
    ("state", "sentence"),
    [("nothing", "There is no file"), ("text", "no safetensors file"), ("weights", "no video session")],
)
def test_what_is_no_saved_session_is_told(tmp_path, state, sentence):
    from safetensors.torch import save_file

    if state == "text":
        (tmp_path / "state").write_text("hello")
    elif state == "weights":
        save_file({"x": torch.ones(1)}, tmp_path / "state")
    with pytest.raises(ValueError, match=sentence):
        VideoSession.load(tiny_pipe(), tmp_path / "state")


def test_a_saved_session_wants_its_own_video_and_model(tmp_path):
    s = session()
    s.add(0, 1, **CLICK)
    s.save(tmp_path / "state")
    with pytest.raises(ValueError, match="was no file"):
        VideoSession.load(tiny_pipe(), tmp_path / "state")
    with pytest.raises(ValueError, match=r"8 frames of \[48, 80\]"):
        VideoSession.load(tiny_pipe(), tmp_path / "state", video=VIDEO[:3])
    with pytest.raises(ValueError, match="of a sam2_video model, got a sam3_tracker_video model"):
        VideoSession.load(tiny_pipe("sam3_tracker_video"), tmp_path / "state", video=VIDEO)
    with pytest.raises(ValueError, match="policy of its own"):
        session(memory=lambda past, slots: []).save(tmp_path / "other")


def test_other_weights_and_another_video_of_the_same_shape_are_told(tmp_path):
    path, pipe = tmp_path / "state", tiny_pipe()
    s = session()
    s.add(0, 1, **CLICK)
    s.propagate(max_frames=4)
    s.save(path)
    other = copy.deepcopy(pipe.model)
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="made with other weights"):
        VideoSession.load(Sam2VideoPipeline(model=other, processor=pipe.processor, device="cpu"), path, video=VIDEO)
    half = Sam2VideoPipeline(
        model=copy.deepcopy(pipe.model).to(torch.bfloat16), processor=pipe.processor, device="cpu"
    )
    rounded = VideoSession.load(half, path, video=VIDEO)  # the same weights
    rounded.propagate()
    assert rounded.correct(3, 1, **CLICK).objects == [1] and len(rounded.propagate("both")) == 8
    processor = copy.deepcopy(pipe.processor)
    processor.video_processor.image_mean = [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="processor scaled colours"):
        VideoSession.load(Sam2VideoPipeline(model=pipe.model, processor=processor, device="cpu"), path, video=VIDEO)
    late = VIDEO.copy()
    late[3] = 255 - late[3]
    for video, frame in ((clip(8, seed=1), 0), (late, 3)):
        with pytest.raises(ValueError, match=f"frame {frame} looks different"):
            VideoSession.load(pipe, path, video=video)
    with pytest.raises(ValueError, match="Expected a video as the session had"):
        VideoSession.load(pipe, path, video=iter(VIDEO))
    coded = np.clip(VIDEO.astype(int) + np.random.default_rng(0).integers(-9, 10, VIDEO.shape), 0, 255)
    assert VideoSession.load(pipe, path, video=coded.astype(np.uint8)).objects == [1]  # the same video, in a codec


def test_a_failed_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    s = session()
    s.add(0, 1, **CLICK)
    s.save(tmp_path / "state")
    before = (tmp_path / "state").read_bytes()
    monkeypatch.setattr("hf_iclr.saving.save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        s.save(tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"output": "png"}, "output to be one of mask, logits, rle, polygon"),
        ({"memory": "best"}, "memory to be one of exact"),
        ({"memory": "motion_gated"}, "memory to be one of exact"),
        ({"max_cond_frames": 0}, "max_cond_frames of at least 1, or -1"),
        ({"keep": "some"}, "keep to be one of"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"undo_levels": -1}, "undo_levels of at least 0"),
    ],
)
def test_bad_options_are_told(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny_pipe().session(VIDEO, **options)


def everything(session) -> list:
    return [session.segments(frame).to_dicts() for frame in range(session.num_frames)]


def edited() -> VideoSession:
    """Two objects, tracked, one corrected and tracked again, the other removed."""
    session = tiny_pipe().session(clip(), output="rle", undo_levels=10)
    session.add(0, 1, points=[[20, 20]])
    session.add(1, 2, box=[30, 5, 70, 40])
    session.propagate()
    session.correct(3, 1, points=[[60, 30]], labels=[0])
    session.propagate("both")
    session.remove_object(2)
    return session


def test_redo_takes_undo_back():
    session = edited()
    times = [everything(session)]
    assert not session.can_redo
    with pytest.raises(ValueError, match="nothing to redo"):
        session.redo()
    while session.can_undo:
        session.undo()
        times.append(everything(session))
    assert session.objects == [] and len(times) == 5
    for known in reversed(times[:-1]):
        session.redo()
        assert everything(session) == known
    session.undo()
    session.clear(3, 1)
    assert not session.can_redo  # what was undone is gone with the next edit


def test_tracks_are_frames_and_scores():
    session = edited()
    assert list(session.tracks) == [1] and list(session.tracks[1]) == list(range(6))
    assert session.tracks[1][3] == session.segments(3).scores[1]


def test_a_pass_of_some_objects_leaves_the_others_alone():
    session = tiny_pipe().session(clip(), output="rle")
    session.add(0, 1, points=[[20, 20]])
    session.add(0, 2, points=[[60, 40]])
    assert [segments.objects for segments in session.iterate("both", objects=[2])] == [[2]] * 6
    assert list(session.tracks[1]) == [0] and list(session.tracks[2]) == list(range(6))
    other = tiny_pipe().session(clip(), output="rle")
    other.add(0, 2, points=[[60, 40]])
    other.propagate("both")
    assert [session.segments(frame, objects=[2]).masks[2] for frame in range(6)] == [
        other.segments(frame).masks[2] for frame in range(6)
    ]


def test_undo_and_redo_outlive_the_session(tmp_path):
    session = edited()
    session.undo()
    session.undo()
    session.save(tmp_path / "a.safetensors")
    loaded = VideoSession.load(tiny_pipe(), tmp_path / "a.safetensors", clip())
    assert everything(loaded) == everything(session) and loaded.can_undo and loaded.can_redo
    for _ in range(2):
        loaded.redo()
        session.redo()
        assert everything(loaded) == everything(session)
    while session.can_undo:
        loaded.undo()
        session.undo()
        assert everything(loaded) == everything(session) and loaded.prompts == session.prompts
    assert not loaded.can_undo
    for _ in range(4):
        loaded.redo()
        session.redo()
    for one in (loaded, session):
        one.correct(5, 1, points=[[50, 20]])
    assert everything(loaded) == everything(session)
    loaded.save(tmp_path / "b.safetensors")
    again = VideoSession.load(tiny_pipe(), tmp_path / "b.safetensors", clip())
    again.undo()
    session.undo()
    assert everything(again) == everything(session)


@pytest.mark.slow
def test_a_compiled_model_is_compiled_no_more_after_its_first_passes():
    plain = near_pipe()
    pipe = Sam2VideoPipeline(model=copy.deepcopy(plain.model), processor=plain.processor, device="cpu")
    model = pipe.model
    for part in (model.vision_encoder.backbone, model.memory_attention, model.mask_decoder, model.memory_encoder):
        part.compile(backend="eager")
    prompts = {0: {1: CLICK, 2: {"box": [40, 5, 70, 40]}}}
    for _ in range(2):
        pipe(VIDEO, prompts)
    graphs = counters["stats"]["unique_graphs"]
    found, expected = (one(clip(8, seed=1), prompts, output="logits") for one in (pipe, plain))
    assert graphs > 3 and counters["stats"]["unique_graphs"] == graphs
    assert all(near(logits(found, obj), logits(expected, obj)) for obj in (1, 2))
