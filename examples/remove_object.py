"""
Take an object out of a video: segment it from one prompt, then paint over it.

    python examples/remove_object.py                              # a drawn clip and its true masks, a few seconds
    python examples/remove_object.py clip.mp4 210 350             # what is at x = 210, y = 350 of frame 0
    python examples/remove_object.py clip.mp4 210 350 stabilityai/stable-diffusion-2-inpainting "an empty street"

Without a painter, the hole shows what other frames saw there, which takes a camera that stands still; it is exact
where the object moves away and blurred where it never does. A painter draws what no frame shows. The last two need the
weights of SAM 2 (and of the painter): from the Hub, or from folders.
"""

import sys

import numpy as np
from transformers import pipeline

from hf_iclr import VideoSegments, inpaint_video
from hf_iclr.vision.evaluation import procedural_clip
from hf_iclr.vision.formats import given_segments


painter, options = None, {}
if len(sys.argv) > 1:
    video, x, y = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    segmenter = pipeline("promptable-video-segmentation", model="facebook/sam2.1-hiera-tiny")
    segments = segmenter(video, prompts={0: {1: {"points": [[x, y]]}}}, direction="both", output="rle")
    if len(sys.argv) > 4:
        from diffusers import AutoPipelineForInpainting

        painter = AutoPipelineForInpainting.from_pretrained(sys.argv[4])
        options = {"prompt": sys.argv[5], "num_inference_steps": 30}
else:
    clip = procedural_clip(seed=4, hard=True, frames=48, size=192)
    video = clip.frames
    segments = VideoSegments(
        given_segments(number, video.shape[1:3], {obj: mask[number] for obj, mask in clip.masks.items()})
        for number in range(len(video))
    )

painted = inpaint_video(video, segments, painter, **options)
painted.save("removed.mp4")
for source, share in painted.sources.items():
    print(f"{share:6.1%} of the painted pixels are {source}")

if len(sys.argv) == 1:
    holes = np.any(list(clip.masks.values()), axis=0)
    for name, images in {"as it was": video, "painted": np.stack(list(painted))}.items():
        error = np.abs(images.astype(float) - clip.background)[holes].mean()
        print(f"{name}: {error:.1f} of 255 levels from the true background")
