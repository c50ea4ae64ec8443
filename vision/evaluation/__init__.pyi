from .interactive import evaluate_interactive
from .vos import evaluate_vos

__all__ = [
    "evaluate_interactive",
    "evaluate_vos",
]
