"""The step of `Sam2VideoModel` once more, differentiable and batched over clips, from the model's own parts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Sam2VideoModel

from ..session.memory import closest_frames
from ..session.tracking import NO_OBJECT, as_maps, decode, gives_several
from .prompts import PromptPlan, corrective_click, first_points


@dataclass
class MaskPrediction:
    """
    What the model made of one frame for the objects of clips with one plan.

    Args:
        clips (`list[int]`): Places of the clips in the batch, one for each object.
        frame (`int`): Number of the frame in its clip.
        truth (`torch.Tensor` of shape `(objects, height, width)`): True masks.
        logits (`torch.Tensor` of shape `(objects, masks, height / 4, width / 4)`): One mask or several to choose from.
        scores (`torch.Tensor` of shape `(objects, masks)`): Expected IoU of each.
        object_scores (`torch.Tensor` of shape `(objects, 1)`): Logit that the object is in sight.
    """

    clips: list[int]
    frame: int
    truth: torch.Tensor
    logits: torch.Tensor
    scores: torch.Tensor
    object_scores: torch.Tensor

    def masks(self) -> torch.Tensor:
        """What is shown, boolean `(objects, height, width)`: the mask expected to be best, of objects in sight."""
        logits = _best(self.logits, self.scores)[:, None].float()
        stretched = F.interpolate(logits, self.truth.shape[1:], mode="bilinear", align_corners=False)
        return (stretched[:, 0] > 0) & (self.object_scores > 0)[..., None]


def predict_clips(model, clips: list[dict[str, Any]], checkpointing: bool = False) -> Iterator[MaskPrediction]:
    """
    Tracks the objects of clips; an image is a clip of one frame. In evaluation mode, masks equal those of the model's
    own propagation. Memories are of predicted masks, and gradients flow through them.

    Args:
        model (`Sam2VideoModel` or `Sam2Model`):
            The latter takes images only, shown by clicks or boxes.
        clips (`list[dict]`):
            Each with `pixel_values` `(frames, 3, side, side)`, boolean `masks` `(objects, frames, side, side)`,
            `noise` `(objects, frames, 1 + clicks, 4)`, uniform in 0..1, `plan` ([`PromptPlan`]) and, *optional*,
            boolean `remember_truth` `(objects, frames)`: where the true mask is remembered, not the predicted one.
        checkpointing (`bool`, *optional*, defaults to `False`):
            Whether to keep only what leaves each frame's step, and compute the rest again for the gradient.

    Yields:
        [`MaskPrediction`] for each decoding: of each frame, then after each corrective click. A mask that was given is
        not predicted.
    """
    run: Callable = partial(checkpoint, use_reentrant=False) if checkpointing else lambda step, *args: step(*args)
    pixels = torch.cat([clip["pixel_values"] for clip in clips])
    pieces = pixels.split(1 if checkpointing else len(pixels))
    features = [run(_features, model, piece) for piece in pieces]
    levels = [torch.cat(level, dim=1) for level in zip(*[level for level, _ in features], strict=True)]
    positions = features[0][1]
    starts = [0]
    for clip in clips:
        starts.append(starts[-1] + len(clip["pixel_values"]))
    groups: dict[tuple[PromptPlan, int], list[int]] = {}
    for number, clip in enumerate(clips):
        groups.setdefault((clip["plan"], len(clip["pixel_values"])), []).append(number)
    for (plan, _), members in groups.items():
        owners = [number for number in members for _ in clips[number]["masks"]]
        tracks = _Tracks(model, plan, levels, positions, [starts[number] for number in owners])
        truth, noise = (torch.cat([clips[number][key] for number in members]) for key in ("masks", "noise"))
        taught = torch.zeros_like(truth[:, :, 0, 0])
        if all("remember_truth" in clips[number] for number in members):
            taught = torch.cat([clips[number]["remember_truth"] for number in members])
        order = [*plan.prompted, *(t for t in range(truth.shape[1]) if t not in plan.prompted)]
        for frame in order:
            for decoded in tracks.step(run, frame, frame != order[-1], truth, noise, taught):
                yield MaskPrediction(owners, frame, truth[:, frame], *decoded)


def _features(model, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Maps `(height * width, frames, channels)`, fine to coarse, and positions `(height * width, 1, channels)`."""
    output = model.get_image_features(pixels.to(model.dtype), return_dict=True)
    return list(output.fpn_hidden_states), output.fpn_position_encoding[-1][:, :1]


class _Tracks:
    """Objects that go through clips of one plan together, and what is remembered of them."""

    def __init__(self, model, plan: PromptPlan, levels: list[torch.Tensor], positions: torch.Tensor, rows: list[int]):
        self.model = model
        self.plan = plan
        self.levels = levels
        self.positions = positions.expand(-1, len(rows), -1)
        self.rows = torch.tensor(rows, device=positions.device)
        self.conditioning = {*plan.prompted, *plan.corrected}
        self.memories: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.pointers: dict[int, torch.Tensor] = {}

    def step(self, run: Callable, frame: int, remember: bool, truth, noise, taught) -> list[tuple[torch.Tensor, ...]]:
        """The decodings of a frame, which is remembered for later ones."""
        bank = None if frame in self.plan.prompted else self._bank(frame, truth.shape[1])
        decoded, remembered = run(
            self._step, frame, bank, remember, truth[:, frame], noise[:, frame], taught[:, frame]
        )
        if remembered is not None:
            features, positions, self.pointers[frame] = remembered
            self.memories[frame] = features, positions
        return decoded

    def _step(self, frame: int, bank: tuple | None, remember: bool, truth, noise, taught):
        model = self.model
        current = [level[:, self.rows + frame] for level in self.levels]
        *fine, image = as_maps(current, model.backbone_feature_sizes)
        visible = truth.flatten(1).any(dim=1, keepdim=True)
        decoded: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        if bank is None and self.plan.kind == "mask":
            if not remember:
                return decoded, None
            given = truth[:, None].to(image.dtype)
            _, scores, tokens, seen = self._decode(image, fine, None, model.mask_downsample(given), True)
            pointer = self._pointer(_best(tokens, scores), seen > 0)
            pointer = torch.where(visible, pointer, model.no_object_pointer)
            high, appears = given * 20 - 10, visible
        else:
            points: Any = None
            previous, clicks = None, 0
            if bank is None:
                image = image + model.no_memory_embedding[0, 0, :, None, None]
                points = first_points(self.plan.kind, truth, noise[:, 0])
            else:
                image = self._attend(current[-1], *bank)
            while True:
                multimask = self._multimask(bank is None, 0 if points is None else points[1].shape[2])
                logits, scores, tokens, seen = self._decode(image, fine, points, previous, multimask)
                decoded.append((logits, scores, seen))
                low = torch.where((seen > 0)[..., None, None], _best(logits, scores)[:, None], NO_OBJECT)
                high = F.interpolate(low.float(), truth.shape[1:], mode="bilinear", align_corners=False)
                if frame not in self.plan.corrected or clicks == self.plan.clicks:
                    break
                clicks += 1
                new = corrective_click(truth, high[:, 0] > 0, noise[:, clicks])
                points = (
                    new if points is None else tuple(torch.cat(pair, dim=2) for pair in zip(points, new, strict=True))
                )
                previous = low.clamp(-32, 32)
            if not remember:
                return decoded, None
            appears = torch.where(taught[:, None], visible, seen > 0)
            pointer = self._pointer(_best(tokens, scores), appears)
            high = torch.where(taught[:, None, None, None], truth[:, None] * 20.0 - 10, high)
        features, positions = model._encode_new_memory(
            current[-1], high, (appears * 20.0 - 10)[..., None], is_mask_from_pts=frame in self.conditioning
        )
        return decoded, (features, positions, pointer)

    def _decode(self, image, fine, points, dense, multimask: bool) -> tuple[torch.Tensor, ...]:
        """Logits `(objects, masks, h, w)`, scores `(objects, masks)`, tokens and the object score `(objects, 1)`."""
        return tuple(output[:, 0] for output in decode(self.model, image, fine, multimask, points, dense))

    def _multimask(self, first: bool, points: int) -> bool:
        if isinstance(self.model, Sam2VideoModel):
            return gives_several(self.model.config, first, points)
        return points == 1  # a single click is ambiguous

    def _pointer(self, token: torch.Tensor, appears: torch.Tensor) -> torch.Tensor:
        return torch.where(appears, self.model.object_pointer_proj(token), self.model.no_object_pointer)

    def _bank(self, frame: int, frames: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Memories and pointers that a frame attends to, their positions, and how many tokens are of pointers."""
        model, config = self.model, self.model.config
        prompted = {t: memory for t, memory in self.memories.items() if t in self.conditioning}
        tracked = {t: memory for t, memory in self.memories.items() if t not in self.conditioning}
        chosen = closest_frames(frame, list(prompted), config.max_cond_frame_num)
        seen = [(0, prompted[t]) for t in chosen]
        for offset in range(model.num_maskmem - 1, 0, -1):
            memory = tracked.get(frame - offset)
            if memory is None and frame - offset not in chosen:
                memory = prompted.get(frame - offset)
            if memory is not None:
                seen.append((offset, memory))
        reach = min(frames, config.max_object_pointers_in_encoder)
        offsets = [frame - t for t in prompted if model.training or t <= frame]
        offsets += [offset for offset in range(1, reach) if frame - offset in tracked]
        pointers, places = model._process_object_pointers(
            offsets,
            [self.pointers[frame - offset] for offset in offsets],
            reach,
            len(self.rows),
            model.hidden_dim,
            self.positions.device,
        )
        positions = [place + model.memory_temporal_positional_encoding[offset - 1] for offset, (_, place) in seen]
        memories = [memory.to(pointers.dtype) for _, (memory, _) in seen]
        return torch.cat([*memories, pointers]), torch.cat([*positions, places]), len(pointers)

    def _attend(self, current: torch.Tensor, memory: torch.Tensor, positions: torch.Tensor, pointers: int):
        attended = self.model.memory_attention(
            current_vision_features=current,
            current_vision_position_embeddings=self.positions,
            memory=memory,
            memory_posision_embeddings=positions,
            num_object_pointer_tokens=pointers,
        )
        return attended[0].transpose(1, 2).unflatten(2, tuple(self.model.backbone_feature_sizes[-1]))


def _best(choices: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of each object's masks or tokens the one whose mask is expected to be best."""
    return choices[torch.arange(len(scores), device=scores.device), scores.argmax(dim=1)]
