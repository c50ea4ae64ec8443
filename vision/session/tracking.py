"""Passes over a video, and the step of the model once more from its own parts, for many objects at once."""

import threading
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from .frames import EndOfVideo
from .memory import FeatureCache, ObjectMemory
from .segments import FrameSegments


_NO_OBJECT = -1024.0  # logits of an object out of sight, as in the reference
_LOCKS: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@contextmanager
def using(model) -> Iterator[None]:
    """
    Where a part of a model is called rather than its `forward`: no gradients, and the hook that accelerate may have
    put on `forward`, which brings weights to the device and takes them away again, so that threads take turns.
    """
    hook = getattr(model, "_hf_hook", None)
    with torch.inference_mode():
        if hook is None:
            yield
            return
        with _LOCKS_LOCK:
            lock = _LOCKS.setdefault(model, threading.RLock())
        with lock:
            hook.pre_forward(model)
            try:
                yield
            finally:
                hook.post_forward(model, None)


def walk_passes(
    session, direction: str, start: int | None, max_frames: int | None, objects: Container[int] | None
) -> Iterator[FrameSegments]:
    """The passes of `VideoSession.iterate`."""

    def first() -> dict[int, int]:
        return {obj: min(memory.conditioning) for obj, memory in _chosen(session, objects).items()}

    both = direction == "both"
    if direction != "backward" and (session.streaming or first()):
        begin = start
        if begin is None:
            begin = session._latest + 1 if session.streaming else min(first().values())
        yield from _walk(session, begin, False, max_frames, both, objects)
    if direction != "forward" and first():  # the last object may have been removed on the way
        if both:
            origins = {obj: frame - 1 for obj, frame in first().items()}
        else:
            origins = {obj: max(memory.conditioning) for obj, memory in _chosen(session, objects).items()}
        begin = start if start is not None and not both else max(origins.values())
        yield from _walk(session, begin, True, max_frames, both, objects, origins)


def _chosen(session, objects: Container[int] | None) -> dict[int, ObjectMemory]:
    return {obj: memory for obj, memory in session._memories.items() if objects is None or obj in objects}


def _walk(
    session,
    begin: int,
    reverse: bool,
    max_frames: int | None,
    both: bool,
    objects: Container[int] | None,
    origins: dict[int, int] | None = None,
) -> Iterator[FrameSegments]:
    """One way over the video; an object joins at its origin, or at its first prompt if there are no origins."""
    smoothed: dict[int, torch.Tensor] = {}
    frame = begin
    session._pixels.step = -1 if reverse else 1
    while frame >= 0 and (max_frames is None or abs(frame - begin) < max_frames):
        if session.num_frames is not None and frame >= session.num_frames:
            return
        try:
            if session.streaming:
                _take(session, frame)
            there = []
            for obj, memory in _chosen(session, objects).items():
                memory.settle()
                if min(memory.conditioning) <= frame if origins is None else frame <= origins.get(obj, -1):
                    there.append(memory)
            track_frame(session.model, [m for m in there if frame not in m.conditioning], frame, reverse)
            for memory in there:
                memory.ways[frame] = {"reverse": reverse}
        except EndOfVideo:
            return
        session._latest = frame
        segments = session.segments(frame, smoothed, objects)
        if session._windowed:
            for memory in _chosen(session, objects).values():
                # The way back starts at the first prompt and shows masks of the way there again.
                ahead = [(min(memory.conditioning) - 1, True)] if both else []
                memory.forget(frame, reverse, ahead, keep_masks=both)
                if session.streaming:
                    _forget_prompts(session, memory, memory.forget_prompts(frame))
        yield segments
        frame += -1 if reverse else 1


def _take(session, frame: int) -> None:
    """Reads the next frame of a stream and answers the prompts that waited for it. A bad frame is passed over."""
    try:
        session.frames[frame]
    except EndOfVideo:
        raise
    except (ValueError, TypeError):
        session._latest = frame
        if frame in session._queue:
            session._queue[frame + 1] = {**session._queue.pop(frame), **session._queue.get(frame + 1, {})}
        raise
    for obj, prompt in list(session._queue.get(frame, {}).items()):
        with session._edit(undoable=False):
            session._show(frame, obj, prompt)
            session._drop_waiting(frame, obj)


def _forget_prompts(session, memory: ObjectMemory, frames: list[int]) -> None:
    (obj,) = memory.obj_ids
    for frame in frames:
        session._prompts[frame].pop(obj)
        session._corrected.discard((frame, obj))
        if not session._prompts[frame]:
            del session._prompts[frame]


class _Found(NamedTuple):
    """Of each object."""

    low: torch.Tensor  # logits of its mask, coarse
    high: torch.Tensor  # and as large as the model's input
    pointer: torch.Tensor
    seen: torch.Tensor  # logit that it is in sight
    scores: torch.Tensor  # of its mask


def answer_prompt(
    model, memory: ObjectMemory, frame: int, alone: bool, previous_logits: torch.Tensor | None = None
) -> None:
    """
    Answers the inputs that the processor gave to `memory` for a frame.

    Args:
        alone (`bool`):
            Whether they say all, as on the first prompt; otherwise the model attends to the object's past too.
        previous_logits (`torch.Tensor` of shape `(1, 1, height, width)`, *optional*):
            Mask logits fed to the prompt encoder with clicks.
    """
    points = memory.point_inputs_per_obj[0].pop(frame, None)
    mask = memory.mask_inputs_per_obj[0].pop(frame, None)
    memory.obj_with_new_inputs = []
    reverse = not alone and memory.ways[frame]["reverse"]
    with using(model):
        levels, positions = _features(model, memory, frame)
        *fine, image = _as_maps(levels, model.backbone_feature_sizes)
        if mask is not None:
            given = model._use_mask_as_output(image, fine, mask)
            found = _Found(
                given.pred_masks, given.high_res_masks, given.object_pointer, given.object_score_logits,
                torch.ones(1),  # the model's own score of a given mask
            )  # fmt: skip
        else:
            if alone:
                (image,) = _as_maps([levels[-1] + model.no_memory_embedding], model.backbone_feature_sizes[-1:])
            else:
                image = _attend(model, [memory], frame, reverse, levels[-1], positions)
            multimask = _multimask(model.config, alone, 0 if points is None else points["point_labels"].shape[2])
            found = _decode(model, memory.cache, image, fine, multimask, points, previous_logits)
        (output,) = _remember(model, levels[-1], found, prompted=True)
    memory.answer(frame, output)


def track_frame(model, memories: Sequence[ObjectMemory], frame: int, reverse: bool) -> None:
    """Finds objects on a frame without prompts of theirs, all at once."""
    if not memories:
        return
    with using(model):
        levels, positions = _features(model, memories[0], frame)
        image = _attend(model, memories, frame, reverse, levels[-1], positions)
        fine = [level.expand(-1, len(memories), -1) for level in levels[:-1]]
        fine = _as_maps(fine, model.backbone_feature_sizes[:-1])
        found = _decode(model, memories[0].cache, image, fine, _multimask(model.config, False, 0))
        outputs = list(_remember(model, levels[-1], found, prompted=False))
    for memory, output in zip(memories, outputs, strict=True):
        memory.track(frame, output)


def _multimask(config, alone: bool, points: int) -> bool:
    """Whether the decoder gives several masks to choose from."""
    here = config.multimask_output_in_sam and (alone or config.multimask_output_for_tracking)
    return here and config.multimask_min_pt_num <= points <= config.multimask_max_pt_num


def _features(model, memory: ObjectMemory, frame: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Maps `(height * width, 1, channels)`, fine to coarse, and the positions of the coarse one."""
    known = memory.cache.get(frame)
    if known is None:
        found = model.get_image_features(memory.get_frame(frame)[None], return_dict=True)
        known = list(found.fpn_hidden_states), found.fpn_position_encoding[-1]  # no other level's are read
        memory.cache.put(frame, *known)
    return known


def _as_maps(levels: Sequence[torch.Tensor], sizes: Sequence) -> list[torch.Tensor]:
    """Flat maps `(height * width, objects, channels)` as `(objects, channels, height, width)`."""
    return [level.permute(1, 2, 0).unflatten(2, tuple(size)) for level, size in zip(levels, sizes, strict=True)]


def _attend(
    model, memories: Sequence[ObjectMemory], frame: int, reverse: bool, image: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The coarse map as each object's past lets it be seen, `(objects, channels, height, width)`."""
    banks = [_bank(model, memory, frame, reverse, image.device) for memory in memories]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, (tokens, _, pointers, spatial) in enumerate(banks):
        groups.setdefault((len(tokens), pointers, spatial), []).append(number)
    attended: dict[int, torch.Tensor] = {}
    for (_, pointers, spatial), members in groups.items():
        tokens = torch.cat([banks[number][0] for number in members], dim=1)
        places = torch.cat([banks[number][1] for number in members], dim=1)
        # EdgeTAM alone asks how many maps the tokens are of.
        maps = {"num_spatial_memory_tokens": spatial} if model.config.model_type == "edgetam_video" else {}
        seen = model.memory_attention(
            current_vision_features=image.expand(-1, len(members), -1),
            current_vision_position_embeddings=positions.expand(-1, len(members), -1),
            memory=tokens.to(model.dtype),
            memory_posision_embeddings=places,
            num_object_pointer_tokens=pointers,
            **maps,
        )
        seen_maps = seen[0].transpose(1, 2).unflatten(2, tuple(model.backbone_feature_sizes[-1]))
        attended |= dict(zip(members, seen_maps.split(1), strict=True))
    return torch.cat([attended[number] for number in range(len(memories))])


def _bank(
    model, memory: ObjectMemory, frame: int, reverse: bool, device
) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """What an object's frame attends to: tokens, their positions, how many are of pointers, and of how many maps."""
    seen, stream = memory.attended(frame, reverse), memory.num_frames is None
    step, times = -1 if reverse else 1, model.memory_temporal_positional_encoding
    maps = [(0, output) for output in seen.conditioning.values()]
    for back in range(model.num_maskmem - 1, 0, -1):
        if (output := seen.tracked.get(frame - back * step)) is not None:
            maps.append((back, output))
    tokens = [output["maskmem_features"].to(device, non_blocking=True) for _, output in maps]
    places = [output["maskmem_pos_enc"].to(device, non_blocking=True) + times[back - 1] for back, output in maps]
    spatial = len(tokens)
    offsets, found, most = model._get_object_pointers(seen, 0, frame, memory.num_frames, device, reverse, stream)
    pointers, pointer_places = model._process_object_pointers(offsets, found, most, 1, model.hidden_dim, device)
    if pointers is None:
        return torch.cat(tokens), torch.cat(places), 0, spatial
    return torch.cat([*tokens, pointers]), torch.cat([*places, pointer_places]), len(pointers), spatial


def _decode(
    model,
    cache: FeatureCache,
    image: torch.Tensor,
    fine: list[torch.Tensor],
    multimask: bool,
    points: dict[str, torch.Tensor] | None = None,
    logits: torch.Tensor | None = None,
) -> _Found:
    count, device = len(image), image.device
    if points is None:
        coordinates = torch.zeros(count, 1, 1, 2, dtype=image.dtype, device=device)
        labels = -torch.ones(count, 1, 1, dtype=torch.int32, device=device)
    else:
        coordinates, labels = points["point_coords"], points["point_labels"]
    sparse, dense = model.prompt_encoder(
        input_points=coordinates, input_labels=labels, input_boxes=None, input_masks=logits
    )
    if cache.decoder_positions is None:
        cache.decoder_positions = model.get_image_wide_positional_embeddings()
    low, scores, tokens, seen = model.mask_decoder(
        image_embeddings=image,
        image_positional_embeddings=cache.decoder_positions.repeat(count, 1, 1, 1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
        high_resolution_features=fine,
    )
    objects, best = torch.arange(count, device=device), scores[:, 0].argmax(dim=-1)
    # The pointer is of the best mask if there are tokens to choose from.
    token = tokens[objects, 0, best if tokens.shape[2] > 1 else 0][:, None]
    low = torch.where(seen[..., None] > 0, low[objects, 0, best][:, None], _NO_OBJECT)
    high = F.interpolate(low.float(), (model.image_size, model.image_size), mode="bilinear", align_corners=False)
    visible = (seen > 0).to(token.dtype)
    pointer = visible * model.object_pointer_proj(token)
    pointer = pointer + (1 - visible) * model.no_object_pointer
    return _Found(low, high.to(low.dtype), pointer, seen, scores[:, 0].amax(dim=-1))


def _remember(model, image: torch.Tensor, found: _Found, prompted: bool) -> Iterator[dict[str, torch.Tensor]]:
    """The output of each object, with the memory of its mask."""
    low, high, pointer, seen, scores = found
    if model.config.model_type == "edgetam_video":  # whose memory encoder takes one object, and gives it first
        each = [
            model._encode_new_memory(image, *of, prompted) for of in zip(high.split(1), seen.split(1), strict=True)
        ]
        tokens, places = zip(*((part.flatten(0, -3).transpose(0, 1) for part in of) for of in each), strict=True)
    else:
        memories = model._encode_new_memory(image.expand(-1, len(low), -1), high, seen, prompted)
        tokens, places = (part.split(1, dim=1) for part in memories)
    for number, score in enumerate(scores.float().cpu()):
        yield {
            "pred_masks": low[number : number + 1],
            "object_pointer": pointer[number : number + 1],
            "object_score_logits": seen[number : number + 1],
            "maskmem_features": tokens[number],
            "maskmem_pos_enc": places[number],
            "mask_score": score[None],
        }
