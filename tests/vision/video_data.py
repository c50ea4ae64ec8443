"""Real videos with true masks, which are too large for the repository; tests that need them skip without them."""

import os
from pathlib import Path

import pytest


# Folder with davis/Annotations/480p, davis/osvos, davis/osvos_reference_jf.json and sav_000001_manual.json.
VIDEO_DATA = Path(os.environ.get("HF_ICLR_VIDEO_DATA", Path(__file__).parents[3] / "shared" / "data" / "video"))

needs_video_data = pytest.mark.skipif(not VIDEO_DATA.is_dir(), reason="set HF_ICLR_VIDEO_DATA to a folder of videos")
