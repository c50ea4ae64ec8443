"""How the benchmarks of training SAM 2 train the package's tiny one."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_iclr import Sam2Trainer, Sam2TrainingConfig
from hf_iclr.tour.demo.segmenter import load_demo_segmenter


WAYS = {"video": {"num_frames": 5, "batch": 4}, "image": {"num_frames": 1, "batch": 20}}
RATES = {"video": 3e-4, "image": 3e-4}  # the first that was tried; --choose compares others


def tune(
    videos: Sequence,
    way: str,
    rate: float,
    steps: int,
    seed: int,
    folder: Path,
    clicks: int = 0,
    augment: bool = False,
) -> tuple[Any, float]:
    """A pipeline with the tuned model, and the CPU seconds of the training; `clicks` corrections of a clip's frame."""
    pipe = load_demo_segmenter()
    args = Sam2TrainingConfig(
        str(folder),
        seed=seed,
        num_frames=WAYS[way]["num_frames"],
        per_device_train_batch_size=WAYS[way]["batch"],
        augment=augment,
        mask_share=0.4,
        box_share=0.0,
        max_prompted_frames=1,
        corrective_clicks=clicks,
        iou_weight=0.3,  # near to what the tiny model was trained with
        object_weight=0.3,
        learning_rate=rate,
        vision_learning_rate=0.6 * rate,  # the reference's ratio
        layer_decay=1.0,
        weight_decay=0.02,
        adam_beta2=0.98,
        max_steps=steps,
        warmup_steps=15,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Sam2Trainer(pipe.model, args, videos, processing_class=pipe.processor)
    started = time.process_time()
    trainer.train()
    pipe.model.eval()
    return pipe, time.process_time() - started
