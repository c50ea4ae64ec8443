from .asking.endpoint import OpenAIEndpoint
from .asking.harm_judge import HarmJudge
from .attacks import decoding_attack, gcg_attack, prefilling_attack, rank_assisted_prefilling
from .audit import audit_safety
from .drift import SafetyDriftCallback
from .judge import RefusalJudge, judge_agreement, refusal_probabilities
from .report import SafetyReport
from .statistics import wilson_rate

__all__ = [
    "HarmJudge",
    "OpenAIEndpoint",
    "RefusalJudge",
    "SafetyDriftCallback",
    "SafetyReport",
    "audit_safety",
    "decoding_attack",
    "gcg_attack",
    "judge_agreement",
    "prefilling_attack",
    "rank_assisted_prefilling",
    "refusal_probabilities",
    "wilson_rate",
]
