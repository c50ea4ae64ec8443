"""Masklets, the masks of one object through a video: tracked, measured, and found without prompts."""

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco

from ..session.automatic_masks import AutomaticMaskConfig
from ..session.frames import PixelValues
from ..session.pipeline import Finder
from ..session.prompts import ObjectPrompt, encode_rle
from ..session.segments import FrameSegments, decode_mask
from ..session.session import VideoSession
from ..session.tracking import using


_ENCODED_AT_ONCE = 4  # frames
_Features = tuple[list[torch.Tensor], torch.Tensor]  # maps of a frame and their positions
_STABILITY_OFFSET = 1.0  # logits, as in the reference's automatic mask generator


class CorrectorUnavailable(OSError, ValueError):
    """Nobody can be asked, for instance as the page has no port: `annotate` stops, and goes on when called again."""


@dataclass
class Masklet:
    """
    One object of a video under annotation: what a verifier judges and a corrector improves.

    Args:
        video (`Any`):
            The video as it was given.
        name (`str`):
            Of the video, unique to it.
        object (`int`):
            Number of the object.
        session (`VideoSession`):
            Where a corrector clicks, see [`annotate`].
        provenance (`str`, *optional*, defaults to `"auto"`):
            "auto", or "manual" once it was prompted by hand.
        masks (`dict[int, dict]`):
            COCO RLE by frame.
        scores, object_scores, stabilities (`dict[int, float]`):
            By frame: the IoU that the model expects, in 0..1; the logit that the object is visible; the IoU of the
            masks at thresholds 1 and -1.
        cycle_iou (`float`, *optional*):
            IoU of the first mask with what the last one, given alone, finds on its frame.
        clicks (`dict[int, int]`):
            Made by hand, by edited frame; the corners of a box are two, a drawn mask is none.
        seconds (`float`):
            That its prompts, verifications and corrections took, by the clock.
        rounds (`int`):
            Of correction.
        status (`str`):
            "waiting" (in the review queue), "accepted" or "rejected" (its object was removed).
        reason (`str`, *optional*):
            Why it waits or was rejected.
        category (`str`, *optional*):
            What the object is, if somebody named it.
    """

    video: Any = field(repr=False)
    name: str
    object: int
    session: VideoSession = field(repr=False)
    provenance: str = "auto"
    masks: dict[int, Any] = field(default_factory=dict, repr=False)
    scores: dict[int, float] = field(default_factory=dict, repr=False)
    object_scores: dict[int, float] = field(default_factory=dict, repr=False)
    stabilities: dict[int, float] = field(default_factory=dict, repr=False)
    cycle_iou: float | None = None
    clicks: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    rounds: int = 0
    status: str = "waiting"
    reason: str | None = None
    category: str | None = None

    def binary(self, frame: int) -> np.ndarray:
        """The boolean mask on a frame, empty if there is none."""
        size = self.session.size
        return decode_mask(self.masks[frame], size) if frame in self.masks else np.zeros(size, dtype=bool)

    @property
    def in_sight(self) -> list[int]:
        """The frames on which its mask is not empty."""
        return [frame for frame in sorted(self.masks) if coco.area(self.masks[frame])]

    @property
    def visibility(self) -> float:
        """Mean over its frames of the probability that the object is visible."""
        scores = np.array(list(self.object_scores.values()))
        return float((1 / (1 + np.exp(-scores.clip(-50, 50)))).mean()) if len(scores) else 0.0

    @property
    def stability(self) -> float:
        """Mean over its frames."""
        return float(np.mean(list(self.stabilities.values()))) if self.stabilities else 0.0

    @property
    def uncertainty(self) -> float:
        """1 less the product of the mean score of its frames in sight, its stability and its cycle IoU; in 0..1."""
        frames = self.in_sight
        score = np.mean([self.scores[frame] for frame in frames]).clip(0, 1) if frames else 0.0
        return float(1 - score * self.stability * (1.0 if self.cycle_iou is None else self.cycle_iou))

    def clear(self) -> None:
        """Forgets its masks."""
        for known in (self.masks, self.scores, self.object_scores, self.stabilities):
            known.clear()

    def take(self, segments: FrameSegments, session: VideoSession) -> None:
        """Takes its mask on a frame; `session` knows how stable it is."""
        frame, obj = segments.frame, self.object
        mask = segments.masks[obj]
        rle = mask if isinstance(mask, dict) else encode_rle(segments.binary(obj))
        if tuple(rle["size"]) != tuple(session.size):
            raise ValueError(
                f"Expected masks of the video's size {tuple(session.size)} (height, width), got {tuple(rle['size'])} "
                f"on frame {frame}."
            )
        self.masks[frame] = rle
        self.scores[frame] = segments.scores[obj]
        self.object_scores[frame] = segments.object_scores[obj]
        logits = session.logits(frame, obj)
        outer = 0 if logits is None else int((logits > -_STABILITY_OFFSET).sum())
        inner = 0 if logits is None else int((logits > _STABILITY_OFFSET).sum())
        self.stabilities[frame] = inner / outer if outer else 1.0
        self.cycle_iou = None


@dataclass(frozen=True)
class QualityGate:
    """
    What a masklet must reach to be accepted without a verifier, or to be shown to one. The thresholds are ours.

    Args:
        min_object_score (`float`, *optional*, defaults to `0.5`): Least `visibility`.
        min_stability (`float`, *optional*, defaults to `0.8`): Least `stability`.
        min_cycle_iou (`float`, *optional*, defaults to `0.5`): Least `cycle_iou`, which costs a step of the tracker an
            object; `None` leaves it out.
    """

    min_object_score: float = 0.5
    min_stability: float = 0.8
    min_cycle_iou: float | None = 0.5

    def reject_reason(self, masklet: Masklet) -> str | None:
        """What a masklet does not reach, `None` if it passes."""
        for what, value, least in (
            ("object score", masklet.visibility, self.min_object_score),
            ("stability", masklet.stability, self.min_stability),
            ("cycle IoU", masklet.cycle_iou, self.min_cycle_iou),
        ):
            if value is not None and least is not None and value < least:
                return f"{what} {value:.2f} is below {least:g}"
        return None


def count_clicks(prompt: ObjectPrompt, before: ObjectPrompt | None) -> int:
    """Clicks of a prompt that are not those of the one it took the place of; a box is two."""
    kept = before is not None and prompt.points[: len(before.points)] == before.points
    boxes = prompt.box is not None and (before is None or prompt.box != before.box)
    return len(prompt.points) - (len(before.points) if before is not None and kept else 0) + 2 * boxes


def empty_session(session: VideoSession, **options: Any) -> VideoSession:
    """Another session of the same video, which shares its vision features; `options` change its configuration."""
    other = VideoSession(session.model, session.processor, session.frames, replace(session.config, **options))
    other.features = session.features
    return other


def _walk(session: VideoSession, objects: Container[int] | None = None) -> Iterator[FrameSegments]:
    """A pass in both directions; on the way forward some frames are encoded at once, which is faster than each."""
    passes, pixels = (
        session.iterate("both", objects=objects),
        PixelValues(session.frames, session.processor, session.model),
    )
    ahead: dict[int, tuple[list[torch.Tensor], torch.Tensor]] = {}
    shown = [frame for frame, known in session.prompts.items() if objects is None or any(o in objects for o in known)]
    frame, last = min(shown), -1
    while True:
        if last < frame < (session.num_frames or 0) and frame not in session.features:
            if frame not in ahead:
                ahead = _encode(session, pixels, frame)
            if frame in ahead:
                session.features.put(frame, *ahead.pop(frame))
        if (segments := next(passes, None)) is None:
            return
        yield segments
        last, frame = max(last, segments.frame), segments.frame + 1


def _encode(
    session: VideoSession, pixels: PixelValues, first: int
) -> dict[int, tuple[list[torch.Tensor], torch.Tensor]]:
    """The features of some frames from a first one on, as far as they can be read and are not known."""
    images: list[torch.Tensor] = []
    for frame in range(first, min(first + _ENCODED_AT_ONCE, session.num_frames or 0)):
        try:
            images.append(pixels(frame))
        except (ValueError, TypeError):
            break  # raised when its turn comes
    if not images:
        return {}
    with using(session.model):
        found = session.model.get_image_features(torch.stack(images), return_dict=True)
    places = found.fpn_position_encoding[-1][:, :1]
    return {
        first + number: ([level[:, number : number + 1] for level in found.fpn_hidden_states], places)
        for number in range(len(images))
    }


def track(session: VideoSession, masklets: Iterable[Masklet]) -> None:
    """Gives masklets the masks of a pass over the video, in both directions; other objects are left alone."""
    wanted = {masklet.object: masklet for masklet in masklets}
    for segments in _walk(session, wanted) if wanted else ():
        for obj in segments.objects:
            wanted[obj].take(segments, session)


def measure_cycles(session: VideoSession, masklets: Iterable[Masklet]) -> None:
    """
    Measures the forward-backward consistency of masklets: the mask on the last frame in sight, given as a prompt to an
    empty memory, is looked for on the first one in one step, whatever lies between: what a mask drifted to is not what
    it began with. That is a step for each object instead of a pass over all frames.
    """
    returning: dict[int, Masklet] = {}
    for masklet in masklets:
        frames = masklet.in_sight
        masklet.cycle_iou = 1.0 if frames else 0.0
        if len(frames) > 1:
            returning[masklet.object] = masklet
    if not returning:
        return
    alone = empty_session(session, keep="window", undo_levels=0)
    for obj, masklet in returning.items():
        last = masklet.in_sight[-1]
        alone.add(last, obj, mask=masklet.masks[last])
    first = {obj: masklet.in_sight[0] for obj, masklet in returning.items()}
    for frame in sorted(set(first.values())):
        objects = [obj for obj in first if first[obj] == frame]
        for segments in alone.iterate("backward", start=frame, max_frames=1, objects=objects):
            for obj in segments.objects:
                pair = [segments.masks[obj]], [returning[obj].masks[frame]]
                returning[obj].cycle_iou = float(coco.iou(*pair, [0])[0, 0])


def find_masklets(pipe, session: VideoSession, config: AutomaticMaskConfig, video: Any, name: str) -> list[Masklet]:
    """
    Finds objects by a grid of clicks and tracks them, both ways if they were found late. Of two masklets that share
    `config.max_overlap` of their pixels in space and time, the more certain one is kept.

    Args:
        pipe (`Sam2VideoPipeline`): Whose model looks.
        session (`VideoSession`): Without objects; gets them.
        config (`AutomaticMaskConfig`): How to look, and on which frames.
        video (`Any`), name (`str`): For the masklets.

    Returns:
        `list[Masklet]`, empty if nothing is found.
    """
    length = session.num_frames or 0
    searched = config.frame - 1
    for searched in range(config.frame, length, config.every or length):
        if pipe._add_found(session, searched, Finder(config)):
            break
    masklets: dict[int, Masklet] = {}
    for segments in _walk(session) if session.objects else ():
        if config.every and segments.frame > searched and (segments.frame - config.frame) % config.every == 0:
            searched = segments.frame
            if pipe._add_found(session, searched, Finder(config)):
                segments = session.segments(searched)
        for obj in segments.objects:
            masklets.setdefault(obj, Masklet(video, name, obj, session)).take(segments, session)
    kept = _without_duplicates(list(masklets.values()), config.max_overlap)
    for obj in set(masklets) - {masklet.object for masklet in kept}:
        session.remove_object(obj)
    return kept


def _without_duplicates(masklets: list[Masklet], max_overlap: float) -> list[Masklet]:
    """Those that share less than `max_overlap` of their union, over all frames, with every more certain one."""
    masklets = sorted(masklets, key=lambda masklet: masklet.uncertainty)
    shared = np.zeros((len(masklets), len(masklets)))
    union = np.zeros_like(shared)
    for frame in {frame for masklet in masklets for frame in masklet.masks}:
        masks = [masklet.masks.get(frame) or encode_rle(masklet.binary(frame)) for masklet in masklets]
        iou = coco.iou(masks, masks, [0] * len(masks))
        areas = coco.area(masks).astype(float)
        both = iou / (1 + iou) * (areas[:, None] + areas)
        shared += both
        union += areas[:, None] + areas - both
    kept: list[int] = []
    for index in range(len(masklets)):
        if all(shared[index, other] < max_overlap * union[index, other] for other in kept):
            kept.append(index)
    return [masklets[index] for index in sorted(kept, key=lambda index: masklets[index].object)]
