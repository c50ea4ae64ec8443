"""A web page on which objects of a video are clicked, tracked, corrected and exported."""

import asyncio
import base64
import io
import ipaddress
import logging
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from aiohttp import web
from PIL import Image, ImageColor
from scipy.ndimage import binary_erosion

from hf_iclr.untrusted import inside

from ..formats.annotation_json import write_sav
from ..formats.mask_folders import write_davis
from ..session.segments import FrameSegments, VideoSegments
from ..session.session import VideoSession


logger = logging.getLogger(__name__)

COLOURS = (
    "#4c9aff",
    "#ff8b3d",
    "#3ddc97",
    "#ff5f9e",
    "#ffd23f",
    "#b388ff",
    "#2ee6d6",
    "#ff6b5e",
    "#a3e048",
    "#e8b4a0",
)
_LOCAL = ("127.0.0.1", "localhost", "::1")
_HOST = web.AppKey("host", str)
_HEADERS = {  # no other site may show the page in a frame, or its frames as pictures
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}
_MOST_BYTES = 2**32  # of a video sent by the page


class AnnotationPage:
    """
    Serves one [`VideoSession`] to a browser; everything that is clicked is done to that session.

    All work on the session runs in one thread of its own, so that a click made while objects are tracked waits for
    the frame at hand, stops the tracking and is then done.

    Args:
        pipe (`Sam2VideoPipeline`):
            Opens videos that are sent from the page.
        session (`VideoSession`, *optional*):
            What to start with, its prompts and masks included; left out, the page asks for a video.

    Raises:
        ValueError: if the session is of a stream, which can't go back.
    """

    def __init__(self, pipe, session: VideoSession | None = None):
        if session is not None and session.streaming:
            raise ValueError("A stream can't be annotated, for it can't go back. Pass `list(frames)` to the session.")
        self.pipe = pipe
        self.session = session
        self._can_open = session is None
        self.done = asyncio.Event()
        self._title = Path(session.frames.source).name if session is not None and session.frames.source else ""
        self._clip = 0  # one more with every video opened
        self._job: dict[str, Any] = {"running": False}
        self._task: asyncio.Task | None = None
        self._worker = ThreadPoolExecutor(1)

    def app(self, host: str = "127.0.0.1") -> web.Application:
        """The routes, all of them relative to the page; `host` is a name it may be called by."""
        app = web.Application(middlewares=[_only_from_here, _errors_as_sentences], client_max_size=_MOST_BYTES)
        app[_HOST] = host
        app.add_routes(
            [
                web.get("/", self._get_page),
                web.get("/state", self._get_state),
                web.get("/job", self._get_job),
                web.get("/frames/{frame}", self._get_frame),
                web.get("/masks/{frame}", self._get_masks),
                web.get("/export", self._get_export),
                web.post("/open", self._post_open),
                web.post("/prompt", self._edit(self._prompt)),
                web.post("/remove", self._edit(lambda session, obj: session.remove_object(obj))),
                web.post("/clear", self._edit(lambda session, frame, obj: session.clear(frame, obj))),
                web.post("/undo", self._edit(lambda session: session.undo())),
                web.post("/track", self._post_track),
                web.post("/cancel", self._post_cancel),
                web.post("/done", self._post_done),
            ]
        )
        return app

    def segments(self) -> VideoSegments:
        """All masks as they are now, of every frame of the video."""
        session = self._opened()
        return VideoSegments(map(session.segments, range(session.num_frames or 0)), session.frames.damage)

    def _opened(self) -> VideoSession:
        if self.session is None:
            raise ValueError("There is no video yet. Open one first.")
        return self.session

    async def _run(self, function: Callable, *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def _get_page(self, request: web.Request) -> web.FileResponse:
        return web.FileResponse(Path(__file__).with_name("page.html"))

    async def _get_job(self, request: web.Request) -> web.Response:
        return web.json_response(self._job)

    async def _get_state(self, request: web.Request) -> web.Response:
        return web.json_response(await self._run(self._state))

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"clip": f"{id(self)}-{self._clip}", "open": False, "can_open": self._can_open}
        if self.session is None:
            return state
        session = self.session
        height, width = session.size
        tracks = {obj: sorted({*memory.conditioning, *memory.tracked}) for obj, memory in session._memories.items()}
        prompts = session.prompts.to_dict()
        for objects in prompts.values():
            for prompt in objects.values():
                if "mask" in prompt:
                    prompt["mask"] = True  # it is shown as any mask is
        return state | {
            "open": True,
            "title": self._title,
            "num_frames": session.num_frames,
            "width": width,
            "height": height,
            "damage": session.frames.damage,
            "objects": [{"obj": obj, "colour": _colour(obj), "frames": frames} for obj, frames in tracks.items()],
            "prompts": prompts,
            "corrected": sorted(session._corrected),
            "can_undo": bool(session._undo),
        }

    async def _get_frame(self, request: web.Request) -> web.Response:
        def read() -> bytes:
            file = io.BytesIO()
            Image.fromarray(self._opened().frames[int(request.match_info["frame"])]).save(file, "JPEG", quality=90)
            return file.getvalue()

        # A frame never changes; the page asks for those of another video under another address.
        headers = {"Cache-Control": "private, max-age=86400"}
        return web.Response(body=await self._run(read), content_type="image/jpeg", headers=headers)

    async def _get_masks(self, request: web.Request) -> web.Response:
        def read() -> dict[str, Any]:
            segments = self._opened().segments(int(request.match_info["frame"]))
            objects = {
                obj: {"score": segments.scores[obj], "visible": segments.visible[obj], "area": segments.areas[obj]}
                for obj in segments.objects
            }
            overlay = base64.b64encode(overlay_png(segments)).decode("ascii") if objects else None
            return {"objects": objects, "overlay": overlay}

        return web.json_response(await self._run(read))

    async def _get_export(self, request: web.Request) -> web.Response:
        name = Path(self._title).stem or "video"
        zipped = request.query.get("format") == "png"

        def write() -> bytes:
            with TemporaryDirectory() as folder:
                if not zipped:
                    write_sav(self.segments(), file := inside(folder, f"{name}.json"))
                    return file.read_bytes()
                write_davis(self.segments(), masks := inside(folder, name))
                return Path(shutil.make_archive(str(masks), "zip", masks)).read_bytes()

        kind = "zip" if zipped else "json"
        headers = {"Content-Disposition": f'attachment; filename="{quote(name)}.{kind}"'}
        return web.Response(body=await self._run(write), content_type=f"application/{kind}", headers=headers)

    async def _post_open(self, request: web.Request) -> web.Response:
        if not self._can_open:
            raise ValueError("This page was opened for one video; it takes no other.")
        body = await request.read()
        await self._stop()
        await self._run(self._open, body, request.query.get("name", ""))
        return await self._get_state(request)

    def _open(self, body: bytes, name: str) -> None:
        session = self.pipe.session(body, output="rle", undo_levels=20)
        session.size  # noqa: B018 - a video without a readable frame is refused here
        self.session, self._title, self._clip = session, name, self._clip + 1

    def _edit(self, change: Callable):
        """The handler of an edit, whose fields come as JSON; it answers with the new state."""

        async def handle(request: web.Request) -> web.Response:
            fields = await request.json()
            await self._stop()
            await self._run(lambda: change(self._opened(), **fields))
            return await self._get_state(request)

        return handle

    def _prompt(self, session: VideoSession, frame: int, obj: int, points=None, labels=None, box=None) -> None:
        if box is None and obj in session.segments(frame).masks:
            session.correct(frame, obj, points, labels)
        elif box is None and 1 not in (labels or [1]):
            raise ValueError(
                f"Object {obj} has no mask on frame {frame} yet. Click on the object first, then beside it."
            )
        else:
            session.add(frame, obj, points, labels, box)

    async def _post_track(self, request: web.Request) -> web.Response:
        direction = (await request.json()).get("direction", "forward")
        await self._stop()
        iterator, total = await self._run(self._start, direction)
        self._job = {"running": True, "direction": direction, "done": 0, "total": total, "frame": None}
        self._task = asyncio.create_task(self._track(self._job, iterator))
        return web.json_response(self._job)

    def _start(self, direction: str):
        session = self._opened()
        iterator = session.iterate(direction)
        first = {obj: min(memory.conditioning) for obj, memory in session._memories.items()}
        last = max(frame for memory in session._memories.values() for frame in memory.conditioning)
        forward = (session.num_frames or 0) - min(first.values())
        return iterator, {"forward": forward, "backward": last + 1, "both": forward + max(first.values())}[direction]

    async def _track(self, job: dict[str, Any], iterator) -> None:
        try:
            while not job.get("cancelled") and (segments := await self._run(next, iterator, None)) is not None:
                job.update(done=job["done"] + 1, frame=segments.frame)
        except Exception as error:
            logger.exception("Tracking failed.")
            job["error"] = _sentence(error)
        finally:
            await self._run(iterator.close)
            job["running"] = False

    async def _stop(self) -> None:
        if self._task is not None:
            self._job["cancelled"] = self._job["running"]
            await self._task
            self._task = None

    async def _post_cancel(self, request: web.Request) -> web.Response:
        await self._stop()
        return await self._get_state(request)

    async def _post_done(self, request: web.Request) -> web.Response:
        await self._stop()
        self._opened()
        self.done.set()
        return web.json_response({})


def annotate_in_browser(
    pipe,
    session: VideoSession | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    on_ready: Callable[[str], None] | None = None,
) -> VideoSegments:
    """
    Serves the page until "Done" is pressed on it.

    Args:
        pipe (`Sam2VideoPipeline`):
            Opens videos that are sent from the page.
        session (`VideoSession`, *optional*):
            What to start with, its prompts and masks included; left out, the page asks for a video.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Where to listen. Whoever can reach another address than this machine's own can use the page, without a
            password and unencrypted, of which a warning tells.
        port (`int`, *optional*, defaults to `7860`):
            0 takes a free one.
        on_ready (`Callable[[str], None]`, *optional*):
            Called with the page's address once it can be opened.

    Returns:
        [`VideoSegments`] of the session as it was when "Done" was pressed.

    Raises:
        ValueError: if the session is of a stream, or the port is taken.

    Example:

    ```python
    >>> session = pipe.session("clip.mp4", output="rle")
    >>> session.add(frame=0, obj=1, mask=mask)
    >>> segments = annotate_in_browser(pipe, session, on_ready=webbrowser.open)
    ```
    """
    return asyncio.run(_serve(AnnotationPage(pipe, session), host, port, on_ready or logger.info))


async def _serve(page: AnnotationPage, host: str, port: int, on_ready: Callable[[str], None]) -> VideoSegments:
    if host not in _LOCAL:
        logger.warning(
            "The page listens on %s: whoever reaches this machine there sees the video and can change its masks, "
            "without a password and unencrypted. For you alone leave host at 127.0.0.1, and from another machine open "
            "a tunnel: `ssh -L %d:127.0.0.1:%d THIS_MACHINE`.", host, port, port,
        )  # fmt: skip
    runner = web.AppRunner(page.app(host), access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise ValueError(f"Can't listen on {host}:{port} ({error.strerror}). Pass another port.") from None
        on_ready(f"http://{host}:{runner.addresses[0][1]}/")
        await page.done.wait()
        return await page._run(page.segments)
    finally:
        await page._stop()
        await runner.cleanup()


def overlay_png(segments: FrameSegments) -> bytes:
    """A PNG of the frame's size: every mask in its object's colour, half transparent, with an opaque outline."""
    height, width = segments.size
    canvas = np.zeros((height, width, 4), dtype=np.uint8)
    for obj in segments.objects:
        mask = segments.binary(obj)
        colour = ImageColor.getrgb(_colour(obj))
        canvas[mask] = (*colour, 110)
        canvas[mask & ~binary_erosion(mask, iterations=max(1, height // 360))] = (*colour, 255)
    file = io.BytesIO()
    Image.fromarray(canvas).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _colour(obj: int) -> str:
    return COLOURS[(obj - 1) % len(COLOURS)]


def _sentence(error: Exception) -> str:
    known = isinstance(error, (ValueError, TypeError, KeyError)) and error.args
    return str(error.args[0]) if known else f"{type(error).__name__}: {error}"


@web.middleware
async def _errors_as_sentences(request: web.Request, handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except (ValueError, TypeError, KeyError) as error:
        return web.json_response({"error": _sentence(error)}, status=400)
    except web.HTTPException:
        raise
    except Exception as error:
        logger.exception("%s %s failed.", request.method, request.path)
        return web.json_response({"error": _sentence(error)}, status=500)


@web.middleware
async def _only_from_here(request: web.Request, handler) -> web.StreamResponse:
    """Refuses what another site's page sends, also under a name of its own that leads to this machine."""
    origin = request.headers.get("Origin")
    if not _is_own(request.url.host or "", request.app[_HOST]) or (origin and urlsplit(origin).netloc != request.host):
        return web.json_response({"error": "This page answers only to itself."}, status=403)
    response = await handler(request)
    response.headers.update(_HEADERS)
    return response


def _is_own(name: str, host: str) -> bool:
    """Whether a page under this name is ours: any name can be made to resolve to this machine, an address can not."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("localhost", host, socket.gethostname())
    return True
