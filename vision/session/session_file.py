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
from .memory import ObjectMemory, new_memory
from .prompts import VideoPrompts


_FORMAT = "hf_iclr video session 3"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"": None, **{str(dtype)[6:]: dtype for dtype in _FLOATS}}
_SAME_LOOK = 6  # of 255
_KINDS = ("cond_frame_outputs", "non_cond_frame_outputs", "waiting")  # in the order of a memory's snapshot
_LARGE = ("maskmem_features", "pred_masks")  # these may be offloaded


def write_session(session, path: str | Path, note: str = "") -> None:
    """
    Writes a [`VideoSession`] with what can be undone and redone: tensors by number, the rest as JSON in the metadata,
    with a `note` of the caller's.
    """
    config = asdict(session.config)
    if config["memory"] != "exact":
        raise ValueError(
            "A session with a memory policy of its own can't be saved, one with the model's own rule can."
        )
    config["feature_cache_dtype"] = str(config["feature_cache_dtype"] or "").removeprefix("torch.")
    frames = session.frames
    tensors: dict[str, torch.Tensor] = {}
    moments = _write_moments(session, tensors)
    if session.features.memory_positions is not None:
        tensors["memory_positions"] = session.features.memory_positions
    if session.streaming and frames.position >= 0:
        with suppress(ValueError, TypeError):  # a bad frame is nothing to go on from
            tensors["latest_frame"] = torch.from_numpy(frames[frames.position])
    state = {
        "model_type": session.model.config.model_type,
        "model": session.model.name_or_path,
        "weights": hash_weights(session.model),
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "scales": _scales(session.processor),
        "source": frames.source,
        "num_frames": session.num_frames,
        "size": frames.size,
        "position": frames.position if session.streaming else None,
        "looks": {} if session.streaming else {frame: _look(frames[frame]) for frame in _samples(session)},
        "config": config,
        "latest": session._latest,
        "moments": moments,
    }
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # none may share memory
    write_safetensors(tensors, Path(path), {"format": _FORMAT, "state": json.dumps(state), "note": note})


def _write_moments(session, tensors: dict[str, torch.Tensor]) -> dict[str, list[dict[str, Any]]]:
    """The present and what can be undone and redone, each as what differs from the moment next to it."""
    names: dict[int, str] = {}
    moments: dict[str, list[dict[str, Any]]] = {}
    present = session._state()
    ways = {"present": [present], "undo": reversed(session._undo), "redo": reversed(session._redo)}
    for way, states in ways.items():
        near, moments[way] = None if way == "present" else present, []
        for state in states:
            prompts, queue, corrected, memories = state
            objects = {}
            for obj, (_, snapshot) in memories.items():
                beside = _snapshot(near, obj)
                record: dict[str, Any] = {"ways": None if snapshot[3] == beside[3] else snapshot[3]}
                # The order of frames is kept, for it is the order in which the model sums over them.
                for kind, outputs, known in zip(_KINDS, snapshot, beside, strict=False):
                    same = {f for f in outputs if f in known and _is(outputs[f], known[f])}
                    if list(outputs) == list(known) and len(same) == len(outputs):
                        continue
                    record[kind] = [[f, None if f in same else _name(o, names, tensors)] for f, o in outputs.items()]
                objects[obj] = record
            known = {"prompts": VideoPrompts(prompts).to_dict(), "queue": VideoPrompts(queue).to_dict()}
            moments[way].append({**known, "corrected": sorted(corrected), "objects": objects})
            near = state
    return moments


def _snapshot(state: tuple | None, obj: int) -> tuple:
    """What is known of an object at a moment, nothing where it isn't there."""
    return state[3][obj][1] if state is not None and obj in state[3] else ({}, {}, {}, {})


def _is(output: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return output.keys() == other.keys() and all(tensor is other[key] for key, tensor in output.items())


def _name(output: dict[str, torch.Tensor], names: dict[int, str], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The names of an output's tensors in the file, which get those that it lacks."""
    found = {}
    for key, tensor in output.items():
        if key != "maskmem_pos_enc":
            found[key] = names.setdefault(id(tensor), str(len(names)))
            tensors[found[key]] = tensor
    return found


def _samples(session) -> list[int]:
    """Frames that tell a video from others of its shape: the first, and some of those that have masks."""
    known = sorted({frame for scores in session.tracks.values() for frame in scores})
    return sorted({0, *known[:: max(1, len(known) // 6)], *known[-1:]})


def _look(frame: np.ndarray) -> list[int]:
    """What a frame looks like from far away: the colours of 8 x 8 patches, which another decoder changes little."""
    return np.asarray(Image.fromarray(frame).resize((8, 8), Image.Resampling.BOX)).flatten().tolist()


def _scales(processor) -> list:
    """How a processor scales colours."""
    frames = processor.video_processor
    return [list(frames.image_mean), list(frames.image_std), frames.rescale_factor, frames.do_normalize]


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
        if state["scales"] != _scales(pipe.processor):
            raise ValueError(
                f"The session's processor scaled colours by {state['scales']} (mean, deviation, factor, whether), got "
                f"{_scales(pipe.processor)}. Give a pipeline with its own processor."
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
    # Of the model's own type; memories are in bfloat16 whatever it is.
    of_model = _DTYPES[state["dtype"]]
    tensors = {
        name: tensor.to(session.model.dtype) if tensor.dtype == of_model else tensor
        for name, tensor in tensors.items()
    }
    last = 2**53 if session.num_frames is None else session.num_frames - 1
    positions, latest = tensors.pop("memory_positions", None), tensors.pop("latest_frame", None)
    if session.streaming:
        session.frames.size = None if state["size"] is None else tuple(state["size"])
        position = whole_number(state["position"], "the frame that was taken last", least=-1, most=last)
        session.frames.resume(position, None if latest is None else latest.numpy())
    session.features.memory_positions = None if positions is None else positions.to(session._state_device)
    session._latest = whole_number(state["latest"], "the latest frame", least=-1, most=last)
    placed: dict[str, torch.Tensor] = {}  # of the tensors, those that are where they belong
    memories: dict[int, ObjectMemory] = {}
    present = None
    for way, kept in (("present", []), ("undo", session._undo), ("redo", session._redo)):
        near, states = present, []
        for record in state["moments"][way]:
            near = _read_moment(session, record, near, memories, tensors, placed, last)
            states.append(near)
        kept.extend(reversed(states))
        if way == "present":
            (present,) = states
    if len(placed) != len(tensors):
        raise ValueError("Expected a moment of the session to name each tensor, got tensors that none names.")
    session._restore(present)


def _read_prompts(session, record: dict[str, Any], objects: set[int] | None = None) -> dict[int, dict[int, Any]]:
    prompts = VideoPrompts(record)
    if prompts:
        prompts.check(session.size, session.num_frames)
    known = {f: {o: p for o, p in own.items() if objects is None or o in objects} for f, own in prompts.items()}
    return {frame: own for frame, own in known.items() if own}


def _read_moment(session, moment: dict[str, Any], near: tuple | None, memories, tensors, placed, last: int) -> tuple:
    """A moment next to another; an object's memory counts on from all that it was."""

    def output(parts: dict[str, str]) -> dict[str, torch.Tensor]:
        found = {}
        for key, name in parts.items():
            if name not in placed:
                placed[name] = tensors[name].to(session._state_device if key in _LARGE else session.model.device)
            found[key] = placed[name]
        return found | ({"maskmem_pos_enc": session.features.memory_positions} if "maskmem_features" in found else {})

    snapshots = {}
    for key, record in moment["objects"].items():
        obj = int(key)
        memory = memories.setdefault(obj, new_memory(session, obj))
        *beside, ways = _snapshot(near, obj)
        kinds = [
            {
                whole_number(f, "a frame with a mask", most=last): dict(known[f] if parts is None else output(parts))
                for f, parts in record.get(kind, [[f, None] for f in known])
            }
            for kind, known in zip(_KINDS, beside, strict=True)
        ]
        if record["ways"] is not None:
            ways = {
                whole_number(int(f), "a tracked frame", most=last): {"reverse": bool(way["reverse"])}
                for f, way in record["ways"].items()
            }
        snapshots[obj] = memory, (*kinds, dict(ways))
        memory._answers = max(memory._answers, *(int(one["answers"]) for kind in kinds for one in kind.values()), 0)
    corrected = {(whole_number(frame, "a corrected frame", most=last), obj) for frame, obj in moment["corrected"]}
    prompts = _read_prompts(session, moment["prompts"], set(snapshots))
    return prompts, _read_prompts(session, moment["queue"]), corrected, snapshots
