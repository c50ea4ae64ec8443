"""Sessions as safetensors files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_iclr.untrusted import as_written_by, parse_json, read_safetensors, whole_number

from .config import VideoSessionConfig
from .memory import MEMORY_POLICIES
from .prompts import VideoPrompts


_FORMAT = "hf_iclr video session 1"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"": None, **{str(dtype)[6:]: dtype for dtype in _FLOATS}}
_LARGE = ("maskmem_features", "pred_masks")  # these may be offloaded


def write_session(session, path: str | Path) -> None:
    """Writes a [`VideoSession`]: tensors by object, kind of frame, frame and key; the rest as JSON in the metadata."""
    config = asdict(session.config)
    if config["memory"] not in MEMORY_POLICIES:
        raise ValueError(f"Only a memory policy with a name can be saved: {', '.join(MEMORY_POLICIES)}.")
    config["feature_cache_dtype"] = str(config["feature_cache_dtype"] or "").removeprefix("torch.")
    tensors = {}
    for obj, memory in session._memories.items():
        for kind, outputs in memory.output_dict_per_obj[0].items():
            for frame, output in outputs.items():
                for key, tensor in output.items():
                    if key != "maskmem_pos_enc":
                        tensors[f"{obj}/{kind}/{frame}/{key}"] = tensor.contiguous().clone()
    if session.features.memory_positions is not None:
        tensors["memory_positions"] = session.features.memory_positions.contiguous().clone()
    state = {
        "model_type": session.model.config.model_type,
        "source": session.frames.source,
        "num_frames": session.num_frames,
        "size": session.frames.size,
        "config": config,
        "prompts": session.prompts.to_dict(),
        "corrected": sorted(session._corrected),
        "latest": session._latest,
        # The order of frames is kept, for it is the order in which the model sums over them.
        "objects": {
            obj: {
                "order": {kind: list(outputs) for kind, outputs in memory.output_dict_per_obj[0].items()},
                "directions": memory.frames_tracked_per_obj[0],
            }
            for obj, memory in session._memories.items()
        },
    }
    save_file(tensors, str(path), metadata={"format": _FORMAT, "state": json.dumps(state)})


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
        dtype = state["config"]["feature_cache_dtype"]
        config = VideoSessionConfig(**state["config"] | {"feature_cache_dtype": _DTYPES[dtype]})
    session = session_class(pipe.model, pipe.processor, source if video is None else video, config)
    with as_written_by(writer, "the session"):
        size = state["size"]
        if size is not None and (session.num_frames, list(session.size)) != (state["num_frames"], size):
            raise ValueError(
                f"Expected the video of the session, {state['num_frames']} frames of {size} pixels, got "
                f"{session.num_frames} frames of {list(session.size)}."
            )
        _fill(session, state, tensors)
    return session


def _fill(session, state: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Puts what was read into a new session."""
    last = 2**53 if session.num_frames is None else session.num_frames - 1
    positions = tensors.pop("memory_positions", None)
    session.features.memory_positions = None if positions is None else positions.to(session._state_device)
    for key, record in state["objects"].items():
        memory = session._memories[int(key)] = session._new_memory(int(key))
        memory.frames_tracked_per_obj[0] = {
            whole_number(int(frame), "a tracked frame", most=last): {"reverse": bool(way["reverse"])}
            for frame, way in record["directions"].items()
        }
        for kind, outputs in memory.output_dict_per_obj[0].items():
            for frame in record["order"].get(kind, []):
                outputs[whole_number(frame, "a frame with a mask", most=last)] = {}
    for name, tensor in tensors.items():
        key, kind, frame, name = name.split("/")
        output = session._memories[int(key)].output_dict_per_obj[0][kind][int(frame)]
        output[name] = tensor.to(session._state_device if name in _LARGE else session.model.device)
        if name == "maskmem_features":
            output["maskmem_pos_enc"] = session.features.memory_positions
    prompts = VideoPrompts(state["prompts"])
    prompts.check(session.size, session.num_frames)
    session._prompts = {
        frame: {obj: prompt for obj, prompt in objects.items() if obj in session._memories}
        for frame, objects in prompts.items()
    }
    session._corrected = {
        (whole_number(frame, "a corrected frame", most=last), obj) for frame, obj in state["corrected"]
    }
    session._latest = whole_number(state["latest"], "the latest frame", least=-1, most=last)
