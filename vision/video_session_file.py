"""Sessions as safetensors files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .video_memory import MEMORY_POLICIES
from .video_prompts import VideoPrompts
from .video_session_config import VideoSessionConfig


_FORMAT = "hf_iclr video session 1"
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


def read_session(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The state and the tensors that [`write_session`] wrote."""
    if not Path(path).is_file():
        raise ValueError(f"There is no file {path}. Give the path that VideoSession.save wrote.")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}).") from None
    if metadata.get("format") != _FORMAT:
        raise ValueError(f"{path} is no video session that VideoSession.save wrote.")
    return json.loads(metadata["state"]), tensors


def restore_session(session_class, pipe, state: dict[str, Any], tensors: dict[str, torch.Tensor], video: Any):
    """
    A session of `session_class` in a read state.

    Raises:
        ValueError: if the model or the video is another.
    """
    model_type = pipe.model.config.model_type
    if state["model_type"] != model_type:
        raise ValueError(f"The session is of a {state['model_type']} model, got a {model_type} model.")
    if video is None and state["source"] is None:
        raise ValueError("The session's video was no file. Give it again: VideoSession.load(pipe, path, video=...).")
    config = state["config"]
    config["feature_cache_dtype"] = getattr(torch, config["feature_cache_dtype"] or "None", None)
    video = state["source"] if video is None else video
    session = session_class(pipe.model, pipe.processor, video, VideoSessionConfig(**config))
    if state["size"] is not None and (session.num_frames, list(session.size)) != (state["num_frames"], state["size"]):
        raise ValueError(
            f"Expected the video of the session, {state['num_frames']} frames of {state['size']} pixels, got "
            f"{session.num_frames} frames of {list(session.size)}."
        )
    positions = tensors.get("memory_positions")
    session.features.memory_positions = None if positions is None else positions.to(session._state_device)
    for key, record in state["objects"].items():
        memory = session._memories[int(key)] = session._new_memory(int(key))
        memory.frames_tracked_per_obj[0] = {int(frame): way for frame, way in record["directions"].items()}
        for kind, frames in record["order"].items():
            memory.output_dict_per_obj[0][kind] = {frame: {} for frame in frames}
    for name, tensor in tensors.items():
        if name == "memory_positions":
            continue
        key, kind, frame, name = name.split("/")
        output = session._memories[int(key)].output_dict_per_obj[0][kind][int(frame)]
        output[name] = tensor.to(session._state_device if name in _LARGE else session.model.device)
        if name == "maskmem_features":
            output["maskmem_pos_enc"] = session.features.memory_positions
    session._prompts = {
        frame: {obj: prompt for obj, prompt in prompts.items() if obj in session._memories}
        for frame, prompts in VideoPrompts(state["prompts"]).items()
    }
    session._corrected = {(frame, obj) for frame, obj in state["corrected"]}
    session._latest = state["latest"]
    return session
