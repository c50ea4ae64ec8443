from .config import SqueezeDPOConfig
from .influence import InfluenceReport, influence_audit
from .pair_audit import audit_pairs, filter_pairs
from .probes import SqueezeProbeCallback, build_probe_set
from .report import write_squeeze_report
from .rows import extend_for_sft
from .trainer import SqueezeDPOTrainer
from .warning import SqueezeMonitor, SqueezeState, SqueezeStoppingCallback

__all__ = [
    "InfluenceReport",
    "SqueezeDPOConfig",
    "SqueezeDPOTrainer",
    "SqueezeMonitor",
    "SqueezeProbeCallback",
    "SqueezeState",
    "SqueezeStoppingCallback",
    "audit_pairs",
    "build_probe_set",
    "extend_for_sft",
    "filter_pairs",
    "influence_audit",
    "write_squeeze_report",
]
