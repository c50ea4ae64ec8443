from .config import SqueezeDPOConfig
from .extend_for_sft import extend_for_sft
from .probes import SqueezeProbeCallback, build_probe_set
from .trainer import SqueezeDPOTrainer
from .warning import SqueezeStoppingCallback

__all__ = [
    "SqueezeDPOConfig",
    "SqueezeDPOTrainer",
    "SqueezeProbeCallback",
    "SqueezeStoppingCallback",
    "build_probe_set",
    "extend_for_sft",
]
