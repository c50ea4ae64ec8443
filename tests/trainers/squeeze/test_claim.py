"""The claim on a tiny model: DPO squeezes, less so after SFT on both answers. benchmarks/squeeze.py has a real one."""

import copy

import pytest
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.probes import SqueezeProbeCallback, build_probe_set
from hf_iclr.trainers.squeeze.rows import extend_for_sft
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def start_and_end(tmp_path, tokenizer, rejected_ratio):
    """60 steps of SFT with or without rejected answers, then 20 of DPO: the probes before and after these."""
    pairs = pair_rows(24, seed=10)
    model = tiny_llama()
    rows = extend_for_sft(pairs, rejected_ratio=rejected_ratio, match_compute=False)
    settings = {**QUICK, "max_steps": 60, "per_device_train_batch_size": 8, "logging_steps": 60}
    SFTTrainer(model, SFTConfig(str(tmp_path), **settings), train_dataset=rows, processing_class=tokenizer).train()
    settings = {**QUICK, "max_steps": 20, "learning_rate": 3e-3, "optim": "rmsprop", "logging_steps": 20}
    args = SqueezeDPOConfig(str(tmp_path), lr_scheduler_type="constant", **settings)
    trainer = SqueezeDPOTrainer(model, copy.deepcopy(model), args, train_dataset=pairs, processing_class=tokenizer)
    probes = build_probe_set(pairs, num_probes=12, test_pairs=pair_rows(8, seed=99))
    trainer.add_callback(SqueezeProbeCallback(probes, trainer=trainer, every=20, probe_budget=1.0, decode_every=0))
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "probe/chosen/logp" in entry]
    return entries[0], entries[-1]


def test_dpo_squeezes_and_less_after_both_answers(tmp_path, word_tokenizer):
    sft, after_sft = start_and_end(tmp_path, word_tokenizer, rejected_ratio=0.0)
    assert after_sft["probe/rejected/delta0"] < -3
    for kind in ("other_train", "other_test", "permuted", "random_words"):
        assert after_sft[f"probe/{kind}/delta0"] < -0.5
    assert after_sft["probe/rejected/logp_argmax"] > sft["probe/rejected/logp_argmax"] + 0.3
    assert after_sft["probe/rejected/pressure"] > sft["probe/rejected/pressure"] + 0.1
    extend, after_extend = start_and_end(tmp_path, word_tokenizer, rejected_ratio=1.0)
    assert extend["probe/rejected/valley_frac"] < 0.5 * sft["probe/rejected/valley_frac"]
    assert after_extend["probe/rejected/delta0"] < -3
    assert after_extend["squeeze/index"] < 0.8 * after_sft["squeeze/index"]
