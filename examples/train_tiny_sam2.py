"""
Trains a SAM 2 of 1.6 million parameters on procedural clips in about half an hour on one CPU core.

    python examples/train_tiny_sam2.py --out tiny_sam2
    python examples/train_tiny_sam2.py --model tiny_sam2 --seed 1 --steps 1500 --peak 5e-4 --out corrected
    python examples/train_tiny_sam2.py --model corrected --seed 2 --steps 1000 --peak 3e-4 --out tiny_sam2_on

The other lines train on with corrections, a quarter of an hour each: prompt encoder and decoder alone, on the last
frame of a clip, where the model is often wrong. `pipeline("promptable-video-segmentation", model="tiny_sam2_on")`
loads the result. How good it is says benchmarks/tiny_sam2.py.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm
from transformers import Sam2VideoModel

from hf_iclr.tiny_models import sam2_processor, tiny_sam2_config
from hf_iclr.vision.evaluation import procedural_clip
from hf_iclr.vision.training import MaskPrediction, PromptPlan, predict_clips
from hf_iclr.vision.training.augmentation import augment_clip
from hf_iclr.vision.training.prompts import PROMPT_KINDS


SIDE, WIDTH, HIDDEN = 128, 16, 128
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def tiny_model(seed: int) -> Sam2VideoModel:
    """A model that learns in minutes: torch's own initialisation, where transformers' suits far larger widths."""
    config = tiny_sam2_config(
        SIDE,
        WIDTH,
        mlp_dim=2 * HIDDEN,
        multimask_output_in_sam=False,
        multimask_output_for_tracking=False,
        num_maskmem=4,
        enable_temporal_pos_encoding_for_object_pointers=False,
        memory_attention_num_layers=2,
        memory_attention_dropout=0.0,
        memory_attention_rope_dropout=0.0,
        memory_fuser_num_layers=1,
        memory_fuser_layer_scale_init_value=1e-6,
    )
    config.mask_decoder_config.num_attention_heads = 4
    config.mask_decoder_config.dynamic_multimask_via_stability = False
    torch.manual_seed(seed)
    model = Sam2VideoModel(config).eval()  # no dropout, and memories of prompted frames as in inference
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(0, 0.5)
        # Clicks must share the image's coordinates; transformers draws the two matrices apart.
        model.prompt_encoder.shared_embedding.positional_embedding.copy_(
            model.shared_image_embedding.positional_embedding
        )
        for name, module in model.mask_decoder.transformer.named_modules():
            if name.endswith(("cross_attn_token_to_image", "cross_attn_image_to_token", "final_attn_token_to_image")):
                module.k_proj.weight.copy_(module.q_proj.weight)  # a click looks at its own place from the start
                for projection in (module.q_proj, module.k_proj):
                    projection.weight.mul_(2)
                    projection.bias.zero_()
        for layer in model.memory_encoder.memory_fuser.layers:
            layer.scale.fill_(0.5)
        model.memory_temporal_positional_encoding.normal_(0, 0.2)
        model.no_memory_embedding.normal_(0, 0.1)
        model.mask_downsample.weight.fill_(1 / 16)
        model.mask_downsample.bias.zero_()
        model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(3.0)
    return model


def draw_batch(rng: np.random.Generator, progress: float) -> list[dict]:
    """
    The first 40 % of training are pairs of frames with the true mask remembered; then come clips of 3 to 5 frames,
    predicted masks, hard clips and more corrections.
    """
    early = progress < 0.4
    frames = 2 if early else int(rng.integers(3, 6))
    hard = (0.0 if progress < 0.2 else 0.3) if early else 0.6
    remember_truth = 1.0 if early else max(0.0, 0.3 * (1 - (progress - 0.4) / 0.2))
    kind = str(rng.choice(["mask", "box", "click"], p=[0.25, 0.4, 0.35]))
    corrected: tuple[int, ...] = ()
    if rng.random() < (0.1 if early else 0.2):
        corrected = (int(rng.integers(1 if kind == "mask" else 0, frames)),)
    plan = PromptPlan(kind, corrected=corrected, clicks=int(rng.integers(1, 3)) if corrected else 0)
    return _draw_clips(rng, 10 if early else 6, frames, hard, plan, remember_truth)


def draw_corrected_batch(rng: np.random.Generator) -> tuple[list[dict], bool]:
    """
    Clips of up to 10 frames, half of them backwards and a third twice as fast, whose last frame gets 1 to 3 clicks,
    and whether its mask before them counts. In a fifth the last frame is the first. In another fifth it does not
    count: there the model is made to be wrong, for a click must count for more than what it believes. It remembers
    another object on the frames between, or was shown another one from the start.
    """
    case = str(rng.choice(["first", "drifted", "other", "tracked"], p=[0.2, 0.12, 0.08, 0.6]))
    frames = 1 if case == "first" else int(rng.integers(3, 11))
    kind = str(rng.choice(["box", "click"] if case == "first" else PROMPT_KINDS))
    plan = PromptPlan(kind, corrected=(frames - 1,), clicks=int(rng.integers(1, 4)))
    wrong = case in ("drifted", "other")
    clips = _draw_clips(rng, 10, frames, 0.8, plan, augment=True, both=wrong)
    for clip in clips if wrong else ():
        between = slice(int(case == "drifted"), frames - 1)
        clip["masks"][:, between] = clip["masks"][:, between].flip(0)
        clip["remember_truth"] = torch.zeros(clip["masks"].shape[:2], dtype=torch.bool)
        clip["remember_truth"][:, between] = True
    return clips, not wrong


def predict_last(model: Sam2VideoModel, clips: list[dict]) -> list[MaskPrediction]:
    """What is made of the last frame; gradients do not reach the frames before it."""
    before_last = len(clips[0]["pixel_values"]) - 2
    predictions = predict_clips(model, clips)
    with torch.no_grad():
        while before_last >= 0 and next(predictions).frame < before_last:
            pass
    return list(predictions)


def _draw_clips(
    rng: np.random.Generator,
    count: int,
    frames: int,
    hard: float,
    plan: PromptPlan,
    remember_truth: float | None = None,
    augment: bool = False,
    both: bool = False,
) -> list[dict]:
    """
    Clips of one length and one plan, so that they run as one. Two objects of each are targets, of some one unless
    `both`: only the prompt says which.
    """
    clips: list[dict] = []
    while len(clips) < count:
        pace = 2 if augment and rng.random() < 0.33 else 1
        drawn = procedural_clip(int(rng.integers(2**40)), bool(rng.random() < hard), pace * frames, SIDE)
        pixels, masks = drawn.frames[::pace], np.stack([drawn.masks[obj][::pace] for obj in (1, 2)])
        if augment and rng.random() < 0.5:
            pixels, masks = pixels[::-1], masks[:, ::-1]
        masks = masks[masks[:, 0].sum((1, 2)) > 40]
        if augment and len(masks) and rng.random() < 0.3:
            changed, masks = augment_clip(rng, list(pixels), np.ascontiguousarray(masks))
            pixels = np.stack(changed)
        if remember_truth is None and len(masks) < (2 if both else 1):
            continue
        clip = {
            "pixel_values": torch.from_numpy((pixels / np.float32(255) - MEAN) / STD).permute(0, 3, 1, 2),
            "masks": torch.from_numpy(np.ascontiguousarray(masks)),
            "plan": plan,
        }
        if remember_truth is not None:
            taught = rng.random((len(masks), frames)) < remember_truth
            taught[:, 0] |= rng.random(len(masks)) < 0.5
            clip["remember_truth"] = torch.from_numpy(taught)
        noise = rng.random((len(masks), frames, 1 + plan.clicks, 4), dtype=np.float32)
        clips.append({**clip, "noise": torch.from_numpy(noise)})
    return clips


def soft_loss(predicted: MaskPrediction) -> tuple[torch.Tensor, torch.Tensor]:
    """
    4 cross-entropy + dice on the mask averaged over 4 x 4 pixels, for the best of several masks, + 0.2 L1 of the
    expected IoU + 0.2 cross-entropy of the object score; and the mean IoU of the visible objects. Unlike the loss of
    `Sam2Trainer` it has a gradient where the object score is wrong, and is as cheap as 32 x 32 pixels.
    """
    logits = predicted.logits
    truth = F.interpolate(predicted.truth[:, None].float(), logits.shape[-2:], mode="area").expand_as(logits)
    visible = predicted.truth.flatten(1).any(1).float()
    chance = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean((-1, -2))
    overlap, total = (chance * truth).sum((-1, -2)), (chance**2 + truth**2).sum((-1, -2))
    fit = 4 * entropy + 1 - (2 * overlap + 1) / (total + 1)
    hit, wanted = logits > 0, truth > 0.5
    iou = (hit & wanted).sum((-1, -2)) / (hit | wanted).sum((-1, -2)).clamp(min=1)
    each = fit.amin(1) + 0.05 * fit.mean(1) + 0.2 * (predicted.scores - iou).abs().mean(1)
    seen = F.binary_cross_entropy_with_logits(predicted.object_scores[:, 0], visible)
    count = visible.sum().clamp(min=1)
    return (each * visible).sum() / count + 0.2 * seen, (iou.amax(1) * visible).sum() / count


def train(model: Sam2VideoModel, steps: int, seed: int, peak: float, further: bool, out: Path) -> dict:
    """AdamW, cosine schedule, and the mean of the weights over the second half. Saved every 100 steps."""
    rng = np.random.default_rng(seed)
    if further:  # what is remembered stays as it is
        model.requires_grad_(False)
        model.mask_decoder.requires_grad_(True)
        model.prompt_encoder.requires_grad_(True)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    mean = copy.deepcopy(model)
    averaged = [parameter for parameter in mean.parameters() if parameter.requires_grad]
    began, recent = time.process_time(), []
    bar = tqdm(range(steps), mininterval=10)
    for step in bar:
        progress = step / steps
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1, (step + 1) / 60) * (0.02 + 0.49 * (1 + math.cos(math.pi * progress)))
        clips, counts = draw_corrected_batch(rng) if further else (draw_batch(rng, progress), True)
        # Three masks are not used in videos, but by prompts="auto".
        model.config.multimask_output_in_sam = clips[0]["plan"].kind == "click" and bool(rng.random() < 0.2)
        predictions = predict_last(model, clips) if further else predict_clips(model, clips)
        results = [soft_loss(predicted) for predicted in predictions]
        losses = torch.stack([loss for loss, _ in results])
        if further:  # what is tracked counts as much as all clicks
            loss = losses[1:].mean() + (losses[0] if counts else 0)
        else:
            loss = losses.mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent = [*recent[-99:], (loss.item(), results[-1][1].item())]
        bar.set_postfix(zip(("loss", "iou"), np.mean(recent, axis=0).round(3), strict=True), refresh=False)
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 4.5 / steps if progress > 0.5 else 1.0)
        if step % 100 == 99 or step == steps - 1:
            copy.deepcopy(mean).half().save_pretrained(out)
            sam2_processor(SIDE).save_pretrained(out)
    loss_value, iou = np.mean(recent, axis=0)
    return {
        "steps": steps,
        "seed": seed,
        "cpu_seconds": time.process_time() - began,
        "loss": loss_value,
        "iou": iou,
        "megabytes": (out / "model.safetensors").stat().st_size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tiny_sam2"))
    parser.add_argument("--model", help="what this script made before, to train on with corrections")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=1e-3, help="the highest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    further = args.model is not None
    model = Sam2VideoModel.from_pretrained(args.model, dtype=torch.float32) if further else tiny_model(args.seed)
    report = train(model, args.steps, args.seed, args.peak, further, args.out)
    print(json.dumps({key: round(float(value), 3) for key, value in report.items()}))


if __name__ == "__main__":
    main()
