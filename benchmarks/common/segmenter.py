"""The model of the benchmarks of SAM 2."""

import torch
from transformers import pipeline

import hf_iclr  # noqa: F401  registers the task
from hf_iclr.tour.demo.segmenter import load_demo_segmenter


def load_segmenter(model: str | None):
    """A pipeline on the CPU with a model from a folder or the Hub, or with the package's own."""
    if model is None:
        return load_demo_segmenter()
    return pipeline("promptable-video-segmentation", model=model, dtype=torch.float32, device="cpu")
