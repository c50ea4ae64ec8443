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


_FORMAT = "hf_iclr video session 2"
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_DTYPES = {"": None, **{str(dtype)[6:]: dtype for dtype in _FLOATS}}
_SAME_LOOK = 6  # of 255
_KINDS = ("cond_frame_outputs", "non_cond_frame_outputs", "waiting")  # in the order of a memory's snapshot
_LARGE = ("maskmem_features", "pred_masks")  # these may be offloaded


def write_session(session, path: str | Path, note: str = "") -> None:
    """
    Writes a [`VideoSession`] with what can be undone and redone: tensors by object, kind of frame, frame and key, of
    other times by number; the rest as JSON in the metadata, with a `note` of the caller's.
    """
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
                        tensors[f"{obj}/{kind}/{frame}/{key}"] = tensor
    history = _write_history(session, tensors)
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
        "history": history,
    }
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # none may share memory
    write_safetensors(tensors, Path(path), {"format": _FORMAT, "state": json.dumps(state), "note": note})


def _write_history(session, tensors: dict[str, torch.Tensor]) -> dict[str, list[dict[str, Any]]]:
    """Other times of a session, each as what differs from the time next to it; adds tensors that only they have."""
    names = {id(tensor): name for name, tensor in tensors.items()}
    ways: dict[str, list[dict[str, Any]]] = {}
    for way, states in {"undo": reversed(session._undo), "redo": reversed(session._redo)}.items():
        near, ways[way] = session._state(), []
        for state in states:
            prompts, queue, corrected, memories = state
            objects = {}
            for obj, (_, snapshot) in memories.items():
                beside = near[3][obj][1] if obj in near[3] else ({}, {}, {}, {})
                record: dict[str, Any] = {"ways": None if snapshot[3] == beside[3] else snapshot[3]}
                for kind, outputs, known in zip(_KINDS, snapshot, beside, strict=False):
                    same = {f for f in outputs if f in known and _is(outputs[f], known[f])}
                    if list(outputs) == list(known) and len(same) == len(outputs):
                        continue
                    record[kind] = [[f, None if f in same else _name(o, names, tensors)] for f, o in outputs.items()]
                objects[obj] = record
            known = {"prompts": VideoPrompts(prompts).to_dict(), "queue": VideoPrompts(queue).to_dict()}
            ways[way].append({**known, "corrected": sorted(corrected), "objects": objects})
            near = state
    return ways


def _is(output: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return output.keys() == other.keys() and all(tensor is other[key] for key, tensor in output.items())


def _name(output: dict[str, torch.Tensor], names: dict[int, str], tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """The names of an output's tensors in the file, which get those that it lacks."""
    found = {}
    for key, tensor in output.items():
        if key != "maskmem_pos_enc":
            found[key] = names.setdefault(id(tensor), f"history/{len(names)}")
            tensors[found[key]] = tensor
    return found


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
        memory = session._memories[int(key)] = new_memory(session, int(key))
        memory.frames_tracked_per_obj[0] = {
            whole_number(int(frame), "a tracked frame", most=last): {"reverse": bool(way["reverse"])}
            for frame, way in record["directions"].items()
        }
        for kind, outputs in _kinds(memory).items():
            for frame in record["order"].get(kind, []):
                outputs[whole_number(frame, "a frame with a mask", most=last)] = {}
    placed = {}  # the tensors of the file, where they belong
    for name, tensor in tensors.items():
        if name.startswith("history/"):
            continue
        key, kind, frame, part = name.split("/")
        placed[name] = tensor.to(session._state_device if part in _LARGE else session.model.device)
        output = _kinds(session._memories[int(key)])[kind][int(frame)]
        output[part] = placed[name]
        if part == "maskmem_features":
            output["maskmem_pos_enc"] = session.features.memory_positions
    for memory in session._memories.values():
        memory.resume()
    session._prompts = _read_prompts(session, state["prompts"], set(session._memories))
    session._queue = _read_prompts(session, state["queue"])
    session._corrected = _read_corrected(state["corrected"], last)
    session._latest = whole_number(state["latest"], "the latest frame", least=-1, most=last)
    _read_history(session, state.get("history") or {"undo": [], "redo": []}, tensors, placed, last)


def _read_prompts(session, record: dict[str, Any], objects: set[int] | None = None) -> dict[int, dict[int, Any]]:
    prompts = VideoPrompts(record)
    if prompts:
        prompts.check(session.size, session.num_frames)
    known = {f: {o: p for o, p in own.items() if objects is None or o in objects} for f, own in prompts.items()}
    return {frame: own for frame, own in known.items() if own}


def _read_corrected(pairs: list[list[int]], last: int) -> set[tuple[int, int]]:
    return {(whole_number(frame, "a corrected frame", most=last), obj) for frame, obj in pairs}


def _read_history(session, history: dict[str, Any], tensors, placed: dict[str, torch.Tensor], last: int) -> None:
    """What can be undone and redone, from the present on; an object's memory counts on from all that it was."""
    memories = dict(session._memories)

    def output(parts: dict[str, str]) -> dict[str, torch.Tensor]:
        found = {}
        for key, name in parts.items():
            if name not in placed:
                placed[name] = tensors[name].to(session._state_device if key in _LARGE else session.model.device)
            found[key] = placed[name]
        return found | ({"maskmem_pos_enc": session.features.memory_positions} if "maskmem_features" in found else {})

    for way, kept in (("undo", session._undo), ("redo", session._redo)):
        near, states = session._state(), []
        for record in history[way]:
            snapshots = {}
            for key, own in record["objects"].items():
                memory = memories.setdefault(int(key), new_memory(session, int(key)))
                beside = near[3][int(key)][1] if int(key) in near[3] else ({}, {}, {}, {})
                kinds = [
                    {
                        whole_number(f, "a frame with a mask", most=last): known[f] if parts is None else output(parts)
                        for f, parts in own.get(kind, [[f, None] for f in known])
                    }
                    for kind, known in zip(_KINDS, beside, strict=False)
                ]
                ways = own["ways"]
                ways = (
                    beside[3] if ways is None else {int(f): {"reverse": bool(w["reverse"])} for f, w in ways.items()}
                )
                snapshots[int(key)] = memory, (*({f: dict(o) for f, o in kind.items()} for kind in kinds), dict(ways))
                answers = [int(one["answers"]) for kind in kinds for one in kind.values()]
                memory._answers = max(memory._answers, *answers, 0)
            prompts = _read_prompts(session, record["prompts"], set(snapshots))
            queue = _read_prompts(session, record["queue"])
            near = (prompts, queue, _read_corrected(record["corrected"], last), snapshots)
            states.append(near)
        kept.extend(reversed(states))
