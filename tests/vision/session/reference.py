"""Edits of a session that the reference predictor was asked for too, and the model that both ran."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from transformers import Sam2VideoModel

from tests.vision.tiny import clip, tiny_config


VIDEO = clip(8)


def reference_model() -> Sam2VideoModel:
    """A tiny model whose weights come from their names alone, so that no library's random numbers matter."""
    model = Sam2VideoModel(tiny_config()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and not name.endswith("layer_norm.weight"):
                wide = "embed" in name or "token" in name or "encoding" in name or "pointer" in name.split(".")[0]
                drawn = np.random.default_rng(crc32(name.encode())).standard_normal(weight.shape, dtype=np.float32)
                weight.copy_(torch.from_numpy(drawn) * (0.5 if wide and "proj" not in name else 0.1))
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(3.0)  # the object is in sight
        # The reference has one encoding of places, for the image and for clicks.
        places = np.random.default_rng(0).standard_normal(model.shared_image_embedding.positional_embedding.shape)
        for owner in (model.shared_image_embedding, model.prompt_encoder.shared_embedding):
            owner.positional_embedding.copy_(torch.from_numpy(places))
    return model


@dataclass(frozen=True)
class Edit:
    """
    One call: of a `VideoSession`, and what it is for a `ReferenceSession`; `None` where the reference has no such
    call.
    """

    ours: Callable[[Any], Any]
    reference: Callable[[Any], Any] | None
    passes: bool = False  # whether all masks may change, rather than that of one object on one frame
    place: tuple[int, int] | None = None  # that object and that frame


def add(frame: int, point: list[float], obj: int = 1) -> Edit:
    """The first click on an object."""
    return Edit(
        lambda s: s.add(frame, obj, points=[point]),
        lambda s: s.click(frame, obj, [point], [1], replace=True),
        place=(obj, frame),
    )


def add_box(frame: int, box: list[float], obj: int = 1) -> Edit:
    return Edit(
        lambda s: s.add(frame, obj, box=box),
        lambda s: s.click(frame, obj, [], [], replace=True, box=box),
        place=(obj, frame),
    )


def correct(frame: int, point: list[float], label: int = 1, obj: int = 1) -> Edit:
    """One more click, which joins those on the frame."""
    return Edit(
        lambda s: s.correct(frame, obj, points=[point], labels=[label]),
        lambda s: s.click(frame, obj, [point], [label], replace=False),
        place=(obj, frame),
    )


def correct_by_box(frame: int, box: list[float], obj: int = 1) -> Edit:
    """A box instead of what was on the frame."""
    return Edit(
        lambda s: s.correct(frame, obj, box=box),
        lambda s: s.click(frame, obj, [], [], replace=True, box=box),
        place=(obj, frame),
    )


def clear(frame: int, obj: int = 1) -> Edit:
    return Edit(lambda s: s.clear(frame, obj), lambda s: s.clear(frame, obj))


def track(start: int | None = None) -> Edit:
    return Edit(lambda s: s.propagate(start=start), lambda s: s.propagate(start), passes=True)


BACKWARD = Edit(lambda s: s.propagate("backward"), lambda s: s.propagate(max(s.prompted()), reverse=True), passes=True)
A, B, C, D = [20.0, 20.0], [60.0, 30.0], [30.0, 24.0], [12.0, 40.0]

EDITS: dict[str, list[Edit]] = {
    "click": [add(0, A), track()],
    "click, click, click": [add(0, A), correct(0, C), correct(0, B, 0), track()],
    "negative click": [add(0, A), correct(0, [70.0, 8.0], 0), track(), correct(5, [66.0, 40.0], 0), track()],
    "clicks on a tracked frame": [add(0, A), track(), correct(4, B), correct(4, C), correct(4, D, 0), track()],
    "clicks on two tracked frames": [add(0, A), track(), correct(3, B), correct(6, C), correct(3, D, 0), track()],
    "click again on the first frame after a pass": [add(0, A), track(), correct(0, B, 0), correct(0, C), track()],
    "box on a tracked frame": [add(0, A), track(), correct_by_box(5, [8, 12, 40, 30]), track()],
    "clear": [add(0, A), track(), correct(4, B), track(), clear(4), track()],
    "re-add": [add(0, B), clear(0), add(0, A), track()],
    "object on another frame": [add(0, A), track(), add_box(3, [40, 5, 70, 40], obj=2), track(3)],
    "undo": [
        add(0, A),
        track(),
        Edit(lambda s: s.correct(4, 1, points=[B]), None),
        Edit(lambda s: s.undo(), None),
        track(),
    ],
    "backward": [add(5, A), track(), correct(7, B), track(), BACKWARD, correct(2, C), BACKWARD],
    "prompts on many frames, of which two are attended to": [
        *(add(frame, [20.0 + 4 * frame, 20.0]) for frame in (0, 2, 3, 5)),
        track(),
    ],
}
MOST = {"prompts on many frames, of which two are attended to": 2}  # conditioning frames attended to
