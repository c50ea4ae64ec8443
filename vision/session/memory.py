"""What a tracker remembers: the past of an object, as far as the model can look back, and features of frames."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from tempfile import NamedTemporaryFile

import torch
from transformers import Sam2VideoInferenceSession

from .segments import box_around


_MAPPED_BYTES = 2**24  # of a file at least
_STREAM_COND_FRAMES = 8  # as many frames as the paper's annotator corrects


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
        self.kept_bytes = 0  # of what is kept beside the latest frame and the position encodings
        # Position encodings of the memory encoder and of the mask decoder, the same for all frames too.
        self.memory_positions: torch.Tensor | None = None
        self.decoder_positions: torch.Tensor | None = None

    def __contains__(self, frame: int) -> bool:
        return frame in self._kept or (self._latest is not None and self._latest[0] == frame)

    @property
    def positions(self) -> torch.Tensor | None:
        """Position encodings of the coarsest features, once a frame was encoded."""
        return self._positions[0] if self._positions else None

    def get(self, frame: int) -> tuple[list[torch.Tensor], torch.Tensor] | None:
        """Features of a frame as the model computed them, `None` if they are not here."""
        if self._latest is not None and self._latest[0] == frame:
            features = self._latest[1]
        elif frame in self._kept:
            position = self._positions[0]
            features = [feature.to(position.device, position.dtype) for feature in self._kept[frame]]
            self._latest = (frame, features)
        else:
            return None
        return features, self._positions[0]

    def put(self, frame: int, levels: list[torch.Tensor], positions: torch.Tensor) -> None:
        """Takes the features of a frame."""
        self._positions = [positions]
        self._latest = (frame, levels)
        size = sum(level.numel() * (self.dtype or level.dtype).itemsize for level in levels)
        if frame not in self._kept and self.kept_bytes + size <= self.limit_bytes:
            self.kept_bytes += size
            self._kept[frame] = [level.to(self.device or level.device, self.dtype or level.dtype) for level in levels]


class MappedTensors:
    """
    Takes tensors into temporary files without a name that are mapped into memory (in `TMPDIR`), so that what is not
    being read need not be there. A file goes with the last of its tensors.
    """

    def __init__(self):
        self._rest = torch.empty(0, dtype=torch.uint8)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        length = -(-tensor.nbytes // 64) * 64  # any type may begin there
        if length > len(self._rest):
            with NamedTemporaryFile() as file:
                size = max(length, _MAPPED_BYTES)
                file.write(bytes(size))  # a disk that is full says so here; when mapped it would end the process
                file.flush()
                self._rest = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
        taken, self._rest = self._rest[: tensor.nbytes], self._rest[length:]
        return taken.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class ObjectMemory(Sam2VideoInferenceSession):
    """
    [`~transformers.Sam2VideoInferenceSession`] of a single object that takes frames from elsewhere and can forget what
    the model no longer attends to: its masks are those of an unbounded session and depend on no other object.

    As in the reference predictor, an answer to a prompt waits until the next pass: further clicks on its frame are
    answered from the memory that the first one found.

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
        max_cond_frames (`int`):
            How many frames with a prompt it attends to at most; -1 for all.
        policy (`MemoryPolicy`):
            Which tracked frames are attended to.
        mapped (`bool`, *optional*, defaults to `False`):
            Whether memories and masks are in [`MappedTensors`].
    """

    def __init__(
        self, obj, pixel_values, num_frames, features, reach, max_cond_frames, policy=exact, mapped=False, **kwargs
    ):
        super().__init__(**kwargs)
        self._mapped = MappedTensors() if mapped else None
        self.obj_id_to_idx(obj)
        self.cache = features
        self.reach = reach
        self.max_cond_frames = max_cond_frames
        self.policy: MemoryPolicy = policy
        self.waiting: dict[int, dict[str, torch.Tensor]] = {}  # answers that no pass has seen yet, by frame
        self._pixel_values = pixel_values
        self._num_frames = num_frames
        self._chosen: list[int] = []
        self._answers = 0  # how many were given; an output says how many had been, so that what follows from one goes

    @property
    def num_frames(self) -> int | None:
        return self._num_frames

    def get_frame(self, frame_idx: int) -> torch.Tensor:
        return self._pixel_values(frame_idx)

    @property
    def conditioning(self) -> dict[int, dict[str, torch.Tensor]]:
        """What is known of the frames with prompts, by frame."""
        return {**self.output_dict_per_obj[0]["cond_frame_outputs"], **self.waiting}

    @property
    def tracked(self) -> dict[int, dict[str, torch.Tensor]]:
        """What is known of the other frames, by frame."""
        return self.output_dict_per_obj[0]["non_cond_frame_outputs"]

    @property
    def ways(self) -> dict[int, dict[str, bool]]:
        """The frames that a pass has seen, and whether it ran backwards."""
        return self.frames_tracked_per_obj[0]

    def output(self, frame: int) -> dict[str, torch.Tensor] | None:
        """What is known of a frame, `None` if nothing."""
        return self.conditioning.get(frame) or self.tracked.get(frame)

    def scores(self) -> dict[int, float]:
        """The IoU that the model expects of each mask, by frame."""
        known = {**self.tracked, **self.conditioning}
        return {frame: float(known[frame]["mask_score"]) for frame in sorted(known) if "pred_masks" in known[frame]}

    def answer(self, frame: int, output: dict[str, torch.Tensor]) -> None:
        """Takes the answer to a prompt; `settle` makes it one that later frames attend to."""
        known = self.conditioning.get(frame, {})
        self._answers += 1
        output["answers"] = known.get("answers", torch.tensor(self._answers))
        self.waiting[frame] = self._kept(output)

    def track(self, frame: int, output: dict[str, torch.Tensor]) -> None:
        """Takes what a pass found on a frame without a prompt."""
        output["answers"] = torch.tensor(self._answers)
        self.tracked[frame] = self._kept(output)

    def settle(self) -> None:
        """Makes the frames of waiting answers conditioning frames: all passes attend to them and none overwrites."""
        for frame, output in self.waiting.items():
            self.output_dict_per_obj[0]["cond_frame_outputs"][frame] = output
            self.tracked.pop(frame, None)
        self.waiting.clear()

    def _kept(self, output: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What may be read again of a new output, where it belongs."""
        shared = self.cache.memory_positions
        if shared is None or not torch.equal(shared.to(output["maskmem_pos_enc"]), output["maskmem_pos_enc"]):
            self.cache.memory_positions = output["maskmem_pos_enc"].to(self.inference_state_device)
        output["maskmem_pos_enc"] = self.cache.memory_positions
        for key in ("maskmem_features", "pred_masks"):
            output[key] = output[key].to(self.inference_state_device)
            if self._mapped is not None:
                output[key] = self._mapped(output[key])
        if self.policy is not exact:
            output["box"] = torch.tensor(box_around((output["pred_masks"][0, 0] > 0).cpu().numpy()))
        return output

    def retract(self, frame: int) -> None:
        """Takes an answer back, if there is one, and the masks of frames that were tracked with it."""
        output = self.conditioning.get(frame)
        self.ways.pop(frame, None)
        if output is None:
            return
        self.waiting.pop(frame, None)
        self.output_dict_per_obj[0]["cond_frame_outputs"].pop(frame, None)
        self.tracked.pop(frame, None)
        for later in [f for f, known in self.tracked.items() if known["answers"] >= output["answers"]]:
            del self.tracked[later]
            self.ways.pop(later, None)

    def snapshot(self) -> tuple:
        """What `restore` takes; tensors are shared, for none is ever changed."""
        kinds = (*self.output_dict_per_obj[0].values(), self.waiting)
        return (*({f: dict(output) for f, output in kind.items()} for kind in kinds), dict(self.ways))

    def restore(self, state: tuple) -> None:
        """Goes back to a snapshot."""
        conditioning, tracked, self.waiting, ways = state
        self.output_dict_per_obj[0] = {"cond_frame_outputs": conditioning, "non_cond_frame_outputs": tracked}
        self.frames_tracked_per_obj[0] = ways

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
                self.ways.pop(past, None)

    def forget_prompts(self, frame: int) -> list[int]:
        """The prompted frames that no later frame of a stream attends to after `frame`, which are dropped."""
        known = self.output_dict_per_obj[0]["cond_frame_outputs"]
        latest = closest_frames(frame + 1, list(known), self.max_cond_frames)
        past = [f for f in known if f not in latest and frame - f > max(self.reach)]
        for old in past:
            del known[old]
            self.ways.pop(old, None)
        return past

    def attended(self, frame: int, reverse: bool) -> "ObjectMemory":
        """
        The memory as the model shall see it from a frame: with the prompted frames nearest to it, other ones as if
        they were tracked, as the reference takes them, and those tracked ones that the policy chose in the places of
        the latest.
        """
        known, step = self.output_dict_per_obj[0]["cond_frame_outputs"], -1 if reverse else 1
        chosen = closest_frames(frame, list(known), self.max_cond_frames)
        others = {f: output for f, output in known.items() if f not in chosen}
        if self.policy is exact:
            near = (frame - place * step for place in range(1, self.reach[0] + 1))
            forgotten = {f for f in near if f in self.tracked and "maskmem_features" not in self.tracked[f]}
            tracked = {f: output for f, output in self.tracked.items() if f not in forgotten}
        else:
            tracked = self._chosen_by_policy(frame, step)
        seen = copy.copy(self)
        outputs = {"cond_frame_outputs": {f: known[f] for f in chosen}, "non_cond_frame_outputs": others | tracked}
        seen.output_dict_per_obj, seen.waiting = {0: outputs}, {}
        return seen

    def _chosen_by_policy(self, frame: int, step: int) -> dict[int, dict[str, torch.Tensor]]:
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


def new_memory(session, obj: int) -> ObjectMemory:
    """An empty memory of an object of a [`VideoSession`]."""
    config, size, most = session.model.config, session.size, session.config.max_cond_frames
    if most is None:
        most = config.max_cond_frame_num
        most = _STREAM_COND_FRAMES if most == -1 and session.streaming else most
    return ObjectMemory(
        obj,
        session._pixels,
        session.num_frames,
        session.features,
        (config.num_maskmem - 1, config.max_object_pointers_in_encoder - 1),
        most,
        session.policy,
        session.config.offload == "disk",
        video_height=size[0],
        video_width=size[1],
        inference_device=session.model.device,
        inference_state_device=session._state_device,
        dtype=session.model.dtype,
    )


def closest_frames(frame: int, prompted: list[int], limit: int) -> list[int]:
    """
    Which prompted frames a frame attends to: the last before it, the first from it on, then by distance.

    Args:
        frame (`int`): The frame.
        prompted (`list[int]`): All of them.
        limit (`int`): At most so many; -1 for all.
    """
    if limit == -1 or len(prompted) <= limit:
        return prompted
    before = max((t for t in prompted if t < frame), default=None)
    after = min((t for t in prompted if t >= frame), default=None)
    sides = [t for t in (before, after) if t is not None]
    others = sorted((t for t in prompted if t not in sides), key=lambda t: abs(t - frame))
    return sides + others[: limit - len(sides)]


def _motion_score(boxes: list[torch.Tensor]) -> float:
    """IoU of the last box with the one that the two before it extrapolate to; 1 without two visible ones before."""
    if len(boxes) < 3 or not all(box.any() for box in boxes[:2]):
        return 1.0
    expected, found = 2 * boxes[1] - boxes[0], boxes[2]
    sides = (torch.minimum(expected[2:], found[2:]) - torch.maximum(expected[:2], found[:2])).clamp(min=0)
    union = (expected[2:] - expected[:2]).clamp(min=0).prod() + (found[2:] - found[:2]).prod() - sides.prod()
    return float(sides.prod() / union) if union > 0 else 0.0
