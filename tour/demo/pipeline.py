"""Text-to-image pipelines of random weights, small enough to try an editor on: they draw noise that follows text."""

from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from hf_iclr.extras import require


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusionPipeline

WORDS = ("a", "cat", "cup", "dog", "fox", "in", "jug", "of", "owl", "sky", "the", "tree")
TOKENS = 8
WIDTH = 64


def build_demo_pipeline(kind: str = "unet", seed: int = 0) -> "DiffusionPipeline":
    """
    A pipeline of random weights that knows the words of `WORDS`, reads 8 tokens and draws 8 x 8 pixels.

    Args:
        kind (`str`, *optional*, defaults to `"unet"`):
            `"unet"` for a `StableDiffusionPipeline`, `"transformer"` for a `FluxPipeline`.
        seed (`int`, *optional*, defaults to 0):
            Seed of the weights. The global random state is left as found.

    Returns:
        `~diffusers.DiffusionPipeline`

    Raises:
        ImportError: without diffusers.
        ValueError: when the kind is another.
    """
    if kind not in ("unet", "transformer"):
        raise ValueError(f"Expected 'unet' or 'transformer', got {kind!r}.")
    require("diffusion", "build_demo_pipeline")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        pipeline = _stable_diffusion() if kind == "unet" else _flux()
    for model in pipeline.components.values():
        if isinstance(model, torch.nn.Module):
            model.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _stable_diffusion() -> "StableDiffusionPipeline":
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer, text_encoder = _clip()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _flux() -> "FluxPipeline":
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, text_encoder = _clip()
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    second = T5EncoderModel(
        T5Config(vocab_size=len(vocabulary), d_model=WIDTH, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=AutoencoderKL(
            block_out_channels=(8,),
            norm_num_groups=4,
            latent_channels=4,
            sample_size=8,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=TOKENS
        ),
        transformer=transformer,
    )


def _clip() -> tuple[CLIPTokenizer, CLIPTextModel]:
    """A CLIP tokenizer whose merges build the words from letters, and an encoder for it."""
    vocabulary, merges = dict.fromkeys(("<|startoftext|>", "<|endoftext|>")), []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        vocabulary |= dict.fromkeys(pieces)
        for end in range(1, len(pieces)):
            merge = ("".join(pieces[:end]), pieces[end])
            vocabulary["".join(merge)] = None
            merges += [merge] if merge not in merges else []
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    tokenizer = CLIPTokenizer(vocab=ids, merges=merges, model_max_length=TOKENS)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(ids),
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            projection_dim=WIDTH,
            initializer_factor=8.0,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    return tokenizer, encoder
