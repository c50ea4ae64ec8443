from .config import SqueezeDPOConfig, SqueezeOptions
from .influence import InfluenceReport, influence_audit
from .pair_audit import audit_pairs, filter_pairs
from .probes import SqueezeProbeCallback, build_probe_set
from .report import write_squeeze_report
from .rows import extend_for_sft
from .trainer import SqueezeDPOTrainer, SqueezeMixin
from .warning import SqueezeMonitor, SqueezeStoppingCallback, read_log, replay_log

__all__ = [
    "InfluenceReport",
    "SqueezeDPOConfig",
    "SqueezeDPOTrainer",
    "SqueezeMixin",
    "SqueezeMonitor",
    "SqueezeOptions",
    "SqueezeProbeCallback",
    "SqueezeStoppingCallback",
    "audit_pairs",
    "build_probe_set",
    "extend_for_sft",
    "filter_pairs",
    "influence_audit",
    "read_log",
    "replay_log",
    "write_squeeze_report",
]
