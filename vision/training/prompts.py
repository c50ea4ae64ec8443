"""Prompts simulated from true masks: what is shown at first, and the clicks that correct what came of it."""

from dataclasses import dataclass

import numpy as np
import torch


PROMPT_KINDS = ("mask", "click", "box")


@dataclass(frozen=True)
class PromptPlan:
    """
    How the objects of a clip are shown.

    Args:
        kind (`str`): "mask", "click" or "box".
        prompted (`tuple[int, ...]`): Frames with a first prompt, frame 0 first.
        corrected (`tuple[int, ...]`, *optional*): Frames with corrective clicks.
        clicks (`int`, *optional*, defaults to `0`): Corrective clicks on each of these.
    """

    kind: str
    prompted: tuple[int, ...] = (0,)
    corrected: tuple[int, ...] = ()
    clicks: int = 0

    def __post_init__(self):
        if self.kind not in PROMPT_KINDS:
            raise ValueError(f"Expected a prompt of kind {', '.join(PROMPT_KINDS)}, got {self.kind!r}.")
        if not self.prompted or self.prompted[0] != 0:
            raise ValueError(f"Expected frame 0 to be prompted first, got {self.prompted}.")
        if self.kind == "mask" and set(self.prompted) & set(self.corrected):
            raise ValueError("A true mask needs no correction: expected other corrected frames than prompted ones.")


def draw_plan(
    rng: np.random.Generator,
    frames: int,
    mask_share: float = 0.5,
    box_share: float = 0.25,
    max_prompted: int = 2,
    max_corrected: int = 2,
    clicks: int = 7,
) -> PromptPlan:
    """
    Draws a plan as the reference does: a mask, a box or a click on up to `max_prompted` frames; unless it was a mask,
    `clicks` corrections on those and on further frames, up to `max_corrected` in all. Masks never show all frames, and
    an image is never shown by one: nothing would be left to predict.

    Args:
        rng (`np.random.Generator`): Where chance comes from.
        frames (`int`): Of the clip.
        mask_share (`float`, *optional*, defaults to `0.5`): Probability of a mask; the paper's.
        box_share (`float`, *optional*, defaults to `0.25`): Probability of a box; the rest are clicks.
        max_prompted (`int`, *optional*, defaults to `2`): Most frames with a first prompt.
        max_corrected (`int`, *optional*, defaults to `2`): Most frames with corrections.
        clicks (`int`, *optional*, defaults to `7`): Corrective clicks a frame.
    """
    probabilities = np.array([mask_share, 1 - mask_share - box_share, box_share])
    if frames == 1:
        probabilities[0] = 0
    kind = str(rng.choice(PROMPT_KINDS, p=probabilities / probabilities.sum()))
    most = min(max_prompted, frames - 1 if kind == "mask" else frames)
    count = int(rng.integers(1, most + 1))
    others = [int(frame) for frame in rng.permutation(np.arange(1, frames))]
    prompted = (0, *sorted(others[: count - 1]))
    if kind == "mask" or not clicks or not max_corrected:
        return PromptPlan(kind, prompted)
    further = int(rng.integers(0, max(min(max_corrected, frames) - count, 0) + 1))
    corrected = (*prompted, *others[count - 1 : count - 1 + further])[:max_corrected]
    return PromptPlan(kind, prompted, tuple(sorted(corrected)), clicks)


def first_points(kind: str, masks: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A click anywhere on each object, or the corners of a box around it that are off by up to a tenth of its sides (20
    pixels at most). An object out of sight is shown by clicks beside it.

    Args:
        kind (`str`): "click" or "box".
        masks (`torch.Tensor` of shape `(objects, height, width)`): True masks.
        noise (`torch.Tensor` of shape `(objects, 4)`): Uniform in 0..1.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: points `(objects, 1, n, 2)` as x, y in pixels, and labels
        `(objects, 1, n)`: 1 on the object, 0 beside it, 2 and 3 for the corners of a box.
    """
    points, labels = _click(masks, torch.zeros_like(masks), noise)
    if kind == "click":
        return points, labels
    columns, rows = masks.any(dim=1).int(), masks.any(dim=2).int()
    height, width = masks.shape[1:]
    first = torch.stack([columns.argmax(1), rows.argmax(1)], dim=1)
    last = torch.stack([width - 1 - columns.flip(1).argmax(1), height - 1 - rows.flip(1).argmax(1)], dim=1)
    reach = (0.1 * (last - first)).clamp(max=20).repeat(1, 2)
    corners = torch.cat([first, last], dim=1) + (2 * noise - 1) * reach
    corners = corners.view(-1, 1, 2, 2).clamp(min=0)
    corners = torch.minimum(corners, corners.new_tensor([width - 1, height - 1]))
    seen = masks.flatten(1).any(dim=1)
    sides = labels.new_tensor([2, 3]).expand(len(masks), 1, 2)
    return (
        torch.where(seen[:, None, None, None], corners, points.expand_as(corners)),
        torch.where(seen[:, None, None], sides, labels.expand_as(sides)),
    )


def corrective_click(
    masks: torch.Tensor, predicted: torch.Tensor, noise: torch.Tensor, truth_share: float = 0.1
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A click anywhere in the error: on a missed part of the object (label 1) or on what is wrongly held for it (0). With
    probability `truth_share` it is on the object wherever that is; without an error, it is beside the object.

    Args:
        masks (`torch.Tensor` of shape `(objects, height, width)`): True masks.
        predicted (`torch.Tensor` of shape `(objects, height, width)`): Predicted masks.
        noise (`torch.Tensor` of shape `(objects, 4)`): Uniform in 0..1.
        truth_share (`float`, *optional*, defaults to `0.1`): The reference's.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: points `(objects, 1, 1, 2)` and labels `(objects, 1, 1)`.
    """
    blind = noise[:, 1] < truth_share
    return _click(masks, predicted & ~blind[:, None, None], noise)


def _click(masks: torch.Tensor, predicted: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    wrong = (masks ^ predicted).flatten(1)
    wrong = torch.where(wrong.any(dim=1, keepdim=True), wrong, ~masks.flatten(1))
    running = wrong.cumsum(1)
    target = (noise[:, :1] * running[:, -1:]).floor() + 1  # the n-th wrong pixel
    place = torch.searchsorted(running, target.to(running.dtype)).clamp(max=wrong.shape[1] - 1)
    width = masks.shape[2]
    points = torch.cat([place % width, place // width], dim=1).to(noise.dtype)
    labels = masks.flatten(1).gather(1, place).int()
    return points[:, None, None], labels[:, None]
