"""A web page on which objects of videos are clicked, drawn, tracked, named, accepted and exported."""

import asyncio
import base64
import io
import logging
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

from aiohttp import web
from PIL import Image

from hf_iclr.untrusted import inside

from ..session.segments import VideoSegments
from ..session.session import VideoSession
from .edits import EDITS
from .overlay import colour, overlay_png
from .project import AnnotationProject
from .queue import StaleEdit
from .requests import (
    HOST,
    MOST_BYTES,
    errors_as_sentences,
    export_bytes,
    only_from_here,
    person_of,
    read_fields,
    refuse_large,
    save_body,
    send_file,
    sentence,
)  # fmt: skip
from .sources import file_stem


logger = logging.getLogger(__name__)

_SAVE_SECONDS = 10.0  # between two writings of a session while objects are tracked, or twenty times what one takes
_MOST_OPEN = 4  # sessions kept in memory


class AnnotationPage:
    """
    Serves an [`AnnotationProject`] to browsers; what is clicked is saved before it is answered.

    All work on sessions and on the database runs in one thread of its own, so that a click made while objects are
    tracked waits for the frame at hand, stops the tracking and is then done. Who asks is known by a name that the page
    keeps in a cookie.

    Args:
        project (`AnnotationProject`):
            The folder.
        clip (`str`, *optional*):
            Its one video to work on; left out, the queue is served, and videos may be sent.
        single (`bool`, *optional*):
            Whether Done ends the page with the masks of one video; left out, whether there is a `clip`.
    """

    def __init__(self, project: AnnotationProject, clip: str | None = None, single: bool | None = None):
        self.project, self.clip = project, clip
        self._can_open, self._single = clip is None, clip is not None if single is None else single
        self.done = asyncio.Event()
        self.skipped = False
        self._page = secrets.token_hex(4)  # by which a browser knows the next one under this address
        self._clips: dict[str, str] = {}  # by person, where they are
        self._jobs: dict[str, dict[str, Any]] = {}
        self._tasks: dict[str, asyncio.Task] = {}
        self._writing: set[asyncio.Task] = set()
        self._worker = ThreadPoolExecutor(1)

    def app(self, host: str = "127.0.0.1") -> web.Application:
        """The routes, all of them relative to the page; `host` is a name it may be called by."""
        guards = [only_from_here, errors_as_sentences, refuse_large]
        app = web.Application(middlewares=guards, client_max_size=MOST_BYTES)
        app[HOST] = host
        app.add_routes(
            [
                web.get("/", send_file("page.html")),
                web.get("/page.js", send_file("page.js")),
                web.get("/state", self._get_state),
                web.get("/job", self._get_job),
                web.get(r"/frames/{frame:\d+}", self._get_frame),
                web.get(r"/masks/{frame:\d+}", self._get_masks),
                web.get("/export", self._get_export),
                web.post("/open", self._post_open),
                *(web.post(f"/{kind}", self._edit(kind)) for kind in EDITS),
                web.post("/track", self._post_track),
                web.post("/cancel", self._post_cancel),
                web.post("/decide", self._post_decide),
                web.post("/next", self._post_next),
                web.post("/done", self._post_done),
            ]
        )
        return app

    def segments(self) -> VideoSegments:
        """All masks of the one video as they are now, of every frame."""
        assert self.clip is not None
        return _all_segments(self.project.session(self.clip))

    async def close(self) -> None:
        """Ends what is running and writes what is open."""
        for name in list(self._tasks):
            await self._stop(name)
        await asyncio.gather(*self._writing)
        await self._run(self.project.close)
        self._worker.shutdown()

    async def _run(self, function: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def _where(self, request: web.Request, fields: dict[str, Any] | None = None) -> tuple[str, str]:
        """The video that a request is about, and the person who asks."""
        person = person_of(request)
        asked = {**request.query, **(fields or {})}.get("clip")
        name = await self._run(self._find, asked, person)
        if name is None:
            raise ValueError("There is no video yet. Open one first.")
        return name, person

    def _find(self, asked: Any, person: str) -> str | None:
        if asked is not None:
            return self.project.queue.video(str(asked))["name"]
        if person not in self._clips:
            if self.clip is not None:
                self._clips[person] = self.clip
            elif item := self.project.next(person):
                self._clips[person] = item.video
        return self._clips.get(person)

    def _state(self, name: str | None, person: str, frame: Any = None, obj: int | None = None) -> dict[str, Any]:
        project = self.project
        state: dict[str, Any] = {"clip": name, "open": False, "can_open": self._can_open, "person": person}
        state |= {"page": self._page, "single": self._single, "queue": project.queue.counts()}
        if name is None:
            return state
        for old in project.open_names()[:-_MOST_OPEN]:
            if old not in (name, *self._clips.values()):
                project.drop(old)
        session, known = project.session(name), project.queue.masklets(name)
        height, width = session.size
        prompts = session.prompts.to_dict()
        for objects in prompts.values():
            for prompt in objects.values():
                if "mask" in prompt:
                    prompt["mask"] = True  # it is shown as any mask is
        keys = ("category", "status", "reason")
        holder = project.queue.holder(name)
        return state | {
            "open": True,
            "version": project.queue.video(name)["version"],
            "holder": holder if holder not in (None, person) else None,
            "title": project.queue.video(name)["title"],
            "num_frames": session.num_frames,
            "width": width,
            "height": height,
            "damage": session.frames.damage,
            "objects": [
                {"obj": one, "colour": colour(one), "frames": list(scores), "doubts": _doubts(scores)}
                | {key: known.get(one, {}).get(key) for key in keys}
                for one, scores in session.tracks.items()
            ],
            "prompts": prompts,
            "can_undo": session.can_undo,
            "can_redo": session.can_redo,
            "current": obj,
            "shown": None if frame is None else self._masks(name, frame),
        }

    def _masks(self, name: str, frame: int) -> dict[str, Any]:
        segments = self.project.session(name).segments(frame)
        objects = {
            obj: {"score": segments.scores[obj], "visible": segments.visible[obj], "area": segments.areas[obj]}
            for obj in segments.objects
        }
        overlay = base64.b64encode(overlay_png(segments)).decode("ascii") if objects else None
        return {"frame": frame, "objects": objects, "overlay": overlay}

    async def _get_state(self, request: web.Request) -> web.Response:
        person = person_of(request)
        name = await self._run(self._find, request.query.get("clip"), person)
        return web.json_response(await self._run(self._state, name, person))

    async def _get_job(self, request: web.Request) -> web.Response:
        name, person = await self._where(request)
        await self._run(self.project.queue.lease, name, person)  # who waits for it still works on it
        return web.json_response(self._jobs.get(name, {"running": False}))

    async def _get_frame(self, request: web.Request) -> web.Response:
        name, _ = await self._where(request)

        def read() -> bytes:
            file, number = io.BytesIO(), int(request.match_info["frame"])
            Image.fromarray(self.project.session(name).frames[number]).save(file, "JPEG", quality=90)
            return file.getvalue()

        # A frame never changes; the page asks for those of another video under another address.
        headers = {"Cache-Control": "private, max-age=86400"}
        return web.Response(body=await self._run(read), content_type="image/jpeg", headers=headers)

    async def _get_masks(self, request: web.Request) -> web.Response:
        name, _ = await self._where(request)
        return web.json_response(await self._run(self._masks, name, int(request.match_info["frame"])))

    async def _get_export(self, request: web.Request) -> web.Response:
        name, _ = await self._where(request)
        kind = request.query.get("format", "sav")

        def write() -> tuple[bytes, str]:
            title = file_stem(Path(self.project.queue.video(name)["title"])) or "video"
            known = self.project.queue.masklets(name)
            named = {obj: one["category"] for obj, one in known.items() if one["category"]} or None
            return export_bytes(_all_segments(self.project.session(name)), title, kind, named)

        body, file = await self._run(write)
        headers = {"Content-Disposition": f'attachment; filename="{quote(file)}"'}
        return web.Response(body=body, content_type=f"application/{file.rsplit('.', 1)[1]}", headers=headers)

    async def _post_open(self, request: web.Request) -> web.Response:
        if not self._can_open:
            raise ValueError("This page was opened for one video; it takes no other.")
        person = person_of(request)
        path = inside(self.project.folder / "videos", request.query.get("name") or "video")
        sent = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
        await save_body(request, sent)

        def add() -> str:
            try:
                self.project.pipe.session(str(sent)).size  # noqa: B018 - without a readable frame it is refused here
            except BaseException:
                sent.unlink()
                raise
            kept = path.with_stem(f"{path.stem[:60]}-{time.time_ns()}") if path.exists() else path
            (name,) = self.project.add_videos(sent.rename(kept))
            self.project.hold(name, person)
            return name

        name = await self._run(add)
        self._clips[person] = name
        return web.json_response(await self._run(self._state, name, person, 0))

    def _edit(self, kind: str):
        """The handler of an edit, whose fields come as JSON; it answers with the new state once that is saved."""

        async def handle(request: web.Request) -> web.Response:
            fields = await read_fields(request)
            name, person = await self._where(request, fields)
            version = await self._fresh(name, fields)
            await self._stop(name)
            fields.pop("clip", None)
            await self._run(self.project.edit, name, kind, fields, person, version)
            if kind == "remove":
                self._write_rows(name)
            if await self._run(self.project.is_long, name):
                await self._run(self.project.checkpoint, name)
            return web.json_response(await self._run(self._state, name, person, fields.get("frame")))

        return handle

    async def _fresh(self, name: str, fields: dict[str, Any]) -> int | None:
        """Refuses what was meant for another state, before a tracking is stopped for it."""
        version = fields.pop("version", None)
        known = (await self._run(self.project.queue.video, name))["version"]
        if version is not None and version != known:
            raise StaleEdit(
                "This video was changed in another tab since. It is shown as it is now: do that once more."
            )
        return version

    async def _post_track(self, request: web.Request) -> web.Response:
        fields = await read_fields(request)
        name, person = await self._where(request, fields)
        await self._run(self.project.hold, name, person)
        await self._stop(name)
        return web.json_response(await self._start(name, fields.get("direction", "forward")))

    async def _start(self, name: str, direction: str) -> dict[str, Any]:
        def start():
            session = self.project.session(name)
            iterator = session.iterate(direction)
            shown = [
                [frame for frame, objects in session.prompts.items() if obj in objects] for obj in session.objects
            ]
            firsts, last, length = [min(frames) for frames in shown], max(map(max, shown)), session.num_frames or 0
            forward = length - min(firsts)
            return iterator, {"forward": forward, "backward": last + 1, "both": forward + max(firsts)}[direction]

        iterator, total = await self._run(start)
        job = {"running": True, "direction": direction, "done": 0, "total": total, "frame": None}
        self._jobs[name] = job
        self._tasks[name] = asyncio.create_task(self._track(name, job, iterator))
        return job

    async def _track(self, name: str, job: dict[str, Any], iterator) -> None:
        saved, took = time.monotonic(), 0.0
        try:
            while not job.get("cancelled") and (segments := await self._run(next, iterator, None)) is not None:
                job.update(done=job["done"] + 1, frame=segments.frame)
                if time.monotonic() - saved > max(_SAVE_SECONDS, 20 * took):
                    started = time.monotonic()
                    await self._run(self.project.checkpoint, name)
                    saved, took = time.monotonic(), time.monotonic() - started
        except Exception as error:
            logger.exception("Tracking failed.")
            job["error"] = sentence(error)
        finally:
            await self._run(iterator.close)
            try:
                await self._run(self.project.checkpoint, name)
            except Exception as error:
                logger.exception("The session of %s could not be written.", name)
                job["error"] = sentence(error)
            job["running"] = False

    async def _stop(self, name: str) -> None:
        if name in self._tasks:
            self._jobs[name]["cancelled"] = self._jobs[name]["running"]
            await self._tasks[name]
            self._tasks.pop(name, None)

    def _write_rows(self, name: str) -> None:
        """Writes the rows of a video while the page goes on; what is not ended is done when the project is opened."""

        async def write() -> None:
            steps = self.project.write_rows(name)
            try:
                while await self._run(next, steps, steps) is not steps:
                    pass
            except Exception:
                logger.exception("The rows of %s could not be written.", name)

        task = asyncio.create_task(write())
        self._writing.add(task)
        task.add_done_callback(self._writing.discard)

    async def _post_cancel(self, request: web.Request) -> web.Response:
        name, person = await self._where(request, await read_fields(request))
        await self._stop(name)
        return web.json_response(await self._run(self._state, name, person))

    async def _post_decide(self, request: web.Request) -> web.Response:
        fields = await read_fields(request)
        name, person = await self._where(request, fields)
        await self._fresh(name, fields)
        await self._stop(name)
        obj = fields.get("obj")
        await self._run(self.project.decide, name, fields.get("decision"), None if obj is None else [obj], person)
        self._write_rows(name)
        return web.json_response(await self._run(self._state, name, person))

    async def _post_next(self, request: web.Request) -> web.Response:
        """Gives the video back and takes the next one, the same if its masklets are still the most uncertain."""
        await read_fields(request)
        person = person_of(request)

        def move():
            old = self._clips.pop(person, None)
            item = self.project.next(person)
            if old is not None and (item is None or item.video != old):
                self.project.save(old)
                self.project.queue.release(old, person)
            if item is None:
                return None, None, False
            self._clips[person] = item.video
            return item.video, item.object, self.project.untracked(item.video)

        if (old := self._clips.get(person)) is not None:
            await self._stop(old)
        name, obj, untracked = await self._run(move)
        if old is not None:
            self._write_rows(old)
        if untracked:
            await self._start(name, "both")
        return web.json_response(await self._run(self._state, name, person, None, obj))

    async def _post_done(self, request: web.Request) -> web.Response:
        fields = await read_fields(request)
        name, person = await self._where(request, fields)
        await self._stop(name)
        self.skipped = fields.get("decision") == "skip"
        if self._single:
            await self._run(self.project.decide, name, "skip" if self.skipped else "accept", None, person)
            self.clip = name
            self.done.set()
        return web.json_response({})


def _all_segments(session: VideoSession) -> VideoSegments:
    return VideoSegments(map(session.segments, range(session.num_frames or 0)), session.frames.damage)


def _doubts(scores: dict[int, float]) -> list[int]:
    """How uncertain each mask is, 0 to 100."""
    return [round(100 * min(1.0, max(0.0, 1 - score))) for score in scores.values()]
