"""The callback in this project's own trainers: values of the rows they train, and weights as without it."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_iclr import (
    DeepSafetySFTConfig,
    DeepSafetySFTTrainer,
    InRunDataShapleyCallback,
    SqueezeDPOConfig,
    SqueezeDPOTrainer,
)
from tests.trainers.data_shapley.test_identity import LORA
from tests.trainers.tiny import QUICK, tiny_llama, triplet_rows, word_rows


def weights(trainer):
    trainer.train()
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("settings", "recovery"),
    [({}, False), ({"reference": "frozen"}, False), ({"constrain": "none"}, False), ({"safety_ratio": 0.25}, True)],
)
def test_deep_safety(settings, recovery, full, word_tokenizer, tmp_path):
    found, shapley = [], InRunDataShapleyCallback(word_rows(5, seed=3), 1, adam_warmup=0, min_scored_share=0.99)
    for callbacks in ([], [shapley]):
        trainer = DeepSafetySFTTrainer(
            tiny_llama(),
            args=DeepSafetySFTConfig(str(tmp_path / str(len(found))), **QUICK, **settings),
            train_dataset=word_rows(12),
            safety_dataset=triplet_rows() if recovery else None,
            processing_class=word_tokenizer,
            peft_config=None if full else LORA,
            callbacks=callbacks,
        )
        found.append(weights(trainer))
    assert all(map(torch.equal, *found))
    values = shapley.result.values()
    assert len(values) == 8 and np.isfinite(values).all() and (values != 0).all()  # but for Adam's first step
    of_rows = shapley.result.to_dataset(word_rows(12))["shapley_value"][:]
    assert sum(value is not None for value in of_rows) == (6 if recovery else 8)


@pytest.mark.parametrize("settings", [{}, {"squeeze_metrics": "full"}, {"precompute_ref_log_probs": True}])
def test_squeeze(settings, word_tokenizer, tmp_path):
    def pairs(count, seed):
        rows, others = word_rows(count, seed=seed), word_rows(count, seed=seed + 50)
        columns = {"prompt": rows["prompt"][:], "chosen": rows["completion"][:], "rejected": others["completion"][:]}
        return Dataset.from_dict(columns)

    found, shapley = [], InRunDataShapleyCallback(pairs(5, 3), 1, adam_warmup=0)
    for callbacks in ([], [shapley]):
        trainer = SqueezeDPOTrainer(
            tiny_llama(tie_word_embeddings=False),
            args=SqueezeDPOConfig(str(tmp_path / str(len(found))), **QUICK, **settings),
            train_dataset=pairs(12, 1),
            processing_class=word_tokenizer,
            peft_config=LORA,
            callbacks=callbacks,
        )
        found.append(weights(trainer))
    assert all(map(torch.equal, *found))
    values = shapley.result.values()
    assert len(values) == 8 and np.isfinite(values).all() and (values != 0).all()
