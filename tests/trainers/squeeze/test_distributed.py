"""Two gloo processes against one: the same metrics and weights with DDP, and with FSDP2's sharded parameters."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from trl.trainer import add_fused_lm_head

from hf_iclr.trainers.squeeze.argmax import HiddenStateTap, exact_argmax
from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.metrics import batch_sums, metrics_from_sums
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.distributed import run_in_two
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

OUTPUTS = ("log_probs", "entropy", "is_top1", "log_sum_sq_probs")


def train(processes, tokenizer, folder):
    """Three steps of four pairs, and an evaluation of five: one more than fits, so that a process repeats some."""
    per_process = {"per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 4 // processes}
    args = SqueezeDPOConfig(
        str(folder / "out"),
        squeeze_metrics="full",
        argmax_every=1,
        **{**QUICK, **per_process},
    )
    trainer = SqueezeDPOTrainer(
        tiny_llama(),
        tiny_llama(),
        args=args,
        train_dataset=pair_rows(),
        eval_dataset=pair_rows(5, seed=2),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.evaluate()
    assert trainer.accelerator.num_processes == processes
    metrics = [{k: v for k, v in entry.items() if "squeeze" in k} for entry in trainer.state.log_history]
    return metrics, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def test_two_processes_are_one(word_tokenizer, tmp_path):
    metrics, weights = train(1, word_tokenizer, tmp_path)
    assert sum("eval_squeeze/rest_logmass_chosen" in entry for entry in metrics) == 1
    for others, other_weights in run_in_two(train, tmp_path, 2, word_tokenizer, tmp_path):
        for entry, other in zip(metrics, others, strict=True):
            assert other == pytest.approx(entry, rel=1e-4, abs=1e-6)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-4, atol=1e-5)


def measure(sharded):
    """What the trainer does around a forward, and the gradient's norm so that a backward is seen to pass."""
    model = tiny_llama()
    add_fused_lm_head(model, outputs=OUTPUTS)
    if sharded:
        torch.distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model.lm_head, mesh=mesh)
        fully_shard(model, mesh=mesh)
    input_ids = torch.randint(1, 49, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, :4] = -100
    tap = HiddenStateTap(model)
    outputs = model(input_ids, labels=labels, fused_lm_head=True)
    log_probs = outputs.log_probs.view_as(outputs.log_probs)
    loss = -torch.nn.functional.logsigmoid((log_probs[:2] - log_probs[2:]).sum(1)).mean()
    (gradients,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    argmax = exact_argmax(model, tap.pop()[:, :-1], labels[:, 1:])
    metrics = metrics_from_sums(batch_sums(outputs, labels, 50, gradients, outputs.log_probs.sum(1) + 1, argmax))
    loss.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    sharded_head = type(model.lm_head.weight).__name__ == "DTensor"
    return metrics, norm.full_tensor().item() if sharded else norm.item(), sharded_head


def test_sharded_parameters_give_the_same(tmp_path):
    metrics, norm, sharded_head = measure(False)
    assert not sharded_head and metrics["squeeze/argmax_gap_rejected"] > 0
    for others, other_norm, other_head in run_in_two(measure, tmp_path, True):
        assert other_head
        assert others == pytest.approx(metrics, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-4)
