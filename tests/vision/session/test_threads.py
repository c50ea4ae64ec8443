"""Many sessions of one model at once, and models with accelerate's hooks."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from accelerate.hooks import ModelHook, add_hook_to_module

from hf_iclr.vision.session.pipeline import Sam2VideoPipeline
from tests.vision.tiny import clip, tiny_pipe


def annotate(pipe, number: int) -> tuple[np.ndarray, list[float]]:
    """An annotator's work: masks and scores."""
    session = pipe.session(clip(6, seed=number), output="logits")
    session.add(0, 1, points=[[20, 20 + number]])
    session.propagate()
    for frame in (2, 4):
        session.correct(frame, 1, points=[[10 + number, 20]], labels=[0])
    passed = session.propagate("both")
    return np.stack([segments.masks[1] for segments in passed]), [segments.scores[1] for segments in passed]


def at_once(pipe, count: int) -> list[tuple[np.ndarray, list[float]]]:
    """The same of as many annotators at once."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(annotate, [pipe] * count, range(count)))
    finally:
        sys.setswitchinterval(interval)


def same(left, right) -> bool:
    return np.array_equal(left[0], right[0]) and left[1] == right[1]


def test_eight_threads_find_what_they_find_one_after_the_other():
    pipe = tiny_pipe()
    alone = [annotate(pipe, number) for number in range(8)]
    assert not any(np.array_equal(alone[0][0], other[0]) for other in alone[1:])
    assert all(same(*pair) for pair in zip(alone, at_once(pipe, 8), strict=True))
    hooked = [module for module in pipe.model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert not hooked and not any("forward" in vars(module) for module in pipe.model.modules())


class Count(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_hooks_of_accelerate_run_and_stay():
    plain = tiny_pipe()
    model = copy.deepcopy(plain.model)
    parts = [
        model,
        model.vision_encoder.neck.position_encoding,
        model.memory_attention.rotary_emb,
        model.mask_decoder,
        model.prompt_encoder,
    ]
    hooks = [Count() for _ in parts]
    for part, hook in zip(parts, hooks, strict=True):
        add_hook_to_module(part, hook)
    pipe = Sam2VideoPipeline(model=model, processor=plain.processor, device="cpu")
    assert all(same(found, annotate(plain, number)) for number, found in enumerate(at_once(pipe, 2)))
    assert all(hook.calls for hook in hooks) and all("forward" in vars(part) for part in parts)
