from .alpha_edit import AlphaEditConfig, AlphaEditor, EditReport, EditRequest, KeyStatistics
from .concepts import ConceptEditor
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
