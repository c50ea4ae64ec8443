from .draft_model import build_draft_model

__all__ = [
    "build_draft_model",
]
