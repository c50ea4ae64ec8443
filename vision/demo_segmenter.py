"""A trained SAM 2 small enough for the package, for tests, demos and tours without a Hub."""

from pathlib import Path

import torch
from transformers import Sam2VideoModel, Sam2VideoProcessor

from .pipeline_promptable_video_segmentation import Sam2VideoPipeline


DEMO_SEGMENTER = Path(__file__).parent / "demo_sam2"


def load_demo_segmenter() -> Sam2VideoPipeline:
    """
    A pipeline with the model of 1.6 million parameters that `examples/train_tiny_sam2.py` trains on procedural clips
    (see [`~hf_iclr.vision.procedural_clips.procedural_clip`]) of 128 x 128 pixels. It knows coloured blobs, not the
    world: on real videos it is weak.
    """
    model = Sam2VideoModel.from_pretrained(DEMO_SEGMENTER, dtype=torch.float32, local_files_only=True)
    processor = Sam2VideoProcessor.from_pretrained(DEMO_SEGMENTER, local_files_only=True)
    return Sam2VideoPipeline(model=model, processor=processor, device="cpu")
