"""
Makes reference_masks.safetensors: what the reference predictor of SAM 2 answers to the edits of `EDITS`, with the
weights of `reference_model`. Run once, by hand, where PyPI can be reached:

    python -m pip install --target REFERENCE --no-deps sam2==1.1.0 hydra-core==1.3.8 omegaconf iopath portalocker
    PYTHONPATH=.:REFERENCE python -m tests.vision.session.make_reference_masks

(PyPI's sam2 1.1.0 has the video predictor and the model of facebookresearch/sam2 at 2b90b9f, line by line; building it
asks for torch, so that `--no-build-isolation` and SAM2_BUILD_CUDA=0 may be needed.) Nothing of it is in the package.
"""

import logging
import re
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from tests.vision.session.reference import EDITS, MOST, VIDEO, reference_model
from tests.vision.tiny import tiny_processor


logger = logging.getLogger(__name__)

# The names of transformers' model from those of the reference, in this order.
_NAMES = (
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"patch_embed\.proj\.", "patch_embed.projection."),
    (r"(blocks\.\d+|layers\.\d+)\.mlp\.layers\.0\.", r"\1.mlp.proj_in."),
    (r"(blocks\.\d+|layers\.\d+)\.mlp\.layers\.1\.", r"\1.mlp.proj_out."),
    (r"(mlps\.\d|iou_prediction_head|pred_obj_score_head|obj_ptr_proj)\.layers\.0\.", r"\1.proj_in."),
    (r"(mlps\.\d|iou_prediction_head|pred_obj_score_head|obj_ptr_proj)\.layers\.2\.", r"\1.proj_out."),
    (r"(mlps\.\d|iou_prediction_head|pred_obj_score_head|obj_ptr_proj)\.layers\.1\.", r"\1.layers.0."),
    (r"^sam_prompt_encoder\.pe_layer\.", "shared_image_embedding."),
    (r"positional_encoding_gaussian_matrix$", "positional_embedding"),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"output_upscaling\.0\.", "upscale_conv1."),
    (r"output_upscaling\.1\.", "upscale_layer_norm."),
    (r"output_upscaling\.3\.", "upscale_conv2."),
    (r"mask_downscaling\.0\.", "mask_embed.conv1."),
    (r"mask_downscaling\.1\.", "mask_embed.layer_norm1."),
    (r"mask_downscaling\.3\.", "mask_embed.conv2."),
    (r"mask_downscaling\.4\.", "mask_embed.layer_norm2."),
    (r"mask_downscaling\.6\.", "mask_embed.conv3."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"\.out_proj\.", ".o_proj."),
    (r"mask_downsampler\.encoder\.12\.", "mask_downsampler.final_conv."),
    (r"mask_downsampler\.encoder\.(\d+)\.", lambda m: f"mask_downsampler.layers.{int(m[1]) // 3}."
     + ("layer_norm." if int(m[1]) % 3 else "conv.")),
    (r"\.fuser\.", ".memory_fuser."),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv", ".pointwise_conv"),
    (r"\.gamma$", ".scale"),
    (r"pix_feat_proj", "feature_projection"),
    (r"^obj_ptr_proj", "object_pointer_proj"),
    (r"^obj_ptr_tpos_proj", "temporal_positional_encoding_projection_layer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"\.norm(\d?|_final_attn)\.", r".layer_norm\1."),
)  # fmt: skip


def reference_predictor(model):
    """The reference's predictor, all corrected frames conditioning, with the weights of a `Sam2VideoModel`."""
    from sam2.modeling.backbones.hieradet import Hiera, MultiScaleAttention
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam.transformer import Attention, RoPEAttention
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    config, backbone = model.config, model.config.vision_config.backbone_config
    width, side = config.memory_attention_hidden_size, config.image_size
    rope = {"rope_theta": 10000.0, "feat_sizes": config.memory_attention_rope_feat_sizes, "dropout": 0.0}
    rope |= {"embedding_dim": width, "num_heads": 1, "downsample_rate": 1}
    layer = MemoryAttentionLayer(
        activation="relu",
        cross_attention=RoPEAttention(rope_k_repeat=True, kv_in_dim=64, **rope),
        d_model=width,
        dim_feedforward=config.memory_attention_feed_forward_hidden_size,
        dropout=0.0,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        self_attention=RoPEAttention(**rope),
    )

    def sine(features: int) -> PositionEmbeddingSine:
        return PositionEmbeddingSine(features, normalize=True, image_size=side)

    trunk = Hiera(
        embed_dim=backbone.hidden_size,
        num_heads=1,
        stages=tuple(backbone.blocks_per_stage),
        window_pos_embed_bkg_spatial_size=tuple(backbone.window_positional_embedding_background_size),
        window_spec=tuple(backbone.window_size_per_stage),
        global_att_blocks=tuple(backbone.global_attention_blocks),
    )
    neck = FpnNeck(
        sine(width),
        d_model=width,
        backbone_channel_list=list(config.vision_config.backbone_channel_list),
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    predictor = SAM2VideoPredictor(
        add_all_frames_to_correct_as_cond=True,
        image_encoder=ImageEncoder(trunk, neck, scalp=1),
        memory_attention=MemoryAttention(width, True, layer, config.memory_attention_num_layers),
        memory_encoder=MemoryEncoder(
            config.memory_encoder_output_channels,
            MaskDownSampler(width, kernel_size=3, stride=2, padding=1),
            Fuser(CXBlock(width), config.memory_fuser_num_layers),
            sine(config.memory_encoder_output_channels),
            in_dim=width,
        ),
        num_maskmem=config.num_maskmem,
        image_size=side,
        max_cond_frames_in_attn=config.max_cond_frame_num,
        max_obj_ptrs_in_encoder=config.max_object_pointers_in_encoder,
        sigmoid_scale_for_mem_enc=config.sigmoid_scale_for_mem_enc,
        sigmoid_bias_for_mem_enc=config.sigmoid_bias_for_mem_enc,
        multimask_output_in_sam=config.multimask_output_in_sam,
        multimask_output_for_tracking=config.multimask_output_for_tracking,
        multimask_min_pt_num=config.multimask_min_pt_num,
        multimask_max_pt_num=config.multimask_max_pt_num,
        add_tpos_enc_to_obj_ptrs=config.enable_temporal_pos_encoding_for_object_pointers,
        proj_tpos_enc_in_obj_ptrs=config.enable_temporal_pos_encoding_for_object_pointers,
        use_signed_tpos_enc_to_obj_ptrs=config.enable_temporal_pos_encoding_for_object_pointers,
        sam_mask_decoder_extra_args={
            name: getattr(config.mask_decoder_config, name)
            for name in (
                "dynamic_multimask_via_stability",
                "dynamic_multimask_stability_delta",
                "dynamic_multimask_stability_thresh",
            )
        },
        **dict.fromkeys(
            [
                "binarize_mask_from_pts_for_mem_enc",
                "use_mask_input_as_output_without_sam",
                "directly_add_no_mem_embed",
                "no_obj_embed_spatial",
                "use_high_res_features_in_sam",
                "iou_prediction_use_sigmoid",
                "use_obj_ptrs_in_encoder",
                "only_obj_ptrs_in_the_past_for_eval",
                "pred_obj_scores",
                "pred_obj_scores_mlp",
                "fixed_no_obj_ptr",
                "use_multimask_token_for_obj_ptr",
                "use_mlp_for_obj_ptr_proj",
            ],
            True,
        ),
    ).eval()
    # Widths and heads that the reference fixes follow the weights.
    heads = backbone.num_attention_heads_per_stage
    stages = [stage for stage, blocks in enumerate(backbone.blocks_per_stage) for _ in range(blocks)]
    blocks = [module for module in predictor.modules() if isinstance(module, MultiScaleAttention)]
    for stage, block in zip(stages, blocks, strict=True):
        block.num_heads = heads[stage]
    for module in predictor.sam_mask_decoder.modules():
        if isinstance(module, Attention):
            module.num_heads = config.mask_decoder_config.num_attention_heads
    weights = model.state_dict()
    points = weights.pop("prompt_encoder.point_embed.weight")
    weights |= {f"prompt_encoder.point_embeddings.{i}.weight": row[None] for i, row in enumerate(points)}
    del weights["prompt_encoder.shared_embedding.positional_embedding"]  # the reference has one for image and clicks
    for name in list(predictor.state_dict()):
        ours = name
        for old, new in _NAMES:
            ours = re.sub(old, new, ours)
        path, _, leaf = name.rpartition(".")
        module, weight = predictor.get_submodule(path), weights.pop(ours)
        if leaf in module._buffers:
            module._buffers[leaf] = weight.clone()
        else:
            setattr(module, leaf, torch.nn.Parameter(weight.clone()))
    if weights.keys() - {"no_memory_positional_encoding"}:
        raise ValueError(f"The reference has no {sorted(weights)}.")
    return predictor


class ReferenceSession:
    """The reference predictor and its state, called as `apply_edits` calls a session."""

    def __init__(self, model, processor, video: np.ndarray):
        import sam2.sam2_video_predictor as reference

        frames = processor.video_processor(video, return_tensors="pt")["pixel_values_videos"][0]
        height, width = video.shape[1:3]
        reference.load_video_frames = lambda **kwargs: (frames, height, width)
        reference.tqdm = lambda frames, desc: frames
        self.predictor = reference_predictor(model)
        self.state = self.predictor.init_state("a folder")

    def click(self, frame: int, obj: int, points, labels, replace: bool, box=None) -> None:
        self.predictor.add_new_points_or_box(
            self.state, frame, obj, points or None, labels or None, clear_old_points=replace, box=box
        )

    def mask(self, frame: int, obj: int, mask: np.ndarray) -> None:
        self.predictor.add_new_mask(self.state, frame, obj, mask)

    def clear(self, frame: int, obj: int) -> None:
        self.predictor.clear_all_prompts_in_frame(self.state, frame, obj)

    def propagate(self, start: int | None = None, reverse: bool = False) -> None:
        for _ in self.predictor.propagate_in_video(self.state, start_frame_idx=start, reverse=reverse):
            pass

    def prompted(self) -> list[int]:
        """The frames that have a prompt."""
        kinds = (self.state["point_inputs_per_obj"], self.state["mask_inputs_per_obj"])
        return [frame for kind in kinds for inputs in kind.values() for frame in inputs]

    def masks(self, obj: int) -> dict[int, torch.Tensor]:
        """All mask logits known of an object, `(side, side)` by frame."""
        number = self.state["obj_id_to_idx"][obj]
        known = {}
        for outputs in (self.state["output_dict_per_obj"][number], self.state["temp_output_dict_per_obj"][number]):
            for kind in ("non_cond_frame_outputs", "cond_frame_outputs"):
                known |= {frame: output["pred_masks"][0, 0] for frame, output in outputs[kind].items()}
        return dict(sorted(known.items()))


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    model, tensors = reference_model(), {}
    for name, edits in EDITS.items():
        session = ReferenceSession(model, tiny_processor(), VIDEO)
        session.predictor.max_cond_frames_in_attn = MOST.get(name, -1)
        for step, edit in enumerate(edits):
            if edit.reference is not None:
                edit.reference(session)
            for obj in session.state["obj_ids"]:
                for frame, logits in session.masks(obj).items():
                    if edit.passes or edit.place == (obj, frame):
                        tensors[f"{name}/{step}/{obj}/{frame}"] = logits.float().clone()
        logger.info("%s: %d edits", name, len(edits))
    path = Path(__file__).with_name("reference_masks.safetensors")
    save_file(tensors, path)
    logger.info("%s: %d masks, %d bytes", path, len(tensors), path.stat().st_size)


if __name__ == "__main__":
    sys.exit(main())
