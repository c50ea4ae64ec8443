"""
Fine-tune SAM 2 on your videos, measure it before and after, and load it with transformers alone.

    python examples/finetune_sam2.py                                               # drawn clips, tiny model, minutes
    python examples/finetune_sam2.py --data MOSE/train --model facebook/sam2.1-hiera-tiny --steps 2000

A folder holds JPEGImages and Annotations, as of DAVIS or MOSE. The same without Python: `hf-iclr train-sam2 FILE`.
"""

import argparse

import torch
from transformers import Sam2VideoModel, pipeline

from hf_iclr import Sam2Trainer, Sam2TrainingConfig, evaluate_vos
from hf_iclr.tour.demo.segmenter import DEMO_SEGMENTER
from hf_iclr.vision.evaluation import procedural_clip
from hf_iclr.vision.formats import read_videos


parser = argparse.ArgumentParser()
parser.add_argument("--data", help="left out: drawn clips of a look that the tiny model does not know")
parser.add_argument("--model", default=str(DEMO_SEGMENTER))
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", default="tuned_sam2")
options = parser.parse_args()

settings = {"num_frames": 8, "frame_checkpointing": True, "bf16": torch.cuda.is_available()}
if options.data:
    videos = read_videos(options.data)
    few = max(1, len(videos) // 5)
    held_out, train = videos[:few], videos[few:]
else:
    train = [procedural_clip(seed, hard=bool(seed % 2), shifted=True) for seed in range(100)]
    held_out = [procedural_clip(1000 + seed, shifted=True) for seed in range(6)]
    settings |= {"num_frames": 5, "frame_checkpointing": False, "corrective_clicks": 0, "max_prompted_frames": 1}
    settings |= {"learning_rate": 1e-3, "vision_learning_rate": 6e-4, "per_device_train_batch_size": 4}

pipe = pipeline("promptable-video-segmentation", model=options.model, dtype=torch.float32)
print(evaluate_vos(pipe, held_out, prompts=("mask", 1)).mean())

args = Sam2TrainingConfig(options.out, max_steps=options.steps, warmup_steps=10, report_to="none", **settings)
trainer = Sam2Trainer(pipe.model, args, train_dataset=train, processing_class=pipe.processor)
trainer.train()
trainer.save_model()

pipe = pipeline("promptable-video-segmentation", model=options.out)
print(evaluate_vos(pipe, held_out, prompts=("mask", 1)).mean())
print(Sam2VideoModel.from_pretrained(options.out).num_parameters(), "parameters, loaded by transformers alone")
