from .config import AlphaEditConfig
from .editor import AlphaEditor
from .report import EditReport
from .request import EditRequest
from .statistics import KeyStatistics

__all__ = [
    "AlphaEditConfig",
    "AlphaEditor",
    "EditReport",
    "EditRequest",
    "KeyStatistics",
]
