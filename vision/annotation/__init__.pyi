from .data_engine import annotate

__all__ = [
    "annotate",
]
