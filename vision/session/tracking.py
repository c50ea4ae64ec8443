"""Passes over a video, and the step of the model once more from its own parts, for many objects at once."""

import threading
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from transformers import Sam2VisionModel

from .frames import EndOfVideo
from .memory import FeatureCache, ObjectMemory
from .segments import FrameSegments


NO_OBJECT = -1024.0  # logits of an object out of sight, as in the reference
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
        if session.frames.position == frame:  # else the iterator itself failed, and gave no frame
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
        levels, positions = frame_features(model, memory.cache, frame, memory.get_frame)
        *fine, image = as_maps(levels, model.backbone_feature_sizes)
        if mask is not None:
            given = model._use_mask_as_output(image, fine, mask)
            found = _Found(
                given.pred_masks, given.high_res_masks, given.object_pointer, given.object_score_logits,
                torch.ones(1),  # the model's own score of a given mask
            )  # fmt: skip
        else:
            if alone:
                (image,) = as_maps([levels[-1] + model.no_memory_embedding], model.backbone_feature_sizes[-1:])
            else:
                image = _attend(model, [memory], frame, reverse, levels[-1], positions)
            clicks = None if points is None else (points["point_coords"], points["point_labels"])
            multimask = gives_several(model.config, alone, 0 if clicks is None else clicks[1].shape[2])
            found = _find(model, memory.cache, image, fine, multimask, clicks, previous_logits)
        (output,) = _remember(model, levels[-1], found, prompted=True)
    memory.answer(frame, output)


def track_frame(model, memories: Sequence[ObjectMemory], frame: int, reverse: bool) -> None:
    """Finds objects on a frame without prompts of theirs, all at once."""
    if not memories:
        return
    with using(model):
        levels, positions = frame_features(model, memories[0].cache, frame, memories[0].get_frame)
        image = _attend(model, memories, frame, reverse, levels[-1], positions)
        fine = [level.expand(-1, len(memories), -1) for level in levels[:-1]]
        fine = as_maps(fine, model.backbone_feature_sizes[:-1])
        found = _find(model, memories[0].cache, image, fine, gives_several(model.config, False, 0))
        outputs = list(_remember(model, levels[-1], found, prompted=False))
    for memory, output in zip(memories, outputs, strict=True):
        memory.track(frame, output)


def gives_several(config, alone: bool, points: int) -> bool:
    """Whether the decoder gives several masks to choose from."""
    here = config.multimask_output_in_sam and (alone or config.multimask_output_for_tracking)
    return here and config.multimask_min_pt_num <= points <= config.multimask_max_pt_num


def frame_features(
    model, cache: FeatureCache, frame: int, pixels_of: Callable[[int], torch.Tensor]
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Maps `(height * width, 1, channels)`, fine to coarse, and the positions of the coarse one."""
    known = cache.get(frame)
    if known is None:
        pixels = pixels_of(frame)[None]
        if cache.positions is not None and _is_plain_sam2(model):
            known = _encode(model, pixels), cache.positions
        else:
            found = model.get_image_features(pixels, return_dict=True)
            known = list(found.fpn_hidden_states), found.fpn_position_encoding[-1]  # no other level's are read
        cache.put(frame, *known)
    return known


def _is_plain_sam2(model) -> bool:
    """Whether the vision encoder is that of SAM 2, and nobody put something in its place or hooks on it."""
    encoder = model.vision_encoder
    return (
        isinstance(encoder, Sam2VisionModel)
        and "get_image_features" not in vars(model)
        and not any(
            hasattr(part, "_hf_hook") or part._forward_hooks or part._forward_pre_hooks
            for part in (encoder, encoder.neck)
        )
    )


def _encode(model, pixels: torch.Tensor) -> list[torch.Tensor]:
    """`get_image_features` without position encodings, the same for all frames and 7 % of a small model's time."""
    encoder, decoder = model.vision_encoder, model.mask_decoder
    nothing = pixels.new_empty(0)
    neck = SimpleNamespace(
        convs=encoder.neck.convs,
        fpn_top_down_levels=encoder.neck.fpn_top_down_levels,
        position_encoding=lambda *args: nothing,
    )
    maps, _ = type(encoder.neck).forward(neck, encoder.backbone(pixels).intermediate_hidden_states)
    fine, middle, *coarse = maps[-encoder.num_feature_levels :][::-1]
    return [level.flatten(2).permute(2, 0, 1) for level in (decoder.conv_s0(fine), decoder.conv_s1(middle), *coarse)]


def as_maps(levels: Sequence[torch.Tensor], sizes: Sequence) -> list[torch.Tensor]:
    """Flat maps `(height * width, objects, channels)` as `(objects, channels, height, width)`."""
    return [level.permute(1, 2, 0).unflatten(2, tuple(size)) for level, size in zip(levels, sizes, strict=True)]


def _attend(
    model, memories: Sequence[ObjectMemory], frame: int, reverse: bool, image: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The coarse map as each object's past lets it be seen, `(objects, channels, height, width)`."""
    pasts = [_past(model, memory, frame, reverse, image.device) for memory in memories]
    alike: dict[tuple, list[int]] = {}  # objects whose memories are of the same moments have the same positions
    for number, past in enumerate(pasts):
        moments = [(back, id(output["maskmem_pos_enc"])) for back, output in past.maps]
        alike.setdefault((*moments, None, *past.offsets), []).append(number)
    groups: dict[tuple[int, ...], list[tuple[list[int], torch.Tensor, torch.Tensor]]] = {}
    for members in alike.values():
        tokens, places, *counts = _bank(model, [pasts[number] for number in members], image.device)
        groups.setdefault((len(tokens), *counts), []).append((members, tokens, places))
    attended: dict[int, torch.Tensor] = {}
    for (_, pointers, spatial), banks in groups.items():
        members = [number for numbers, *_ in banks for number in numbers]
        tokens, places = (torch.cat(part, dim=1) for part in list(zip(*banks, strict=True))[1:])
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


class _Past(NamedTuple):
    """What an object's frame attends to."""

    maps: list[tuple[int, dict[str, torch.Tensor]]]  # how many frames back, 0 where prompted, and what is known of it
    offsets: list[int]  # how many frames back each pointer is
    pointers: list[torch.Tensor]
    most: int  # pointers at most


def _past(model, memory: ObjectMemory, frame: int, reverse: bool, device) -> _Past:
    seen, stream = memory.attended(frame, reverse), memory.num_frames is None
    step = -1 if reverse else 1
    maps = [(0, output) for output in seen.conditioning.values()]
    for back in range(model.num_maskmem - 1, 0, -1):
        if (output := seen.tracked.get(frame - back * step)) is not None:
            maps.append((back, output))
    return _Past(maps, *model._get_object_pointers(seen, 0, frame, memory.num_frames, device, reverse, stream))


def _bank(model, pasts: Sequence[_Past], device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Of memories of the same moments: tokens, positions, how many are of pointers, and of how many maps."""
    times, maps, count = model.memory_temporal_positional_encoding, pasts[0].maps, len(pasts)
    tokens = [
        torch.cat([output["maskmem_features"].to(device, non_blocking=True) for _, output in same], dim=1)
        for same in zip(*(past.maps for past in pasts), strict=True)
    ]
    places = [output["maskmem_pos_enc"].to(device, non_blocking=True) + times[back - 1] for back, output in maps]
    places = [place.expand(-1, count, -1) for place in places]
    spatial = len(tokens)
    pointers, pointer_places = model._process_object_pointers(
        pasts[0].offsets,
        [torch.cat(same) for same in zip(*(past.pointers for past in pasts), strict=True)],
        pasts[0].most,
        count,
        model.hidden_dim,
        device,
    )
    if pointers is None:
        return torch.cat(tokens), torch.cat(places), 0, spatial
    return torch.cat([*tokens, pointers]), torch.cat([*places, pointer_places]), len(pointers), spatial


def decode(
    model,
    image: torch.Tensor,
    fine: list[torch.Tensor],
    multimask: bool,
    points: tuple[torch.Tensor, torch.Tensor] | None = None,
    logits: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """
    What the mask decoder finds of each object: logits of masks, their scores, tokens, and a logit that it is in sight.
    `points` are clicks and labels, of each object or of one for all; `logits` are those of the masks before.
    """
    count, device = len(image), image.device
    if points is None:
        nowhere = torch.zeros(1, 1, 1, 2, dtype=image.dtype, device=device)
        points = nowhere, -torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    sparse, dense = model.prompt_encoder(
        input_points=points[0], input_labels=points[1], input_boxes=None, input_masks=logits
    )
    positions = model.get_image_wide_positional_embeddings() if positions is None else positions
    return model.mask_decoder(
        image_embeddings=image,
        image_positional_embeddings=positions.repeat(count, 1, 1, 1),
        sparse_prompt_embeddings=sparse.expand(count, -1, -1, -1),
        dense_prompt_embeddings=dense.expand(count, -1, -1, -1),
        multimask_output=multimask,
        high_resolution_features=fine,
    )


def _find(model, cache: FeatureCache, image, fine, multimask: bool, points=None, logits=None) -> _Found:
    """The best mask of each object, and what follows from it."""
    if cache.decoder_positions is None:
        cache.decoder_positions = model.get_image_wide_positional_embeddings()
    low, scores, tokens, seen = decode(model, image, fine, multimask, points, logits, cache.decoder_positions)
    objects, best = torch.arange(len(image), device=image.device), scores[:, 0].argmax(dim=-1)
    # The pointer is of the best mask if there are tokens to choose from.
    token = tokens[objects, 0, best if tokens.shape[2] > 1 else 0][:, None]
    low = torch.where(seen[..., None] > 0, low[objects, 0, best][:, None], NO_OBJECT)
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
