from .alpha_edit_config import AlphaEditConfig
from .alpha_editor import AlphaEditor
from .concept_editor import ConceptEditor
from .edit_report import EditReport
from .edit_request import EditRequest
from .key_statistics import KeyStatistics
from .null_space_callback import NullSpaceCallback

__all__ = [
    "AlphaEditConfig",
    "AlphaEditor",
    "ConceptEditor",
    "EditReport",
    "EditRequest",
    "KeyStatistics",
    "NullSpaceCallback",
]
