"""The small model of the package: that it segments, is small, and that its example trains."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import pipeline

import hf_iclr  # noqa: F401  registers the task
from hf_iclr.tour.demo.segmenter import DEMO_SEGMENTER, load_demo_segmenter
from hf_iclr.vision.evaluation.interactive import evaluate_interactive
from hf_iclr.vision.evaluation.j_and_f import region_similarity
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.evaluation.simulated_prompts import first_prompt


EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny_sam2.py"


@pytest.fixture(scope="module")
def pipe():
    return load_demo_segmenter()


def test_it_is_small_and_plain_transformers():
    assert (DEMO_SEGMENTER / "model.safetensors").stat().st_size <= 4e6
    config = json.loads((DEMO_SEGMENTER / "config.json").read_text())
    assert config["architectures"] == ["Sam2VideoModel"]


@pytest.mark.parametrize("kind", ["mask", "box", 1])
def test_it_follows_a_blob_that_moves_away_from_where_it_was_shown(pipe, kind):
    scores, held = [], []
    for seed in (10**12, 10**12 + 1):
        clip = procedural_clip(seed, frames=6)
        truth = clip.masks[1]
        result = pipe(clip.frames, prompts={0: {1: first_prompt(truth[0], kind)}})
        scores.append(region_similarity(np.stack([frame.masks[1] for frame in result]), truth)[1:])
        held.append(region_similarity(np.repeat(truth[:1], 6, axis=0), truth)[1:])
    assert np.mean(scores) > 0.7
    assert np.mean(scores) > np.mean(held) + 0.2


def test_the_example_trains_the_same_weights_again(tmp_path, monkeypatch, capsys):
    weights = []
    for name in ("first", "again"):
        monkeypatch.setattr(sys, "argv", ["train", "--steps", "2", "--out", str(tmp_path / name)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        loaded = pipeline("promptable-video-segmentation", model=str(tmp_path / name), device="cpu")
        weights.append(torch.cat([parameter.flatten() for parameter in loaded.model.parameters()]))
    assert torch.equal(*weights)
    assert '"megabytes": 3.2' in capsys.readouterr().out


def test_a_correction_lifts_what_it_lost(pipe):
    clips = [procedural_clip(seed, hard=True) for seed in range(10**12, 10**12 + 6)]
    table = evaluate_interactive(pipe, clips, clicks_per_frame=3, max_frames=3).table
    scores = table.pivot_table(index="frames", columns=["clip", "object"], values="j_and_f").ffill()
    lost = scores.loc[:, scores.loc[1] < 0.8].mean(axis=1)
    assert lost[2] > lost[1] + 0.01
    assert lost[3] > lost[1] + 0.03
