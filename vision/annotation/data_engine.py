"""Annotates videos with a model in the loop: masks proposed, verified, corrected, and written as a dataset."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm

from hf_iclr.models import hash_weights
from hf_iclr.saving import model_revision

from ..session.automatic_masks import AutomaticMaskConfig
from ..session.config import VideoSessionConfig
from ..session.prompts import ObjectPrompt, VideoPrompts
from ..session.segments import VideoSegments
from ..session.session import VideoSession
from .masklets import (
    CorrectorUnavailable,
    Masklet,
    QualityGate,
    count_clicks,
    find_masklets,
    measure_cycles,
    track,
)
from .sources import list_videos, name_video, open_frames
from .store import AnnotationStore, to_row


logger = logging.getLogger(__name__)

_FEATURE_CACHE_BYTES = 2**31  # the features of 100 frames at 1024 pixels


def annotate(
    videos: Any,
    pipe,
    prompts: str | Callable[[Any, VideoSession], Mapping | None] = "auto",
    verifier: Callable[[Masklet], bool] | None = None,
    corrector: Callable[[Masklet], VideoSegments | None] | None = None,
    out: str | Path = "annotations",
    gate: QualityGate | None = None,
    automatic: AutomaticMaskConfig | Mapping | None = None,
    max_rounds: int = 8,
    **options: Any,
) -> datasets.Dataset:
    """
    The data engine of SAM 2 (https://huggingface.co/papers/2408.00714, section 5): a model proposes the masks of
    objects through videos, a verifier judges them, a corrector corrects them, and all is written down.

    What is done to a masklet: it passes the gate or not; if it does, the verifier judges it. One that is satisfactory
    is accepted; another goes to the corrector and back to the verifier, `max_rounds` times at most. Without a verifier
    the masks that a corrector returns are accepted, for a person saw them, and what follows from its prompts goes back
    to the gate. An object that is removed on the way is rejected, whichever was being corrected. One that is still
    unsatisfactory, is not corrected or whose verifier or corrector raises, waits in the queue: see [`review_queue`].

    Each video is written to `out/shards` when it is done. Called again, after a kill or with more videos, `annotate`
    goes on with those that are not there; a video is known by its content, wherever it was moved. Under `accelerate
    launch` the processes share the videos. A video that can't be read or prompted is logged, left out and listed in
    `out/skipped.json` and in the description of the dataset.

    Args:
        videos (`Any`):
            A folder with video files or folders of images at any depth, a video file, a `datasets` dataset, or any
            iterable, read lazily, of what `open_video` takes or of what has such `frames`.
        pipe (`Sam2VideoPipeline`):
            The model in the loop. Each frame is encoded once for all objects and passes, as far as
            `feature_cache_bytes` reach.
        prompts (`str` or `Callable`, *optional*, defaults to `"auto"`):
            "auto" finds objects by a grid of clicks (the paper's automatic masklets). Or a function of the video as it
            was given and a session, that clicks in the session or returns prompts by frame and object; what it points
            at is "manual".
        verifier (`Callable`, *optional*):
            Whether a [`Masklet`] is satisfactory.
        corrector (`Callable`, *optional*):
            Corrects a [`Masklet`] by prompts in `masklet.session`, or removes its object there to reject it; or
            returns [`VideoSegments`], corrected or as they were, as [`annotate_in_browser`] does. One that raises
            `CorrectorUnavailable` stops the run, which goes on when `annotate` is called again.
        out (`str` or `Path`, *optional*, defaults to `"annotations"`):
            Folder for the results.
        gate (`QualityGate`, *optional*):
            Least quality; left out, its defaults.
        automatic (`AutomaticMaskConfig` or `Mapping`, *optional*):
            How "auto" finds objects.
        max_rounds (`int`, *optional*, defaults to `8`):
            Corrections of a masklet at most: the paper's interactive evaluation corrects on up to 8 frames.
        options:
            Fields of `VideoSessionConfig`.

    Returns:
        `datasets.Dataset`: all masklets in `out`, a row each, mapped from a file into memory: the video's path, name
        and size; object and category; frames with their COCO RLEs, scores and object scores; stability, cycle IoU and
        uncertainty; provenance, model, its commit (for a folder, its weights) and hash of weights, and prompts;
        clicks, clicked and edited frames, rounds and seconds in the functions given; status, reason and damage of the
        file. Its description counts them.

    Raises:
        TypeError: if `videos` is a single video.
        ValueError: if an argument is out of its range, or `out` holds annotations of another model.
        OSError: if a result can't be written.

    Example:

    ```python
    >>> pipe = pipeline("promptable-video-segmentation", model="facebook/sam2.1-hiera-tiny")
    >>> masklets = annotate("clips/", pipe, out="annotated")
    >>> masklets.filter(lambda row: row["status"] == "accepted").push_to_hub("me/masklets")
    >>> by_hand = lambda masklet: annotate_in_browser(pipe, masklet.session)
    >>> masklets = annotate("clips/", pipe, corrector=by_hand, out="corrected")
    ```
    """
    if prompts != "auto" and not callable(prompts):
        raise ValueError(f'Expected prompts to be "auto" or a function of a video and a session, got {prompts!r:.80}.')
    if automatic is not None and prompts != "auto":
        raise ValueError('`automatic` says how prompts="auto" finds objects. Pass prompts="auto" with it.')
    if max_rounds < 0:
        raise ValueError(f"Expected max_rounds of at least 0, got {max_rounds}.")
    pipe._sanitize_parameters(**options)
    gate = gate or QualityGate()
    # What corrections of any frame need grows with the video: it waits on the disk.
    passes: dict[str, Any] = {"keep": "window"} if corrector is None else {"keep": "all", "offload": "disk"}
    if corrector is None and gate.min_cycle_iou is None:  # no frame is looked at twice
        passes["feature_cache_bytes"] = 0
    options = {"feature_cache_bytes": _FEATURE_CACHE_BYTES, **passes, **options, "output": "rle"}
    VideoSessionConfig(**options)  # a wrong value is refused before any work
    finder = automatic if isinstance(automatic, AutomaticMaskConfig) else AutomaticMaskConfig(**(automatic or {}))
    engine = _Engine(pipe, prompts, verifier, corrector, gate, finder, max_rounds, options)
    given = list_videos(videos)
    model, weights = pipe.model.config.name_or_path, hash_weights(pipe.model)
    revision = model_revision(pipe.model) or f"weights-{weights}"
    store = AnnotationStore(out, {"model": model, "weights": weights})
    state = PartialState(cpu=pipe.model.device.type == "cpu")
    skipped = []
    for index, video in enumerate(tqdm(given, desc="Annotating", unit="video", disable=not state.is_main_process)):
        if index % state.num_processes != state.process_index:
            continue
        name = str(video) if isinstance(video, (str, Path)) else f"videos[{index}]"
        try:
            name, path = name_video(video)
            if store.find(name, path) is not None:
                continue
            masklets = engine.annotate(video, name)
        except CorrectorUnavailable:
            raise
        except Exception as error:
            skipped.append({"name": name, "reason": f"{type(error).__name__}: {error}"})
            logger.warning("Skipped %s. %s", name, error)
            logger.debug("Where that came from:", exc_info=error)
            continue
        store.write(name, [to_row(masklet, path, model, revision, weights) for masklet in masklets])
    skipped = gather_object(skipped)
    if state.is_main_process:
        store.write_json("skipped.json", skipped)
        store.collect()
    state.wait_for_everyone()
    return store.read(skipped, collect=False)


@dataclass
class _Engine:
    """What is done to each video."""

    pipe: Any
    prompts: str | Callable
    verifier: Callable | None
    corrector: Callable | None
    gate: QualityGate
    finder: AutomaticMaskConfig
    max_rounds: int
    options: dict[str, Any]

    def annotate(self, video: Any, name: str) -> list[Masklet]:
        session = self.pipe.session(open_frames(video), **self.options)
        masklets: dict[int, Masklet] = {}
        if isinstance(self.prompts, str):
            masklets = {found.object: found for found in find_masklets(self.pipe, session, self.finder, video, name)}
        else:
            self._first_prompts(session, masklets, video, name)
        self._measure(session, masklets.values())
        while pending := [m for m in masklets.values() if m.status == "waiting" and m.reason is None]:
            self._settle(pending[0], masklets)
        self._measure(session, [masklet for masklet in masklets.values() if masklet.status != "rejected"])
        return list(masklets.values())

    def _first_prompts(self, session: VideoSession, masklets: dict[int, Masklet], video: Any, name: str) -> None:
        assert callable(self.prompts)
        prompt = self.prompts

        def point() -> None:
            for frame, objects in VideoPrompts(prompt(video, session)).items():
                for obj, one in objects.items():
                    session.add(frame, obj, **vars(one))

        _, clicks, seconds = self._call_hook(session, point)
        for frame, obj in clicks:
            masklets.setdefault(obj, Masklet(video, name, obj, session, "manual"))
            masklets[obj].clicks[frame] = clicks[frame, obj]
        for masklet in masklets.values():
            masklet.seconds = seconds / len(masklets)
        track(session, masklets.values())

    def _settle(self, masklet: Masklet, masklets: dict[int, Masklet]) -> None:
        """Verifies and corrects a masklet until it is accepted, rejected or waits."""
        reason = self.gate.reject_reason(masklet)
        known = set(masklet.session.objects)
        try:
            while True:
                if self.verifier is not None and (masklet.rounds or reason is None):
                    started = time.perf_counter()
                    reason = None if self.verifier(masklet) else "unsatisfactory"
                    masklet.seconds += time.perf_counter() - started
                masklet.status, masklet.reason = "waiting" if reason else "accepted", reason
                if reason is None or self.corrector is None or masklet.rounds >= self.max_rounds:
                    return
                answer = self._correct(masklet, masklets)
                if answer == "nothing" or masklet.status == "rejected":
                    return
                if self.verifier is None:
                    self._measure(masklet.session, [masklet])
                    reason = None if answer == "masks" else self.gate.reject_reason(masklet)
        except CorrectorUnavailable:
            raise
        except Exception as error:
            masklet.status, masklet.reason = "waiting", f"{type(error).__name__}: {error}"
            for obj in (known - set(masklet.session.objects)) & masklets.keys():  # before it failed
                masklets[obj].status, masklets[obj].reason = "rejected", "removed"
            logger.warning("Object %d of %s is %s. %s", masklet.object, masklet.name, masklet.status, error)
            logger.debug("Where that came from:", exc_info=error)

    def _correct(self, masklet: Masklet, masklets: dict[int, Masklet]) -> str:
        """Has a masklet corrected, and whatever else is prompted with it; by "masks", "prompts" or "nothing"."""
        assert self.corrector is not None
        session, corrector = masklet.session, self.corrector
        prompted, known = _prompts_of(session), set(session.objects)
        segments, clicks, seconds = self._call_hook(session, lambda: corrector(masklet))
        masklet.rounds += 1
        masklet.seconds += seconds
        changed = {obj for _, obj in clicks}
        changed |= {obj for frame, obj in prompted.keys() - _prompts_of(session).keys()}
        for frame, obj in clicks:
            one = masklets.setdefault(obj, Masklet(masklet.video, masklet.name, obj, session))
            one.clicks[frame] = one.clicks.get(frame, 0) + clicks[frame, obj]
            one.provenance = "manual"
            if one.status == "rejected":  # it was removed, and is shown anew
                one.status, one.reason = "waiting", None
        removed = known - set(session.objects)
        if segments is not None and masklet.object not in segments.objects:
            removed |= {masklet.object}
        for obj in removed & masklets.keys():
            masklets[obj].status, masklets[obj].reason = "rejected", "removed"
        changed -= removed
        if segments is None:
            track(session, [masklets[obj] for obj in changed])
            return "prompts" if changed or removed else "nothing"
        for obj in (changed | {masklet.object}) - removed:
            _replace_masks(masklets[obj], segments, session, drawn=obj not in changed)
        return "masks"

    def _call_hook(self, session: VideoSession, hook: Callable) -> tuple[Any, dict[tuple[int, int], int], float]:
        """What a hook gave, clicks by frame and object that it prompted in the session, and seconds."""
        before = _prompts_of(session)
        started = time.perf_counter()
        result = hook()
        seconds = time.perf_counter() - started
        made = {key: prompt for key, prompt in _prompts_of(session).items() if prompt is not before.get(key)}
        return result, {key: count_clicks(prompt, before.get(key)) for key, prompt in made.items()}, seconds

    def _measure(self, session: VideoSession, masklets: Iterable[Masklet]) -> None:
        if self.gate.min_cycle_iou is not None:
            measure_cycles(session, [masklet for masklet in masklets if masklet.cycle_iou is None])


def _prompts_of(session: VideoSession) -> dict[tuple[int, int], ObjectPrompt]:
    return {(frame, obj): prompt for frame, objects in session.prompts.items() for obj, prompt in objects.items()}


def _replace_masks(masklet: Masklet, segments: VideoSegments, session: VideoSession, drawn: bool) -> None:
    """Takes masks from elsewhere; those `drawn` there without prompts count as edited frames."""
    before = dict(masklet.masks)
    for frame in segments:
        if masklet.object in frame.objects:
            masklet.take(frame, session)
            if drawn and masklet.masks[frame.frame] != before.get(frame.frame):
                masklet.clicks.setdefault(frame.frame, 0)
                masklet.provenance = "manual"
