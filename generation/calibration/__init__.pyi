from .calibrate import CascadeCalibration, calibrate_cascade
from .sweep import CascadeSweep, sweep_cascade

__all__ = [
    "CascadeCalibration",
    "CascadeSweep",
    "calibrate_cascade",
    "sweep_cascade",
]
