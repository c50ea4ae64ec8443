"""Who may ask the page, how much may be sent, and what is answered to a wrong request."""

import ipaddress
import logging
import shutil
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

from aiohttp import web

from hf_iclr.untrusted import inside, parse_json

from ..formats.annotation_json import write_coco, write_sav, write_ytvis
from ..formats.mask_folders import write_davis, write_yolo
from ..session.segments import VideoSegments
from .queue import StaleEdit


logger = logging.getLogger(__name__)

HOST = web.AppKey("host", str)
MOST_BYTES = 2**23  # of an edit; a stroke of a brush has some thousand
MOST_VIDEO_BYTES = 2**29  # of a video sent by the page; larger ones are opened where they are
_HEADERS = {  # no other site may show the page in a frame, or its frames as pictures
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def person_of(request: web.Request) -> str:
    """The name that the page keeps for whoever asks, if they gave one."""
    return unquote(request.cookies.get("person", ""))[:80]


async def read_fields(request: web.Request) -> dict[str, Any]:
    """The fields of a request in JSON."""
    fields = parse_json(await request.read() or b"{}", "the request")
    if not isinstance(fields, dict):
        raise ValueError(f'Expected fields by name, such as {{"frame": 0}}, got {type(fields).__name__}.')  # noqa: TRY004
    return fields


async def save_body(request: web.Request, path: Path) -> None:
    """Writes what is sent to a file, never more than is allowed; there is none if it does not come whole."""
    if (request.content_length or 0) > MOST_VIDEO_BYTES:
        raise _too_large(MOST_VIDEO_BYTES, request.content_length)
    path.parent.mkdir(exist_ok=True)
    taken = 0
    try:
        with path.open("wb") as file:
            async for chunk in request.content.iter_chunked(2**20):
                taken += len(chunk)
                if taken > MOST_VIDEO_BYTES:
                    raise _too_large(MOST_VIDEO_BYTES, None)
                file.write(chunk)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def send_file(name: str) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """A handler that answers with a file of this room."""

    async def send(request: web.Request) -> web.StreamResponse:
        return web.FileResponse(Path(__file__).with_name(name))

    return send


def export_bytes(segments: VideoSegments, title: str, kind: str, named: Mapping[int, str] | None) -> tuple[bytes, str]:
    """Masks as a file of a kind ("sav", "coco", "ytvis", "yolo" or "png"), and its name; folders are zipped."""
    writers: dict[str, Callable[[Path], Any]] = {
        "sav": lambda path: write_sav(segments, path),
        "coco": lambda path: write_coco({title: segments}, path, named),
        "ytvis": lambda path: write_ytvis({title: segments}, path, named),
        "yolo": lambda path: write_yolo(segments, path, named),
        "png": lambda path: write_davis(segments, path),
    }
    if kind not in writers:
        raise ValueError(f"Expected a format of {', '.join(writers)}, got {kind!r:.40}.")
    with TemporaryDirectory() as folder:
        zipped = kind in ("yolo", "png")
        path = inside(folder, title if zipped else f"{title}.json")
        writers[kind](path)
        file = Path(shutil.make_archive(str(path), "zip", path)) if zipped else path
        return file.read_bytes(), file.name


def sentence(error: Exception) -> str:
    known = isinstance(error, (ValueError, TypeError, KeyError)) and error.args
    return str(error.args[0]) if known else f"{type(error).__name__}: {error}"


def _too_large(limit: int, size: int | None) -> web.HTTPException:
    return web.HTTPRequestEntityTooLarge(limit, size or limit + 1)


@web.middleware
async def errors_as_sentences(request: web.Request, handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except StaleEdit as error:
        return web.json_response({"error": sentence(error)}, status=409)
    except (ValueError, TypeError, KeyError) as error:
        return web.json_response({"error": sentence(error)}, status=400)
    except web.HTTPRequestEntityTooLarge:
        limit = MOST_VIDEO_BYTES if request.path == "/open" else MOST_BYTES
        said = f"Expected {limit // 2**20} MiB at most, got more. "
        said += "Start the page with the path of the video: `hf-iclr annotate-ui VIDEO`." * (request.path == "/open")
        return web.json_response({"error": said.strip()}, status=413)
    except web.HTTPException:
        raise
    except Exception as error:
        logger.exception("%s %s failed.", request.method, request.path)
        return web.json_response({"error": sentence(error)}, status=500)


@web.middleware
async def refuse_large(request: web.Request, handler) -> web.StreamResponse:
    """Says no before anything is read, rather than after."""
    if request.path != "/open" and (request.content_length or 0) > MOST_BYTES:
        raise _too_large(MOST_BYTES, request.content_length)
    return await handler(request)


@web.middleware
async def only_from_here(request: web.Request, handler) -> web.StreamResponse:
    """Refuses what another site's page sends, also under a name of its own that leads to this machine."""
    origin = request.headers.get("Origin")
    if not _is_own(request.url.host or "", request.app[HOST]) or (origin and urlsplit(origin).netloc != request.host):
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
