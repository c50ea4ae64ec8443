from .draft_model import build_draft_model
from .teacher import sample_texts

__all__ = [
    "build_draft_model",
    "sample_texts",
]
