from .callback import InRunDataShapleyCallback
from .result import DataShapleyResult
from .store import ShapleyStore

__all__ = [
    "DataShapleyResult",
    "InRunDataShapleyCallback",
    "ShapleyStore",
]
