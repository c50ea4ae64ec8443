"""The video session of transformers as it is, with the methods of ours."""

from collections.abc import Iterator

from hf_iclr.vision.session.segments import FrameSegments


class NativePipe:
    """Opens sessions of transformers in place of ours, for `evaluate_interactive` and `evaluate_vos`."""

    def __init__(self, pipe):
        self.pipe = pipe

    def session(self, video, **options) -> "NativeSession":
        return NativeSession(self.pipe.model, self.pipe.processor, video)


class NativeSession:
    """The calls a user of transformers makes, in the form of a [`VideoSession`] with a single object."""

    def __init__(self, model, processor, video):
        self.model, self.processor = model, processor
        self.inner = processor.init_video_session(video=list(video), dtype=model.dtype)

    def add(self, frame: int, obj: int, points=None, labels=None, box=None, mask=None) -> FrameSegments:
        return self._prompt(
            frame,
            obj,
            input_points=None if points is None else [[points]],
            input_labels=None if points is None else [[labels]],
            input_boxes=None if box is None else [[box]],
            input_masks=None if mask is None else [mask],
        )

    def correct(self, frame: int, obj: int, points, labels) -> FrameSegments:
        clicks = {"input_points": [[points]], "input_labels": [[labels]]}
        return self._prompt(frame, obj, **clicks, clear_old_inputs=False)

    def iterate(self, start: int | None = None) -> Iterator[FrameSegments]:
        for output in self.model.propagate_in_video_iterator(self.inner, start_frame_idx=start):
            yield self.segments(output.frame_idx)

    def segments(self, frame: int) -> FrameSegments:
        outputs = self.inner.output_dict_per_obj[0]
        output = outputs["cond_frame_outputs"].get(frame) or outputs["non_cond_frame_outputs"][frame]
        size = self.inner.video_height, self.inner.video_width
        mask = self.processor.post_process_masks([output["pred_masks"]], [list(size)])[0][0, 0].cpu().numpy()
        obj = self.inner.obj_ids[0]
        return FrameSegments(frame, size, {obj: mask}, {}, {obj: float(output["object_score_logits"])})

    def _prompt(self, frame: int, obj: int, **inputs) -> FrameSegments:
        self.processor.add_inputs_to_inference_session(self.inner, frame, [obj], **inputs)
        self.model(self.inner, frame_idx=frame)
        return self.segments(frame)
