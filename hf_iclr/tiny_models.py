"""Tiny random models, always the same, to see in a second whether something runs."""

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def tiny_llama(noise: float = 0.0) -> LlamaForCausalLM:
    """A random Llama over the 50 words of [`word_tokenizer`], always the same; `noise` makes one much like it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.4, bos_token_id=None,
            eos_token_id=49, pad_token_id=48,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters() if noise else ():
                parameter += noise * torch.randn_like(parameter)
    return model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """50 words w0 .. w49, split at spaces."""
    backend = Tokenizer(WordLevel({f"w{index}": index for index in range(50)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w0", pad_token="w48", eos_token="w49", padding_side="left"
    )


def tiny_segmenter() -> tuple[Any, Any]:
    """A random SAM 2 for videos, always the same, whose masks follow prompts and memories; and its processor."""
    from transformers import (  # which needs the extra `vision`
        Sam2HieraDetConfig,
        Sam2ImageProcessor,
        Sam2VideoConfig,
        Sam2VideoModel,
        Sam2VideoProcessor,
        Sam2VideoVideoProcessor,
        Sam2VisionConfig,
    )

    wide = 128  # a hidden size equal to the memory's 64 is not legal
    backbone = Sam2HieraDetConfig(
        hidden_size=8, image_size=[64, 64], embed_dim_per_stage=[8, 16, 32, 64], blocks_per_stage=[1, 1, 2, 1],
        num_attention_heads_per_stage=[1, 1, 2, 2], global_attention_blocks=[3], window_size_per_stage=[8, 4, 4, 2],
        window_positional_embedding_background_size=[7, 7], mlp_ratio=2.0,
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8], fpn_hidden_size=wide,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    config = Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": wide, "image_size": 64, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": wide, "mlp_dim": wide, "num_attention_heads": 2, "iou_head_hidden_dim": wide,
        },
        image_size=64, memory_attention_hidden_size=wide, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=wide, memory_attention_rope_feat_sizes=[4, 4],
        memory_encoder_hidden_size=wide, mask_downsampler_embed_dim=wide, memory_fuser_embed_dim=wide,
        memory_fuser_intermediate_dim=wide, memory_fuser_layer_scale_init_value=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Sam2VideoModel(config).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_encoder" not in name:
                parameter.mul_(4)
        model.memory_temporal_positional_encoding.normal_(0, 0.5)
        model.no_memory_embedding.normal_(0, 0.5)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(3.0)  # the object is in sight
    size = {"height": 64, "width": 64}
    images = Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16})
    return model, Sam2VideoProcessor(images, Sam2VideoVideoProcessor(size=size), target_size=64)
