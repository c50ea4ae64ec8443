from .batches import EditReport
from .config import AlphaEditConfig
from .editor import AlphaEditor
from .requests import EditRequest, edit_requests
from .scoring import continue_texts, edit_success, evaluate_edits, ngram_entropy, perplexity, score_edits
from .statistics import KeyStatistics

__all__ = [
    "AlphaEditConfig",
    "AlphaEditor",
    "EditReport",
    "EditRequest",
    "KeyStatistics",
    "continue_texts",
    "edit_requests",
    "edit_success",
    "evaluate_edits",
    "ngram_entropy",
    "perplexity",
    "score_edits",
]
