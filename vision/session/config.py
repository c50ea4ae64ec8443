"""How a session remembers and what it shows."""

from dataclasses import dataclass

import torch

from hf_iclr.untrusted import check_field_types

from .memory import MemoryPolicy
from .segments import OUTPUTS


@dataclass
class VideoSessionConfig:
    """
    How a session remembers and what it shows. At its defaults, masks equal those of the model's own loop.

    Args:
        output (`str`, *optional*, defaults to `"mask"`):
            "mask" (boolean array), "logits", "rle" (COCO) or "polygon".
        memory (`str` or `MemoryPolicy`, *optional*, defaults to `"exact"`):
            Which tracked frames the model attends to: "exact" (its own rule), or a function of a list of `Remembered`
            and a number of slots.
        max_cond_frames (`int`, *optional*):
            How many prompted and corrected frames the model attends to at most, those nearest in time, like the
            reference's `max_cond_frames_in_attn`; -1 for all. Defaults to the model's own number in a video, and in a
            stream, whose corrections have no end, to 8 if that is all. A stream forgets those it will not attend to.
        keep (`str`, *optional*, defaults to `"all"`):
            "all" keeps what corrections of any frame need (about 0.8 MB an object and frame at 1024 pixels), "window"
            only what the next frame needs. A stream keeps a window whatever is said.
        offload (`bool` or `str`, *optional*, defaults to `False`):
            Whether memories, masks and cached features wait on the CPU while the model is elsewhere. With "disk"
            memories and masks are in temporary files that are mapped into memory (in `TMPDIR`), of which the system
            keeps what it has room for: so a session of `keep="all"` has bounds too.
        feature_cache_bytes (`int`, *optional*, defaults to `2**28`):
            How many bytes of vision features are kept for later passes (21 MB a frame at 1024 pixels).
        feature_cache_dtype (`torch.dtype`, *optional*):
            How they are stored; `torch.bfloat16` halves them and changes masks of later passes slightly.
        non_overlap (`bool`, *optional*, defaults to `False`):
            Whether each pixel belongs to one object only, the one with the highest logit.
        max_hole_area (`float`, *optional*, defaults to `0`):
            Holes up to this area are filled, in pixels of the model's mask (256 x 256 for a model of 1024 pixels).
        max_sprinkle_area (`float`, *optional*, defaults to `0`):
            Islands up to this area are removed, in the same pixels.
        smoothing (`float`, *optional*, defaults to `0.0`):
            Share, in 0..1, of the frame before in what is shown (not in what is remembered).
        undo_levels (`int`, *optional*, defaults to `4`):
            How many edits can be undone; each keeps the masks of its time.

    Raises:
        ValueError: if a value is none of these.
    """

    output: str = "mask"
    memory: str | MemoryPolicy = "exact"
    max_cond_frames: int | None = None
    keep: str = "all"
    offload: bool | str = False
    feature_cache_bytes: int = 2**28
    feature_cache_dtype: torch.dtype | None = None
    non_overlap: bool = False
    max_hole_area: float = 0
    max_sprinkle_area: float = 0
    smoothing: float = 0.0
    undo_levels: int = 4

    def __post_init__(self):
        check_field_types(self, VideoSessionConfig)
        choices: dict[str, tuple] = {
            "output": OUTPUTS, "keep": ("all", "window"), "offload": (False, True, "disk")
        }  # fmt: skip
        if not callable(self.memory):
            choices["memory"] = ("exact",)
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"Expected {name} to be one of {', '.join(map(str, values))}, got {getattr(self, name)!r}."
                )
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"Expected smoothing in 0..1 (1 excluded), got {self.smoothing}.")
        if self.max_cond_frames is not None and self.max_cond_frames < 1 and self.max_cond_frames != -1:
            raise ValueError(f"Expected max_cond_frames of at least 1, or -1 for all, got {self.max_cond_frames}.")
        for name in ("feature_cache_bytes", "max_hole_area", "max_sprinkle_area", "undo_levels"):
            if getattr(self, name) < 0:
                raise ValueError(f"Expected {name} of at least 0, got {getattr(self, name)}.")
