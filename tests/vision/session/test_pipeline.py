"""`pipeline("promptable-video-segmentation")`: every input, output and model of the family, saved and loaded."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Sam2Config, Sam2Model, pipeline

import hf_iclr  # noqa: F401
from hf_iclr.vision.session.pipeline import Sam2VideoPipeline
from hf_iclr.vision.session.prompts import VideoPrompts
from hf_iclr.vision.session.segments import VideoSegments
from tests.hub_server import TOKEN
from tests.vision.session.direct import direct_masks
from tests.vision.session.test_frames import smooth, write_video
from tests.vision.tiny import FAMILIES, clip, tiny_pipe


TASK = "promptable-video-segmentation"
VIDEO = clip(5)
CLICK = {"points": [[20, 20]], "labels": [1]}
PROMPTS = {0: {1: CLICK}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_pipe().save_pretrained(path)
    return str(path)


def masks(segments, obj=1) -> np.ndarray:
    return np.stack([frame.binary(obj) for frame in segments])


def test_fixed_use(tmp_path, folder):
    pipe = pipeline(TASK, model=folder)
    assert type(pipe) is Sam2VideoPipeline
    video = write_video(tmp_path / "clip.mp4", smooth(6))
    m = np.zeros((48, 64), bool)
    m[10:20, 10:20] = True
    prompts = {0: {1: {"points": [[21, 35]], "labels": [1]}, 2: {"box": [10, 10, 40, 45]}}, 4: {3: {"mask": m}}}
    result = pipe(video, prompts=prompts, direction="both", output="rle")
    assert isinstance(result, VideoSegments) and len(result) == 6
    for frame in result:
        assert set(frame.masks) == set(frame.scores) == set(frame.object_scores) == set(frame.boxes) == {1, 2, 3}
        assert set(frame.masks[1]) == {"size", "counts"} and set(frame.visible) == {1, 2, 3}
    assert result[4].prompted == {3}
    camera = (frame for frame in clip(4))
    frames = [
        (frame.frame, frame.masks[1].shape, frame.scores[1])
        for frame in pipe.stream(camera, prompts={0: {1: {"points": [[50, 40]], "labels": [1]}}})
    ]
    assert [frame[:2] for frame in frames] == [(number, (48, 80)) for number in range(4)]
    image = Image.fromarray(VIDEO[0])
    (frame,) = pipe(image, prompts={1: {"box": [10, 10, 60, 40]}})
    assert frame.masks[1].shape == (48, 80) and frame.masks[1].dtype == bool
    assert len(pipe(image, prompts="auto", automatic={"points_per_side": 2, "pred_iou_thresh": 0.0})) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_its_own_loop(family, tmp_path):
    tiny_pipe(family).save_pretrained(tmp_path)
    pipe = pipeline(TASK, model=str(tmp_path))
    assert pipe.model.config.model_type == family
    inputs = {"input_points": [[[[20, 20]]]], "input_labels": [[[1]]]}
    expected = direct_masks(pipe.model, pipe.processor, VIDEO, 2, ways=(False, True), **inputs)
    result = pipe(VIDEO, prompts={2: {1: CLICK, 7: {"box": [40, 5, 70, 40]}}}, direction="both", output="logits")
    assert result.frames == list(expected) == list(range(5))
    # Two objects go through the model together, which rounds otherwise; one alone has its masks bit for bit.
    assert all(np.abs(result[frame].masks[1] - expected[frame]).max() < 1e-4 for frame in expected)
    alone = pipe(VIDEO, prompts={2: {1: CLICK}}, direction="both", output="logits")
    assert all(np.array_equal(alone[frame].masks[1], expected[frame]) for frame in expected)
    session = pipe.session(VIDEO)
    session.add(2, 1, **CLICK)
    session.propagate()
    fixed = session.correct(4, 1, points=[[60, 30]])
    assert np.array_equal(session.propagate("both")[4].masks[1], fixed.masks[1])


def test_the_same_video_in_any_form_gives_the_same_masks(tmp_path):
    pipe = tiny_pipe()
    expected = masks(pipe(VIDEO, prompts=PROMPTS))
    assert expected.any() and not expected.all()
    for number, frame in enumerate(VIDEO):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    images = [Image.fromarray(frame) for frame in VIDEO]
    for form in (list(VIDEO), images, str(tmp_path), paths, torch.from_numpy(VIDEO), {"frames": VIDEO}):
        assert np.array_equal(masks(pipe(form, prompts=PROMPTS)), expected)


def test_an_iterator_is_read_lazily():
    taken = []
    frames = tiny_pipe().stream((taken.append(number) or frame for number, frame in enumerate(VIDEO)), prompts=PROMPTS)
    assert taken in ([], [0])
    next(frames), next(frames)
    assert taken == [0, 1]
    assert tiny_pipe()(iter(VIDEO), prompts=PROMPTS).frames == list(range(5))


def test_several_videos_have_prompts_each_or_one_for_all():
    pipe = tiny_pipe()
    other = clip(3, seed=1)
    own = [PROMPTS, {1: {4: {"box": [8, 12, 28, 30]}}}]
    first, second = pipe([VIDEO, other], prompts=own)
    assert np.array_equal(masks(first), masks(pipe(VIDEO, prompts=PROMPTS)))
    assert second.objects == [4] and second.frames == [1, 2]
    assert [len(segments) for segments in pipe([VIDEO, other], prompts=PROMPTS, output="rle")] == [5, 3]


def test_videos_come_with_their_prompts_as_datasets_and_generators():
    pipe = tiny_pipe()
    expected = masks(pipe(VIDEO, prompts=PROMPTS))
    row = {"video": VIDEO, "prompts": PROMPTS, "name": "park"}
    assert np.array_equal(masks(pipe(row)), expected)
    rows = Dataset.from_list([{"frames": [Image.fromarray(f) for f in VIDEO], "name": n} for n in "ab"])
    for several, prompts in (
        ([row, row], None),
        (iter([row, row]), None),
        ((VIDEO for _ in range(2)), PROMPTS),
        ((VIDEO for _ in range(2)), [PROMPTS, PROMPTS]),
        (rows, PROMPTS),
    ):
        results = pipe(several, prompts=prompts)
        assert isinstance(results, list) == isinstance(several, list)
        assert all(np.array_equal(masks(result), expected) for result in results)
    taken = []
    results = pipe((taken.append(number) or VIDEO for number in range(9)), prompts=PROMPTS)
    next(results)
    assert taken == [0]
    with pytest.raises(ValueError, match="beside the video or apart from it, got both"):
        pipe(row, prompts=PROMPTS)


def test_prompts_may_be_checked_or_json():
    pipe = tiny_pipe()
    expected = masks(pipe(VIDEO, prompts=PROMPTS))
    text = VideoPrompts(PROMPTS).to_json()
    for prompts in (VideoPrompts(PROMPTS), VideoPrompts.from_json(text), json.loads(text)):
        assert np.array_equal(masks(pipe(VIDEO, prompts=prompts)), expected)


@pytest.mark.parametrize("output", ["mask", "logits", "rle", "polygon"])
def test_every_output_is_the_same_mask(output):
    pipe = tiny_pipe()
    result = pipe(VIDEO, prompts=PROMPTS, output=output)
    assert np.array_equal(masks(result), masks(pipe(VIDEO, prompts=PROMPTS)))
    record = result.to_dicts()[1]
    assert record["frame"] == 1 and 0 < record["score"] < 1 and not record["prompted"]


def test_options_may_be_set_once_or_for_a_call():
    pipe = Sam2VideoPipeline(
        model=tiny_pipe().model, processor=tiny_pipe().processor, device="cpu", output="rle", direction="both"
    )
    result = pipe(VIDEO, prompts={2: {1: CLICK}})
    assert len(result) == 5 and isinstance(result[0].masks[1], dict)
    assert isinstance(pipe(VIDEO, prompts=PROMPTS, output="mask")[0].masks[1], np.ndarray)
    assert pipe.session(VIDEO).config.output == "rle"


def test_half_precision_runs():
    pipe = tiny_pipe()
    model = type(pipe.model)(pipe.model.config).to(torch.bfloat16)
    half = Sam2VideoPipeline(model=model, processor=pipe.processor, device="cpu")
    # Torch's flash attention raises where ATEN_CPU_CAPABILITY hides from it what the processor has (AMX).
    with sdpa_kernel(SDPBackend.MATH):
        result = half(VIDEO[:3], prompts=PROMPTS, output="logits")
    assert result[2].masks[1].dtype == np.float32 and np.isfinite(result[2].masks[1]).all()


def test_a_saved_pipeline_loads_without_remote_code(folder, tmp_path):
    config = json.loads(open(f"{folder}/config.json").read())  # noqa: SIM115
    assert "custom_pipelines" not in config
    again = pipeline(TASK, model=folder)
    assert type(again.processor) is type(tiny_pipe().processor) and again.processor.target_size == 64
    expected, loaded = tiny_pipe().model.state_dict(), again.model.state_dict()
    assert set(loaded) == set(expected) and all(torch.equal(loaded[name], expected[name]) for name in expected)
    # The weights are the same bits. Their masks need not be: loaded tensors begin where the file has them, products
    # round by the alignment of their factors, and memories in bfloat16 carry that on.
    shown = {"prompts": PROMPTS, "output": "logits"}
    found, made = (np.stack([frame.masks[1] for frame in pipe(VIDEO, **shown)]) for pipe in (again, tiny_pipe()))
    assert np.abs(found - made).max() < 1e-3 * np.abs(made).max()
    again.save_pretrained(tmp_path / "twice")
    assert type(pipeline(TASK, model=str(tmp_path / "twice")).processor) is type(again.processor)


def test_a_pushed_pipeline_loads_in_another_process(hub, folder):
    HfApi(hub.url, token=TOKEN).create_repo("user/tiny-sam2", exist_ok=True)
    printed = hub.run(f"""
        import hf_iclr, numpy as np
        from transformers import pipeline
        pipe = pipeline("{TASK}", model={folder!r}, device="cpu")
        pipe.push_to_hub("user/tiny-sam2")
        pipe = pipeline("{TASK}", model="user/tiny-sam2", device="cpu")
        result = pipe(np.zeros((2, 48, 80, 3), np.uint8), prompts={{1: {{"box": [1, 2, 30, 40]}}}})
        print(type(pipe).__name__, type(pipe.processor).__name__, result)
    """)
    assert "Sam2VideoPipeline Sam2VideoProcessor VideoSegments(2 frames, objects [1])" in printed


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda pipe: pipe(VIDEO), "Nothing says what to segment"),
        (lambda pipe: pipe(VIDEO, prompts={}), "Nothing says what to segment"),
        (lambda pipe: pipe(VIDEO, prompts="everything"), "\"auto\", got 'everything'"),
        (lambda pipe: pipe(VIDEO, prompts={9: {1: CLICK}}), r"0\.\.4, got a prompt on frame 9"),
        (lambda pipe: pipe(VIDEO, prompts={0: {1: {"points": [[90, 3]]}}}), r"x in 0\.\.80"),
        (lambda pipe: pipe(VIDEO, prompts={0: {1: {"box": [90, 3, 99, 9]}}}), r"box with x in 0\.\.80"),
        (lambda pipe: pipe(VIDEO, prompts={0: {-1: CLICK}}), "object numbers from 0 on, got -1"),
        (lambda pipe: pipe([VIDEO, VIDEO], prompts=[PROMPTS]), "each of 2 videos, got 1"),
        (lambda pipe: pipe(VIDEO, prompts=[PROMPTS]), "Pass a list of videos"),
        (lambda pipe: pipe(iter(VIDEO), prompts=PROMPTS, direction="both"), "A stream goes forward"),
        (lambda pipe: pipe(VIDEO, prompts=PROMPTS, automatic={}), 'prompts="auto" with it'),
        (lambda pipe: pipe([], prompts=PROMPTS), "at least one frame"),
        (lambda pipe: pipe.stream(iter(VIDEO)), "Nothing says what to segment"),
    ],
)
def test_bad_calls_are_told(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(tiny_pipe())


def test_unknown_options_and_models_are_told():
    with pytest.raises(TypeError, match="Unknown options outputs. There are direction"):
        tiny_pipe()(VIDEO, prompts=PROMPTS, outputs="rle")
    with pytest.raises(ValueError, match="processor beside the model"):
        Sam2VideoPipeline(model=tiny_pipe().model)
    with torch.device("meta"), pytest.raises(ValueError, match="edgetam_video, sam3_tracker_video, got sam2 "):
        Sam2VideoPipeline(model=Sam2Model(Sam2Config()), processor=tiny_pipe().processor)
    with torch.device("meta"), pytest.raises(ValueError, match=r"model=Sam3TrackerVideoModel\.from_pretrained\('a'\)"):
        model = Sam2Model(Sam2Config())
        model.config.model_type, model.name_or_path = "sam3_video", "a"
        Sam2VideoPipeline(model=model, processor=tiny_pipe().processor)
    with pytest.raises(ValueError, match="Expected a model for 'promptable-video-segmentation'"):
        pipeline(TASK)


def test_boxes_of_detectors_may_reach_over_the_edge():
    pipe = tiny_pipe()
    over = pipe(VIDEO, prompts={0: {1: {"box": [-0.4, 12, 30, 48.7]}}}, output="logits")
    within = pipe(VIDEO, prompts={0: {1: {"box": [0, 12, 30, 48]}}}, output="logits")
    assert all(np.array_equal(over[number].masks[1], within[number].masks[1]) for number in range(5))


@pytest.mark.parametrize("form", ["logits", "probabilities", "bfloat16 logits", "0 and 1", "0 and 255", "uint8"])
def test_masks_are_prompts_in_any_scale(form):
    pipe = tiny_pipe()
    logits = pipe(VIDEO, prompts=PROMPTS, output="logits")[0].masks[1]
    mask = logits > 0
    assert 0 < mask.sum() < mask.size
    given = {
        "logits": logits,
        "probabilities": 1 / (1 + np.exp(-logits)),
        "bfloat16 logits": torch.from_numpy(logits).bfloat16(),
        "0 and 1": mask.astype(np.float32),
        "0 and 255": mask * 255.0,
        "uint8": mask * np.uint8(7),
    }[form]
    assert np.array_equal(VideoPrompts({0: {1: {"mask": given}}})[0][1].mask, mask)
