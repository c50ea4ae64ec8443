"""A trained SAM 2 small enough for the repository, for tests, demos and tours without a Hub."""

import os
from pathlib import Path

import torch
from transformers import Sam2VideoModel, Sam2VideoProcessor

from hf_iclr.vision.session.pipeline import Sam2VideoPipeline


DEMO_SEGMENTER = Path(__file__).parent / "sam2"  # of the repository and the sdist; wheels are without it


def load_demo_segmenter() -> Sam2VideoPipeline:
    """
    A pipeline with the model of 1.6 million parameters that `examples/train_tiny_sam2.py` trains on procedural clips
    (see [`~hf_iclr.vision.evaluation.procedural_clips.procedural_clip`]) of 128 x 128 pixels. It knows coloured
    blobs, not the world: on real videos it is weak.

    Raises:
        FileNotFoundError: where the package was installed from a wheel, which does without the 3.2 MB of weights, and
            they were not copied to `$HF_ICLR_CACHE` (*optional*, defaults to `~/.cache/hf_iclr`).
    """
    folder = _find_weights()
    model = Sam2VideoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    processor = Sam2VideoProcessor.from_pretrained(folder, local_files_only=True)
    return Sam2VideoPipeline(model=model, processor=processor, device="cpu")


def _find_weights() -> Path:
    cache = Path(os.environ.get("HF_ICLR_CACHE", "~/.cache/hf_iclr")).expanduser()
    folders = [DEMO_SEGMENTER, cache / "demo_sam2"]
    for folder in folders:
        if (folder / "model.safetensors").exists():
            return folder
    raise FileNotFoundError(
        f"Expected the small SAM 2 in {folders[0]} or {folders[1]}, got none: wheels are without its weights. In the "
        f"repository or the sdist of hf_iclr type `mkdir -p {cache} && cp -r tour/demo/sam2 {cache}/demo_sam2`."
    )
