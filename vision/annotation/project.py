"""A folder in which videos are annotated over weeks: edits are on the disk before they are answered."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from safetensors import safe_open

from hf_iclr.models import hash_weights
from hf_iclr.saving import model_revision
from hf_iclr.untrusted import inside

from ..session.prompts import ObjectPrompt, VideoPrompts
from ..session.session import VideoSession
from ..session.session_file import write_session
from .edits import apply_edit
from .masklets import Masklet, count_clicks
from .queue import Item, Queue, StaleEdit
from .sources import list_videos, name_video
from .store import AnnotationStore, to_row


logger = logging.getLogger(__name__)

_UNDO_LEVELS = 100
_MOST_REPLAYED = 30  # edits after which the session is written anew, so that opening it again is quick


class AnnotationProject:
    """
    A folder of videos, one safetensors session each, and one SQLite file with the queue, edits, decisions and people.
    It may be the folder that [`annotate`] wrote, whose masklets are then the queue, or a new one.

    An edit is done to the session, written to the database and only then answered; the session's file is written when
    objects were tracked, and what was edited since is done again when it is opened. Accepted, rejected and waiting
    masklets go to the same Parquet files as those of [`annotate`], for `load_dataset` and training.

    Args:
        folder (`str` or `Path`):
            Made if it does not exist.
        pipe (`Sam2VideoPipeline`):
            The model in the loop.

    Raises:
        ValueError: if the folder holds annotations of another model, or is none.

    Example:

    ```python
    >>> project = AnnotationProject("annotations", pipe)
    >>> project.add_videos("clips/")
    >>> item = project.next("ann")  # the most uncertain masklet that nobody else works on
    >>> click = {"frame": 3, "obj": item.object, "points": [[60, 30]], "labels": [0]}
    >>> project.edit(item.video, "prompt", click, "ann")
    >>> project.decide(item.video, "accept", [item.object], "ann")
    ```
    """

    def __init__(self, folder: str | Path, pipe):
        self.folder, self.pipe = Path(folder), pipe
        self.keep = True  # whether sessions and rows are written at all
        self._model, self._weights = pipe.model.config.name_or_path, hash_weights(pipe.model)
        self._revision = model_revision(pipe.model) or f"weights-{self._weights}"
        self.store = AnnotationStore(folder, {"model": self._model, "weights": self._weights})
        (self.folder / "sessions").mkdir(exist_ok=True)
        self.queue = Queue(self.folder / "project.sqlite")
        self._sessions: dict[str, VideoSession] = {}
        self._versions: dict[str, int] = {}  # of what is in memory
        self._saved: dict[str, int] = {}  # of what is in the session's file
        self._given: dict[str, Any] = {}  # videos without a path
        worked_on = {
            video["name"]
            for video in self.queue.videos()
            if video["version"] or video["finished"] or self.queue.masklets(video["name"])
        }
        for name in self.store.names():
            if name not in worked_on:
                self._take_rows(name)

    def close(self) -> None:
        """Writes what was edited; what can't be written now is when the project is opened again."""
        for name in self.open_names():
            try:
                self.save(name)
            except Exception as error:  # noqa: BLE001  whatever a broken video raises
                logger.warning("The session of %s could not be written: %s", name, error)
        self.write_all()
        self.queue.close()

    def add_videos(self, videos: Any) -> list[str]:
        """
        Adds what [`annotate`] takes as videos; known ones stay as they are, wherever they were moved.

        Returns:
            `list[str]`: their names.
        """
        names = []
        for video in list_videos(videos):
            name, path = name_video(video)
            ends = name.rsplit("-", 1)[-1]
            known = [one["name"] for one in self.queue.videos() if one["name"].endswith(f"-{ends}")]
            name = known[0] if known else name
            self.queue.add_video(name, path, Path(path).name if path else name)
            if path is None:
                self._given[name] = video
            names.append(name)
        return names

    def adopt(self, session: VideoSession) -> str:
        """Takes a session that is open already into a new project; its name."""
        name, source = "clip", session.frames.source
        self.queue.add_video(name, source, Path(source).name if source else "")
        self._sessions[name], self._versions[name], self._saved[name] = session, 0, 0
        with self.queue.change():
            self._track_masklets(name, session, set(session.objects))
        return name

    def next(self, person: str = "") -> Item | None:
        """What a person is to look at next, whose video is then theirs for a while; `None` if nothing is left."""
        for item in self.queue.waiting(person, limit=20):
            if self.queue.lease(item.video, person):
                return item
        return None

    def hold(self, name: str, person: str) -> None:
        """
        Renews a person's lease.

        Raises:
            StaleEdit: if the video is another's now.
        """
        if not self.queue.lease(name, person):
            raise StaleEdit(f"{self.queue.holder(name) or 'Somebody'} works on this video now. Take the next one.")

    def session(self, name: str) -> VideoSession:
        """
        The session of a video, as it was after its last edit.

        Raises:
            ValueError: if the video or the session can't be read, or is of other weights.
        """
        video, file = self.queue.video(name), self._file(name)
        if self._versions.get(name) == video["version"]:  # else another program edited it
            return self._sessions[name]
        source = self._given.get(name, video["path"])
        if source is None:
            raise ValueError(f"The video {name} was no file. Add it to the project again: add_videos([video]).")
        saved = 0
        if file.exists():
            session = VideoSession.load(self.pipe, file, source)
            with safe_open(file, "pt") as opened:
                saved = int(opened.metadata().get("note") or 0)
        else:
            session = self.pipe.session(source, output="rle", undo_levels=_UNDO_LEVELS)
            for obj, one in self.queue.masklets(name).items():
                for frame, prompt in _prompts_of(one).items():
                    session.add(frame, obj, **vars(prompt))
            session.forget_edits()
        for version, kind, fields in self.queue.edits_since(name, saved):
            try:
                apply_edit(session, kind, fields)
            except (ValueError, TypeError) as error:
                raise ValueError(f"Edit {version} ({kind}) of {name} can't be done again: {error}") from None
        self._sessions[name], self._versions[name], self._saved[name] = session, video["version"], saved
        return session

    def untracked(self, name: str) -> bool:
        """Whether the session has masks on prompted frames only, though rows tell of more."""
        session = self.session(name)
        prompts = _prompts_by_object(session)
        tracked = any(len(frames) > len(prompts[obj]) for obj, frames in session.tracks.items())
        return not tracked and any(len(row["frames"]) > 1 for row in self.store.rows(name))

    def edit(
        self, name: str, kind: str, fields: Mapping[str, Any], person: str = "", version: int | None = None
    ) -> int:
        """
        Does an edit, whose answer may be given when this returns.

        Args:
            name (`str`):
                Of the video.
            kind (`str`), fields (`Mapping[str, Any]`):
                Of `apply_edit`.
            person (`str`, *optional*):
                Whose edit it is.
            version (`int`, *optional*):
                Of what was seen; left out, it is not checked.

        Returns:
            `int`: the new version.

        Raises:
            ValueError, TypeError: for what can't be done. Nothing is changed then.
            StaleEdit: if it was changed since.
        """
        self.hold(name, person)
        session, known = self.session(name), self.queue.video(name)["version"]
        if version is not None and version != known:
            raise StaleEdit(
                "This video was changed in another tab since. It is shown as it is now: do that once more."
            )
        before = _prompts_by_object(session)
        apply_edit(session, kind, fields)
        try:
            with self.queue.change():
                version = self.queue.add_edit(name, known, kind, dict(fields), person)
                after = _prompts_by_object(session)
                changed = {obj for obj in before.keys() | after.keys() if not _same(before.get(obj), after.get(obj))}
                self._track_masklets(name, session, changed)
                if kind == "name":
                    self._put(name, fields["obj"], category=fields["category"] or None)
        except BaseException:
            self._versions.pop(name, None)  # what is on the disk counts
            raise
        self._versions[name] = version
        return version

    def decide(self, name: str, decision: str, objects: Iterable[int] | None = None, person: str = "") -> None:
        """
        Accepts, rejects or skips masklets.

        Args:
            name (`str`):
                Of the video.
            decision (`str`):
                "accept", "reject" or "skip".
            objects (`Iterable[int]`, *optional*):
                Left out, all that wait; an accepted video is then finished, also without any object.
            person (`str`, *optional*):
                Who decides.

        Raises:
            ValueError: for another decision, or an object that is not there.
        """
        if decision not in ("accept", "reject", "skip"):
            raise ValueError(f"Expected a decision of accept, reject or skip, got {decision!r:.40}.")
        self.hold(name, person)
        known = self.queue.masklets(name)
        chosen = (
            [obj for obj, one in known.items() if one["status"] == "waiting"] if objects is None else list(objects)
        )
        if unknown := set(chosen) - known.keys():
            raise ValueError(f"There is no object {unknown.pop()!r:.40} to decide on.")
        with self.queue.change():
            self.queue.decide(name, chosen, decision, person)
            if objects is None and decision != "skip":
                self.queue.mark(name, finished=1)
            self.queue.mark(name, unwritten=1)

    def checkpoint(self, name: str) -> None:
        """Writes the session of a video with what was tracked, so that nothing is to be done again to open it."""
        session, known = self.session(name), self.queue.masklets(name)
        if not self.keep:
            return
        write_session(session, self._file(name), note=str(self._versions[name]))
        self._saved[name] = self._versions[name]
        with self.queue.change():
            for obj, scores in session.tracks.items():
                if obj in known and known[obj]["edited"]:
                    self._put(name, obj, uncertainty=_doubt(scores))
                    self.queue.mark(name, unwritten=1)

    def is_long(self, name: str) -> bool:
        """Whether many edits would have to be done again."""
        return self._versions.get(name, 0) - self._saved.get(name, 0) >= _MOST_REPLAYED

    def open_names(self) -> list[str]:
        """The videos whose sessions are in memory, in the order in which they were opened."""
        return list(self._sessions)

    def save(self, name: str) -> None:
        """Writes a video's session if it was edited since."""
        if name in self._sessions and self._versions.get(name) != self._saved[name]:
            self.checkpoint(name)

    def drop(self, name: str) -> None:
        """Saves a session and forgets it until it is asked for."""
        self.save(name)
        self._sessions.pop(name, None)
        self._versions.pop(name, None)

    def write_rows(self, name: str) -> Iterator[None]:
        """Writes the rows of a video, a frame at a time, so that others get their turn in between."""
        if not self.keep:
            return
        known, rows = self.queue.masklets(name), {row["object"]: row for row in self.store.rows(name)}
        version, written = self.queue.video(name)["version"], []
        for obj, one in known.items():
            base = rows.get(obj)
            if one["edited"] and one["reason"] != "removed":
                masklet = self._masklet(name, obj, one)
                yield from self._take_masks(masklet)
                row = to_row(masklet, self.queue.video(name)["path"], self._model, self._revision, self._weights)
            elif base is not None:
                row = base
            else:
                continue  # shown and removed again
            written.append({**row, "status": one["status"], "reason": one["reason"], "category": one["category"]})
        if self.queue.video(name)["version"] == version and (written or self.queue.video(name)["finished"]):
            self.store.write(name, written)
        with self.queue.change():
            if self.queue.video(name)["version"] == version and self.queue.masklets(name) == known:
                self.queue.mark(name, unwritten=0)

    def write_all(self) -> None:
        """Writes the rows of all videos that were changed since."""
        for video in self.queue.videos():
            if video["unwritten"]:
                try:
                    for _ in self.write_rows(video["name"]):
                        pass
                except (ValueError, OSError) as error:
                    logger.warning("The rows of %s could not be written: %s", video["name"], error)

    def read(self) -> datasets.Dataset:
        """All masklets of the folder, as [`annotate`] gives them."""
        self.write_all()
        return self.store.read([])

    def _file(self, name: str) -> Path:
        return inside(self.folder / "sessions", f"{name}.safetensors")

    def _take_rows(self, name: str) -> None:
        rows = self.store.rows(name)
        path = rows[0]["video"] if rows else None
        with self.queue.change():
            self.queue.add_video(name, path, Path(path).name if path else name)
            for row in rows:
                fields = {key: row[key] for key in ("status", "uncertainty", "reason", "category")}
                origin = {key: row[key] for key in ("prompts", "provenance", "rounds", "seconds", "edited_frames")}
                if row["reason"] == "removed":
                    origin["prompts"] = "{}"
                self.queue.put_masklet(name, row["object"], origin=json.dumps(origin), **fields)
            if not rows:
                self.queue.mark(name, finished=1)  # nothing was found in it

    def _put(self, name: str, obj: int, **fields: Any) -> None:
        known = self.queue.masklets(name).get(obj, {"status": "waiting", "uncertainty": 0.0})
        self.queue.put_masklet(name, obj, **{"status": known["status"], "uncertainty": known["uncertainty"], **fields})

    def _track_masklets(self, name: str, session: VideoSession, changed: set[int]) -> None:
        """Whoever was changed waits, and who was removed is rejected, whatever was decided before."""
        tracks = session.tracks
        for obj in changed:
            if obj in tracks:
                self._put(name, obj, status="waiting", uncertainty=_doubt(tracks[obj]), reason=None, edited=1)
            else:
                self._put(name, obj, status="rejected", reason="removed", edited=1)

    def _masklet(self, name: str, obj: int, known: Mapping[str, Any]) -> Masklet:
        """A masklet as people left it; what was done by hand is what its prompts have beside those it began with."""
        session = self.session(name)
        origin, before = json.loads(known["origin"] or "{}"), _prompts_of(known)
        by_hand = set(origin.get("edited_frames", []))
        masklet = Masklet(None, name, obj, session, clicks=dict.fromkeys(by_hand, 0))
        for frame, prompt in _prompts_by_object(session).get(obj, {}).items():
            first = before.get(frame)
            if frame in by_hand or first is None or first.to_dict() != prompt.to_dict():
                masklet.clicks[frame] = count_clicks(prompt, None if frame in by_hand else first)
        masklet.provenance = "manual" if masklet.clicks else origin.get("provenance", "manual")
        masklet.rounds, masklet.seconds = origin.get("rounds", -1) + 1, origin.get("seconds", 0.0)
        return masklet

    def _take_masks(self, masklet: Masklet) -> Iterator[None]:
        for frame in masklet.session.tracks.get(masklet.object, ()):
            segments = masklet.session.segments(frame, objects=[masklet.object])
            if segments.objects:  # it may be removed meanwhile
                masklet.take(segments, masklet.session)
            yield


def _doubt(scores: Mapping[int, float]) -> float:
    return 1 - float(np.clip(np.mean(list(scores.values())), 0, 1)) if scores else 1.0


def _prompts_of(masklet: Mapping[str, Any]) -> dict[int, ObjectPrompt]:
    """By frame, those that `annotate` left; none of what people found."""
    prompts = json.loads(json.loads(masklet["origin"] or "{}").get("prompts", "{}"))
    known = VideoPrompts({int(frame): {masklet["object"]: prompt} for frame, prompt in prompts.items()})
    return {frame: objects[masklet["object"]] for frame, objects in known.items()}


def _prompts_by_object(session: VideoSession) -> dict[int, dict[int, ObjectPrompt]]:
    found: dict[int, dict[int, ObjectPrompt]] = {obj: {} for obj in session.objects}
    for frame, objects in session.prompts.items():
        for obj, prompt in objects.items():
            found[obj][frame] = prompt
    return found


def _same(one: dict[int, ObjectPrompt] | None, other: dict[int, ObjectPrompt] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(prompt is other[frame] for frame, prompt in one.items())
