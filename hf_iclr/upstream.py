"""The undocumented upstream functions we override or call, why, and the parameters we wrote against."""

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Seam:
    """
    An upstream function that is in no documentation.

    Args:
        reason (`str`):
            What we do with it, and why nothing documented serves.
        expected (`str`):
            The parameters we wrote against, without annotations, which read differently from one Python to the next.
        older (`tuple[str, ...]`, *optional*, defaults to `()`):
            Those of older releases that we are tested with, where they differ.
    """

    reason: str
    expected: str
    older: tuple[str, ...] = ()


_GENERATION = "transformers.generation.utils:GenerationMixin."
_CANDIDATES = "transformers.generation.candidate_generator:AssistedCandidateGenerator."
_SAM2 = "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel."

# Where each stands, as "module:qualified.name". Tested with transformers 5.22 to 5.24 and trl 1.16.
SEAMS = {
    f"{_GENERATION}_assisted_decoding": Seam(
        "overridden by the cascade's loop; `custom_generate` would have to hand encoder-decoders back to it",
        "(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, "
        "inputs_tensor=None, assistant_model=None, assistant_tokenizer=None, tokenizer=None, **model_kwargs)",
    ),
    f"{_GENERATION}_get_candidate_generator": Seam(
        "overridden to record what is drafted; `generate` takes no candidate generator",
        "(self, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model=None, "
        "target_tokenizer=None, assistant_tokenizer=None)",
    ),
    f"{_GENERATION}_validate_generation_mode": Seam(
        "overridden to allow several sequences a prompt; `generate` checks before any hook of its caller",
        "(self, generation_mode, generation_config, generation_mode_kwargs)",
    ),
    f"{_GENERATION}_prepare_generation_config": Seam(
        "called to calibrate with `generate`'s own settings; `generate` shows them for one prompt and length only",
        "(self, generation_config, **kwargs)",
    ),
    f"{_GENERATION}_prepare_special_tokens": Seam(
        "called because `_get_logits_processor` reads what it leaves on the config",
        "(self, generation_config, kwargs_has_attention_mask=None, device=None, batch_size=None)",
    ),
    f"{_GENERATION}_get_logits_processor": Seam(
        "called to process teacher-forced logits as `generate` would; it hands out no processors of its own",
        "(self, generation_config, input_ids_seq_length=None, encoder_input_ids=None, prefix_allowed_tokens_fn=None, "
        "logits_processor=None, device=None, model_kwargs=None, negative_prompt_ids=None, "
        "negative_prompt_attention_mask=None)",
    ),
    f"{_CANDIDATES}get_candidates": Seam(
        "overridden to keep each draft; candidate generators are in no documentation",
        "(self, input_ids, **kwargs)",
    ),
    f"{_CANDIDATES}update_candidate_strategy": Seam(
        "overridden to count what is accepted; only the generator is notified",
        "(self, input_ids, scores, num_matches)",
    ),
    "transformers.trainer:Trainer._get_train_sampler": Seam(
        "overridden to mix recovery rows into each step; `get_train_dataloader` is the whole loader",
        "(self, train_dataset=None)",
    ),
    "transformers.trainer:Trainer._save": Seam(
        "overridden to merge adapters in what is saved; `save_model` takes no state dict",
        "(self, output_dir=None, state_dict=None)",
    ),
    "trl.trainer.sft_trainer:SFTTrainer._set_signature_columns_if_needed": Seam(
        "overridden to keep two columns; `remove_unused_columns=False` would keep all",
        "(self)",
    ),
    "trl.trainer.sft_trainer:SFTTrainer._prepare_dataset": Seam(
        "called to tokenize validation rows as the trainer did its own, which only its constructor does in the open; "
        "overridden to pack a third column",
        "(self, dataset, processing_class, args, packing, formatting_func, dataset_name)",
    ),
    "trl.trainer.dpo_trainer:DPOTrainer._prepare_dataset": Seam(
        "overridden to refuse empty answers before they are tokenized, called as that of SFT; the same",
        "(self, dataset, processing_class, args, dataset_name)",
    ),
    "trl.trainer.dpo_trainer:DPOTrainer._precompute_ref_logps": Seam(
        "called to give validation rows a reference as training rows got it; only the constructor does it in the open",
        "(self, dataset, name, batch_size)",
    ),
    "trl.trainer.utils:add_fused_lm_head": Seam(
        "called to ask for more outputs of each token than the loss reads; exported by `trl.trainer`, not documented",
        "(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',))",
    ),
    "trl.models.utils:prepare_deepspeed": Seam(
        "called for a reference model; accelerate prepares one DeepSpeed engine, the trainer's",
        "(model, accelerator)",
    ),
    "trl.models.utils:prepare_fsdp": Seam(
        "called for a reference model; accelerate shards one model, the trainer's",
        "(model, accelerator)",
    ),
    "trl.scripts.sft:main": Seam(
        "called with our trainer in the place of TRL's; as a program it lets a misspelt line of a config file pass",
        "(script_args, training_args, model_args, dataset_args)",
    ),
    "trl.scripts.dpo:main": Seam(
        "called like that of SFT",
        "(script_args, training_args, model_args, dataset_args)",
    ),
    f"{_SAM2}get_image_features": Seam(
        "called to train on, and replaced where a proposal's features serve the tracker; `forward` gives none",
        "(self, pixel_values, **kwargs)",
    ),
    f"{_SAM2}get_image_embeddings": Seam(
        "called to find objects in a frame without a session; `forward` needs one",
        "(self, pixel_values, **kwargs)",
    ),
    f"{_SAM2}get_prompt_embeddings": Seam(
        "called with it",
        "(self, input_points=None, input_labels=None, input_boxes=None, input_masks=None)",
    ),
    f"{_SAM2}get_image_wide_positional_embeddings": Seam("called with it", "(self)"),
    f"{_SAM2}_get_object_pointers": Seam(
        "called to track many objects at once; `forward` takes them one by one, and hides scores and last logits",
        "(self, inference_session, obj_idx, frame_idx, num_total_frames, device, track_in_reverse_time=False, "
        "streaming=False)",
    ),
    f"{_SAM2}_use_mask_as_output": Seam("called with it", "(self, backbone_features, high_res_features, mask_inputs)"),
    f"{_SAM2}_encode_new_memory": Seam(
        "called with it and in the differentiable step; `forward` runs without gradient and one clip at a time",
        "(self, current_vision_feats, pred_masks_high_res, object_score_logits, is_mask_from_pts)",
    ),
    f"{_SAM2}_process_object_pointers": Seam(
        "called with it",
        "(self, temporal_offsets, pointer_tokens, max_object_pointers_to_use, batch_size, num_channels, device)",
    ),
}


@dataclass(frozen=True)
class SeamCheck:
    """A seam, the parameters we wrote against and those found now (`None` when it is gone)."""

    seam: str
    expected: str
    found: str | None

    @property
    def ok(self) -> bool:
        return self.found == self.expected


def check_seams(seams: dict[str, Seam] = SEAMS) -> list[SeamCheck]:
    """
    Compare every seam with the installed packages.

    Args:
        seams (`dict[str, Seam]`, *optional*, defaults to `SEAMS`):
            What we wrote against, by `"module:qualified.name"`.

    Returns:
        `list[SeamCheck]`: one row per seam, in the order given. What an older release has counts as expected there.
    """
    checks = []
    for name, seam in seams.items():
        found = _find_parameters(name)
        checks.append(SeamCheck(name, found if found in seam.older else seam.expected, found))
    return checks


def _find_parameters(seam: str) -> str | None:
    try:
        return parameters(pkgutil.resolve_name(seam))
    except (ImportError, AttributeError):
        return None


def parameters(function: Callable) -> str:
    """The signature of `function` without annotations."""
    signature = inspect.signature(function)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def checkpointing_argument() -> str:
    """Training argument that switches activation checkpointing: transformers 5.23 renamed `gradient_checkpointing`."""
    from transformers import TrainingArguments

    names = {field.name for field in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
