"""`pipeline("promptable-video-segmentation")`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import ModelCard, try_to_load_from_cache
from transformers import AutoModel, Pipeline

from hf_iclr.hub import PretrainedHubMixin, model_card, repository_name

from .automatic_masks import AutomaticMaskConfig, detect_objects, generate_masks, is_new, new_objects
from .config import VideoSessionConfig
from .frames import VideoFrames, is_image
from .prompts import VideoPrompts
from .segments import FrameSegments, VideoSegments, encode_mask
from .session import VideoSession
from .tracking import frame_features, using
from .videos import open_video


MODEL_TYPES = ("sam2_video", "edgetam_video", "sam3_tracker_video")
_OPTIONS = {option.name for option in fields(VideoSessionConfig)}


class VideoModel(AutoModel):
    """[`~transformers.AutoModel`] whose models keep the commit that they were loaded from."""

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        model = super().from_pretrained(name, *args, **kwargs)
        known = {key: kwargs.get(key) for key in ("cache_dir", "revision")}
        file = None if Path(name).exists() else try_to_load_from_cache(name, "config.json", **known)
        model.loaded_commit = Path(file).parent.name if isinstance(file, str) else None
        return model


@dataclass
class Finder:
    """What finds the objects that nobody points at, and what it said they are."""

    config: AutomaticMaskConfig
    detector: Callable | None = None
    labels: dict[int, str] = field(default_factory=dict)


class Sam2VideoPipeline(PretrainedHubMixin, Pipeline):
    """
    Segments prompted objects in videos with SAM 2 (https://huggingface.co/papers/2408.00714), EdgeTAM or the tracker
    of SAM 3: every object on its own, in a memory bounded to what the model attends to.

    Any field of [`~hf_iclr.vision.session.VideoSessionConfig`] and any argument of a call may be passed here, too.

    Raises:
        ValueError: if the model is no video segmenter, has no processor, or a call has no prompts.

    Example:

    ```python
    >>> import hf_iclr
    >>> from transformers import pipeline

    >>> pipe = pipeline("promptable-video-segmentation", model="facebook/sam2.1-hiera-tiny")
    >>> prompts = {0: {1: {"points": [[210, 350]], "labels": [1]}, 2: {"box": [10, 10, 80, 90]}}}
    >>> result = pipe("clip.mp4", prompts=prompts, direction="both", output="rle")
    >>> result[12].masks[1], result[12].scores[1]
    >>> for frame in pipe.stream(camera, prompts=prompts):  # any iterator, constant memory
    ...     frame.masks[1]
    >>> pipe(image, prompts="auto")  # everything in an image
    >>> detector = pipeline("object-detection")
    >>> for frame in pipe.stream(camera, detector=detector, automatic={"every": 10}):  # without a person
    ...     frame.labels, frame.boxes
    ```
    """

    model_loader = VideoModel
    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, model, *args, **kwargs):
        found = model.config.model_type
        if found not in MODEL_TYPES:
            name = "Sam3TrackerVideo" if found.startswith("sam3") else "Sam2Video"
            raise ValueError(
                f"Expected a model of type {', '.join(MODEL_TYPES)}, got {found} ({type(model).__name__})."
                + f" The same folder may hold one: model={name}Model.from_pretrained({model.name_or_path!r}), "
                f"processor={name}Processor.from_pretrained({model.name_or_path!r})." * found.startswith("sam")
            )
        if kwargs.get("processor") is None:
            raise ValueError("Expected a processor beside the model: processor=AutoProcessor.from_pretrained(...).")
        super().__init__(model, *args, **kwargs)

    def __call__(self, video: Any, prompts: Any = None, **kwargs: Any) -> Any:
        """
        Segments one video or image, or several.

        Args:
            video (`Any`):
                A video or an image in any form that `open_video` takes, or a mapping with it as `video` and with its
                `prompts`. Several are a list, a dataset or an iterator of these; a list of images is one video.
            prompts (`VideoPrompts`, `Mapping`, `str` or `list`):
                By frame and object, or by object for frame 0; "auto" segments everything. With several videos, a
                list of as many, or one for all.
            direction (`str`, *optional*, defaults to `"forward"`):
                "forward", "backward" or "both", see [`VideoSession.iterate`].
            automatic (`AutomaticMaskConfig` or `Mapping`, *optional*):
                How "auto" finds objects, and when.
            detector (`Callable`, *optional*):
                What finds objects instead, where no prompts are given or "auto":
                `pipeline("object-detection")`, or any function that [`detect_objects`] takes. Each of its boxes whose
                mask overlaps none of the tracked ones is the prompt of a new object with a number of its own.
            kwargs:
                Fields of `VideoSessionConfig`, such as `output="rle"`.

        Returns:
            [`VideoSegments`], a list of them for a list, or an iterator, which segments a video when it is asked for
            it.
        """
        several, video = _as_several(video)
        if several:
            count = len(video) if hasattr(video, "__len__") else None
            each = prompts if isinstance(prompts, list) else repeat(prompts)
            if isinstance(prompts, list) and count not in (None, len(prompts)):
                raise ValueError(f"Expected prompts for each of {count} videos, got {len(prompts)}.")
            results = (self(one, own, **kwargs) for one, own in zip(video, each, strict=False))
            return list(results) if isinstance(video, (list, tuple)) else results
        if isinstance(prompts, list):
            raise ValueError("Expected prompts of one video, got a list. Pass a list of videos with it.")  # noqa: TRY004
        if isinstance(video, Mapping) and "prompts" in video:
            if prompts is not None:
                raise ValueError("Expected the prompts beside the video or apart from it, got both.")
            video, prompts = {key: value for key, value in video.items() if key != "prompts"}, video["prompts"]
        return super().__call__({"video": video, "prompts": prompts}, **kwargs)

    def stream(self, frames: Iterable, prompts: Any = None, **kwargs: Any) -> Iterator[FrameSegments]:
        """
        Segments frames as they come and keeps only what the next frame needs.

        Args:
            frames (`Iterable`):
                Frames in any form that `open_video` takes; an iterator is read lazily.
            prompts (`VideoPrompts`, `Mapping` or `str`):
                By frame and object, used when the frame comes; "auto" segments everything.
            kwargs:
                As in a call: `automatic`, `detector` and fields of `VideoSessionConfig`.

        Returns:
            An iterator of [`FrameSegments`].
        """
        params = self._sanitize_parameters(**kwargs)
        inputs = {"video": iter(open_video(frames)), "prompts": prompts}
        ready = self.preprocess(inputs, **{**self._preprocess_params, **params[0]})
        return self._frames(**ready, **{**self._forward_params, **params[1]})

    def session(self, video: Any, **options: Any) -> VideoSession:
        """
        Opens a video for prompts and corrections.

        Args:
            video (`Any`): Anything `open_video` takes.
            options: Fields of `VideoSessionConfig`.
        """
        options = {**self._preprocess_params.get("options", {}), **options}
        return VideoSession(self.model, self.processor, video, VideoSessionConfig(**options))

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Saves model, processor and a card; `pipeline(task, model=save_directory)` loads both."""
        super().save_pretrained(save_directory, *args, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _card(self, repo_id: str) -> ModelCard:
        base = repository_name(self.model.name_or_path)
        return model_card(
            f"Promptable video segmentation with {base or type(self.model).__name__}",
            f"""Segments prompted objects in videos, after [SAM 2](https://huggingface.co/papers/2408.00714): a
`{self.model.config.model_type}` of {self.model.num_parameters():,} parameters with its processor, for the pipeline of
`hf_iclr`, in which every object has a memory of its own.""",
            f"""import hf_iclr
import numpy as np
from transformers import pipeline

pipe = pipeline("promptable-video-segmentation", model="{repo_id}")
video = np.zeros((4, 96, 160, 3), np.uint8)  # or "clip.mp4"
result = pipe(video, prompts={{0: {{1: {{"points": [[80, 48]], "labels": [1]}}}}}})
print(result[3].masks[1], result[3].scores[1])""",
            [base],
            library_name="transformers",
            pipeline_tag="mask-generation",
            tags=["video-segmentation", "promptable-segmentation", self.model.config.model_type],
        )

    def _sanitize_parameters(
        self, direction: str | None = None, automatic: Any = None, detector: Callable | None = None, **options: Any
    ):
        unknown = set(options) - _OPTIONS
        if unknown:
            raise TypeError(
                f"Unknown options {', '.join(sorted(unknown))}. There are direction, automatic, detector, "
                f"{', '.join(sorted(_OPTIONS))}."
            )
        if detector is not None and not callable(detector):
            raise TypeError(
                f"Expected a detector that takes an image and gives boxes, got {type(detector).__name__}. Pass "
                'detector=pipeline("object-detection") or a function.'
            )
        given = {"options": options or None, "automatic": automatic, "detector": detector}
        preprocess = {name: value for name, value in given.items() if value is not None}
        return preprocess, {} if direction is None else {"direction": direction}, {}

    def preprocess(
        self,
        inputs: dict[str, Any],
        options: Mapping | None = None,
        automatic: Any = None,
        detector: Callable | None = None,
    ) -> dict[str, Any]:
        prompts = inputs["prompts"]
        if prompts is None and detector is not None:
            prompts = "auto"
        if automatic is not None and prompts != "auto":
            raise ValueError('`automatic` says how prompts="auto" finds objects. Pass prompts="auto" with it.')
        finder = None
        if isinstance(prompts, str):
            if prompts != "auto":
                raise ValueError(f'Expected prompts by frame and object, or "auto", got {prompts!r}.')
            given = isinstance(automatic, AutomaticMaskConfig)
            finder = Finder(automatic if given else AutomaticMaskConfig(**(automatic or {})), detector)
            prompts = {}
        checked = prompts if isinstance(prompts, VideoPrompts) else VideoPrompts(prompts)
        if not checked and finder is None:
            raise ValueError(
                'Nothing says what to segment. Pass prompts={0: {1: {"points": [[x, y]]}}} or prompts="auto".'
            )
        # One way over the video needs neither old features nor old states.
        once: dict[str, Any] = {"keep": "window", "feature_cache_bytes": 0, "undo_levels": 0}
        once |= {**self._preprocess_params.get("options", {}), **(options or {})}
        session = self.session(inputs["video"], **once)
        if not session.streaming:
            checked.check(session.size, session.num_frames)
        return {"session": session, "prompts": checked, "finder": finder}

    def _forward(self, model_inputs: dict[str, Any], direction: str = "forward") -> dict[str, Any]:
        session, finder = model_inputs["session"], model_inputs["finder"]
        if finder is not None and finder.detector is None and session.num_frames == 1:
            return {"segments": VideoSegments([self._everything(session, finder.config)])}
        frames = list(self._frames(**model_inputs, direction=direction))
        return {"segments": VideoSegments(frames, session.frames.damage)}

    def postprocess(self, model_outputs: dict[str, Any]) -> VideoSegments:
        return model_outputs["segments"]

    def _frames(
        self, session: VideoSession, prompts: VideoPrompts, finder: Finder | None, direction: str = "forward"
    ) -> Iterator[FrameSegments]:
        for frame, objects in prompts.items():
            for obj, prompt in objects.items():
                session.add(frame, obj, **vars(prompt))
        if finder is None:
            yield from session.iterate(direction)
            return
        config, labels = finder.config, finder.labels
        searched = -1 if session.streaming else self._find_first(session, finder)
        highest = 0  # of the numbers given so far
        unseen: dict[int, int] = {}  # for how many frames each object was out of sight
        for segments in session.iterate(direction):
            since = segments.frame - config.frame
            if segments.frame > searched and since >= 0:
                if since == 0 or config.every and since % config.every == 0:
                    highest = max(highest, *session.objects, 0)
                    self._add_found(session, segments.frame, finder, highest)
                    segments = session.segments(segments.frame)
                searched = segments.frame
            segments.labels = {obj: labels[obj] for obj in segments.objects if obj in labels}
            yield segments
            if config.every and config.expire_after and direction == "forward":
                unseen = {obj: 0 if segments.visible[obj] else unseen.get(obj, 0) + 1 for obj in segments.objects}
                highest = max(highest, *unseen, 0)
                for obj in [obj for obj, frames in unseen.items() if frames >= config.expire_after]:
                    session.remove_object(obj)
                    labels.pop(obj, None)

    def _find_first(self, session: VideoSession, finder: Finder) -> int:
        """Adds the objects of the first frame of a video on which any is found; its number."""
        begin, end = finder.config.frame, session.num_frames or 0
        frames = range(begin, end, finder.config.every or end) or range(begin, begin + 1)
        for frame in frames:
            if self._add_found(session, frame, finder):
                return frame
        where = f"frame {begin}" if len(frames) == 1 else f"any of frames {', '.join(map(str, frames))}"
        lower = "pred_iou_thresh" if finder.detector is None else "the threshold of the detector"
        raise ValueError(f"Nothing was found on {where:.80}. Lower {lower}, or prompt by hand.")

    def _add_found(self, session: VideoSession, frame: int, finder: Finder, numbered: int = 0) -> bool:
        """Adds what is found on a frame and not tracked yet, numbered from `numbered` on; whether there was any."""
        image, segments, most = session.frames[frame], session.segments(frame), finder.config.max_overlap
        known = [segments.binary(obj) for obj in segments.objects]
        first = obj = max(numbered, *session.objects, 0) + 1
        if finder.detector is None:
            with using(self.model):
                levels, _ = frame_features(self.model, session.features, frame, session._pixels)
            found = generate_masks(self.model, self.processor, image, finder.config, levels)
            for obj, record in enumerate(new_objects(found, known, most), start=first):
                session.add(frame, obj, mask=record["segmentation"])
            return first in session.objects
        for prompt, label in detect_objects(finder.detector, image):
            session._show(frame, obj, prompt)
            mask = session.segments(frame, objects=[obj]).binary(obj)
            if is_new(mask, known, most):
                known.append(mask)
                if label is not None:
                    finder.labels[obj] = label
                obj += 1
            else:
                session.remove_object(obj)
        return obj > first

    def _everything(self, session: VideoSession, finder: AutomaticMaskConfig) -> FrameSegments:
        """The masks found in an image as they are, rather than as prompts."""
        found = generate_masks(self.model, self.processor, session.frames[0], finder)
        records = dict(enumerate(found, start=1))
        return FrameSegments(
            0,
            session.size,
            {
                obj: encode_mask(np.where(record["segmentation"], 10.0, -10.0), session.config.output)
                for obj, record in records.items()
            },
            {obj: record["predicted_iou"] for obj, record in records.items()},
            {obj: record["object_score"] for obj, record in records.items()},
        )


def _as_several(video: Any) -> tuple[bool, Any]:
    """Whether something holds videos rather than the frames of one, and the same, whose first item was looked at."""
    if isinstance(video, Iterator) and not hasattr(video, "readable"):  # a file gives its lines
        first = list(islice(video, 1))
        return bool(first) and _is_video(first[0]), chain(first, video)
    known = (str, bytes, bytearray, Mapping, np.ndarray, torch.Tensor, VideoFrames)
    if isinstance(video, known) or not (hasattr(video, "__len__") and hasattr(video, "__getitem__")):
        return False, video
    return bool(len(video)) and _is_video(video[0]), video


def _is_video(item: Any) -> bool:
    return not (item is None or is_image(item) or isinstance(item, Mapping) and set(item) <= {"bytes", "path"})
