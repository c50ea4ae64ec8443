"""Two processes end where one does, and the same functions work on a model sharded by FSDP2."""

import pytest
import torch
from peft import LoraConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoTokenizer
from trl.trainer import add_fused_lm_head

from hf_iclr import DeepSafetySFTConfig, DeepSafetySFTTrainer, constrained_sft_loss
from hf_iclr.trainers.deep_safety.constrained_loss import answer_positions, schedule_betas
from tests.trainers.distributed import run_in_two
from tests.trainers.tiny import QUICK, losses, tiny_llama, triplet_rows, word_rows


CASES = [
    {"reference": "precompute", "rows": 20},
    {"reference": "window", "rows": 16, "safety_dataset": triplet_rows()},
    {"reference": "frozen", "rows": 20},
    {"reference": "adapter", "rows": 20, "accumulation": 2},
]
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def train(folder, batch_size, tokenizer_path, case):
    """Losses, logged weights, parameters and stored references of a short run."""
    trainer = DeepSafetySFTTrainer(
        tiny_llama(),
        args=DeepSafetySFTConfig(
            str(folder),
            **{**QUICK, "per_device_train_batch_size": batch_size, "per_device_eval_batch_size": 4},
            reference=case["reference"],
            gradient_accumulation_steps=case.get("accumulation", 1),
        ),
        train_dataset=word_rows(case["rows"]),
        eval_dataset=word_rows(7, seed=4),
        safety_dataset=case.get("safety_dataset"),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_path),
        peft_config=LORA if case["reference"] == "adapter" else None,
    )
    trainer.train()
    stored = case["reference"] == "precompute"
    return {
        "losses": losses(trainer),
        "weights": losses(trainer, "constraint/weight_initial"),
        "eval": [trainer.evaluate()["eval_constrained_loss"]],
        "references": [value for row in trainer.train_dataset["ref_logps"] for value in row] if stored else [],
        "parameters": {name: value.detach().cpu() for name, value in trainer.model.named_parameters()},
    }


def sharded_step(sharded):
    """The constrained loss and the norm of its gradient at the embeddings."""
    model, reference = tiny_llama(), tiny_llama(seed=3)
    for each in (model, reference):
        add_fused_lm_head(each)
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for layer in each.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(each, mesh=mesh)
    ids = torch.randint(1, 49, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :4] = -100
    outputs = model(input_ids=ids, labels=labels, fused_lm_head=True)
    with torch.no_grad():
        ref_logps = reference(input_ids=ids, labels=labels, fused_lm_head=True).log_probs
    betas = schedule_betas(answer_positions(outputs.label_mask), 0.5, 2.0, 0.1, 5)
    loss = (constrained_sft_loss(outputs.log_probs, ref_logps, betas) * outputs.label_mask).sum()
    loss.backward()
    gradient = model.model.embed_tokens.weight.grad
    return [loss.item(), (gradient.full_tensor() if sharded else gradient).norm().item()]


def everything(folder, batch_size, tokenizer_path, sharded):
    runs = [train(folder, batch_size, tokenizer_path, case) for case in CASES]
    return runs, sharded_step(sharded)


@pytest.fixture(scope="module")
def results(tmp_path_factory, word_tokenizer):
    """What two processes return, and what this one does."""
    folder = tmp_path_factory.mktemp("distributed")
    word_tokenizer.save_pretrained(folder / "tokenizer")
    two = run_in_two(everything, folder, folder / "two", 5, str(folder / "tokenizer"), True)
    return two, everything(folder / "one", 10, str(folder / "tokenizer"), False)


@pytest.mark.parametrize("case", range(len(CASES)), ids=[case["reference"] for case in CASES])
def test_two_processes_end_where_one_does(results, case):
    two, (runs, _) = results
    for (their_runs, _), name in ((result, name) for result in two for name in ("losses", "weights", "eval")):
        assert their_runs[case][name] == pytest.approx(runs[case][name], abs=1e-5)
    for their_runs, _ in two:
        assert their_runs[case]["references"] == pytest.approx(runs[case]["references"], abs=1e-5)
        for name, value in runs[case]["parameters"].items():
            torch.testing.assert_close(their_runs[case]["parameters"][name], value, atol=1e-4, rtol=0)


def test_the_loss_on_a_model_sharded_by_fsdp2(results):
    two, (_, whole) = results
    for _, sharded in two:
        assert sharded == pytest.approx(whole, rel=1e-5)
