from .interactive import InteractiveResult, evaluate_interactive
from .j_and_f import contour_accuracy, region_similarity
from .procedural_clips import Clip, procedural_clip
from .simulated_prompts import correct_object, first_prompt, middle_click, next_click, prompt_object
from .vos import VosResult, evaluate_vos
from .vos_inference import segment_dataset

__all__ = [
    "Clip",
    "InteractiveResult",
    "VosResult",
    "contour_accuracy",
    "correct_object",
    "evaluate_interactive",
    "evaluate_vos",
    "first_prompt",
    "middle_click",
    "next_click",
    "procedural_clip",
    "prompt_object",
    "region_similarity",
    "segment_dataset",
]
