"""The annotation page in a real browser: clicks, boxes, keys, tracking, errors; and how it looks."""

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from aiohttp.test_utils import TestServer
from PIL import Image

from hf_iclr.vision.annotation.page import AnnotationPage
from tests.vision.annotation.chromium import CHROMIUM, open_tab
from tests.vision.tiny import clip, tiny_pipe


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
IDLE = "loading === null && !document.querySelector('#message').textContent.startsWith('Working')"


def test_a_video_is_annotated_in_a_browser(tmp_path):
    asyncio.run(_annotate(tmp_path))


async def _annotate(tmp_path: Path) -> None:
    session = tiny_pipe().session(clip(40), output="rle", undo_levels=20)
    page = AnnotationPage(tiny_pipe(), session)
    async with TestServer(page.app()) as server, open_tab(str(server.make_url("/")), tmp_path / "profile") as tab:
        await tab.until("state.open && document.querySelector('#frame').naturalWidth === 80")
        left, top, width, height = await tab.run("(r => [r.x, r.y, r.width, r.height])(view.getBoundingClientRect())")
        assert width / height == pytest.approx(80 / 48, abs=0.01) and width > 700

        def at(x, y):
            return left + x / 80 * width, top + y / 48 * height

        # Two clicks, the second one beside the object; a box for another object.
        await tab.click(*at(20, 20))
        await tab.until("state.prompts[0]?.[1]?.points.length === 1")
        await tab.click(*at(60, 40), button="right")
        await tab.until("state.prompts[0][1].points.length === 2")
        assert session.prompts[0][1].labels == [1, 0]
        assert np.allclose(session.prompts[0][1].points, [[20, 20], [60, 40]], atol=0.2)
        await tab.key("n")
        await tab.mouse("mousePressed", *at(30, 8))
        await tab.mouse("mouseMoved", *at(45, 30))
        await tab.mouse("mouseMoved", *at(62, 36))
        await tab.mouse("mouseReleased", *at(62, 36))
        await tab.until("state.prompts[0][2]?.box")
        assert np.allclose(session.prompts[0][2].box, [30, 8, 62, 36], atol=0.2)

        # Tracking moves the progress bar and ends on the last frame; a correction there is kept.
        await tab.press("#forward")
        await tab.until("document.querySelector('#progress').value > 0")
        await tab.until("document.querySelector('#message').textContent === 'Tracked 40 frames.'")
        assert await tab.run("frame") == 39
        for _ in range(3):
            await tab.key("ArrowLeft")
        await tab.key("1")
        await tab.until(f"frame === 36 && view.dataset.frame === '36' && {IDLE}")
        await tab.click(*at(40, 24), modifiers=8)  # with Shift: beside the object
        await tab.until("state.prompts[36]?.[1]")
        assert session.prompts[36][1].labels == [0]
        await tab.key("z")
        await tab.until("!state.prompts[36]")

        # A wrong request is told in the page, which stays usable.
        await tab.run("edit('prompt', {frame: 99, obj: 1, points: [[1, 1]], labels: [1]})")
        assert "Expected a frame in 0..39" in await tab.run("document.querySelector('#message.bad').textContent")
        await tab.key("Home")
        await tab.until(f"frame === 0 && view.dataset.frame === '0' && {IDLE}")

        # Every control has a name, and the keyboard alone can click.
        controls = "[...document.querySelectorAll('button, input')]"
        nameless = f"{controls}.filter(e => !(e.textContent || e.ariaLabel || e.labels?.length)).length"
        assert await tab.run(nameless) == 0
        await tab.run("view.focus()")
        await tab.key("ArrowUp")
        await tab.key("Enter")
        await tab.until("state.prompts[0][1].points.length === 3")
        await tab.run("view.blur()")
        await tab.until(IDLE)

        shot = Path(os.environ.get("ANNOTATION_SCREENSHOT", tmp_path / "page.png"))
        await tab.screenshot(shot)
        pixels = np.asarray(Image.open(shot).convert("RGB"))
        assert pixels.shape == (800, 1280, 3)
        overlay = session.segments(0).binary(2) & ~session.segments(0).binary(1)
        ys, xs = np.nonzero(overlay)
        seen = pixels[(top + (ys + 0.5) / 48 * height).astype(int), (left + (xs + 0.5) / 80 * width).astype(int)]
        bare = session.frames[0][ys, xs]
        assert np.abs(seen.astype(int).mean(0) - bare.mean(0)).max() > 20  # tinted by the mask

        await tab.press("#done")
        await tab.until("document.querySelector('#message').textContent.startsWith('Done')")
        assert page.done.is_set() and page.segments().objects == [1, 2]
