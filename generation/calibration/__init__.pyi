from .calibrate import calibrate_cascade
from .sweep import sweep_cascade

__all__ = [
    "calibrate_cascade",
    "sweep_cascade",
]
