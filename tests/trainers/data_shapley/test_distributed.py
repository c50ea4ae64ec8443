"""Two gloo processes give the values of one; FSDP2 with LoRA in a plain loop; what is refused, and why."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from hf_iclr.trainers.data_shapley.callback import InRunDataShapleyCallback
from hf_iclr.trainers.data_shapley.gradients.coverage import applied_factor, clip_factor, find_gaps
from hf_iclr.trainers.data_shapley.gradients.direction import is_sharded
from hf_iclr.trainers.data_shapley.support import check_trainer
from tests.trainers.data_shapley.test_callback import callback, lora, make, token_rows
from tests.trainers.distributed import run_in_two
from tests.trainers.tiny import tiny_llama


def train(processes, folder):
    """Values of three clipped AdamW steps after one without, by row, in double precision as in `loop`."""
    shapley = callback(adam_warmup=1, targets={"other": token_rows(3, seed=4)}, batch_size=2)
    settings = {
        "per_device_train_batch_size": 4 // processes,
        "max_grad_norm": 0.5,
        "optim": "adamw_torch",
        "learning_rate": 1e-4,
        "max_steps": 4,
    }
    trainer = make(folder, lora(tiny_llama()).double(), [shapley], **settings)
    trainer.train()
    assert trainer.accelerator.num_processes == processes
    if trainer.accelerator.process_index:
        return None
    return shapley.result.rows.sort_values(["step", "index"])


def test_two_processes_are_one(tmp_path):
    alone = train(1, tmp_path / "one")
    (tmp_path / "two").mkdir()
    together, _ = run_in_two(train, tmp_path / "two", 2, tmp_path / "two" / "out")
    assert len(alone) == 12
    for column in ("step", "index", "tokens"):
        assert alone[column].tolist() == together[column].tolist()
    for column in ("value", "value_other"):
        assert together[column].tolist() == pytest.approx(alone[column].tolist(), rel=1e-8)


def loop(processes, sharded, full=False):
    """
    A loop over the same rows, each process with its part, with parameters sharded or not. In double precision: Adam
    divides by second moments of the same rows' gradients, which are no more than rounding where rows cancel out, so
    that single precision says nothing below a thousandth.
    """
    accelerator = Accelerator(cpu=True)
    model = (tiny_llama() if full else lora(tiny_llama())).double()
    if sharded:
        mesh = init_device_mesh("cpu", (processes,))
        for layer in (model if full else model.base_model.model).model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = token_rows(12).with_format("torch")
    batches = [rows.select(range(start, start + 4)) for start in (0, 4, 8)]
    mine = [batch.shard(processes, accelerator.process_index, contiguous=True) for batch in batches]
    order = [row for batch in mine for row in batch]
    loader = DataLoader(order, batch_size=4 // processes)
    val = DataLoader(token_rows(5, seed=9).with_format("torch"), batch_size=2)
    with InRunDataShapleyCallback.attach(
        model, optimizer, loader, val, refresh_every=2, adam_warmup=1, output_dir=None, rank=4
    ) as shapley:
        for batch in loader:
            model.train()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        stored = [(step.step, step.values[:, 0], step.record) for step in shapley._records.collected]
    return [(step, values.tolist(), record) for step, values, record in stored], is_sharded(model)


@pytest.mark.parametrize("full", [False, True])
def test_sharded_parameters_have_the_values_of_whole_ones(full, tmp_path):
    """All of them by the sketch, or adapters."""
    whole, _ = loop(1, False, full)
    parts = run_in_two(loop, tmp_path, 2, True, full)
    assert all(found for _, found in parts)
    for step, (number, values, record) in enumerate(whole):
        (first, *_), (second, *_) = (found[step] for found, _ in parts)
        assert first == second == number
        both = [value for found, _ in parts for value in found[step][1]]
        assert both == pytest.approx(values, rel=1e-8)
        for key in record:
            assert parts[0][0][step][2][key] == pytest.approx(record[key], rel=1e-8)
    assert [number for number, _, _ in whole] == [2, 3]


def spread():
    """A model whose layers are on two devices."""
    model = tiny_llama()
    model.lm_head.to("meta")
    return model


def trainer_with(**settings):
    found = {"is_fsdp_enabled": False, "model": tiny_llama(), **settings}
    found |= {"callback_handler": SimpleNamespace(callbacks=[]), "model_wrapped": found["model"]}
    args = SimpleNamespace(n_gpu=found.pop("n_gpu", 1), use_liger_kernel=found.pop("liger", False))
    parallel = SimpleNamespace(tp_size=1, cp_size=1, sp_size=1) if "parallel" not in found else found.pop("parallel")
    return SimpleNamespace(args=args, accelerator=SimpleNamespace(parallelism_config=parallel), **found)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"n_gpu": 2}, "DataParallel, whose replicas"),
        ({"parallel": SimpleNamespace(tp_size=2)}, "tensor, context or sequence parallelism"),
        ({"parallel": SimpleNamespace(cp_size=2)}, "tensor, context or sequence parallelism"),
        ({"is_fsdp_enabled": True}, "FSDP other than version 2"),
        ({"liger": True}, "Liger's fused loss"),
        ({"model": spread()}, "layers on several devices"),
    ],
)
def test_what_hides_scores_is_refused_with_the_reason(settings, reason):
    with pytest.raises(ValueError, match=reason):
        check_trainer(trainer_with(**settings), InRunDataShapleyCallback)


def test_lora_with_liger_is_fine():
    check_trainer(trainer_with(liger=True, model=lora(tiny_llama())), InRunDataShapleyCallback)
    check_trainer(trainer_with(), InRunDataShapleyCallback)


def test_an_fp16_scaler_is_divided_out_whether_gradients_were_unscaled_or_not():
    """Scores are of a loss times 65536. Clipping unscales gradients; without it the scaler does so in its step."""
    scale, scores = 65536.0, np.array([3.0, -1.0])  # of the unscaled loss, as they are compared
    for clip, gradient in ((0.25, 0.25 * scores), (1.0, scores), (1.0, scale * scores)):
        assert applied_factor(clip_factor(gradient, scores), scale) == pytest.approx(clip)
    assert applied_factor(0.7, 1.0) == 0.7


def test_the_clip_factor_is_that_of_groups_without_a_gap():
    scores = np.array([2.0, -3.0, 1.0, 0.0])
    gradient = np.array([1.0, -1.5, 4.0, 0.0])
    factor = clip_factor(gradient, scores)
    assert factor == 0.5
    assert find_gaps(gradient, scores, np.abs(scores), factor, 1e-3) == [2]
    assert find_gaps(0.5 * scores, scores, np.abs(scores), factor, 1e-3) == []
    assert clip_factor(np.zeros(2), np.zeros(2)) == 1
