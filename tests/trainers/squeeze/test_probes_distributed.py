"""Two gloo processes share the probes and log what one does; scoring and decoding with FSDP2's sharded parameters."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.squeeze.probe_scoring import COLUMNS, decode_answers, score_answers
from hf_iclr.trainers.squeeze.probes import SqueezeProbeCallback, build_probe_set
from tests.trainers.distributed import run_in_two
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


def train(processes, tokenizer, folder):
    """Two steps; five probes are one more than two processes can share evenly."""
    settings = {
        **QUICK,
        "per_device_train_batch_size": 4 // processes,
        "max_steps": 2,
        "lr_scheduler_type": "constant",
    }
    rows = pair_rows().remove_columns("rejected").rename_column("chosen", "completion")
    trainer = SFTTrainer(
        tiny_llama(), SFTConfig(str(folder / "out"), **settings), train_dataset=rows, processing_class=tokenizer
    )
    probes = build_probe_set(pair_rows(), num_probes=5)
    trainer.add_callback(SqueezeProbeCallback(probes, trainer=trainer, every=1, max_new_tokens=4, batch_size=3))
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    logged = [entry for entry in trainer.state.log_history if "probe/chosen/logp" in entry]
    # Own samples are drawn from the random states of the processes
    return [{k: v for k, v in e.items() if k.startswith(("probe", "repeat", "squeeze"))} for e in logged]


def test_two_processes_are_one(word_tokenizer, tmp_path):
    alone = train(1, word_tokenizer, tmp_path)
    assert len(alone) == 3 and alone[-1]["probe/permuted/delta0"] != 0
    for logged in run_in_two(train, tmp_path, 2, word_tokenizer, tmp_path):
        for entry, other in zip(alone, logged, strict=True):
            assert other == pytest.approx(entry, rel=1e-3, abs=1e-5)


def measure(sharded, tokenizer):
    """Scores of three answers and greedy answers to three prompts; two processes get two and one, then one again."""
    accelerator = Accelerator(cpu=True)
    model = tiny_llama()
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    trainer = SimpleNamespace(accelerator=accelerator, model=model, model_wrapped=model)
    weight = type(model.lm_head.weight).__name__  # the outermost module stays whole after its first forward
    answers = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10]), ([11, 12], [13])]
    table = score_answers(trainer, answers, [True, False, True], batch_size=1)
    greedy = decode_answers(trainer, tokenizer, [prompt for prompt, _ in answers], 5, batch_size=1)
    return table, greedy, weight


def test_sharded_parameters_give_the_same(word_tokenizer, tmp_path):
    table, greedy, _ = measure(False, word_tokenizer)
    assert table[:, 0].tolist() == [2, 4, 1] and (table[:, COLUMNS.index("logp_tok")] < 0).all()
    assert (table[:, COLUMNS.index("logp_argmax")] < 0).tolist() == [True, False, True]
    for others, other_greedy, weight in run_in_two(measure, tmp_path, True, word_tokenizer):
        assert weight == "DTensor"
        torch.testing.assert_close(others, table, rtol=1e-5, atol=1e-6)
        assert other_greedy == greedy
