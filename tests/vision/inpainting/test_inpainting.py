"""Objects taken out of videos: the error against the known background, diffusers pipelines, and bad input."""

import json
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLMagvit,
    AutoencoderKLWan,
    AutoPipelineForInpainting,
    EasyAnimateInpaintPipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.utils import BaseOutput
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from hf_iclr.cli import app as cli
from hf_iclr.tour.demo.pipeline import build_demo_pipeline
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
from hf_iclr.vision.formats.annotation_json import write_sav
from hf_iclr.vision.formats.segment_files import given_segments
from hf_iclr.vision.inpainting.inpainting import inpaint_video
from hf_iclr.vision.session.segments import VideoSegments
from hf_iclr.vision.session.videos import open_video
from tests.vision.tiny import tiny_pipe


GREEN = np.array([0, 255, 0], np.uint8)


def given(masks: dict[int, np.ndarray]) -> VideoSegments:
    frames, *size = next(iter(masks.values())).shape
    return VideoSegments(
        given_segments(number, tuple(size), {obj: mask[number] for obj, mask in masks.items()})
        for number in range(frames)
    )


def scene(frames: int = 8, step: int = 6, size: int = 48):
    """A noiseless scene and a square before it, which moves `step` pixels a frame: frames, masks, background."""
    background = np.random.default_rng(1).integers(0, 200, (size, size, 3), dtype=np.uint8)
    video, mask = np.repeat(background[None], frames, axis=0), np.zeros((frames, size, size), bool)
    for number in range(frames):
        left = 2 + step * number % (size - 12)
        mask[number, 16:28, left : left + 10] = True
    video[mask] = (250, 240, 20)
    return video, mask, background


class Greens:
    """Stands for an image pipeline: everything it draws is green, at its own size."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompt=None, image=None, mask_image=None, generator=None, height=16, width=16, strength=1.0):
        self.calls.append((prompt, np.asarray(image), np.asarray(mask_image), generator.initial_seed()))
        return BaseOutput(images=[Image.new("RGB", (width, height), (0, 255, 0))])


class GreenWindows:
    """Stands for a video pipeline."""

    def __init__(self):
        self.calls = []

    def __call__(
        self,
        prompt=None,
        video=None,
        mask=None,
        height=480,
        width=832,
        num_frames=81,
        generator=None,
        output_type="np",
    ):
        self.calls.append(([np.asarray(image) for image in video], [np.asarray(image) for image in mask]))
        return BaseOutput(frames=np.tile(np.float32([0, 1, 0]), (1, num_frames, height, width, 1)))


def test_what_other_frames_show_is_the_background_itself():
    video, mask, background = scene()
    painted = inpaint_video(video, given({1: mask}))
    assert painted.sources == {"seen": 1.0, "generated": 0.0, "interpolated": 0.0} and painted.key_frames == [0]
    assert np.array_equal(np.stack(list(painted)), np.repeat(background[None], 8, axis=0))
    assert np.array_equal(video[3][mask[3]], np.tile((250, 240, 20), (120, 1)))  # the caller's frames stay


@pytest.mark.parametrize("hard", [False, True], ids=["plain", "hard"])
def test_the_error_against_the_true_background_is_small(hard):
    errors, untouched = [], []
    for seed in range(3):
        clip = procedural_clip(seed, hard=hard, frames=24, size=64)
        holes = np.any(list(clip.masks.values()), axis=0)
        painted = np.stack(list(inpaint_video(clip.frames, given(clip.masks))))
        for images, found in ((painted, errors), (clip.frames, untouched)):
            found.append(np.abs(images.astype(float) - clip.background)[holes].mean())
    assert np.mean(errors) < 4 and np.mean(untouched) > 10 * np.mean(errors)


def test_only_the_objects_asked_for_go_and_the_rest_is_untouched():
    clip = procedural_clip(3, frames=6, size=64)
    painted = np.stack(list(inpaint_video(clip.frames, given(clip.masks), objects=[2], dilation=1, feather=0)))
    first, second = clip.masks[1], clip.masks[2]
    alone = first & ~np.stack([np.pad(m, 1)[1:-1, 1:-1] for m in second])
    changed = (painted != clip.frames).any(-1)
    assert changed[second].mean() > 0.9 and changed[alone].mean() < 0.1
    assert not changed[
        ~np.any([np.roll(second, (y, x), (1, 2)) for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)
    ].any()


def test_an_image_pipeline_draws_once_what_was_never_seen():
    video, mask, background = scene(step=0)  # the square stands still
    moving = scene()[1]
    video[moving] = (250, 240, 20)
    painter = Greens()
    painted = inpaint_video(video, given({1: mask, 2: moving}), painter, prompt="grass", dilation=0, feather=0, seed=7)
    ((prompt, image, hole, seed),) = painter.calls
    assert prompt == "grass" and seed == 7
    assert image.shape == (24, 24, 3) and hole.shape == (24, 24)  # 12 rows, and half as much on either side
    assert set(np.unique(hole)) == {0, 255} and (hole == 255).sum() == mask[0].sum()
    assert np.array_equal(image[hole == 0], background[10:34, 0:24][hole == 0])  # without the other object
    frames = np.stack(list(painted))
    assert (frames[mask] == GREEN).all()
    assert np.array_equal(frames[~mask], np.repeat(background[None], 8, axis=0)[~mask])
    assert painted.sources["generated"] == pytest.approx(mask.sum() / (mask | moving).sum())


def test_crop_none_shows_the_pipeline_whole_frames():
    video, mask, _ = scene(step=0)
    painter = Greens()
    inpaint_video(video, given({1: mask}), painter, crop=None)
    assert painter.calls[0][1].shape == (48, 48, 3)


def test_each_key_frame_has_a_background_of_its_own():
    video, mask, _ = scene(step=0)
    for key_frames, expected in ((None, [0]), (3, [0, 3, 6]), ([5], [0, 5])):
        painter = Greens()
        painted = inpaint_video(video, given({1: mask}), painter, key_frames=key_frames)
        assert painted.key_frames == expected and len(painter.calls) == len(expected)
    wide = np.random.default_rng(0).integers(0, 255, (48, 96, 3), dtype=np.uint8)
    panned = np.stack([wide[:, left : left + 48] for left in (0, 0, 0, 20, 20, 20, 40, 40)])
    assert inpaint_video(panned, given({1: mask}), Greens()).key_frames == [0, 3, 6]


def test_a_replaced_background_leaves_the_object():
    video, mask, _ = scene()
    painter = Greens()
    painted = inpaint_video(video, given({1: mask}), painter, mode="replace_background", feather=0)
    frames = np.stack(list(painted))
    assert np.array_equal(frames[mask], video[mask]) and (frames[~mask] == GREEN).all()
    assert len(painter.calls) == 2  # what is free on frame 0, then what the object hides there
    assert painted.sources["generated"] == 1


@pytest.mark.parametrize("kind", ["unet", "transformer"])
def test_diffusers_image_pipelines_draw(kind):
    painter = AutoPipelineForInpainting.from_pipe(build_demo_pipeline(kind))
    painter.set_progress_bar_config(disable=True)
    video, mask, _ = scene(step=0, frames=3)
    options = {"prompt": "the sky", "num_inference_steps": 2, "height": 16, "width": 16}
    first, again, other = (
        np.stack(list(inpaint_video(video, given({1: mask}), painter, seed=seed, **options))) for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert (first[mask] != video[mask]).any(-1).mean() > 0.9
    assert np.array_equal(first[0][mask[0]], first[2][mask[2]])  # one drawing, shown on all frames


def test_windows_of_a_video_pipeline_go_on_from_each_other():
    video, mask, _ = scene()
    painter = GreenWindows()
    painted = inpaint_video(video, given({1: mask}), painter, feather=0, height=64, width=64, num_frames=5)
    assert painted.key_frames == [0, 4]
    (first, holes), (second, later) = painter.calls
    assert len(first) == 5 and len(second) == 4
    assert first[0].shape == (64, 64, 3)
    assert (first[0][holes[0] > 0] == 128).all()  # the object isn't shown
    assert not later[0].any() and later[1].any()  # the painted frame 4 is given
    assert (np.abs(second[0].astype(int) - GREEN).sum(-1) == 0).any()
    frames = np.stack(list(painted))
    assert len(frames) == 8 and (frames[mask] == GREEN).all()


def wan_vace():
    base = build_demo_pipeline("transformer")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    transformer = WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0],
        vace_in_channels=72,
    )
    return WanVACEPipeline(
        tokenizer=base.tokenizer_2,
        text_encoder=base.text_encoder_2,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=transformer,
    ), {}


def easy_animate():
    torch.manual_seed(0)
    transformer = EasyAnimateTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=12,
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=16,
        num_layers=1,
        sample_width=16,
        sample_height=16,
        patch_size=2,
        resize_inpaint_mask_directly=False,
    )
    vae = AutoencoderKLMagvit(
        down_block_types=("SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3),
        up_block_types=("SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3),
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )
    pipeline = EasyAnimateInpaintPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return pipeline, {name: torch.ones(1, 4) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}


@pytest.mark.parametrize("build", [wan_vace, easy_animate])
def test_diffusers_video_pipelines_draw(build):
    painter, options = build()
    painter.set_progress_bar_config(disable=True)
    video, mask, _ = scene(frames=6)
    options |= {name: torch.ones(1, 4, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    options |= {"num_inference_steps": 1, "height": 32, "width": 32, "num_frames": 5}
    painted = inpaint_video(video, given({1: mask}), painter, **options)
    frames = np.stack(list(painted))
    assert painted.key_frames == [0, 4] and frames.shape == video.shape
    assert (frames[mask] != video[mask]).any(-1).mean() > 0.9
    assert np.array_equal(frames[:, :5], video[:, :5])  # far from the mask


def test_a_painted_video_is_a_video(tmp_path):
    clip = procedural_clip(0, frames=12, size=64)
    painted = inpaint_video(clip.frames, given(clip.masks))
    painted.save(tmp_path / "painted.mp4", rate=8)
    again = np.stack(list(open_video(tmp_path / "painted.mp4")))
    assert again.shape == clip.frames.shape and len(painted) == 12
    assert np.abs(again.astype(int) - clip.background)[np.any(list(clip.masks.values()), axis=0)].mean() < 10
    assert np.array_equal(open_video(painted)[5], painted[5])
    assert tiny_pipe().session(painted).num_frames == 12


def textured(height: int, width: int) -> np.ndarray:
    """Blobs and stripes over a slope of light, `(height, width, 3)`, in floats of 40 to 200."""
    rng = np.random.default_rng(5)
    coarse = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (5, 5, 0))
    fine = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (1.5, 1.5, 0))
    return 120 + 25 * coarse / coarse.std() + 10 * fine / fine.std()


def filmed(shift, turn=lambda t: 0.0, gain=lambda t: 1.0, frames: int = 20, size: int = 96):
    """What a camera sees of a wide picture, and a disc that moves before it: frames, masks, the bare background."""
    wide = textured(3 * size, 3 * size)
    video, mask, bare = (
        np.zeros((frames, size, size, *rest), kind) for rest, kind in (((3,), np.uint8), ((), bool), ((3,), np.uint8))
    )
    y, x = np.mgrid[:size, :size]
    for t in range(frames):
        angle, (down, right) = turn(t), shift(t)
        matrix = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        middle = np.array([1.5 * size + down, 1.5 * size + right]) - matrix @ [size / 2, size / 2]
        seen = np.stack(
            [ndimage.affine_transform(wide[..., c], matrix, middle, (size, size), order=3) for c in range(3)], -1
        )
        bare[t] = (seen * gain(t)).clip(0, 255).round()
        mask[t] = np.hypot(x - 20 - 2.5 * t, y - 48) < 9
        video[t] = np.where(mask[t][..., None], (250, 30, 220), bare[t])
    noise = np.random.default_rng(1).normal(0, 3, video.shape)
    return (video + noise).clip(0, 255).astype(np.uint8), mask, bare


MOVES = {
    "exposure drifts": {"shift": lambda t: (0, 0), "gain": lambda t: 0.75 + 0.03 * t},
    "slow pan": {"shift": lambda t: (0, 0.7 * t)},
    "pan": {"shift": lambda t: (0.3 * t, 1.5 * t), "gain": lambda t: 1 + 0.1 * np.sin(t)},
    "hand": {"shift": lambda t: (3 * np.sin(t), 2 * np.cos(1.3 * t)), "turn": lambda t: 0.04 * np.sin(0.7 * t)},
}


@pytest.mark.parametrize("name", MOVES)
def test_a_camera_that_moves_a_little_or_gets_lighter_needs_one_background(name):
    """Noise of 3 has a mean of 2.4: what is painted has less than that and an error of registration."""
    video, mask, bare = filmed(**MOVES[name])
    painted = inpaint_video(video, given({1: mask}))
    assert painted.key_frames == [0] and painted.sources["interpolated"] < 0.02
    error = np.abs(np.stack(list(painted)).astype(float) - bare)[mask].mean()
    assert error < 4, error


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_rate_and_sound_of_the_video_are_kept(tmp_path, suffix):
    """Packets of sound are those of the source byte for byte, also where it begins a while after the pictures."""
    path = tmp_path / f"source{suffix}"
    clip = procedural_clip(0, frames=30, size=64)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(30_000, 1001))
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        tone = file.add_stream("aac", rate=44_100)
        for frame in clip.frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
        for place in range(4 * 1024, 44_100, 1024):
            wave = np.sin(np.arange(place, place + 1024, dtype=np.float32) / 16)[None]
            chunk = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            chunk.sample_rate, chunk.pts = 44_100, place
            file.mux(tone.encode(chunk))
        file.mux(tone.encode())
    painted = inpaint_video(str(path), given(clip.masks))
    for rate, sounds in ((None, 1), (15, 0)):
        painted.save(tmp_path / "painted.mp4", rate)
        with av.open(str(tmp_path / "painted.mp4")) as file, av.open(str(path)) as source:
            assert len(file.streams.audio) == sounds and len(source.streams.audio) == 1
            assert float(file.streams.video[0].average_rate) == pytest.approx(rate or 30_000 / 1001, abs=1e-3)
            if sounds:
                first, second = ([p for p in each.demux(audio=0) if p.size] for each in (source, file))
                assert [bytes(packet) for packet in first] == [bytes(packet) for packet in second]
                starts = [float(packets[1].pts * packets[1].time_base) for packets in (first, second)]
                assert starts[0] == pytest.approx(starts[1], abs=0.03)
    painted.save(tmp_path / "painted.gif")
    assert open_video(tmp_path / "painted.gif").rate == pytest.approx(30, abs=4)


def test_uneven_times_of_a_video_are_kept(tmp_path):
    clip, times = procedural_clip(0, frames=8, size=64), [0, 1, 2, 3, 9, 10, 11, 30]
    with av.open(str(tmp_path / "phone.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for picture, time in zip(clip.frames, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 30)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    inpaint_video(str(tmp_path / "phone.mp4"), given(clip.masks)).save(tmp_path / "painted.mp4")
    again = open_video(tmp_path / "painted.mp4")
    assert [again.time(number) for number in range(8)] == pytest.approx([time / 30 for time in times], abs=1e-3)


def test_what_was_never_seen_is_counted(caplog):
    video, mask, _ = scene(step=0)
    painted = inpaint_video(video, given({1: mask}))
    assert painted.sources["interpolated"] == 1 and "100 % of the painted pixels were never seen" in caplog.text
    assert (np.stack(list(painted))[mask] != (250, 240, 20)).any(-1).all()


VIDEO, MASK, _ = scene(frames=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode": "erase"}, "Expected mode to be one of remove, replace_background"),
        ({"dilation": -1}, "Expected dilation of at least 0"),
        ({"objects": [4]}, r"Expected some of the objects \[1\], got \[4\]"),
        ({"objects": []}, r"Expected some of the objects \[1\], got \[\]"),
        ({"segments": VideoSegments([])}, "There are no objects in the segments"),
        ({"segments": given({1: MASK & False})}, "There is nothing to paint"),
        ({"segments": given({1: MASK[:, :40]})}, r"masks of the video's size \(48, 48\).*got \[\(40, 48\)\]"),
        (
            {"segments": given({1: MASK[:2]})},
            r"masks of all 3 frames of the video, got them of 2 \(the frames 0\.\.1\)",
        ),
        ({"video": iter(VIDEO)}, "which a stream can't give"),
        ({"mode": "replace_background"}, "A new background has to be drawn. Pass an inpainting pipeline"),
        ({"num_inference_steps": 4}, "There is no pipeline to pass num_inference_steps to"),
        ({"pipeline": lambda prompt: None}, "Make one by AutoPipelineForInpainting.from_pipe"),
        ({"pipeline": Greens(), "steps": 4}, "Greens can't be passed steps here"),
        ({"pipeline": GreenWindows(), "key_frames": 2}, "windows instead of key frames"),
        ({"pipeline": GreenWindows(), "num_frames": 1}, "windows of at least 2 frames"),
        ({"key_frames": 0}, "a key frame every 1 or more frames"),
        ({"key_frames": [3]}, r"Expected key frames in 0\.\.2, got \[3\]"),
    ],
)
def test_bad_input_gets_a_sentence(change, words):
    options = {"video": VIDEO, "segments": given({1: MASK}), **change}
    with pytest.raises(ValueError, match=words):
        inpaint_video(**options)


def test_segments_of_another_kind_get_a_sentence():
    with pytest.raises(TypeError, match="Expected VideoSegments"):
        inpaint_video(VIDEO, MASK)


def test_the_command(tmp_path):
    video, mask, _ = scene(frames=4, size=64)
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    write_sav(given({1: mask}), tmp_path / "masks.json")
    tiny_pipe().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.json").write_text(json.dumps({"0": {"1": {"box": [10, 10, 40, 40]}}}))
    base = ["inpaint", str(tmp_path), "--out", str(tmp_path / "out.mp4")]
    for how in (["--masks", "masks.json"], ["--prompts", "prompts.json", "--model", "model"]):
        arguments = [*base, *(part if part.startswith("--") else str(tmp_path / part) for part in how)]
        result = CliRunner().invoke(cli.app, arguments)
        assert result.exit_code == 0, result.output
        assert "4 frames written to" in result.output.replace("\n", " ")
        assert open_video(tmp_path / "out.mp4").num_frames == 4
    result = CliRunner().invoke(cli.app, base)
    assert result.exit_code == 2 and "--masks and --prompts" in result.output
