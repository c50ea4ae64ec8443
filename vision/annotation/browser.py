"""Serves the annotation page, for one session or for a whole project."""

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import closing
from tempfile import TemporaryDirectory

from aiohttp import web

from ..session.segments import VideoSegments
from ..session.session import VideoSession
from .masklets import CorrectorUnavailable
from .page import AnnotationPage
from .project import AnnotationProject


logger = logging.getLogger(__name__)

_LOCAL = ("127.0.0.1", "localhost", "::1")


def listen(host: str = "127.0.0.1", port: int = 7860) -> socket.socket:
    """
    Takes a port, before any work is done that would be lost without it.

    Raises:
        CorrectorUnavailable: if it can't be had.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CorrectorUnavailable(f"Can't listen on {host}:{port} ({reason}). Pass another port.") from None


def annotate_in_browser(
    pipe,
    session: VideoSession | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    on_ready: Callable[[str], None] | None = None,
) -> VideoSegments | None:
    """
    Serves the page for one session until "Done" or "Skip" is pressed on it. What is edited is in the session; to keep
    it on the disk, serve an [`AnnotationProject`], as `hf-iclr annotate-ui` does.

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
        [`VideoSegments`] of the session as it was when "Done" was pressed, `None` if it was skipped.

    Raises:
        CorrectorUnavailable: if the port is taken; a `ValueError`.
        ValueError: if the session is of a stream.

    Example:

    ```python
    >>> session = pipe.session("clip.mp4", output="rle")
    >>> session.add(frame=0, obj=1, mask=mask)
    >>> segments = annotate_in_browser(pipe, session, on_ready=webbrowser.open)
    ```
    """
    if session is not None and session.streaming:
        raise ValueError("A stream can't be annotated, for it can't go back. Pass `list(frames)` to the session.")
    with closing(listen(host, port)) as listener, TemporaryDirectory() as folder:
        project = AnnotationProject(folder, pipe)
        project.keep = session is None  # else the session is the caller's
        clip = None if session is None else project.adopt(session)
        return serve(AnnotationPage(project, clip, single=True), listener, host, on_ready or logger.info)


def serve(page: AnnotationPage, listener: socket.socket, host: str, on_ready: Callable[[str], None]):
    """Serves a page until it is done: the masks of its one video, `None` if that was skipped."""
    return asyncio.run(_serve(page, listener, host, on_ready))


async def _serve(
    page: AnnotationPage, listener: socket.socket, host: str, on_ready: Callable[[str], None]
) -> VideoSegments | None:
    port = listener.getsockname()[1]
    if host not in _LOCAL:
        logger.warning(
            "The page listens on %s: whoever reaches this machine there sees the videos and can change their masks, "
            "without a password and unencrypted. For you alone leave host at 127.0.0.1, and from another machine open "
            "a tunnel: `ssh -L %d:127.0.0.1:%d THIS_MACHINE`.", host, port, port,
        )  # fmt: skip
    runner = web.AppRunner(page.app(host), access_log=None, shutdown_timeout=2)
    await runner.setup()
    try:
        await web.SockSite(runner, listener).start()
        on_ready(f"http://{host}:{port}/")
        await page.done.wait()
        return None if page.skipped else await page._run(page.segments)
    finally:
        await runner.cleanup()
        await page.close()
