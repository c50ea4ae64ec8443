from .data_engine import annotate
from .masklets import Masklet, QualityGate
from .page import annotate_in_browser
from .simulated_annotator import SimulatedAnnotator
from .store import annotation_statistics, review_queue

__all__ = [
    "Masklet",
    "QualityGate",
    "SimulatedAnnotator",
    "annotate",
    "annotate_in_browser",
    "annotation_statistics",
    "review_queue",
]
