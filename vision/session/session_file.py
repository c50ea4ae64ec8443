"""Sessions as safetensors files."""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from hf_iclr.models import hash_weights
from hf_iclr.saving import write_safetensors
from hf_iclr.untrusted import as_written_by, parse_json, read_safetensors, whole_number

from .config import VideoSessionConfig
from .memory import ObjectMemory
from .prompts import VideoPrompts


_FORMAT = "hf_iclr video session 2"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"": None, **{str(dtype)[6:]: dtype for dtype in _FLOATS}}
_SAME_LOOK = 6  # of 255
_LARGE = ("maskmem_features", "pred_masks")  # these may be offloaded


def write_session(session, path: str | Path) -> None:
    """Writes a [`VideoSession`]: tensors by object, kind of frame, frame and key; the rest as JSON in the metadata."""
    config = asdict(session.config)
    if config["memory"] != "exact":
        raise ValueError(
            "A session with a memory policy of its own can't be saved, one with the model's own rule can."
        )
    config["feature_cache_dtype"] = str(config["feature_cache_dtype"] or "").removeprefix("torch.")
    frames, tensors = session.frames, {}
    for obj, memory in session._memories.items():
        for kind, outputs in _kinds(memory).items():
            for frame, output in outputs.items():
                for key, tensor in output.items():
                    if key != "maskmem_pos_enc":
                        tensors[f"{obj}/{kind}/{frame}/{key}"] = tensor.contiguous().clone()
    if session.features.memory_positions is not None:
        tensors["memory_positions"] = session.features.memory_positions.contiguous().clone()
    if session.streaming and frames.position >= 0:
        with suppress(ValueError, TypeError):  # a bad frame is nothing to go on from
            tensors["latest_frame"] = torch.from_numpy(frames[frames.position].copy())
    state = {
        "model_type": session.model.config.model_type,
        "model": session.model.name_or_path,
        "weights": hash_weights(session.model),
        "source": frames.source,
        "num_frames": session.num_frames,
        "size": frames.size,
        "position": frames.position if session.streaming else None,
        "looks": {} if session.streaming else {frame: _look(frames[frame]) for frame in _samples(session)},
        "config": config,
        "prompts": VideoPrompts(session._prompts).to_dict(),
        "queue": VideoPrompts(session._queue).to_dict(),
        "corrected": sorted(session._corrected),
        "latest": session._latest,
        # The order of frames is kept, for it is the order in which the model sums over them.
        "objects": {
            obj: {
                "order": {kind: list(outputs) for kind, outputs in _kinds(memory).items()},
                "directions": memory.ways,
            }
            for obj, memory in session._memories.items()
        },
    }
    write_safetensors(tensors, Path(path), {"format": _FORMAT, "state": json.dumps(state)})


def _kinds(memory: ObjectMemory) -> dict[str, dict[int, dict[str, torch.Tensor]]]:
    return {**memory.output_dict_per_obj[0], "waiting": memory.waiting}


def _samples(session) -> list[int]:
    """Frames that tell a video from others of its shape: the first, and some of those that have masks."""
    known = sorted({f for memory in session._memories.values() for kind in _kinds(memory).values() for f in kind})
    return sorted({0, *known[:: max(1, len(known) // 6)], *known[-1:]})


def _look(frame: np.ndarray) -> list[int]:
    """What a frame looks like from far away: the colours of 8 x 8 patches, which another decoder changes little."""
    return np.asarray(Image.fromarray(frame).resize((8, 8), Image.Resampling.BOX)).flatten().tolist()


def read_session(session_class, pipe, path: str | Path, video: Any):
    """
    A session of `session_class` as [`write_session`] wrote it.

    Raises:
        ValueError: if the file is none that it wrote, or the model or the video is another.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}. Give the path that VideoSession.save wrote.")
    tensors, metadata = read_safetensors(path)
    if metadata.get("format") != _FORMAT or "state" not in metadata:
        raise ValueError(f"{path} is no video session that VideoSession.save wrote.")
    state = parse_json(metadata["state"], path)
    model_type, writer = pipe.model.config.model_type, "VideoSession.save"
    with as_written_by(writer, "the session"):
        if state["model_type"] != model_type:
            raise ValueError(f"The session is of a {state['model_type']} model, got a {model_type} model.")
        source = state["source"]
        if video is None and source is None:
            raise ValueError(
                "The session's video was no file. Give it again: VideoSession.load(pipe, path, video=...)."
            )
        if video is None and not (Path(source).is_file() or Path(source).is_dir()):
            raise ValueError(
                f"The session's video, {source!r:.80}, is no file or folder here, and nothing else that a session "
                "names is opened. Give it: VideoSession.load(pipe, path, video=...)."
            )
        if state["weights"] != hash_weights(pipe.model):
            raise ValueError(
                f"The session was made with other weights ({str(state['model'])!r:.80}) than those of this pipeline "
                f"({pipe.model.name_or_path!r}), which can't read its memories. Give a pipeline with its own."
            )
        dtype = state["config"]["feature_cache_dtype"]
        config = VideoSessionConfig(**state["config"] | {"feature_cache_dtype": _DTYPES[dtype]})
    session = session_class(pipe.model, pipe.processor, source if video is None else video, config)
    with as_written_by(writer, "the session"):
        _check_video(session, state)
        _fill(session, state, tensors)
    return session


def _check_video(session, state: dict[str, Any]) -> None:
    """Raises `ValueError` for another video than that of the session; a stream is not read for it."""
    size, length = state["size"], state["num_frames"]
    if session.streaming != (length is None):
        was, now = ("a stream", "a video") if length is None else ("a video", "a stream")
        raise ValueError(f"Expected {was} as the session had (an iterator is a stream, a list is none), got {now}.")
    if session.streaming:
        return
    if size is not None and (session.num_frames, list(session.size)) != (length, size):
        raise ValueError(
            f"Expected the video of the session, {length} frames of {size} pixels, got {session.num_frames} frames of "
            f"{list(session.size)}."
        )
    for frame, look in state["looks"].items():
        number = whole_number(int(frame), "a frame of the video", most=length - 1)
        if np.abs(np.subtract(_look(session.frames[number]), look)).max() > _SAME_LOOK:
            raise ValueError(
                f"Expected the video of the session, got another one of its shape: frame {number} looks different. "
                "Give the video that it was made on."
            )


def _fill(session, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Puts what was read into a new session."""
    last = 2**53 if session.num_frames is None else session.num_frames - 1
    positions, latest = tensors.pop("memory_positions", None), tensors.pop("latest_frame", None)
    if session.streaming:
        session.frames.size = None if state["size"] is None else tuple(state["size"])
        position = whole_number(state["position"], "the frame that was taken last", least=-1, most=last)
        session.frames.resume(position, None if latest is None else latest.numpy())
    session.features.memory_positions = None if positions is None else positions.to(session._state_device)
    for key, record in state["objects"].items():
        memory = session._memories[int(key)] = session._new_memory(int(key))
        memory.frames_tracked_per_obj[0] = {
            whole_number(int(frame), "a tracked frame", most=last): {"reverse": bool(way["reverse"])}
            for frame, way in record["directions"].items()
        }
        for kind, outputs in _kinds(memory).items():
            for frame in record["order"].get(kind, []):
                outputs[whole_number(frame, "a frame with a mask", most=last)] = {}
    for name, tensor in tensors.items():
        key, kind, frame, name = name.split("/")
        output = _kinds(session._memories[int(key)])[kind][int(frame)]
        output[name] = tensor.to(session._state_device if name in _LARGE else session.model.device)
        if name == "maskmem_features":
            output["maskmem_pos_enc"] = session.features.memory_positions
    for memory in session._memories.values():
        memory.resume()
    for name, waits in (("prompts", False), ("queue", True)):
        prompts = VideoPrompts(state[name])
        if prompts:
            prompts.check(session.size, session.num_frames)
        kept = session._queue if waits else session._prompts
        kept |= {
            frame: known
            for frame, objects in prompts.items()
            if (known := {obj: prompt for obj, prompt in objects.items() if waits or obj in session._memories})
        }
    session._corrected = {
        (whole_number(frame, "a corrected frame", most=last), obj) for frame, obj in state["corrected"]
    }
    session._latest = whole_number(state["latest"], "the latest frame", least=-1, most=last)
