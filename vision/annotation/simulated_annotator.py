"""A stand-in for the people of a data engine, who knows the true masks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.j_and_f import region_similarity
from ..evaluation.simulated_prompts import correct_object, first_prompt
from ..session.session import VideoSession
from .masklets import Masklet, empty_session


_SAME_OBJECT = 0.1  # IoU with some true object below which what the model found is none


@dataclass
class SimulatedAnnotator:
    """
    Points at objects, verifies masklets and corrects them from the truth, so that the phases of the data engine can be
    compared (https://huggingface.co/papers/2408.00714, section 5): its methods are what [`annotate`] takes.

    A masklet is satisfactory once every frame reaches `min_iou`. Otherwise its worst frame is clicked, each click in
    the middle of the largest error left, as in the paper's offline evaluation; a frame that was clicked before stays
    as it is. What the model found by itself belongs to the true object that it covers best; what covers none is
    removed.

    Args:
        truth (`Callable[[Any], Mapping[int, np.ndarray]]`, *optional*):
            Gives of a video, as it was given to `annotate`, the boolean masks `(frames, height, width)` by object;
            defaults to its attribute `masks`.
        phase (`int`, *optional*, defaults to `3`):
            Of the paper's engine: 1, every frame is clicked on alone, and nothing is tracked; 2, clicks make a mask
            from nothing, and masks are tracked; 3, clicks are tracked, and refine what is there.
        min_iou (`float`, *optional*, defaults to `0.75`):
            What a mask must reach, in 0..1; the paper's threshold for the agreement of masks between phases.
        max_clicks (`int`, *optional*, defaults to `8`):
            On a frame in one go.
        per_frame (`bool`, *optional*, defaults to `True`):
            Whether every frame must reach `min_iou`, rather than the mean over frames.

    Example:

    ```python
    >>> annotator = SimulatedAnnotator(phase=2)
    >>> hooks = {"prompts": annotator.point, "verifier": annotator.verify, "corrector": annotator.correct}
    >>> annotate([procedural_clip(seed) for seed in range(20)], pipe, **hooks)
    ```
    """

    truth: Callable[[Any], Mapping[int, np.ndarray]] = lambda video: video.masks
    phase: int = 3
    min_iou: float = 0.75
    max_clicks: int = 8
    per_frame: bool = True

    def __post_init__(self):
        if self.phase not in (1, 2, 3):
            raise ValueError(f"Expected phase 1, 2 or 3, got {self.phase!r}.")
        if not 0 < self.min_iou <= 1:
            raise ValueError(f"Expected min_iou in 0..1 (0 excluded), got {self.min_iou}.")
        if self.max_clicks < 1:
            raise ValueError(f"Expected max_clicks of at least 1, got {self.max_clicks}.")
        self._matches: dict[tuple[str, int], int | None] = {}
        self._clicks: dict[tuple[int, int], dict[int, int]] = {}  # of masks that were drawn, by session and object

    def point(self, video: Any, session: VideoSession) -> None:
        """Clicks on every object of a video; `prompts` of [`annotate`]."""
        for obj, truth in self.truth(video).items():
            visible = np.flatnonzero(truth.any(axis=(1, 2))).tolist()
            for frame in range(len(truth)) if self.phase == 1 else visible[:1]:
                self._click(session, frame, obj, truth[frame])

    def verify(self, masklet: Masklet) -> bool:
        """Whether a masklet is satisfactory; `verifier` of [`annotate`]."""
        self._count(masklet)
        truth = self._truth_of(masklet)
        if truth is None:
            return False
        values = self.ious(masklet, truth)
        return bool((values.min() if self.per_frame else values.mean()) >= self.min_iou)

    def correct(self, masklet: Masklet) -> None:
        """Clicks on the worst frame of a masklet, or removes what is no object; `corrector` of [`annotate`]."""
        truth = self._truth_of(masklet)
        if truth is None:
            masklet.session.remove_object(masklet.object)
            return
        values = self.ious(masklet, truth)
        values[list(masklet.clicks)] = 1.0
        worst = int(values.argmin())
        if values[worst] < (self.min_iou if self.per_frame else 1.0):
            self._click(masklet.session, worst, masklet.object, truth[worst])
            self._count(masklet)

    @staticmethod
    def ious(masklet: Masklet, truth: np.ndarray) -> np.ndarray:
        """IoU of a masklet on each frame with the true masks `(frames, height, width)`."""
        return region_similarity(np.stack([masklet.binary(frame) for frame in range(len(truth))]), truth)

    def _truth_of(self, masklet: Masklet) -> np.ndarray | None:
        truth, key = self.truth(masklet.video), (masklet.name, masklet.object)
        if key not in self._matches:
            match: int | None = masklet.object
            if masklet.provenance == "auto":
                frames = sorted(masklet.masks)
                masks = np.stack([masklet.binary(frame) for frame in frames])
                values = {obj: region_similarity(masks, true[frames]).mean() for obj, true in truth.items()}
                match = max(values, key=lambda obj: values[obj], default=None)
                match = match if match is not None and values[match] >= _SAME_OBJECT else None
            self._matches[key] = match
        match = self._matches[key]
        return None if match is None else truth[match]

    def _count(self, masklet: Masklet) -> None:
        """Clicks that led to a mask which was then drawn are no prompts that the engine could count."""
        for frame, clicks in self._clicks.pop((id(masklet.session), masklet.object), {}).items():
            masklet.clicks[frame] = masklet.clicks.get(frame, 0) + clicks

    def _click(self, session: VideoSession, frame: int, obj: int, truth: np.ndarray) -> None:
        where = session if self.phase == 3 else empty_session(session)
        segments, clicks = where.segments(frame), 0
        if obj not in segments.masks:
            if not truth.any():
                session.add(frame, obj, mask=truth)  # out of sight here: there is nothing to click on
                return
            where.add(frame, obj, **first_prompt(truth, 1))
            segments, clicks = where.segments(frame), 1
        while (
            clicks < self.max_clicks and region_similarity(segments.binary(obj)[None], truth[None])[0] < self.min_iou
        ):
            clicks += correct_object(where, segments, obj, truth, 1)
            segments = where.segments(frame)
        if where is not session:
            session.add(frame, obj, mask=segments.binary(obj))
            self._clicks.setdefault((id(session), obj), {})[frame] = clicks
