"""
DPO as TRL does it, with one class swapped: it logs where probability mass goes, and writes a report at the end.

    python examples/squeeze_dpo.py                  # SmolLM2 and a few pairs, offline, a few minutes on two cores
    python examples/squeeze_dpo.py model dataset    # any causal language model, any preference dataset
"""

import sys

from datasets import load_dataset
from peft import LoraConfig

from hf_iclr import SqueezeDPOConfig, SqueezeDPOTrainer, SqueezeStoppingCallback, build_probe_set
from hf_iclr.tour.demo.language_model import demo_model_path
from hf_iclr.tour.demo.pairs import demo_pairs


if len(sys.argv) == 3:
    model, pairs = sys.argv[1], load_dataset(sys.argv[2], split="train")
    settings = {}
else:
    model, pairs = str(demo_model_path()), demo_pairs().select(range(8))
    settings = {
        "max_steps": 20,
        "learning_rate": 1e-4,
        "per_device_train_batch_size": 2,
        "logging_steps": 5,
        "probe_every": 5,
        "probe_budget": 1.0,  # a pass every 5 steps, though it takes more time than they do
        "bf16": False,
        "activation_checkpointing": False,
    }

trainer = SqueezeDPOTrainer(  # was: DPOTrainer
    model,
    args=SqueezeDPOConfig("squeeze_dpo", squeeze_metrics="full", report_to="none", **settings),  # was: DPOConfig
    train_dataset=pairs,
    probe_dataset=build_probe_set(pairs, num_probes=min(64, len(pairs) // 2)),  # new
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[SqueezeStoppingCallback(action="warn")],  # new
)
trainer.train()

last = next(entry for entry in reversed(trainer.state.log_history) if "squeeze/index" in entry)
print(f"Squeeze index {last['squeeze/index']:+.3f}, change of the chosen answers {last['probe/chosen/delta0']:+.3f}")
print("Report:", trainer.squeeze_report("squeeze_dpo/report"))
