from .callback import InRunDataShapleyCallback
from .result import DataShapleyResult

__all__ = [
    "DataShapleyResult",
    "InRunDataShapleyCallback",
]
