from .browser import annotate_in_browser
from .data_engine import annotate
from .masklets import CorrectorUnavailable, Masklet, QualityGate
from .project import AnnotationProject
from .simulated_annotator import SimulatedAnnotator
from .store import annotation_statistics, review_queue

__all__ = [
    "AnnotationProject",
    "CorrectorUnavailable",
    "Masklet",
    "QualityGate",
    "SimulatedAnnotator",
    "annotate",
    "annotate_in_browser",
    "annotation_statistics",
    "review_queue",
]
