"""The mixin in front of TRL's other preference trainers: the same bits, and metrics of the right answers."""

import pytest
import torch
from datasets import Dataset
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.metrics import batch_sums, metrics_from_sums
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer, SqueezeMixin
from tests.trainers.squeeze.pairs_and_logs import fused_outputs, pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*trl.experimental.*"),
]


def unpaired_rows(seed=1):
    rows = pair_rows(8, seed)
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in rows
            for side in ("chosen", "rejected")
        ]
    )


def by_length(completions, **kwargs):
    return [float(len(text)) for text in completions]


LOGITS = {"remove_unused_columns": False}  # else they warn
TRAINERS = {
    "kto": (KTOTrainer, KTOConfig, {}),
    "kto precomputed": (KTOTrainer, KTOConfig, {"precompute_ref_log_probs": True}),
    "apo": (KTOTrainer, KTOConfig, {"loss_type": "apo_zero_unpaired"}),
    "cpo": (CPOTrainer, CPOConfig, LOGITS),
    "simpo": (CPOTrainer, CPOConfig, {**LOGITS, "loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": (ORPOTrainer, ORPOConfig, LOGITS),
    "grpo": (GRPOTrainer, GRPOConfig, {"num_generations": 2, "max_completion_length": 4}),
    "grpo with a reference": (
        GRPOTrainer,
        GRPOConfig,
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.1, "temperature": 0.7, "loss_type": "grpo"},
    ),
}


@pytest.fixture
def make(tmp_path, word_tokenizer):
    def build(kind, ours, **settings):
        parent, config, more = TRAINERS[kind]
        trainer_class = type("Squeezing", (SqueezeMixin, parent), {}) if ours else parent
        squeeze = {name: settings.pop(name) for name in ("squeeze_metrics", "argmax_every") if name in settings}
        probes = {"probe_dataset": pair_rows(3)} if ours else {}
        args = config(str(tmp_path / "out"), **{**QUICK, "max_steps": 2, **more, **settings})
        for name, value in squeeze.items() if ours else ():
            setattr(args, name, value)
        rows = unpaired_rows() if parent is KTOTrainer else pair_rows(8)
        rest = {"reward_funcs": by_length} if parent is GRPOTrainer else {}
        if parent is GRPOTrainer:
            rows = rows.select_columns(["prompt"])
        model = tiny_llama()
        if parent in (KTOTrainer, GRPOTrainer):  # which load the reference from the same place
            model.save_pretrained(tmp_path / "model")
            model = str(tmp_path / "model")
        else:
            model.warnings_issued = {}  # CPO and ORPO write into it
        return trainer_class(
            model=model,
            args=args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=word_tokenizer,
            **rest,
            **probes,
        )

    return build


FULL = {"squeeze_metrics": "full", "argmax_every": 1}


def run(trainer):
    trainer.train()
    trainer.evaluate()
    return trainer


@pytest.mark.parametrize("kind", TRAINERS)
def test_same_bits_as_the_parent(make, kind):
    theirs, ours = (run(make(kind, **settings)) for settings in ({"ours": False}, {"ours": True, **FULL}))
    for (name, parameter), other in zip(theirs.model.named_parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    probed = [entry for entry in ours.state.log_history if "probe/chosen/logp" in entry]
    assert [entry["step"] for entry in probed] == [0, 2]
    log = [entry for entry in ours.state.log_history if entry not in probed]
    for entry, other in zip(theirs.state.log_history, log, strict=True):
        timed = [key for key in entry if "time" in key or "per_second" in key]
        assert {**entry, **dict.fromkeys(timed)} == {key: None if key in timed else other[key] for key in entry}
    logged, evaluated = log[0], log[-1]
    assert {"squeeze/logp_tok_chosen", "squeeze/pressure_rejected", "squeeze/logp_argmax_rejected"} <= logged.keys()
    assert logged["squeeze/logp_argmax_rejected"] > logged["squeeze/logp_tok_rejected"]
    assert evaluated["eval_squeeze/logp_argmax_chosen"] >= evaluated["eval_squeeze/logp_tok_chosen"]
    assert ("squeeze/force" in logged) == (kind in ("kto", "kto precomputed", "apo"))
    assert "squeeze/both_down" not in logged


@pytest.mark.parametrize("kind", ["kto", "cpo", "orpo"])
def test_an_evaluation_is_of_all_the_softmax(make, kind):
    """The last batch is not full; -100 outside of the answers."""
    trainer = make(kind, True, squeeze_metrics="full", per_device_eval_batch_size=6)
    logged = trainer.evaluate()
    batch = trainer.data_collator([dict(row) for row in trainer.eval_dataset])
    sides = None
    if kind == "kto":
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        sides = torch.as_tensor(batch["label"]).long() * 2 - 1
    else:
        whole = trainer.concatenated_inputs(batch, padding_value=0)
        ids, mask, labels = (whole[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels"))
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=mask).logits.double()
    expected = metrics_from_sums(batch_sums(fused_outputs(logits, labels), labels, 50, sides=sides))
    tops = logits[:, :-1].log_softmax(-1).amax(-1)
    chosen = sides > 0 if kind == "kto" else torch.arange(len(labels)) < len(labels) // 2
    expected["squeeze/logp_argmax_chosen"] = tops[chosen][labels[chosen][:, 1:] != -100].mean().item()
    for key, value in expected.items():
        assert logged[f"eval_{key}"] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def test_sides_of_samples_are_those_of_their_advantages(make):
    trainer = make("grpo", True)
    seen = []
    add = trainer._add_batch
    trainer._add_batch = lambda noted, inputs, loss: seen.append((noted, inputs)) or add(noted, inputs, loss)
    trainer.train()
    noted, inputs = seen[0]
    expected = {}
    for side, wanted in (("chosen", inputs["advantages"] > 0), ("rejected", inputs["advantages"] < 0)):
        own = noted["labels"][wanted][:, 1:] != -100
        if own.any():
            expected[side] = noted["outputs"].log_probs[wanted][own].mean().item()
    assert expected
    for side, value in expected.items():
        log = next(entry for entry in trainer.state.log_history if "loss" in entry)
        assert log[f"squeeze/logp_tok_{side}"] == pytest.approx(value, rel=1e-5)


def test_off_is_off(make):
    trainer = make("cpo", True, squeeze_metrics="off")
    trainer.train()
    assert not [key for entry in trainer.state.log_history for key in entry if "squeeze/logp" in key]


@pytest.mark.parametrize("squeeze_metrics", ["off", "default", "full"])
def test_a_loss_of_ones_own_sees_the_model(tmp_path, word_tokenizer, squeeze_metrics):
    """Its class, configuration, parts and attributes, in training and in evaluations."""
    losses = []
    for parent, config in ((DPOTrainer, DPOConfig), (SqueezeDPOTrainer, SqueezeDPOConfig)):

        class Own(parent):
            def _compute_loss(self, model, inputs, return_outputs):
                unwrapped = self.accelerator.unwrap_model(model)
                assert isinstance(unwrapped, LlamaForCausalLM) and unwrapped.config.vocab_size == 50
                assert model.get_output_embeddings() is self.model.lm_head and model.training == self.model.training
                model.batches = getattr(model, "batches", 0) + 1
                return super()._compute_loss(model, inputs, return_outputs)

        ours = {"squeeze_metrics": squeeze_metrics} if config is SqueezeDPOConfig else {}
        args = config(str(tmp_path), **{**QUICK, "max_steps": 2, **ours})
        rows = {"train_dataset": pair_rows(4), "eval_dataset": pair_rows(4, seed=3)}
        trainer = Own(tiny_llama(), tiny_llama(), args, processing_class=word_tokenizer, **rows)
        trainer.train()
        losses.append((trainer.evaluate()["eval_loss"], trainer.model.batches))
    assert losses[0] == losses[1]
