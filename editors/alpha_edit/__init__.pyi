from .batches import EditReport
from .config import AlphaEditConfig
from .editor import AlphaEditor
from .metrics import edit_success, hidden_drift, ngram_entropy
from .requests import EditRequest, edit_requests
from .scoring import continue_texts, evaluate_edits, last_hidden_states, perplexity, score_edits
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
    "hidden_drift",
    "last_hidden_states",
    "ngram_entropy",
    "perplexity",
    "score_edits",
]
