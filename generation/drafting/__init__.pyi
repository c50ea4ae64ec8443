from .draft_model import build_draft_model
from .eagle import Eagle3ForCausalLM
from .teacher import sample_texts

__all__ = [
    "Eagle3ForCausalLM",
    "build_draft_model",
    "sample_texts",
]
