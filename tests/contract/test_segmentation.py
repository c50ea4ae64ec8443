"""A corrected clip against the reference predictor's correction, made with transformers alone."""

import numpy as np
import pytest

from hf_iclr.tiny_models import tiny_segmenter
from hf_iclr.vision.session.session import VideoSession
from tests.vision.session.direct import corrected_masks


@pytest.mark.parametrize("ways", [(False,), (False, True)], ids=["forward", "both"])
def test_a_corrected_clip(ways):
    model, processor = tiny_segmenter()
    video = np.random.default_rng(0).integers(0, 160, (6, 48, 80, 3), dtype=np.uint8)
    video[:, 12:30, 8:28] = (250, 60, 30)
    session = VideoSession(model, processor, video)
    session.config.output = "logits"
    session.add(0, 1, points=[[20, 20]])
    session.propagate()
    session.correct(3, 1, points=[[60, 30], [30, 20]], labels=[1, 0])
    passes = session.propagate("both" if True in ways else "forward")
    ours = {frame.frame: frame.masks[1] for frame in passes if 1 in frame.masks}
    expected = corrected_masks(model, processor, video, 0, [20, 20], 3, [[60, 30], [30, 20]], [1, 0], ways=ways)
    assert ours.keys() == expected.keys()
    assert all(np.array_equal(ours[frame], expected[frame]) for frame in ours)
