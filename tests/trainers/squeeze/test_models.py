"""Models that are more than a decoder: experts with a loss of their own, images."""

import copy

import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MixtralConfig,
    MixtralForCausalLM,
    set_seed,
)
from trl import DPOConfig, DPOTrainer

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.probes import build_probe_set
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


def assert_same_steps(make_model, processing_class, rows, folder):
    """Two steps with TRL's trainer and with ours; the logs of ours."""
    histories = []
    for trainer_class, config in ((DPOTrainer, DPOConfig), (SqueezeDPOTrainer, SqueezeDPOConfig)):
        full = {"squeeze_metrics": "full"} if config is SqueezeDPOConfig else {}
        args = config(str(folder), **{**QUICK, "max_steps": 2, "per_device_train_batch_size": 2, **full})
        trainer = trainer_class(
            make_model(), make_model(), args, train_dataset=rows, processing_class=processing_class
        )
        trainer.train()
        histories.append(trainer.state.log_history[:2])
    for entry, other in zip(*histories, strict=True):
        assert {key: other[key] for key in entry} == entry
    assert histories[1][0]["squeeze/argmax_gap_rejected"] > 0
    return histories[1]


def test_mixture_of_experts(word_tokenizer, tmp_path):
    def mixtral():
        set_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=50,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                num_local_experts=4,
                router_aux_loss_coef=0.1,
                initializer_range=0.4,
                bos_token_id=None,
                eos_token_id=49,
                pad_token_id=0,
            )
        )

    logs = assert_same_steps(mixtral, word_tokenizer, pair_rows(4), tmp_path)
    assert logs[0]["aux_loss"] > 0


def test_images(word_tokenizer, tmp_path):
    """A tiny Llava on images of 28 x 28 pixels, four patches each."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}

    def llava():
        config = LlavaConfig(
            vision_config=CLIPVisionConfig(**tower, image_size=28, patch_size=14, projection_dim=16),
            text_config=tiny_llama(vocab_size=51).config,
            image_token_index=50,
            image_seq_length=4,
            vision_feature_layer=-1,
        )
        set_seed(0)
        return LlavaForConditionalGeneration(config)

    pixels = torch.randint(255, (4, 28, 28, 3), dtype=torch.uint8).numpy()
    rows = [
        {**row, "prompt": f"<image> {row['prompt']}", "images": [Image.fromarray(image)]}
        for row, image in zip(pair_rows(4), pixels, strict=True)
    ]
    moved = [{**row, "images": other["images"]} for row, other in zip(rows, [*rows[1:], rows[0]], strict=True)]
    rows = Dataset.from_list(rows)
    assert_same_steps(llava, processor, rows, tmp_path)

    def watched(probes):
        args = SqueezeDPOConfig(str(tmp_path), **{**QUICK, "max_steps": 1, "learning_rate": 0.0}, probe_budget=1.0)
        return SqueezeDPOTrainer(
            llava(), llava(), args, train_dataset=rows, eval_dataset=rows, processing_class=processor,
            probe_dataset=probes,
        )  # fmt: skip

    values, fingerprints = [], set()
    for probes in (build_probe_set(rows), build_probe_set(Dataset.from_list(moved))):
        trainer = watched(probes)
        trainer.train()
        values.append(next(e["probe/chosen/logp"] for e in trainer.state.log_history if "probe/chosen/logp" in e))
        fingerprints |= {
            one._sets[0].fingerprint for one in trainer.callback_handler.callbacks if hasattr(one, "_sets")
        }
    assert values[0] == pytest.approx(trainer.evaluate()["eval_squeeze/logp_tok_chosen"], abs=1e-5)
    assert abs(values[0] - values[1]) > 1e-5 and len(fingerprints) == 2
    with pytest.raises(ValueError, match="should have images if the trained rows do"):
        watched(build_probe_set(rows.remove_columns("images"))).train()
