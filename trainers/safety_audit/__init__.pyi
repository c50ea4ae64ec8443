from .audit import audit_safety
from .drift import SafetyDriftCallback
from .judge import RefusalJudge
from .report import SafetyReport

__all__ = [
    "RefusalJudge",
    "SafetyDriftCallback",
    "SafetyReport",
    "audit_safety",
]
