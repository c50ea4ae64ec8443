"""A video that is being segmented: prompts, corrections that hold, and passes over its frames."""

from collections import deque
from collections.abc import Container, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config import VideoSessionConfig
from .frames import PixelValues, StreamedFrames
from .mask_postprocessing import clean_logits, smooth_logits
from .memory import FeatureCache, ObjectMemory, exact, new_memory
from .prompts import ObjectPrompt, VideoPrompts
from .segments import FrameSegments, VideoSegments, encode_mask
from .session_file import read_session, write_session
from .tracking import answer_prompt, walk_passes
from .videos import open_video


DIRECTIONS = ("forward", "backward", "both")


class VideoSession:
    """
    Tracks objects through a video, each on its own: an object's masks do not depend on the others.

    A frame with a prompt or a correction is a conditioning frame: passes attend to it and never overwrite it. A pass
    forwards shows an object from its first prompted frame on; one backwards, up to its last prompted frame.

    Args:
        model (`Sam2VideoModel`, `EdgeTamVideoModel` or `Sam3TrackerVideoModel`):
            Put in evaluation mode.
        processor (`Sam2VideoProcessor` or `Sam3TrackerVideoProcessor`):
            Of the same checkpoint.
        video (`Any`):
            Anything `open_video` takes.
        config (`VideoSessionConfig`, *optional*):
            How to remember and what to show.

    Raises:
        ValueError: from any method, for frames, objects, prompts or places that are not there. The session stays as
            it was before the call.

    Example:

    ```python
    >>> session = pipe.session("clip.mp4")
    >>> preview = session.add(frame=0, obj=1, points=[[30, 60]])
    >>> masks = session.propagate()
    >>> session.correct(frame=12, obj=1, points=[[90, 40]], labels=[0])
    >>> masks = session.propagate("both")
    ```
    """

    def __init__(self, model, processor, video: Any, config: VideoSessionConfig | None = None):
        self.model = model.eval()
        self.processor = processor
        self.frames = open_video(video)
        self.config = config or VideoSessionConfig()
        self.streaming = isinstance(self.frames, StreamedFrames)
        self.policy = self.config.memory if callable(self.config.memory) else exact
        self._state_device = torch.device("cpu") if self.config.offload else model.device
        self.features = FeatureCache(
            0 if self.streaming else self.config.feature_cache_bytes,
            self.config.feature_cache_dtype,
            self._state_device,
        )
        self._memories: dict[int, ObjectMemory] = {}
        self._prompts: dict[int, dict[int, ObjectPrompt]] = {}
        self._corrected: set[tuple[int, int]] = set()
        self._queue: dict[int, dict[int, ObjectPrompt]] = {}  # prompts of a stream for frames to come
        self._latest = -1  # the frame tracked last
        self._pixels = PixelValues(self.frames, processor, model)
        self._undo: deque[tuple] = deque(maxlen=self.config.undo_levels)
        self._redo: list[tuple] = []

    @property
    def objects(self) -> list[int]:
        """Numbers of all objects, in the order they were added."""
        return list(self._memories)

    @property
    def prompts(self) -> VideoPrompts:
        """All prompts that count, those that wait for a frame of a stream included."""
        frames = {*self._prompts, *self._queue}
        prompts = {frame: {**self._prompts.get(frame, {}), **self._queue.get(frame, {})} for frame in frames}
        return VideoPrompts({frame: objects for frame, objects in prompts.items() if objects})

    @property
    def num_frames(self) -> int | None:
        """Length of the video; `None` for a stream."""
        return self.frames.num_frames

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames; the first one is read for it."""
        if self.frames.size is None:
            self.frames[0]
        assert self.frames.size is not None
        return self.frames.size

    @property
    def tracks(self) -> dict[int, dict[int, float]]:
        """By object, the frames on which it has a mask, with the IoU that the model expects of it."""
        return {obj: memory.scores() for obj, memory in self._memories.items()}

    @property
    def can_undo(self) -> bool:
        """Whether there is an edit to take back."""
        return bool(self._undo)

    @property
    def can_redo(self) -> bool:
        """Whether an edit was taken back."""
        return bool(self._redo)

    def add(self, frame: int, obj: int, points=None, labels=None, box=None, mask=None) -> FrameSegments | None:
        """
        Shows an object, old or new, on a frame: the mask follows from this prompt alone, whatever was there. An
        earlier prompt of the object on this frame is taken back, as by `clear`.

        Args:
            frame (`int`): Number of the frame.
            obj (`int`): Number of the object.
            points (`list[list[float]]`, *optional*): Clicks as `[x, y]` in pixels of the frame.
            labels (`list[int]`, *optional*, defaults to all 1): 1 on the object, 0 beside it.
            box (`list[float]`, *optional*): `[x0, y0, x1, y1]`.
            mask (`np.ndarray`, *optional*): Boolean mask of the frame's size, a `PIL.Image` or a COCO RLE.

        Returns:
            [`FrameSegments`] of the frame, or `None` if the frame of a stream is yet to come.
        """
        ((frame, prompts),) = VideoPrompts({frame: {obj: ObjectPrompt(points, labels, box, mask)}}).items()
        ((obj, prompt),) = prompts.items()
        if isinstance(self.frames, StreamedFrames) and frame > max(self.frames.position, 0):
            prompt.check(self.size)
            with self._edit():
                self._queue.setdefault(frame, {})[obj] = prompt
            return None
        self._check(frame, prompt)
        with self._edit():
            self._show(frame, obj, prompt)
        return self.segments(frame)

    def correct(self, frame: int, obj: int, points=None, labels=None, box=None) -> FrameSegments:
        """
        Corrects an object's mask by clicks, which join the earlier ones on this frame, or by a box, which takes their
        place. The mask as it was and the object's past are given to the model with them, and from the next tracked
        frame on this one is a conditioning frame, as in the reference predictor with
        `add_all_frames_to_correct_as_cond=True`. Where the mask is of something else, show the object anew by `add`.

        Args:
            frame (`int`): Number of a frame on which the object has a mask.
            obj (`int`): Number of the object.
            points (`list[list[float]]`, *optional*): Clicks as `[x, y]` in pixels of the frame.
            labels (`list[int]`, *optional*, defaults to all 1): 1 on the object, 0 beside it.
            box (`list[float]`, *optional*): `[x0, y0, x1, y1]`.

        Returns:
            [`FrameSegments`] of the frame.
        """
        memory = self._memory(obj)
        prompt = ObjectPrompt(points, labels, box)
        self._check(frame, prompt)
        if (logits := self.logits(frame, obj)) is None:
            raise ValueError(f"Object {obj} has no mask on frame {frame} to correct. Call propagate() or add() first.")
        if self._windowed and frame != self._latest and frame not in memory.conditioning:
            raise ValueError(
                f"What led to frame {frame} is forgotten; only frame {self._latest}, the latest, can be corrected. "
                'Open the session with keep="all" to correct any frame.'
            )
        if (earlier := self._prompts.get(frame, {}).get(obj)) is not None and box is None:
            prompt = ObjectPrompt(earlier.points + prompt.points, earlier.labels + prompt.labels, earlier.box)
        with self._edit():
            known = logits.to(self.model.device).clamp(-32, 32)
            self._run_prompt(memory, frame, prompt, frame not in memory.ways, known)
            self._corrected.add((frame, obj))
        return self.segments(frame)

    def remove_object(self, obj: int) -> None:
        """Forgets an object and its prompts, those that wait included; the others keep their masks."""
        if not any(obj in prompts for prompts in self._queue.values()):
            self._memory(obj)
        with self._edit():
            self._memories.pop(obj, None)
            self._prompts = {f: ps for f, own in self._prompts.items() if (ps := {o: own[o] for o in own if o != obj})}
            self._corrected = {(frame, o) for frame, o in self._corrected if o != obj}
            for frame in [f for f, prompts in self._queue.items() if obj in prompts]:
                self._drop_waiting(frame, obj)

    def clear(self, frame: int, obj: int) -> None:
        """
        Takes back an object's prompts on a frame, and the masks that were tracked with them; later passes track these
        frames again. An object without any prompt goes.
        """
        if obj in self._queue.get(frame, {}):
            with self._edit():
                return self._drop_waiting(frame, obj)
        self._memory(obj)
        if obj not in self._prompts.get(frame, {}):
            known = ", ".join(f"frame {number}" for number, prompts in self.prompts.items() if obj in prompts)
            raise ValueError(f"Object {obj} has no prompt on frame {frame}. Its prompts: {known or 'none'}.")
        with self._edit():
            del self._prompts[frame][obj]
            self._corrected.discard((frame, obj))
            self._memories[obj].retract(frame)
            if not self._memories[obj].conditioning:
                del self._memories[obj]

    def undo(self) -> None:
        """Goes back to before the last add, correct, clear or remove_object, with the masks of that time."""
        if not self._undo:
            raise ValueError(f"There is nothing to undo; the last {self.config.undo_levels} edits can be undone.")
        self._redo.append(self._state())
        self._restore(self._undo.pop())

    def redo(self) -> None:
        """Takes the last undo back, if nothing was edited since, with what was tracked before it."""
        if not self._redo:
            raise ValueError("There is nothing to redo: nothing was undone since the last edit.")
        self._undo.append(self._state())
        self._restore(self._redo.pop())

    def forget_edits(self) -> None:
        """Makes the present the first that undo goes back to."""
        self._undo.clear()

    def propagate(self, direction: str = "forward", start: int | None = None, max_frames: int | None = None):
        """[`VideoSegments`] of a whole pass; `iterate` gives the same frame by frame."""
        return VideoSegments(list(self.iterate(direction, start, max_frames)), self.frames.damage)

    def iterate(
        self,
        direction: str = "forward",
        start: int | None = None,
        max_frames: int | None = None,
        objects: Container[int] | None = None,
    ) -> Iterator[FrameSegments]:
        """
        Tracks all objects through the video. Prompts may be added and corrected while it runs.

        Args:
            direction (`str`, *optional*, defaults to `"forward"`):
                "forward" from the first prompt to the end, "backward" from the last prompt to frame 0, or "both":
                forward, then each object backward from its first prompt.
            start (`int`, *optional*):
                Another frame to start at.
            max_frames (`int`, *optional*):
                Frames of each pass at most.
            objects (`Container[int]`, *optional*):
                Those to track and to show, the others are left alone; all of them if left out.

        Yields:
            [`FrameSegments`] of each frame, all objects that have a mask there included.

        Raises:
            ValueError, TypeError: for a frame of a stream that is of another size or no image. A new call goes on with
                the frame after it, for which prompts of the bad one wait.
        """
        if direction not in DIRECTIONS:
            raise ValueError(f"Expected direction to be one of {', '.join(DIRECTIONS)}, got {direction!r}.")
        if self.streaming and (direction != "forward" or start is not None):
            raise ValueError("A stream goes forward from where it is. Pass `list(frames)` to move freely.")
        if not self._memories and not self._queue and not self.streaming:
            raise ValueError("There is nothing to track. Add a prompt first: add(frame=0, obj=1, points=[[x, y]]).")
        if start is not None:
            self._check(start)
        return walk_passes(self, direction, start, max_frames, objects)

    def logits(self, frame: int, obj: int) -> torch.Tensor | None:
        """The coarse mask of an object on a frame as the model gave it, `(1, 1, height, width)`, if there is one."""
        output = self._memories[obj].output(frame) if obj in self._memories else None
        return (output or {}).get("pred_masks")

    def segments(
        self, frame: int, smoothed: dict[int, torch.Tensor] | None = None, objects: Container[int] | None = None
    ) -> FrameSegments:
        """The masks known of a frame, of all or some objects, without tracking."""
        shown = {obj: memory for obj, memory in self._memories.items() if objects is None or obj in objects}
        outputs = {obj: memory.output(frame) or {} for obj, memory in shown.items()}
        outputs = {obj: output for obj, output in outputs.items() if "pred_masks" in output}
        masks: dict[int, Any] = {}
        if outputs:
            logits = {obj: output["pred_masks"].to(self.model.device) for obj, output in outputs.items()}
            if smoothed is not None and self.config.smoothing:
                logits = {o: smooth_logits(x, smoothed.get(o), self.config.smoothing) for o, x in logits.items()}
                smoothed.update(logits)
            low = torch.cat(list(logits.values()))
            low = clean_logits(low, self.config.max_hole_area, self.config.max_sprinkle_area)
            high = self.processor.post_process_masks(
                [low], [self.size], binarize=False, apply_non_overlapping_constraints=self.config.non_overlap
            )[0]
            arrays = high[:, 0].float().cpu().numpy()
            masks = {obj: encode_mask(array, self.config.output) for obj, array in zip(outputs, arrays, strict=True)}
        return FrameSegments(
            frame,
            self.size,
            masks,
            {obj: float(output["mask_score"]) for obj, output in outputs.items()},
            {obj: float(output["object_score_logits"]) for obj, output in outputs.items()},
            frozenset(obj for obj in self._prompts.get(frame, {}) if obj in outputs),
            frozenset(obj for obj in outputs if (frame, obj) in self._corrected),
        )

    def save(self, path: str | Path) -> None:
        """
        Writes prompts, masks, memories and what can be undone to a safetensors file. Of the frames only the latest of
        a stream is written: a video that is no file must be given again to `load`, a stream where it goes on.
        """
        write_session(self, path)

    @classmethod
    def load(cls, pipe, path: str | Path, video: Any = None) -> "VideoSession":
        """
        Opens what `save` wrote.

        Args:
            pipe (`Sam2VideoPipeline`): With the model that the session was saved with.
            path (`str` or `Path`): The safetensors file.
            video (`Any`, *optional*): The video; needed if it was no file. Of a stream, an iterator that goes on after
                the last frame that the session took.

        Raises:
            ValueError: if the file is none that `save` wrote, or weights or video are others.
        """
        return read_session(cls, pipe, path, video)

    @property
    def _windowed(self) -> bool:
        return self.streaming or self.config.keep == "window"

    def _check(self, frame: int, prompt: ObjectPrompt | None = None) -> None:
        last = self.frames.position if isinstance(self.frames, StreamedFrames) else (self.num_frames or 0) - 1
        if not (isinstance(frame, (int, np.integer)) and 0 <= frame <= max(last, 0)):
            raise ValueError(f"Expected a frame in 0..{last}, got {frame!r}.")
        if prompt is not None:
            prompt.check(self.size)

    def _memory(self, obj: int) -> ObjectMemory:
        if obj not in self._memories:
            raise ValueError(f"There is no object {obj!r}; there are {self.objects or 'none yet'}.")
        return self._memories[obj]

    def _show(self, frame: int, obj: int, prompt: ObjectPrompt) -> None:
        """Answers a prompt that says all, as in a session without a past."""
        memory = self._memories.setdefault(obj, new_memory(self, obj))
        memory.retract(frame)
        self._run_prompt(memory, frame, prompt, alone=True)
        self._corrected.discard((frame, obj))

    def _run_prompt(
        self, memory: ObjectMemory, frame: int, prompt: ObjectPrompt, alone: bool, logits: torch.Tensor | None = None
    ) -> None:
        (obj,) = memory.obj_ids
        self.processor.add_inputs_to_inference_session(
            memory,
            frame,
            [obj],
            input_points=[[[list(point) for point in prompt.points]]] if prompt.points else None,
            input_labels=[[list(prompt.labels)]] if prompt.points else None,
            input_boxes=None if prompt.box is None else [[prompt.clipped_box(self.size)]],
            input_masks=None if prompt.mask is None else [prompt.mask],
        )
        answer_prompt(self.model, memory, frame, alone, logits)
        self._prompts.setdefault(frame, {})[obj] = prompt

    def _drop_waiting(self, frame: int, obj: int) -> None:
        del self._queue[frame][obj]
        if not self._queue[frame]:
            del self._queue[frame]

    @contextmanager
    def _edit(self, undoable: bool = True):
        """Returns to what was if the edit fails, and keeps it for `undo`."""
        before = self._state()
        try:
            yield
        except BaseException:
            self._restore(before)
            raise
        if undoable:
            self._undo.append(before)
            self._redo.clear()

    def _state(self) -> tuple:
        return (
            {frame: dict(prompts) for frame, prompts in self._prompts.items()},
            {frame: dict(prompts) for frame, prompts in self._queue.items()},
            set(self._corrected),
            {obj: (memory, memory.snapshot()) for obj, memory in self._memories.items()},
        )

    def _restore(self, state: tuple) -> None:
        self._prompts, self._queue, self._corrected, memories = state
        self._memories = {obj: memory for obj, (memory, _) in memories.items()}
        for memory, snapshot in memories.values():
            memory.restore(snapshot)
