"""The upstream functions we override or lean on beyond their documented use, and the parameters we wrote against."""

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields


# Where it stands -> its parameters without annotations, which read differently from one Python to the next.
# Written against transformers 5.23, trl 1.16, datasets 5.2.
SEAMS = {
    "transformers.generation.utils:GenerationMixin._assisted_decoding": (
        "(self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None, "
        "inputs_tensor=None, assistant_model=None, assistant_tokenizer=None, tokenizer=None, **model_kwargs)"
    ),
    "transformers.generation.utils:GenerationMixin._extract_generation_mode_kwargs": (
        "(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)"
    ),
    "transformers.generation.utils:GenerationMixin._get_candidate_generator": (
        "(self, generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model=None, "
        "target_tokenizer=None, assistant_tokenizer=None)"
    ),
    "transformers.generation.utils:GenerationMixin._validate_generation_mode": (
        "(self, generation_mode, generation_config, generation_mode_kwargs)"
    ),
    "transformers.generation.utils:GenerationMixin._prepare_generation_config": "(self, generation_config, **kwargs)",
    "transformers.generation.utils:_speculative_sampling": (
        "(candidate_input_ids, candidate_logits, candidate_length, new_logits, assistant_ensemble_weight=None)"
    ),
    "transformers.generation.candidate_generator:AssistedCandidateGenerator.__init__": (
        "(self, input_ids, assistant_model, generation_config, model_kwargs, inputs_tensor=None, "
        "logits_processor=None)"
    ),
    "transformers.generation.candidate_generator:AssistedCandidateGenerator._generate_candidates": (
        "(self, generation_args)"
    ),
    "transformers.generation.candidate_generator:AssistedCandidateGenerator._prepare_generation_args": (
        "(self, input_ids, min_new_tokens, max_new_tokens)"
    ),
    "transformers.generation.candidate_generator:AssistedCandidateGenerator.get_candidates": (
        "(self, input_ids, **kwargs)"
    ),
    "transformers.generation.candidate_generator:AssistedCandidateGenerator.update_candidate_strategy": (
        "(self, input_ids, scores, num_matches)"
    ),
    "transformers.generation.candidate_generator:UniversalSpeculativeDecodingGenerator.get_candidates": (
        "(self, input_ids, **kwargs)"
    ),
    "transformers.cache_utils:DynamicCache.crop": "(self, tokens_to_remove)",
    "transformers.cache_utils:DynamicLayer.crop": "(self, tokens_to_remove)",
    "transformers.pipelines.base:Pipeline._sanitize_parameters": "(self, **pipeline_parameters)",
    "transformers.pipelines.base:PipelineRegistry.register_pipeline": (
        "(self, task, pipeline_class, pt_model=None, default=None, type=None)"
    ),
    "transformers.pipelines.text_generation:TextGenerationPipeline._forward": (
        "(self, model_inputs, **generate_kwargs)"
    ),
    "transformers.pipelines.text_generation:TextGenerationPipeline._sanitize_parameters": (
        "(self, return_full_text=None, return_tensors=None, return_text=None, return_type=None, "
        "clean_up_tokenization_spaces=None, prefix=None, handle_long_generation=None, stop_sequence=None, "
        "truncation=None, max_length=None, continue_final_message=None, skip_special_tokens=None, "
        "tokenizer_encode_kwargs=None, tools=None, documents=None, **generate_kwargs)"
    ),
    "transformers.pipelines.text_generation:TextGenerationPipeline.postprocess": (
        "(self, model_outputs, return_type=<ReturnType.FULL_TEXT: 2>, clean_up_tokenization_spaces=None, "
        "continue_final_message=None, skip_special_tokens=None, tools=None)"
    ),
    "transformers.dynamic_module_utils:custom_object_save": "(obj, folder, config=None)",
    "transformers.trainer:Trainer.log": "(self, logs, start_time=None)",
    "transformers.trainer:Trainer._get_train_sampler": "(self, train_dataset=None)",
    "trl.trainer.sft_trainer:SFTTrainer.compute_loss": (
        "(self, model, inputs, return_outputs=False, num_items_in_batch=None)"
    ),
    "trl.trainer.sft_trainer:SFTTrainer._set_signature_columns_if_needed": "(self)",
    "trl.trainer.sft_trainer:DataCollatorForLanguageModeling.__init__": (
        "(self, pad_token_id, padding_free=False, return_position_ids=False, pad_to_multiple_of=None, "
        "return_tensors='pt')"
    ),
    "trl.trainer.dpo_trainer:DPOTrainer._compute_loss": "(self, model, inputs, return_outputs)",
    "trl.trainer.dpo_trainer:DPOTrainer._prepare_dataset": "(self, dataset, processing_class, args, dataset_name)",
    "trl.trainer.utils:FusedCausalLMOutput.__init__": (
        "(self, loss=None, log_probs=None, entropy=None, log_sum_sq_probs=None, mean_logits=None, is_top1=None, "
        "label_mask=None, aux_loss=None)"
    ),
    "trl.trainer.utils:add_fused_lm_head": (
        "(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',))"
    ),
    "trl.trainer.utils:get_config_model_id": "(config)",
    "trl.trainer.utils:hash_module": "(module)",
    "trl.trainer.utils:maybe_gather_lm_head_ctx": "(*params)",
    "trl.trainer.utils:use_adapter": "(model, adapter_name)",
    "trl.models.utils:prepare_deepspeed": "(model, accelerator)",
    "trl.models.utils:prepare_fsdp": "(model, accelerator)",
    "trl.data_utils:common_prefix_length": "(ids, other_ids)",
    "trl.scripts.sft:main": "(script_args, training_args, model_args, dataset_args)",
    "trl.scripts.sft:make_parser": "(subparsers=None, prog=None)",
    "trl.scripts.dpo:main": "(script_args, training_args, model_args, dataset_args)",
    "trl.scripts.dpo:make_parser": "(subparsers=None, prog=None)",
    "datasets.arrow_dataset:Dataset._get_cache_file_path": "(self, fingerprint)",
    "transformers.cache_utils:DynamicLayer.update": "(self, key_states, value_states, *args, **kwargs)",
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoInferenceSession.__init__": (
        "(self, video=None, video_height=None, video_width=None, inference_device='cpu', "
        "inference_state_device='cpu', "
        "video_storage_device='cpu', dtype='float32', max_vision_features_cache_size=1)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoInferenceSession.get_frame": "(self, frame_idx)",
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoInferenceSession.add_new_frame": (
        "(self, pixel_values, frame_idx=None)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoInferenceSession.obj_id_to_idx": "(self, obj_id)",
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoInferenceCache.cache_vision_features": (
        "(self, frame_idx, features)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoInferenceCache.get_vision_features": (
        "(self, frame_idx)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel.forward": (
        "(self, inference_session, frame_idx=None, frame=None, reverse=False, run_mem_encoder=True, **kwargs)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel.get_image_embeddings": (
        "(self, pixel_values, **kwargs)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel.get_prompt_embeddings": (
        "(self, input_points=None, input_labels=None, input_boxes=None, input_masks=None)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel.get_image_wide_positional_embeddings": "(self)",
    "transformers.models.sam2_video.processing_sam2_video:Sam2VideoProcessor.add_inputs_to_inference_session": (
        "(self, inference_session, frame_idx, obj_ids, input_points=None, input_labels=None, input_boxes=None, "
        "input_masks=None, original_size=None, clear_old_inputs=True)"
    ),
    "transformers.models.sam2_video.processing_sam2_video:Sam2VideoProcessor.post_process_masks": (
        "(self, masks, original_sizes, mask_threshold=0.0, binarize=True, max_hole_area=0.0, max_sprinkle_area=0.0, "
        "apply_non_overlapping_constraints=False, **kwargs)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel._use_multimask": (
        "(self, is_init_cond_frame, point_inputs)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel._encode_new_memory": (
        "(self, current_vision_feats, pred_masks_high_res, object_score_logits, is_mask_from_pts)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel._process_object_pointers": (
        "(self, temporal_offsets, pointer_tokens, max_object_pointers_to_use, batch_size, num_channels, device)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel._select_closest_cond_frames": (
        "(self, frame_idx, cond_frame_outputs, max_cond_frame_num)"
    ),
    "transformers.models.sam2_video.modeling_sam2_video:Sam2VideoModel.get_image_features": (
        "(self, pixel_values, **kwargs)"
    ),
    "transformers.trainer:Trainer._save": "(self, output_dir=None, state_dict=None)",
    "transformers.trainer:Trainer._prepare_inputs": "(self, inputs)",
    "evaluate.module:Metric._info": "(self)",
    "evaluate.module:Metric._compute": "(self, *, predictions=None, references=None, **kwargs)",
    "diffusers.loaders.lora_pipeline:StableDiffusionLoraLoaderMixin.save_lora_weights": (
        "(save_directory, unet_lora_layers=None, text_encoder_lora_layers=None, is_main_process=True, "
        "weight_name=None, "
        "save_function=None, safe_serialization=True, unet_lora_adapter_metadata=None, "
        "text_encoder_lora_adapter_metadata=None)"
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


def check_seams(seams: dict[str, str] = SEAMS) -> list[SeamCheck]:
    """
    Compare every seam with the installed packages.

    Args:
        seams (`dict[str, str]`, *optional*, defaults to `SEAMS`):
            Parameters we wrote against, by `"module:qualified.name"`.

    Returns:
        `list[SeamCheck]`: one row per seam, in the order given.
    """
    return [SeamCheck(seam, expected, _find_parameters(seam)) for seam, expected in seams.items()]


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
