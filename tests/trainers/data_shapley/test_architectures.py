"""Values of one step equal one backward pass a row, for models of images, sound and text with parts of their own."""

import logging

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_iclr.trainers import InRunDataShapleyCallback
from tests.trainers.tiny import QUICK, tiny_llama


EXPERTS = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,
}
SPEECH = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}
STAGES = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4, "image_size": 32}
QWEN = {**EXPERTS, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 1],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
    "decoder_hidden_size": 8,
}
MAMBA = {"vocab_size": 50, "hidden_size": 16, "state_size": 8, "num_hidden_layers": 2}
BERT = {"vocab_size": 50, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
T5 = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "decoder_start_token_id": 0}
WHISPER = {
    "vocab_size": 50,
    "num_mel_bins": 8,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "d_model": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DEEPSEEK = {
    "moe_intermediate_size": 16,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SPARSE = {"intermediate_size": 16, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
NEXT = {
    "shared_expert_intermediate_size": 16,
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
MODELS = {
    "ConvNext": ("ImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
    "ResNet": ("ImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}),
    "Segformer": ("SemanticSegmentation", {**SEGFORMER, "num_labels": 2}),
    "Swinv2": ("ImageClassification", STAGES),
    "Wav2Vec2": ("SequenceClassification", SPEECH),
    "SEW": ("SequenceClassification", {**SPEECH, "squeeze_factor": 2}),
    "Bert": ("MultipleChoice", {**BERT, "hidden_size": 16}),
    "Whisper": ("ConditionalGeneration", WHISPER),
    "T5": ("ConditionalGeneration", {**T5, "num_heads": 4}),
    "Mamba2": ("CausalLM", {**MAMBA, "expand": 2, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}),
    "Qwen3Moe": ("CausalLM", QWEN),
    "Mixtral": ("CausalLM", {**EXPERTS, "num_local_experts": 4}),
    "GptOss": ("CausalLM", {**EXPERTS, **SPARSE, "rope_parameters": None}),
    "DeepseekV3": ("CausalLM", {**EXPERTS, **DEEPSEEK}),
    "Qwen3Next": ("CausalLM", {**QWEN, **NEXT}),
}
ADAPTERS = {
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "VeraConfig": {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_weights": False},
    "OFTConfig": {"target_modules": ["q_proj", "v_proj"], "oft_block_size": 4, "init_weights": False},
    "LNTuningConfig": {},
    "LoraConfig": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4], "modules_to_save": ["lm_head"]},
}


def make(name):
    """A random model without dropout, whose batch normalisation keeps its running statistics, and nine rows for it."""
    torch.manual_seed(0)
    kind, settings = MODELS[name]
    model = getattr(transformers, f"{name}For{kind}")(getattr(transformers, f"{name}Config")(**settings))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, torch.nn.BatchNorm2d):
            module.train = lambda mode=True: None
            module.training = False
        for option in [found for found in vars(module) if "drop" in found and isinstance(vars(module)[found], float)]:
            setattr(module, option, 0.0)
    for option in ("mask_time_prob", "mask_feature_prob", "layerdrop"):
        if hasattr(model.config, option):
            setattr(model.config, option, 0.0)
    # four tokens a row and four rows a batch: whose dimension is whose has to be found out
    ids = torch.randint(3, 49, (9, 4))
    shapes = {"pixel_values": (9, 3, 32, 32), "input_values": (9, 2000), "input_features": (9, 8, 32)}
    inputs = {model.main_input_name: torch.randn(shapes.get(model.main_input_name, (9, 4)))}
    if model.main_input_name == "input_ids":
        inputs = {"input_ids": ids}
    if kind == "MultipleChoice":
        inputs = {"input_ids": torch.randint(3, 49, (9, 3, 4))}
        inputs["attention_mask"] = (torch.arange(4) < torch.tensor([[2], [4], [3]])).long().expand(9, 3, 4)
    labels = {"SemanticSegmentation": torch.randint(0, 2, (9, 8, 8)), "ImageClassification": torch.arange(9) % 2}
    labels["MultipleChoice"] = torch.arange(9) % 3
    inputs["labels"] = labels.get(kind, torch.arange(9) % 2 if kind == "SequenceClassification" else ids)
    return model, [{key: value[row] for key, value in inputs.items()} for row in range(9)]


def gradient(model, rows, autocast=False):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16, autocast):
        loss = model(**default_data_collator(rows)).loss
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True)
        ]
    ).double()


def compare(model, rows, tmp_path, caplog, tolerance=1e-4, times=1.0, bf16=False):
    """The callback's values of a step of SGD with four rows, and those of four backward passes, perhaps multiplied."""
    target = gradient(model.eval(), rows[4:], bf16)
    expected = [times * 1e-2 / 4 * float(gradient(model.train(), [row], bf16) @ target) for row in rows[:4]]
    shapley = InRunDataShapleyCallback(rows[4:], refresh_every=1, exact=True)
    settings = {**QUICK, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    args = TrainingArguments(tmp_path, **{**settings, "bf16": bf16}, dataloader_drop_last=True, label_names=["labels"])
    with caplog.at_level(logging.WARNING, "hf_iclr"):
        Trainer(model, args, train_dataset=rows[:4], data_collator=default_data_collator, callbacks=[shapley]).train()
    assert shapley.result.values().sort_index().to_numpy() == pytest.approx(
        expected, abs=tolerance * max(map(abs, expected))
    )
    assert "leave out" not in caplog.text


@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_one_backward_pass_a_row(name, tmp_path, caplog):
    compare(*make(name), tmp_path, caplog)


@pytest.mark.parametrize("name", ["ConvNext", "ResNet", "Segformer", "Whisper"])
def test_modules_that_are_run_again_are_run_under_autocast_as_before(name, tmp_path, caplog):
    """Convolutions and batch normalisations, which without it refuse inputs in bfloat16 beside weights in float32."""
    compare(*make(name), tmp_path, caplog, tolerance=5e-3, bf16=True)


def test_lora_on_the_parameters_of_experts_is_scored(tmp_path, caplog):
    model, rows = make("Qwen3Moe")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False)
    compare(get_peft_model(model, lora), rows, tmp_path, caplog)


def adapted(name, **settings):
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 49, (9, 6))]
    return peft.get_peft_model(tiny_llama(), getattr(peft, name)(task_type="CAUSAL_LM", **settings)), rows


@pytest.mark.parametrize("name", ADAPTERS)
def test_other_adapters_have_the_values_of_one_backward_pass_a_row(name, tmp_path, caplog):
    torch.manual_seed(0)
    compare(*adapted(name, **ADAPTERS[name]), tmp_path, caplog)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_valued_by_the_loss_that_the_trainer_takes(name, tmp_path, caplog):
    """
    The last of them predicts the first of a row's six tokens, which Trainer leaves out of its count of what is
    predicted: its losses, that of evaluation too, are six fifths of the mean.
    """
    torch.manual_seed(0)
    compare(*adapted(name, num_virtual_tokens=3), tmp_path, caplog, times=(6 / 5) ** 2)


def test_an_adapter_that_draws_random_numbers_is_refused_by_name(tmp_path, caplog):
    model, rows = adapted("LoHaConfig", target_modules=["q_proj"], init_weights=False)
    with pytest.raises(ValueError, match="q_proj.hada_w1_a.*it draws random numbers"):
        compare(model, rows, tmp_path, caplog)
