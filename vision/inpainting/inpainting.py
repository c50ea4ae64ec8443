"""Objects taken out of videos, and backgrounds replaced."""

import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..session.frames import StreamedFrames, VideoFrames
from ..session.segments import VideoSegments
from ..session.videos import open_video
from .background_plate import Span, around, fill_smoothly, registered_spans, seen_background, soften
from .inpainted_video import Fill, InpaintedVideo


logger = logging.getLogger(__name__)

MODES = ("remove", "replace_background")
_INPUTS = (("image", "mask_image"), ("video", "mask"), ("video", "mask_video"))
_OURS = ("prompt", "image", "mask_image", "video", "mask", "mask_video", "generator", "output_type", "return_dict")
_SIDES = 16  # what heights and widths of video pipelines are multiples of


def inpaint_video(
    video: Any,
    segments: VideoSegments,
    pipeline: Any = None,
    *,
    objects: Iterable[int] | None = None,
    mode: str = "remove",
    prompt: str = "",
    dilation: int | None = None,
    feather: int = 2,
    crop: float | None = 0.5,
    key_frames: int | Sequence[int] | None = None,
    seed: int = 0,
    **kwargs: Any,
) -> InpaintedVideo:
    """
    Takes objects out of a video, or puts them before another background.

    Without a pipeline no weights are needed: a hole shows the median of what was seen there on other frames. Frames
    are laid over each other first, by phase correlation and least squares, and their exposure is made the same, for as
    long as most of them shows the same; what was never seen is filled smoothly from the border of the hole. With an
    image pipeline, that which was never seen is drawn once for each key frame and then shown on all frames that share
    its background. A video pipeline draws whole windows of frames.

    Args:
        video (`Any`):
            Anything `open_video` takes but a stream, for frames are read several times.
        segments (`VideoSegments`):
            Masks of every frame, from [`Sam2VideoPipeline`] for instance.
        pipeline (`~diffusers.DiffusionPipeline`, *optional*):
            One that takes `image` and `mask_image` (from `AutoPipelineForInpainting`), or `video` and `mask` or
            `mask_video` (`WanVACEPipeline`, `EasyAnimateInpaintPipeline`).
        objects (`Iterable[int]`, *optional*, defaults to all):
            Which objects to remove, or to keep when the background is replaced.
        mode (`str`, *optional*, defaults to `"remove"`):
            "remove", or "replace_background", which needs a pipeline.
        prompt (`str`, *optional*, defaults to `""`):
            What to draw. Describe the background, not the object that goes.
        dilation (`int`, *optional*, defaults to 4, or 0 when the background is replaced):
            Pixels by which the painted region grows, so that borders and shadows of an object go with it.
        feather (`int`, *optional*, defaults to 2):
            Pixels over which the painted region fades out.
        crop (`float`, *optional*, defaults to `0.5`):
            The pipeline sees the painted region with a margin of this share of its longer side; `None` shows it whole
            frames.
        key_frames (`int` or `Sequence[int]`, *optional*):
            Frames that begin a background of their own: one every so many, or these, and between them the camera is
            held to stand still. Left out, one begins when the pixels beside the masks tell that too much has changed;
            a replaced background is drawn once. A video pipeline has windows instead, of `num_frames` frames.
        seed (`int`, *optional*, defaults to 0):
            Of the pipeline's noise.
        kwargs:
            Passed to the pipeline, such as `num_inference_steps`, `strength`, `height` and `width`. Left out, an image
            pipeline draws at the size it was made for; a video pipeline at most as many pixels as its default size.

    Returns:
        [`~hf_iclr.vision.inpainting.InpaintedVideo`]

    Raises:
        TypeError: if `segments` are no `VideoSegments`.
        ValueError: before anything is painted, if video and masks differ in length or size, there is nothing to paint
            or an option can't be.

    Example:

    ```python
    >>> segments = pipe("clip.mp4", prompts={0: {1: {"points": [[210, 350]]}}}, direction="both", output="rle")
    >>> inpaint_video("clip.mp4", segments, dilation=8).save("without.mp4")
    >>> painter = AutoPipelineForInpainting.from_pretrained("stabilityai/stable-diffusion-2-inpainting").to("cuda")
    >>> inpaint_video("clip.mp4", segments, painter, prompt="an empty street").sources
    ```
    """
    if mode not in MODES:
        raise ValueError(f"Expected mode to be one of {', '.join(MODES)}, got {mode!r}.")
    dilation = {"remove": 4, "replace_background": 0}[mode] if dilation is None else dilation
    for name, value in {"dilation": dilation, "feather": feather, "crop": crop or 0}.items():
        if value < 0:
            raise ValueError(f"Expected {name} of at least 0, got {value}.")
    parameters = _check_pipeline(pipeline, mode, kwargs)
    frames = open_video(video)
    chosen = _check_masks(frames, segments, objects)
    spans = _spans(key_frames, len(segments), "video" in parameters)

    @lru_cache(maxsize=2)
    def weights(number: int) -> np.ndarray:
        shown = [obj for obj in chosen if obj in segments[number].masks]
        mask = np.zeros(segments[number].size, bool)
        for obj in shown:
            mask |= segments[number].binary(obj)
        return soften(~mask if mode == "replace_background" else mask, dilation, feather)

    painter = None if pipeline is None else _Painter(pipeline, parameters, prompt, crop, feather, seed, kwargs)
    if painter is not None and "video" in parameters:
        return painter.paint_windows(frames, weights, len(segments))
    if spans is None:
        whole = mode == "replace_background"
        spans = [Span(range(len(segments)))] if whole else registered_spans(frames, weights, len(segments))
    fills: dict[int, Fill] = {}
    pixels = {"seen": 0, "generated": 0, "interpolated": 0}
    for span in tqdm(spans, desc="backgrounds", disable=len(spans) == 1):
        if mode == "replace_background":
            assert painter is not None
            plate, hidden = painter.draw_background(frames, weights, span.frames)
            pixels["generated"] += int(hidden.sum())
        else:
            plate, hidden, seen = seen_background(frames, weights, span, seed)
            pixels["seen"] += int(hidden[seen].sum())
            pixels["interpolated" if painter is None else "generated"] += int(hidden[~seen].sum())
            if not seen.all():
                plate = fill_smoothly(plate, ~seen) if painter is None else painter.draw(plate, ~seen)
        still = all(alignment.still for alignment in span.alignments)
        place = around(hidden > 0, feather + (1 if still else 4)) or (slice(0, 0), slice(0, 0))
        part, start = plate[place].copy(), span.canvas(frames[span.frames[0]].shape[:2])[0]
        for number, alignment in zip(span.frames, span.alignments, strict=True):
            matrix = None if still else alignment.matrix.copy()
            if matrix is not None:
                matrix[:, 2] -= start + [side.start for side in place]
            fills[number] = Fill(place, part, matrix, alignment.gain)
    total = max(sum(pixels.values()), 1)
    sources = {name: count / total for name, count in pixels.items()}
    if sources["interpolated"] > 0.05:
        logger.warning(
            "%.0f %% of the painted pixels were never seen and are filled from the border of the hole. Pass an "
            "inpainting pipeline to draw them.",
            100 * sources["interpolated"],
        )
    return InpaintedVideo([span.frames[0] for span in spans], sources, frames, weights, fills)


@dataclass
class _Painter:
    """Calls a diffusers pipeline on what is to be painted, cropped to it."""

    pipeline: Any
    parameters: Mapping[str, inspect.Parameter]
    prompt: str
    crop: float | None
    feather: int
    seed: int
    kwargs: dict[str, Any]

    def _call(self, **inputs: Any) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        prompt = None if "prompt_embeds" in self.kwargs else self.prompt
        return self.pipeline(prompt=prompt, generator=generator, **inputs, **self.kwargs)

    def _place(self, mask: np.ndarray) -> tuple[slice, slice]:
        whole = slice(0, mask.shape[0]), slice(0, mask.shape[1])
        tight = around(mask, 0)
        if self.crop is None or tight is None:
            return whole
        longer = max(min(side.stop, full.stop) - side.start for side, full in zip(tight, whole, strict=True))
        rows, columns = (
            _widen(side, round(longer * (1 + 2 * self.crop)), full.stop)
            for side, full in zip(tight, whole, strict=True)
        )
        return rows, columns

    def draw(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The image with its mask painted by the image pipeline, fading out around the mask."""
        place = self._place(mask)
        picture, hole = Image.fromarray(image[place]), Image.fromarray(mask[place])
        output = self._call(image=picture, mask_image=hole.convert("L"))
        drawn = np.asarray(output.images[0].convert("RGB").resize(picture.size, Image.Resampling.LANCZOS))
        weight = soften(mask[place], 0, self.feather)[..., None]
        painted = image.copy()
        painted[place] = (image[place] * (1 - weight) + drawn * weight).round()
        return painted

    def draw_background(self, frames, weights, span: range) -> tuple[np.ndarray, np.ndarray]:
        """A background for a span, and how often each pixel shows it: first what is free, then what is behind it."""
        hidden = np.zeros(weights(span[0]).shape, int)
        for number in span:
            hidden += weights(number) > 0
        free = weights(span[0]) == 1
        plate = self.draw(frames[span[0]], free) if free.any() else frames[span[0]]
        if (hidden[~free] > 0).any():
            plate = self.draw(plate, ~free)
        return plate, hidden

    def paint_windows(self, frames, weights, count: int) -> InpaintedVideo:
        """Each window begins with the last frame of the one before, as it was painted, for the two to go together."""
        parameters = self.parameters
        window = self.kwargs.pop("num_frames", parameters["num_frames"].default)
        sides = (self.kwargs.pop(name, parameters[name].default) for name in ("height", "width"))
        pixels = int(np.prod([*sides]))
        config = vars(self.pipeline)
        stride = config.get("vae_scale_factor_temporal") or config.get("vae_temporal_compression_ratio") or 1
        key_frames = list(range(0, max(count - 1, 1), max(window - 1, 1)))
        painted = InpaintedVideo(key_frames, {"generated": 1.0}, frames, weights, {})
        for start in tqdm(key_frames, desc="windows"):
            numbers = list(range(start, min(start + window, count)))
            masks = [weights(number) == 1 for number in numbers]
            reached = np.any([weights(number) > 0 for number in numbers], axis=0)
            place = self._place(reached)
            shown = [frames[number][place] for number in numbers]
            if start:
                shown[0], masks[0] = painted[start][place], np.zeros_like(masks[0])
            if any(mask.any() for mask in masks):
                extra = -(len(numbers) - 1) % stride  # the pipelines want one frame more than a multiple
                drawn = self._paint_window(
                    shown + shown[-1:] * extra, [m[place] for m in masks + masks[-1:] * extra], pixels
                )
            else:
                drawn = shown
            for number, pixels_of in zip(numbers, drawn, strict=False):
                painted._fills.setdefault(number, Fill(place, pixels_of))
        return painted

    def _paint_window(self, frames: list[np.ndarray], masks: list[np.ndarray], pixels: int) -> list[np.ndarray]:
        """Frames with gray where the masks are go to the pipeline, and come back at their size."""
        height, width = frames[0].shape[:2]
        scale = (pixels / (height * width)) ** 0.5
        sides = [max(int(side * scale) // _SIDES, 1) * _SIDES for side in (height, width)]
        small = sides[::-1]
        holes = [Image.fromarray(mask).convert("L").resize(small, Image.Resampling.NEAREST) for mask in masks]
        pictures = []
        for frame, hole in zip(frames, holes, strict=True):
            picture = Image.fromarray(frame).resize(small, Image.Resampling.LANCZOS)
            picture.paste((128, 128, 128), mask=hole)
            pictures.append(picture)
        sizes = {"height": sides[0], "width": sides[1], "num_frames": len(frames), "output_type": "np"}
        if "mask_video" in self.parameters:  # tensors `(1, channels, frames, height, width)`: 0..1, and 0 or 255
            video = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).float() / 255
            hidden = torch.from_numpy(np.stack([np.asarray(hole) for hole in holes])).float()
            inputs: dict[str, Any] = {"video": video.permute(3, 0, 1, 2)[None], "mask_video": hidden[None, None]}
        else:
            inputs = {"video": pictures, "mask": [hole.convert("RGB") for hole in holes]}
        drawn = (np.asarray(self._call(**inputs, **sizes).frames[0]) * 255).round().astype(np.uint8)
        return [
            np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)) for frame in drawn
        ]


def _widen(side: slice, length: int, most: int) -> slice:
    """Rows or columns `length` long around a side, moved into 0..`most`."""
    length = min(length, most)
    start = (side.start + min(side.stop, most) - length) // 2
    start = max(0, min(start, most - length))
    return slice(start, start + length)


def _check_pipeline(pipeline: Any, mode: str, kwargs: Mapping[str, Any]) -> Mapping[str, inspect.Parameter]:
    if pipeline is None:
        if mode == "replace_background":
            raise ValueError("A new background has to be drawn. Pass an inpainting pipeline of diffusers.")
        if kwargs:
            raise ValueError(f"There is no pipeline to pass {', '.join(kwargs)} to.")
        return {}
    parameters = inspect.signature(pipeline.__call__).parameters
    if not any(set(names) <= set(parameters) for names in _INPUTS):
        raise ValueError(
            "Expected a pipeline that takes image and mask_image, or video and mask, got "
            f"{type(pipeline).__name__}. Make one by AutoPipelineForInpainting.from_pipe(pipeline)."
        )
    wrong = [name for name in kwargs if name in _OURS or name not in parameters]
    if wrong:
        raise ValueError(f"{type(pipeline).__name__} can't be passed {', '.join(wrong)} here.")
    if kwargs.get("num_frames", 2) < 2:
        raise ValueError(f"Expected windows of at least 2 frames, got num_frames={kwargs['num_frames']}.")
    return parameters


def _check_masks(frames: VideoFrames, segments: VideoSegments, objects: Iterable[int] | None) -> list[int]:
    """The objects asked for, of masks that fit the video."""
    if isinstance(frames, StreamedFrames):
        raise ValueError("Frames are read several times, which a stream can't give. Pass `list(frames)`.")  # noqa: TRY004
    if not isinstance(segments, VideoSegments):
        raise TypeError(
            f"Expected VideoSegments, as the segmentation pipeline returns, got {type(segments).__name__}."
        )
    if not segments.objects:
        raise ValueError("There are no objects in the segments.")
    if segments.frames != list(range(frames.num_frames or 0)):
        raise ValueError(
            f"Expected masks of all {frames.num_frames} frames of the video, got them of {len(segments)} (the frames "
            f"{segments.frames[0]}..{segments.frames[-1]}). Propagate with direction='both'."
        )
    frames[0]
    sizes = {frame.size for frame in segments} | {
        mask.shape for frame in segments for mask in frame.masks.values() if isinstance(mask, np.ndarray)
    }
    if sizes != {frames.size}:
        raise ValueError(f"Expected masks of the video's size {frames.size} (height, width), got {sorted(sizes)}.")
    chosen = segments.objects if objects is None else list(objects)
    unknown = set(chosen) - set(segments.objects)
    if unknown or not chosen:
        raise ValueError(f"Expected some of the objects {segments.objects}, got {chosen}.")
    if not any(frame.areas[obj] for frame in segments for obj in chosen if obj in frame.masks):
        raise ValueError(f"There is nothing to paint: the masks of objects {chosen} are empty on all frames.")
    return chosen


def _spans(key_frames: int | Sequence[int] | None, count: int, video_pipeline: bool) -> list[Span] | None:
    if key_frames is None:
        return None
    if video_pipeline:
        raise ValueError("A video pipeline has windows instead of key frames. Pass num_frames=, their length.")
    if isinstance(key_frames, int):
        if key_frames < 1:
            raise ValueError(f"Expected a key frame every 1 or more frames, got {key_frames}.")
        key_frames = range(0, count, key_frames)
    starts = sorted({0, *key_frames})
    if starts[0] < 0 or starts[-1] >= count:
        raise ValueError(f"Expected key frames in 0..{count - 1}, got {list(key_frames)}.")
    return [Span(range(start, end)) for start, end in zip(starts, [*starts[1:], count], strict=True)]
