import numpy as np
import pytest
import torch

from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.training.clip_forward import closest_frames, predict_clips
from hf_iclr.vision.training.prompts import PromptPlan, first_points
from tests.vision.tiny import SIDE, tiny_model, tiny_processor


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_maskmem=3)


def make_clip(plan: PromptPlan, frames: int = 4, seed: int = 0):
    drawn = procedural_clip(seed, frames=frames, size=SIDE)
    pixels = tiny_processor().video_processor(drawn.frames, return_tensors="pt")["pixel_values_videos"][0]
    masks = torch.from_numpy(np.stack(list(drawn.masks.values())))
    noise = torch.rand(2, frames, 1 + plan.clicks, 4, generator=torch.Generator().manual_seed(seed))
    return drawn, {"pixel_values": pixels, "masks": masks, "noise": noise, "plan": plan}


def chosen(prediction) -> torch.Tensor:
    best = prediction.logits[torch.arange(len(prediction.scores)), prediction.scores.argmax(1)]
    return torch.where(prediction.object_scores[..., None] > 0, best, -1024.0)


def propagated(model, drawn, clip, row: int) -> dict[int, torch.Tensor]:
    """The masks of one object by the model's own session and loop."""
    processor, plan = tiny_processor(), clip["plan"]
    session = processor.init_video_session(video=drawn.frames, inference_device="cpu")
    for frame in plan.prompted:
        if plan.kind == "mask":
            mask = clip["masks"][row, frame].numpy()
            processor.add_inputs_to_inference_session(session, frame, 1, input_masks=[mask])
        else:
            points, labels = first_points(plan.kind, clip["masks"][:, frame], clip["noise"][:, frame, 0])
            inputs = {"point_coords": points[row : row + 1], "point_labels": labels[row : row + 1]}
            session.add_point_inputs(session.obj_id_to_idx(1), frame, inputs)
            session.obj_with_new_inputs = [1]
        model(session, frame_idx=frame)
    outputs = model.propagate_in_video_iterator(session, start_frame_idx=0)
    return {output.frame_idx: output.pred_masks[0, 0] for output in outputs}


@pytest.mark.parametrize("kind", ["mask", "click", "box"])
@pytest.mark.parametrize("prompted", [(0,), (0, 2)])
def test_masks_equal_those_of_the_models_own_propagation(model, kind, prompted):
    drawn, clip = make_clip(PromptPlan(kind, prompted))
    with torch.no_grad():
        predictions = {prediction.frame: prediction for prediction in predict_clips(model, [clip])}
    assert sorted(predictions) == [t for t in range(4) if kind != "mask" or t not in prompted]
    for row in range(2):
        expected = propagated(model, drawn, clip, row)
        for frame, prediction in predictions.items():
            # Memories are rounded to bfloat16, which a last bit before it can turn.
            torch.testing.assert_close(chosen(prediction)[row], expected[frame], rtol=1e-3, atol=1e-4)


def test_clips_of_other_plans_and_lengths_in_a_batch_change_nothing(model):
    clips = [
        make_clip(PromptPlan("click"), seed=1)[1],
        make_clip(PromptPlan("box", corrected=(0, 2), clicks=2), seed=2)[1],
        make_clip(PromptPlan("click"), frames=1, seed=3)[1],
        make_clip(PromptPlan("click"), seed=4)[1],
    ]
    with torch.no_grad():
        together = list(predict_clips(model, clips))
        alone = [(number, p) for number, clip in enumerate(clips) for p in predict_clips(model, [clip])]
    seen = 0
    for number, single in alone:
        match = [p for p in together if number in p.clips and p.frame == single.frame and len(p.clips) >= 2]
        rows = [row for row, owner in enumerate(match[0].clips) if owner == number]
        nearest = min((chosen(p)[rows] - chosen(single)).abs().max() for p in match)
        assert nearest < 1e-4
        seen += 1
    assert seen == 4 + (4 + 2 + 2) + 1 + 4  # decodings: frames, and one more a corrective click


def test_a_correction_changes_its_frame_and_later_ones_and_becomes_a_condition(model):
    plain = make_clip(PromptPlan("mask"), frames=5)[1]
    corrected = {**plain, "plan": PromptPlan("mask", corrected=(2,), clicks=1), "noise": torch.rand(2, 5, 2, 4)}
    with torch.no_grad():
        before = {p.frame: chosen(p) for p in predict_clips(model, [plain])}
        decoded = [(p.frame, chosen(p)) for p in predict_clips(model, [corrected])]
    assert [frame for frame, _ in decoded] == [1, 2, 2, 3, 4]
    after = dict(decoded)
    assert torch.equal(after[1], before[1])
    assert torch.equal(decoded[1][1], before[2])
    assert all(not torch.allclose(after[frame], before[frame], atol=1e-3) for frame in (2, 3, 4))


def test_true_masks_are_remembered_where_it_is_said(model):
    plain = make_clip(PromptPlan("click"), frames=2)[1]
    taught = {**plain, "remember_truth": torch.tensor([[True, True], [False, False]])}
    with torch.no_grad():
        before = {p.frame: chosen(p) for p in predict_clips(model, [plain])}
        after = {p.frame: chosen(p) for p in predict_clips(model, [taught])}
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1][0], after[1][0], atol=1e-3)
    torch.testing.assert_close(before[1][1], after[1][1])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_the_last_frame_reach_all_parts_through_the_memory(checkpointing):
    model = tiny_model()
    clip = make_clip(PromptPlan("click"), frames=3)[1]
    *_, last = predict_clips(model, [clip], checkpointing)
    last.logits.square().mean().backward()
    parts = (
        *("vision_encoder.backbone", "vision_encoder.neck", "memory_attention", "memory_encoder", "mask_decoder"),
        *("object_pointer_proj", "memory_temporal_positional_encoding", "prompt_encoder.point_embed"),
    )
    for part in parts:
        gradients = [p.grad for name, p in model.named_parameters() if name.startswith(part)]
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in gradients), part


@pytest.mark.parametrize(
    "frame, limit, expected",
    [(5, -1, [0, 3, 8, 9]), (5, 3, [3, 8, 9]), (4, 3, [3, 8, 0]), (9, 2, [8, 9]), (0, 2, [0, 3])],
)
def test_of_many_prompted_frames_the_closest_are_attended_to(frame, limit, expected):
    assert closest_frames(frame, [0, 3, 8, 9], limit) == expected
