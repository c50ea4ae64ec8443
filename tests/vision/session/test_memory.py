"""Bounded memory gives the masks of an unbounded one, and is bounded."""

import numpy as np
import pytest
import torch

from hf_iclr.vision.session.memory import (
    FeatureCache,
    exact,
)
from hf_iclr.vision.session.session import VideoSession
from hf_iclr.vision.session.tracking import track_frame
from tests.vision.session.direct import direct_masks, direct_stream
from tests.vision.tiny import clip, near_pipe, tiny_pipe


LONG = clip(14)  # much longer than the model looks back
CLICK = {"points": [[20, 20]]}


def kept_bytes(session: VideoSession) -> int:
    """All that a session holds: tensors of every memory, counted once, cached features and their encodings."""
    tensors = [*session.features._positions, *session.features._latest[1]]
    tensors += [level for levels in session.features._kept.values() for level in levels]
    for memory in session._memories.values():
        for outputs in memory.output_dict_per_obj[0].values():
            tensors += [tensor for output in outputs.values() for tensor in output.values()]
        assert memory.processed_frames is None
    return sum(
        storage.nbytes() for storage in {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
    )


def kept_frames(session: VideoSession, key: str) -> dict[int, list[int]]:
    return {
        obj: [frame for frame, output in memory.tracked.items() if key in output]
        for obj, memory in session._memories.items()
    }


@pytest.mark.parametrize("direction", ["forward", "both", "backward"])
def test_bounded_equals_unbounded_over_a_long_clip(direction):
    pipe = near_pipe()
    found = {}
    for keep in ("all", "window"):
        session = pipe.session(LONG, keep=keep, output="logits")
        session.add(6, 1, **CLICK)
        session.add(5, 2, box=[40, 5, 70, 40])
        session.add(10, 1, points=[[60, 30]])
        found[keep] = session.propagate(direction)
    assert found["all"].frames == found["window"].frames
    assert len(found["all"]) == {"forward": 9, "backward": 11, "both": 14}[direction]
    for left, right in zip(found["all"], found["window"], strict=True):
        assert left.objects == right.objects and left.scores == right.scores
        for obj in left.objects:
            assert torch.equal(torch.from_numpy(left.masks[obj]), torch.from_numpy(right.masks[obj]))


def test_bounded_equals_the_models_own_session():
    pipe = near_pipe()
    for ways, direction in (((False,), "forward"), ((False, True), "both")):
        inputs = {"input_points": [[[[20, 20]]]], "input_labels": [[[1]]]}
        expected = direct_masks(pipe.model, pipe.processor, LONG, 6, ways=ways, **inputs)
        result = pipe(LONG, prompts={6: {1: CLICK}}, direction=direction, output="logits")
        assert result.frames == list(expected)
        assert all(np.array_equal(result[frame].masks[1], expected[frame]) for frame in expected)


def test_a_stream_equals_the_models_own_stream():
    pipe = near_pipe()
    expected = direct_stream(pipe.model, pipe.processor, LONG, input_points=[[[[20, 20]]]], input_labels=[[[1]]])
    frames = pipe.stream(iter(LONG), prompts={0: {1: CLICK}}, output="logits")
    assert all(np.array_equal(frame.masks[1], expected[frame.frame]) for frame in frames)


def test_a_model_that_limits_its_conditioning_frames_is_bounded_alike():
    pipe = tiny_pipe(max_cond_frame_num=2, num_maskmem=3, max_object_pointers_in_encoder=5)
    found = []
    for keep in ("all", "window"):
        session = pipe.session(LONG, keep=keep, output="logits")
        for frame in (2, 5, 7, 9):
            session.add(frame, 1, points=[[10 + frame, 20]])
        found.append(session.propagate("both"))
    assert all(np.array_equal(a.masks[1], b.masks[1]) for a, b in zip(*found, strict=True))


def test_memory_is_flat_over_a_stream():
    pipe = near_pipe()
    session = pipe.session(iter(clip(24)))
    session.add(0, 1, **CLICK)
    session.add(0, 2, box=[40, 5, 70, 40])
    sizes = [kept_bytes(session) for _ in session.iterate()]
    assert len(set(sizes[8:])) == 1
    frames = kept_frames(session, "maskmem_features")
    assert frames == {1: [21, 22, 23], 2: [21, 22, 23]}  # 2 to attend to, and the current one
    assert kept_frames(session, "object_pointer")[1] == list(range(19, 24))  # 4 and the current one
    assert len(session._memories[1].frames_tracked_per_obj[0]) == 6  # and the prompted frame


def test_the_current_frame_of_a_stream_can_be_corrected_as_in_an_unbounded_session():
    pipe = near_pipe()
    masks = []
    for video, options in ((iter(LONG), {}), (LONG, {"keep": "all"})):
        session = pipe.session(video, output="logits", **options)
        session.add(0, 1, **CLICK)
        frames = session.iterate()
        for _ in range(8):
            next(frames)
        masks.append([session.correct(7, 1, points=[[60, 30]]).masks[1], *(next(frames).masks[1] for _ in range(3))])
        if not options:
            with pytest.raises(ValueError, match="only frame 10, the latest"):
                session.correct(9, 1, points=[[60, 30]])
            assert next(frames).frame == 11
    assert all(np.array_equal(left, right) for left, right in zip(*masks, strict=True))


def test_prompts_of_a_stream_wait_for_their_frame():
    pipe = near_pipe()
    session = pipe.session(iter(LONG[:8]), output="logits")
    assert session.add(0, 1, **CLICK) is not None
    assert session.add(5, 2, box=[40, 5, 70, 40]) is None
    assert session.prompts.describe() == "frame 0: object 1 by 1 point\nframe 5: object 2 by a box"
    frames = list(session.iterate())
    assert [frame.objects for frame in frames] == [[1]] * 5 + [[1, 2]] * 3
    assert frames[5].prompted == {2}
    late = pipe.session(iter(LONG[5:8]), output="logits")
    late.add(0, 2, box=[40, 5, 70, 40])
    # The same object in a stream that begins with it: what came before leaves no trace.
    assert all(np.abs(a.masks[2] - b.masks[2]).max() < 1e-4 for a, b in zip(frames[5:], late.iterate(), strict=True))


def test_offloading_moves_every_large_tensor():
    session = near_pipe().session(LONG[:4], offload=True)
    session.add(0, 1, **CLICK)
    memory = session._memories[1]
    assert memory.inference_state_device.type == "cpu"
    memory.inference_state_device = torch.device("meta")  # the only other device of every machine
    memory.cache.device = torch.device("meta")
    memory.settle()
    track_frame(session.model, [memory], 1, reverse=False)
    output = memory.tracked[1]
    assert {key for key, tensor in output.items() if tensor.device.type == "meta"} >= {
        "maskmem_features",
        "pred_masks",
    }
    assert "high_res_masks" not in output
    large = [tensor for tensor in output.values() if tensor.numel() > 1024 and tensor.device.type != "meta"]
    assert [tensor.data_ptr() for tensor in large] == [session.features.memory_positions.data_ptr()] * len(large)
    assert all(level.device.type == "meta" for level in session.features._kept[1])


def test_the_position_encoding_is_kept_once_and_high_resolution_masks_never():
    session = near_pipe().session(LONG[:6])
    session.add(0, 1, **CLICK)
    session.add(0, 2, **CLICK)
    session.propagate()
    outputs = [
        o for m in session._memories.values() for kind in m.output_dict_per_obj[0].values() for o in kind.values()
    ]
    assert len(outputs) == 12 and not any("high_res_masks" in output for output in outputs)
    assert len({output["maskmem_pos_enc"].data_ptr() for output in outputs}) == 1


def features(value: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    return [torch.full((16, 1, 4), value), torch.full((4, 1, 4), value)], torch.zeros(4, 1, 4)


def test_the_feature_cache_holds_features_only_up_to_its_limit():
    cache = FeatureCache(limit_bytes=2 * 80 * 4)
    for frame in range(5):
        cache.put(frame, *features(float(frame)))
    assert [frame for frame in range(6) if frame in cache] == [0, 1, 4]  # first come, and the latest
    assert cache.kept_bytes == 2 * 80 * 4 and [tuple(x.shape) for x in cache._positions] == [(4, 1, 4)]
    assert torch.equal(cache.get(1)[0][1], torch.ones(4, 1, 4))
    assert cache.get(3) is None


def test_features_in_bfloat16_take_half_and_serve_later_passes_only():
    cache = FeatureCache(limit_bytes=80 * 2, dtype=torch.bfloat16)
    cache.put(0, *features(1.001))
    assert float(cache.get(0)[0][0][0, 0, 0]) == pytest.approx(1.001)  # all objects alike
    cache.put(1, *features(2.0))
    again = cache.get(0)[0][0]
    assert again.dtype == torch.float32 and float(again[0, 0, 0]) == 1.0 and cache.kept_bytes == 160
    session = near_pipe().session(LONG[:6], feature_cache_dtype=torch.bfloat16, output="logits")
    session.add(0, 1, **CLICK)
    first, second = session.propagate(), session.propagate()
    difference = [np.abs(a.masks[1] - b.masks[1]).mean() for a, b in zip(first, second, strict=True)][1:]
    assert 0 < max(difference) < 0.05 * np.abs(first[3].masks[1]).mean()


@pytest.mark.parametrize("keep", ["all", "window"])
def test_a_policy_decides_what_is_attended_to(keep):
    pipe = near_pipe()

    def run(memory):
        session = pipe.session(LONG[:10], memory=memory, keep=keep, output="logits")
        session.add(0, 1, **CLICK)
        return [frame.masks[1] for frame in session.iterate()]

    own = run("exact")
    assert all(np.array_equal(a, b) for a, b in zip(own, run(lambda past, slots: exact(past, slots)), strict=True))
    earliest = run(lambda past, slots: [seen.frame for seen in past[:slots]])
    same = [np.array_equal(a, b) for a, b in zip(own, earliest, strict=True)]
    assert same == [True] * 4 + [False] * 6  # from frame 4 on, more is past than two slots hold


def test_a_policy_sees_scores_motion_and_pointers_and_keeps_its_choice():
    seen = []

    def first_and_last(past, slots):
        seen.append(past)
        return [past[0].frame, past[-1].frame] if len(past) > 1 else [frame.frame for frame in past]

    session = near_pipe().session(iter(LONG), memory=first_and_last)
    session.add(0, 1, **CLICK)
    session.propagate()
    assert seen[-1][0].frame == 1 and seen[-1][-1].frame == 12  # frame 1 was never dropped, being chosen
    assert 0 < seen[-1][-1].mask_score < 1 and 0 <= seen[-1][-1].motion_score <= 1
    assert seen[-1][-1].pointer.shape == (128,)
    assert kept_frames(session, "maskmem_features")[1] == [1, 11, 12, 13]


def test_position_encodings_are_computed_once(monkeypatch):
    pipe, calls = tiny_pipe(), []
    encoding = type(pipe.model.vision_encoder.neck.position_encoding)
    forward = encoding.forward
    monkeypatch.setattr(encoding, "forward", lambda self, *args: calls.append(1) or forward(self, *args))
    session = pipe.session(LONG, feature_cache_bytes=0)
    session.add(0, 1, **CLICK)
    first = len(calls)
    session.propagate()
    assert first == len(calls) == 4  # of the four levels of the first frame
    with torch.inference_mode():
        features = pipe.model.get_image_features(session._pixels(13)[None], return_dict=True)
    maps, positions = session.features.get(13)
    assert all(torch.equal(*pair) for pair in zip(maps, features.fpn_hidden_states, strict=True))
    assert torch.equal(positions, features.fpn_position_encoding[-1])


def test_objects_shown_at_different_times_go_through_the_model_together(monkeypatch):
    pipe, sizes = near_pipe(), []
    prompts = {
        0: {1: CLICK, 2: {"box": [40, 5, 70, 40]}},
        3: {3: {"points": [[60, 30]]}},
        5: {1: {"points": [[30, 20]]}},
    }
    attention = type(pipe.model.memory_attention)
    forward = attention.forward

    def counted(self, **kwargs):
        sizes.append(kwargs["memory"].shape[1])
        return forward(self, **kwargs)

    monkeypatch.setattr(attention, "forward", counted)
    together = pipe(LONG, prompts=prompts, output="logits")
    assert sorted(sizes[-2:]) == [1, 2]  # object 1 has more to attend to, the others as much as each other
    for obj in (1, 2, 3):
        own = {frame: {obj: objects[obj]} for frame, objects in prompts.items() if obj in objects}
        alone = pipe(LONG, prompts=own, output="logits")
        for frame in alone:
            assert np.abs(frame.masks[obj] - together[frame.frame].masks[obj]).max() < 1e-4
            assert frame.scores[obj] == pytest.approx(together[frame.frame].scores[obj], abs=1e-5)


def test_memories_on_the_disk_are_the_same_and_none_is_held_in_memory():
    """All that grows with the frames is mapped from files, corrections and what can be undone included."""
    masks = []
    for offload in (False, "disk"):
        session = near_pipe().session(LONG, output="logits", offload=offload)
        session.add(0, 1, **CLICK)
        session.add(0, 2, box=[40, 5, 70, 40])
        session.propagate()
        session.correct(3, 1, [[20, 20]], [0])
        found = session.propagate("both")
        masks.append([found[frame].masks for frame in range(len(LONG))])
    for one, other in zip(*masks, strict=True):
        assert all(np.array_equal(one[obj], other[obj]) for obj in (1, 2))
    for memory in session._memories.values():
        outputs = [*memory.conditioning.values(), *memory.tracked.values()]
        assert len(outputs) == len(LONG)
        for output in outputs:
            assert all(output[key].untyped_storage().filename for key in ("maskmem_features", "pred_masks"))
