"""What a tracker remembers: the past of an object, as far as the model can look back, and features of frames."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import Sam2VideoInferenceSession

from .segments import box_around


@dataclass(frozen=True)
class Remembered:
    """
    What a memory policy may know of a tracked frame.

    Args:
        frame (`int`): Number of the frame.
        mask_score (`float`): The IoU that the mask decoder expects of its mask, in 0..1.
        object_score (`float`): Logit that the object is visible.
        motion_score (`float`): IoU of the mask's box with the one expected at constant velocity; 1 if there is none.
        pointer (`torch.Tensor` of shape `(hidden_size,)`): The model's summary of the object.
    """

    frame: int
    mask_score: float
    object_score: float
    motion_score: float
    pointer: torch.Tensor


MemoryPolicy = Callable[[list[Remembered], int], list[int]]


def exact(past: list[Remembered], slots: int) -> list[int]:
    """The model's own rule: the most recent frames, whatever they show."""
    return [seen.frame for seen in past[-slots:]]


def motion_gated(past: list[Remembered], slots: int) -> list[int]:
    """
    The most recent frames whose mask is trusted, whose object is visible and whose motion is plausible, after an idea
    of SAMURAI (https://huggingface.co/papers/2411.11922); thresholds and constant velocity, where it has a Kalman
    filter, are ours.
    """
    return [seen.frame for seen in past if seen.mask_score > 0.5 and seen.object_score > 0 and seen.motion_score > 0][
        -slots:
    ]


def long_term_diverse(past: list[Remembered], slots: int) -> list[int]:
    """
    Half of the slots for the most recent frames; the others for older frames with a visible object, each time the one
    whose pointer is least similar (cosine) to those chosen.
    """
    recent = past[-(slots - slots // 2) :]
    older = [seen for seen in past[: -len(recent)] if seen.object_score > 0]
    chosen = list(recent)
    while older and len(chosen) < slots:
        pointers = torch.nn.functional.normalize(torch.stack([seen.pointer.float() for seen in chosen]), dim=1)
        similarity = [(pointers @ torch.nn.functional.normalize(seen.pointer.float(), dim=0)).max() for seen in older]
        chosen.append(older.pop(int(torch.stack(similarity).argmin())))
    return sorted(seen.frame for seen in chosen)


MEMORY_POLICIES: dict[str, MemoryPolicy] = {
    "exact": exact,
    "motion_gated": motion_gated,
    "long_term_diverse": long_term_diverse,
}


class FeatureCache:
    """
    Vision features of frames, so that a second pass over a video need not encode them again. The latest frame is
    always kept; others stay, first come, until the limit is reached, which suits passes over the same frames. Position
    encodings are the same for all frames and kept once.

    Args:
        limit_bytes (`int`):
            How much may be kept beside the latest frame.
        dtype (`torch.dtype`, *optional*):
            How kept features are stored, for instance `torch.bfloat16` to halve them; masks of a second pass then
            differ slightly. Defaults to their own, which changes nothing.
        device (`torch.device`, *optional*):
            Where they are kept, defaults to where they were computed.
    """

    def __init__(self, limit_bytes: int, dtype: torch.dtype | None = None, device: torch.device | None = None):
        self.limit_bytes = limit_bytes
        self.dtype = dtype
        self.device = device
        self._latest: tuple[int, list[torch.Tensor]] | None = None
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._positions: list[torch.Tensor] = []
        self._constants: dict[tuple, Any] = {}
        self.kept_bytes = 0  # of what is kept beside the latest frame and the position encodings
        self.memory_positions: torch.Tensor | None = None  # of the memory encoder, the same for all frames too

    def __contains__(self, frame: int) -> bool:
        return frame in self._kept or (self._latest is not None and self._latest[0] == frame)

    def get_vision_features(self, frame: int) -> dict[str, list[torch.Tensor]] | None:
        """Features of a frame as the model computed them; called by the model."""
        if self._latest is not None and self._latest[0] == frame:
            features = self._latest[1]
        elif frame in self._kept:
            position = self._positions[0]
            features = [feature.to(position.device, position.dtype) for feature in self._kept[frame]]
            self._latest = (frame, features)
        else:
            return None
        return {"vision_feats": features, "vision_pos_embeds": self._positions}

    def cache_vision_features(self, frame: int, features: dict[str, Any]) -> None:
        """Takes the features of a frame; called by the model."""
        levels = list(features["vision_feats"])
        self._positions = [features["vision_pos_embeds"][-1]]  # the model reads no other level
        self._latest = (frame, levels)
        size = sum(level.numel() * (self.dtype or level.dtype).itemsize for level in levels)
        if frame not in self._kept and self.kept_bytes + size <= self.limit_bytes:
            self.kept_bytes += size
            self._kept[frame] = [level.to(self.device or level.device, self.dtype or level.dtype) for level in levels]

    @contextmanager
    def constants_of(self, model) -> Iterator[None]:
        """
        While it lasts, `model` computes its position encodings once rather than for every frame and object: they
        depend on shapes and weights alone.
        """
        methods = (
            (model.vision_encoder.neck.position_encoding, "forward"),
            (model.memory_attention.rotary_emb, "forward"),
            (model, "get_image_wide_positional_embeddings"),
        )
        for owner, name in methods:
            setattr(owner, name, partial(self._constant, id(owner), getattr(owner, name)))
        try:
            yield
        finally:
            for owner, name in methods:
                delattr(owner, name)

    def _constant(self, owner: int, compute: Callable[..., Any], *args) -> Any:
        # Of features only the kind counts; whole numbers are positions, which tensor of the model it is.
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        key = (owner, *(arg for arg in args if not isinstance(arg, torch.Tensor)))
        for tensor in tensors:
            position = 0 if tensor.is_floating_point() else tensor.data_ptr()
            key = (*key, tensor.shape, tensor.dtype, tensor.device, position)
        if key not in self._constants:
            self._constants[key] = compute(*args)
        return self._constants[key]


class ObjectMemory(Sam2VideoInferenceSession):
    """
    [`~transformers.Sam2VideoInferenceSession`] of a single object that takes frames from elsewhere and can forget what
    the model no longer attends to: its masks are those of an unbounded session and depend on no other object.

    Args:
        obj (`int`):
            Number of the object.
        pixel_values (`Callable[[int], torch.Tensor]`):
            Gives the preprocessed frame of a number.
        num_frames (`int`, *optional*):
            Length of the video; `None` for a stream.
        features (`FeatureCache`):
            Shared by all objects of a video.
        reach (`tuple[int, int]`):
            How many frames back the model attends to masks, and to object pointers.
        policy (`MemoryPolicy`):
            Which tracked frames are attended to.
    """

    def __init__(self, obj, pixel_values, num_frames, features, reach, policy: MemoryPolicy = exact, **kwargs):
        super().__init__(**kwargs)
        self.obj_id_to_idx(obj)
        self.cache = features
        self.reach = reach
        self.policy = policy
        self._pixel_values = pixel_values
        self._num_frames = num_frames
        self._chosen: list[int] = []

    @property
    def num_frames(self) -> int | None:
        return self._num_frames

    def get_frame(self, frame_idx: int) -> torch.Tensor:
        return self._pixel_values(frame_idx).to(self.inference_device, self.dtype)

    def add_new_frame(self, pixel_values: torch.Tensor, frame_idx: int | None = None) -> int | None:
        return frame_idx  # frames are never stored here

    @property
    def conditioning(self) -> dict[int, dict[str, torch.Tensor]]:
        """What is known of the frames with prompts, by frame."""
        return self.output_dict_per_obj[0]["cond_frame_outputs"]

    @property
    def tracked(self) -> dict[int, dict[str, torch.Tensor]]:
        """What is known of the other frames, by frame."""
        return self.output_dict_per_obj[0]["non_cond_frame_outputs"]

    @tracked.setter
    def tracked(self, outputs: dict[int, dict[str, torch.Tensor]]) -> None:
        self.output_dict_per_obj[0]["non_cond_frame_outputs"] = outputs

    def output(self, frame: int) -> dict[str, torch.Tensor] | None:
        """What is known of a frame, `None` if nothing."""
        return self.conditioning.get(frame) or self.tracked.get(frame)

    def run(self, model, frame: int, reverse: bool = False, previous_logits: torch.Tensor | None = None) -> None:
        """
        Runs `model` on one frame, with the new inputs of this object if it has any, which makes it a conditioning
        frame: one that all later passes attend to and none overwrites.

        Args:
            previous_logits (`torch.Tensor` of shape `(1, 1, height, width)`, *optional*):
                Mask logits fed to the prompt encoder with new clicks.
        """
        prompted = bool(self.obj_with_new_inputs)
        scores: list[torch.Tensor] = []
        hooks = [model.mask_decoder.register_forward_hook(lambda module, args, output: scores.append(output[1]))]
        if previous_logits is not None:
            hooks.append(
                model.prompt_encoder.register_forward_pre_hook(
                    lambda module, args, kwargs: (args, {**kwargs, "input_masks": previous_logits}), with_kwargs=True
                )
            )
        tracked = self.tracked
        self.tracked = self._attended(frame, reverse)
        streamed = {} if self._num_frames is not None else {"frame": torch.empty(0)}
        try:
            with self.cache.constants_of(model):
                model(self, frame_idx=frame, reverse=reverse, **streamed)
        finally:
            for hook in hooks:
                hook.remove()
            if self.tracked is not tracked:
                if frame in self.tracked:
                    tracked[frame] = self.tracked[frame]
                self.tracked = tracked
        if prompted:
            # The model files the answer to a prompt on a tracked frame as an ordinary output, but its memory with an
            # older conditioning output; a frame with a prompt is a conditioning frame here.
            self.conditioning[frame] = {**self.conditioning.get(frame, {}), **self.tracked.pop(frame, {})}
        from_mask = prompted and frame in self.mask_inputs_per_obj[0]  # the model's own score of a given mask is 1
        self._settle(frame, torch.ones(1) if from_mask else scores[-1].max().reshape(1))

    def _settle(self, frame: int, mask_score: torch.Tensor) -> None:
        """Keeps of a new output what may be read again, where it belongs."""
        output = self.output(frame)
        assert output is not None
        output.pop("high_res_masks", None)  # read by the memory encoder, which has run
        output["mask_score"] = mask_score.float().cpu()
        shared = self.cache.memory_positions
        if shared is None or not torch.equal(shared.to(output["maskmem_pos_enc"]), output["maskmem_pos_enc"]):
            self.cache.memory_positions = output["maskmem_pos_enc"].to(self.inference_state_device)
        output["maskmem_pos_enc"] = self.cache.memory_positions
        for key in ("maskmem_features", "pred_masks"):
            output[key] = output[key].to(self.inference_state_device)
        if self.policy is not exact:
            output["box"] = torch.tensor(box_around((output["pred_masks"][0, 0] > 0).cpu().numpy()))

    def demote(self, frame: int) -> None:
        """Makes a conditioning frame whose prompts are gone an ordinary one."""
        if frame in self.conditioning:
            self.tracked[frame] = self.conditioning.pop(frame)
        self.frames_tracked_per_obj[0].pop(frame, None)

    def snapshot(self) -> tuple:
        """What `restore` takes; tensors are shared, for none is ever changed."""
        outputs = ({f: dict(output) for f, output in kind.items()} for kind in (self.conditioning, self.tracked))
        return (*outputs, dict(self.frames_tracked_per_obj[0]))

    def restore(self, state: tuple) -> None:
        """Goes back to a snapshot."""
        conditioning, tracked, directions = state
        self.output_dict_per_obj[0] = {"cond_frame_outputs": conditioning, "non_cond_frame_outputs": tracked}
        self.frames_tracked_per_obj[0] = directions
        self.obj_with_new_inputs.clear()

    def forget(self, frame: int, reverse: bool, anchors: Iterable[tuple[int, bool]] = (), keep_masks=False) -> None:
        """
        Drops what no later step can attend to.

        Args:
            frame (`int`):
                The frame just tracked.
            reverse (`bool`):
                Whether the pass runs backwards.
            anchors (`Iterable[tuple[int, bool]]`, *optional*):
                First frames of passes to come, with their `reverse`.
            keep_masks (`bool`, *optional*, defaults to `False`):
                Whether masks are kept, because they will be shown again.
        """
        # A head is attended from; the current frame is one, because it may be corrected.
        heads = [(frame, reverse), *anchors]
        for past in list(self.tracked):
            distances = [past - head if back else head - past for head, back in heads]
            distance = min((d for d in distances if d >= 0), default=max(self.reach) + 1)
            if distance <= self.reach[0] or past in self._chosen:
                continue
            for key in ("maskmem_features", "maskmem_pos_enc", *([] if keep_masks else ["pred_masks"])):
                self.tracked[past].pop(key, None)
            if distance > self.reach[1] and not keep_masks:
                del self.tracked[past]
                self.frames_tracked_per_obj[0].pop(past, None)

    def _attended(self, frame: int, reverse: bool) -> dict[int, dict[str, torch.Tensor]]:
        """The tracked frames as the model shall see them: those that the policy chose in the places of the latest."""
        step = -1 if reverse else 1
        if self.policy is exact:
            near = (frame - place * step for place in range(1, self.reach[0] + 1))
            forgotten = {f for f in near if f in self.tracked and "maskmem_features" not in self.tracked[f]}
            return {f: o for f, o in self.tracked.items() if f not in forgotten} if forgotten else self.tracked
        past = sorted(
            (f for f, output in self.tracked.items() if (frame - f) * step > 0 and "box" in output),
            key=lambda f: f * step,
        )
        remembered = [
            Remembered(
                f,
                float(self.tracked[f]["mask_score"]),
                float(self.tracked[f]["object_score_logits"]),
                _motion_score([self.tracked[p]["box"] for p in past[max(0, i - 2) : i + 1]]),
                self.tracked[f]["object_pointer"].flatten(),
            )
            for i, f in enumerate(past)
            if "maskmem_features" in self.tracked[f] and ((frame - f) * step <= self.reach[0] or f in self._chosen)
        ]
        self._chosen = self.policy(remembered, self.reach[0])
        view = {f: o for f, o in self.tracked.items() if (frame - f) * step > self.reach[0]}
        for place, chosen in enumerate(sorted(self._chosen, key=lambda f: -f * step), start=1):
            there = frame - place * step
            pointer = self.tracked.get(there, self.tracked[chosen])["object_pointer"]
            view[there] = {**self.tracked[chosen], "object_pointer": pointer}
        return view


def _motion_score(boxes: list[torch.Tensor]) -> float:
    """IoU of the last box with the one that the two before it extrapolate to; 1 without two visible ones before."""
    if len(boxes) < 3 or not all(box.any() for box in boxes[:2]):
        return 1.0
    expected, found = 2 * boxes[1] - boxes[0], boxes[2]
    sides = (torch.minimum(expected[2:], found[2:]) - torch.maximum(expected[:2], found[:2])).clamp(min=0)
    union = (expected[2:] - expected[:2]).clamp(min=0).prod() + (found[2:] - found[:2]).prod() - sides.prod()
    return float(sides.prod() / union) if union > 0 else 0.0
