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


def word_tokenizer(pad_token: str = "w48") -> PreTrainedTokenizerFast:
    """50 words w0 .. w49, split at spaces; w0 stands for all others, w49 ends."""
    backend = Tokenizer(WordLevel({f"w{index}": index for index in range(50)}, unk_token="w0"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="w0", pad_token=pad_token, eos_token="w49", padding_side="left"
    )


def tiny_sam2_config(side: int = 64, width: int = 8, mlp_dim: int = 128, **kwargs: Any) -> Any:
    """A small [`~transformers.Sam2VideoConfig`] for squares of `side` pixels; `kwargs` change it."""
    from transformers import Sam2HieraDetConfig, Sam2VideoConfig, Sam2VisionConfig  # which need the extra `vision`

    hidden = 128  # a hidden size equal to the memory's 64 is not legal
    widths = [width, 2 * width, 4 * width, 8 * width]
    backbone = Sam2HieraDetConfig(
        hidden_size=width, image_size=[side, side], embed_dim_per_stage=widths, blocks_per_stage=[1, 1, 2, 1],
        num_attention_heads_per_stage=[1, 1, 2, 2], global_attention_blocks=[3], window_size_per_stage=[8, 4, 4, 2],
        window_positional_embedding_background_size=[7, 7], mlp_ratio=2.0,
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=widths[::-1], fpn_hidden_size=hidden,
        backbone_feature_sizes=[[side // stride] * 2 for stride in (4, 8, 16)],
    )  # fmt: skip
    memory = {
        "memory_attention_hidden_size": hidden, "memory_attention_num_layers": 1,
        "memory_attention_feed_forward_hidden_size": mlp_dim, "memory_attention_rope_feat_sizes": [side // 16] * 2,
        "memory_encoder_hidden_size": hidden, "mask_downsampler_embed_dim": hidden, "memory_fuser_embed_dim": hidden,
        "memory_fuser_intermediate_dim": mlp_dim, "memory_fuser_layer_scale_init_value": 0.3,
    }  # fmt: skip
    return Sam2VideoConfig(
        vision_config=vision, image_size=side,
        prompt_encoder_config={"hidden_size": hidden, "image_size": side, "patch_size": 16},
        mask_decoder_config={
            "hidden_size": hidden, "mlp_dim": mlp_dim, "num_attention_heads": 2, "iou_head_hidden_dim": hidden,
        },
        **(memory | kwargs),
    )  # fmt: skip


def sharpen(model: Any) -> Any:
    """Makes the masks of a random video segmenter follow prompts, memories and time, so that a mistake shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_encoder" not in name:
                parameter.mul_(4)
        model.memory_temporal_positional_encoding.normal_(0, 0.5)
        model.no_memory_embedding.normal_(0, 0.5)
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(3.0)  # the object is in sight
    return model.eval()


def sam2_processor(side: int = 64) -> Any:
    """The processor of a SAM 2 for squares of `side` pixels."""
    from transformers import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor

    size = {"height": side, "width": side}
    images = Sam2ImageProcessor(size=size, mask_size={"height": side // 4, "width": side // 4})
    return Sam2VideoProcessor(images, Sam2VideoVideoProcessor(size=size), target_size=side)


def tiny_segmenter() -> tuple[Any, Any]:
    """A random SAM 2 for videos, always the same, and its processor."""
    from transformers import Sam2VideoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sharpen(Sam2VideoModel(tiny_sam2_config())), sam2_processor()
