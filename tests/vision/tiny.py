"""The smallest legal video segmenters of each family, with random weights that make masks worth comparing."""

from functools import cache

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    EdgeTamVideoConfig,
    EdgeTamVideoModel,
    EdgeTamVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2VideoModel,
    Sam2VideoVideoProcessor,
    Sam3ImageProcessor,
    Sam3TrackerVideoConfig,
    Sam3TrackerVideoModel,
    Sam3TrackerVideoProcessor,
)
from transformers.modeling_outputs import BaseModelOutput

from hf_iclr.tiny_models import sam2_processor, sharpen, tiny_sam2_config
from hf_iclr.vision.session.pipeline import Sam2VideoPipeline


SIDE = 64  # pixels of the model's square
HIDDEN = 128  # a hidden size equal to the memory's 64 is not legal
FAMILIES = ("sam2_video", "sam3_tracker_video", "edgetam_video")
_SIZES = [[SIDE // 4] * 2, [SIDE // 8] * 2, [SIDE // 16] * 2]


class PyramidConfig(PreTrainedConfig):
    """Of a stand-in for EdgeTAM's backbone, which would need timm."""

    model_type = "tiny_pyramid"
    channels: tuple[int, ...] = (8, 16, 16, 16)


class PyramidModel(PreTrainedModel):
    """Feature maps at strides 4, 8, 16 and 32, one convolution each."""

    config_class = PyramidConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        widths = [3, *config.channels]
        self.levels = nn.ModuleList(
            nn.Conv2d(widths[level], widths[level + 1], 4 if level == 0 else 2, stride=4 if level == 0 else 2)
            for level in range(4)
        )
        self.post_init()

    def forward(self, pixel_values, **kwargs):
        maps = []
        for level in self.levels:
            pixel_values = level(pixel_values).relu()
            maps.append(pixel_values)
        return BaseModelOutput(last_hidden_state=maps)


AutoConfig.register("tiny_pyramid", PyramidConfig, exist_ok=True)
AutoModel.register(PyramidConfig, PyramidModel, exist_ok=True)


def _shared(**kwargs) -> dict:
    """What the configurations have in common beside the vision encoder."""
    return {
        "memory_attention_hidden_size": HIDDEN,
        "memory_attention_num_layers": 1,
        "memory_attention_rope_feat_sizes": [SIDE // 16] * 2,
        "memory_encoder_hidden_size": HIDDEN,
        "mask_downsampler_embed_dim": HIDDEN,
        "memory_fuser_embed_dim": HIDDEN,
        "memory_fuser_intermediate_dim": HIDDEN,
        "memory_fuser_layer_scale_init_value": 0.3,
        **kwargs,
    }


def _prompt_encoder(patch_size: int = 16) -> dict:
    return {"hidden_size": HIDDEN, "image_size": SIDE, "patch_size": patch_size}


def _mask_decoder() -> dict:
    return {"hidden_size": HIDDEN, "mlp_dim": HIDDEN, "num_attention_heads": 2, "iou_head_hidden_dim": HIDDEN}


def tiny_config(family: str = "sam2_video", **kwargs):
    """A configuration; `kwargs` change it."""
    if family == "sam3_tracker_video":
        vit = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vit |= {"patch_size": 16, "image_size": SIDE, "pretrain_image_size": SIDE, "window_size": 2}
        vision = {"backbone_config": {"model_type": "sam3_vit_model", **vit}, "fpn_hidden_size": HIDDEN}
        return Sam3TrackerVideoConfig(
            vision_config={"model_type": "sam3_vision_model", **vision},
            prompt_encoder_config=_prompt_encoder(),
            mask_decoder_config=_mask_decoder(),
            image_size=SIDE,
            **_shared(memory_attention_feed_forward_hidden_size=HIDDEN, **kwargs),
        )
    if family == "edgetam_video":
        return EdgeTamVideoConfig(
            vision_config=EdgeTamVisionConfig(
                backbone_config=PyramidConfig(),
                backbone_channel_list=[16, 16, 16, 8],
                backbone_feature_sizes=_SIZES,
                fpn_hidden_size=HIDDEN,
            ),
            prompt_encoder_config=_prompt_encoder(),
            mask_decoder_config=_mask_decoder(),
            image_size=SIDE,
            memory_attention_rope_k_sizes=[2, 2],
            perceiver_resampler_num_latents=4,
            perceiver_resampler_num_latents_2d=4,
            **_shared(memory_attention_mlp_hidden_size=HIDDEN, **kwargs),
        )
    return tiny_sam2_config(SIDE, **kwargs)


def tiny_model(family: str = "sam2_video", **kwargs):
    """A model whose masks follow prompts, memories and time, so that a mistake shows."""
    config = tiny_config(family, **kwargs)
    torch.manual_seed(0)
    classes = {
        "sam2_video": Sam2VideoModel,
        "sam3_tracker_video": Sam3TrackerVideoModel,
        "edgetam_video": EdgeTamVideoModel,
    }
    return sharpen(classes[family](config))


def tiny_processor(family: str = "sam2_video"):
    """The processor of a tiny model."""
    if family != "sam3_tracker_video":
        return sam2_processor(SIDE)
    size = {"height": SIDE, "width": SIDE}
    images = Sam3ImageProcessor(size=size, mask_size={"height": SIDE // 4, "width": SIDE // 4})
    return Sam3TrackerVideoProcessor(images, Sam2VideoVideoProcessor(size=size), target_size=SIDE)


@cache
def tiny_pipe(family: str = "sam2_video", **kwargs) -> Sam2VideoPipeline:
    """A pipeline, made once; tests must not change its model."""
    return Sam2VideoPipeline(model=tiny_model(family, **kwargs), processor=tiny_processor(family), device="cpu")


def near_pipe() -> Sam2VideoPipeline:
    """One that looks back 2 frames at masks and 4 at pointers, so that short clips are long for it."""
    return tiny_pipe(num_maskmem=3, max_object_pointers_in_encoder=5)


def clip(frames: int = 6, height: int = 48, width: int = 80, seed: int = 0) -> np.ndarray:
    """A moving bright rectangle over noise, `(frames, height, width, 3)` in uint8."""
    video = np.random.default_rng(seed).integers(0, 160, (frames, height, width, 3), dtype=np.uint8)
    for number in range(frames):
        left = 8 + 2 * number % (width // 2)
        video[number, 12:30, left : left + 20] = (250, 60, 30)
    return video
