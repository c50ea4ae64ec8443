"""The loop a user writes with transformers alone, as the oracle of ours."""

import numpy as np
import torch


def direct_masks(model, processor, video, frame: int, ways=(False,), obj: int = 1, **inputs) -> dict[int, np.ndarray]:
    """
    Mask logits in the size of the video by frame, of one object prompted on `frame`: the model's own session, never
    pruned. `ways` are the passes, each with its `reverse`; `inputs` are the processor's.
    """
    session = processor.init_video_session(video=video, dtype=model.dtype)
    processor.add_inputs_to_inference_session(session, frame, obj, **inputs)
    model(session, frame_idx=frame)
    low = {}
    for reverse in ways:
        for output in model.propagate_in_video_iterator(session, reverse=reverse):
            low[output.frame_idx] = output.pred_masks
    return {number: upscale(processor, masks, video) for number, masks in sorted(low.items())}


def direct_stream(model, processor, frames, **inputs) -> list[np.ndarray]:
    """The same for frames that come one by one, prompted on the first."""
    session = processor.init_video_session(dtype=model.dtype)
    masks = []
    for number, frame in enumerate(frames):
        encoded = processor(images=frame, return_tensors="pt")
        if number == 0:
            size = tuple(encoded["original_sizes"][0].tolist())
            processor.add_inputs_to_inference_session(session, 0, 1, original_size=size, **inputs)
        output = model(session, frame=encoded["pixel_values"][0])
        masks.append(upscale(processor, output.pred_masks, frames))
    return masks


def corrected_masks(
    model, processor, video, start, click, frame, points, labels, ways=(False,)
) -> dict[int, np.ndarray]:
    """
    The reference predictor's correction with `add_all_frames_to_correct_as_cond=True`, on the model's own session:
    forward, previous logits (clamped to -32..32) with all clicks on `frame`, the frame made a conditioning one, then
    `ways` again.
    """
    session = processor.init_video_session(video=video, dtype=model.dtype)
    processor.add_inputs_to_inference_session(session, start, 1, input_points=[[[click]]], input_labels=[[[1]]])
    model(session, frame_idx=start)
    list(model.propagate_in_video_iterator(session))
    outputs = session.output_dict_per_obj[0]
    previous = outputs["non_cond_frame_outputs"][frame]["pred_masks"].clamp(-32, 32)
    original = model._run_single_frame_inference

    def with_previous(**kwargs):
        return original(**{**kwargs, "prev_sam_mask_logits": previous})

    processor.add_inputs_to_inference_session(session, frame, 1, input_points=[[points]], input_labels=[[labels]])
    model._run_single_frame_inference = with_previous
    try:
        model(session, frame_idx=frame)
    finally:
        del model._run_single_frame_inference
    outputs["cond_frame_outputs"][frame] = outputs["non_cond_frame_outputs"].pop(frame)
    low = {}
    for reverse in ways:
        for output in model.propagate_in_video_iterator(session, reverse=reverse):
            low[output.frame_idx] = output.pred_masks
    return {number: upscale(processor, masks, video) for number, masks in sorted(low.items())}


def upscale(processor, masks: torch.Tensor, video) -> np.ndarray:
    size = list(np.asarray(video[0]).shape[:2])
    return processor.post_process_masks([masks], [size], binarize=False)[0][0, 0].float().numpy()
