"""The annotation page in a real browser: clicks, boxes, keys, tracking, errors; and how it looks."""

import asyncio
import os
from pathlib import Path

import numpy as np
import pytest
from aiohttp.test_utils import TestServer
from PIL import Image

from hf_iclr import AnnotationProject, annotate
from hf_iclr.vision.annotation.masklets import QualityGate
from hf_iclr.vision.annotation.page import AnnotationPage
from tests.vision.annotation.chromium import CHROMIUM, open_tab
from tests.vision.annotation.test_page import page_of
from tests.vision.session.test_frames import smooth, write_video
from tests.vision.tiny import clip, tiny_pipe


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
IDLE = "loading === null && !document.querySelector('#message').textContent.startsWith('Working')"


def test_a_video_is_annotated_in_a_browser(tmp_path):
    asyncio.run(_annotate(tmp_path))


async def _annotate(tmp_path: Path) -> None:
    session = tiny_pipe().session(clip(40), output="rle", undo_levels=20)
    page = page_of(tmp_path / "project", session)
    async with TestServer(page.app()) as server, open_tab(str(server.make_url("/")), tmp_path / "profile") as tab:
        await tab.until("state.open && document.querySelector('#frame').naturalWidth === 80")
        left, top, width, height = await tab.run("(r => [r.x, r.y, r.width, r.height])(view.getBoundingClientRect())")
        assert width / height == pytest.approx(80 / 48, abs=0.01) and width > 700
        assert page.project.folder.name == "project"

        def at(x, y):
            return left + x / 80 * width, top + y / 48 * height

        # Two clicks, the second one beside the object; a box for another object.
        await tab.click(*at(20, 20))
        await tab.until("state.prompts[0]?.[1]?.points.length === 1")
        await tab.until("document.querySelector('#saved').textContent === 'Saved · edit 1'")
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
        await tab.key("y")
        await tab.until("state.prompts[36]?.[1]")
        await tab.key("u")  # to the most uncertain frame
        await tab.until("frame === mostUncertain()")

        # A wrong request is shown in the page, which stays usable.
        await tab.run("edit('prompt', {frame: 99, obj: 1, points: [[1, 1]], labels: [1]})")
        assert "Expected a frame in 0..39" in await tab.run("document.querySelector('#message.bad').textContent")
        await tab.key("Home")
        await tab.until(f"frame === 0 && view.dataset.frame === '0' && {IDLE}")

        # A class is typed; a brush draws and an eraser rubs out, also where the frame is magnified.
        version = await tab.run("state.version")
        await tab.press("#objects input")
        for letter in "dog":
            await tab.key(letter)
        await tab.key("Enter")
        await tab.until("state.objects[0].category === 'dog' && !unsaved")
        assert await tab.run("state.version") == version + 1
        await tab.key("e")
        for _ in range(2):
            await tab.press("#in")
        await tab.until("document.querySelector('#zoom').textContent === '225 %'")
        before = session.segments(0).binary(1).sum()
        box = (
            "(r => [r.x + r.width / 2, r.y + r.height / 2])(document.querySelector('#stage').getBoundingClientRect())"
        )
        x, y = await tab.run(box)
        await tab.mouse("mousePressed", x, y)
        await tab.mouse("mouseMoved", x + 60, y + 30)
        await tab.mouse("mouseReleased", x + 60, y + 30)
        await tab.until("state.prompts[0][1].mask === true")
        drawn = session.segments(0).binary(1)
        assert drawn[24, 40] and drawn.sum() >= before
        await tab.key("d")
        await tab.click(x, y)
        await tab.until(f"state.version === {version + 3}")
        assert not session.segments(0).binary(1)[24, 40]
        await tab.key("0")
        await tab.key("q")
        await tab.key("z")
        await tab.key("z")
        await tab.until("state.prompts[0][1].points?.length === 2")

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

        assert [error for error in tab.errors if "400" not in error] == []  # but for the wrong request
        await tab.press("#done")
        await tab.until("document.querySelector('#message').textContent.startsWith('Done')")
        assert page.done.is_set() and page.segments().objects == [1, 2]


def test_it_works_with_a_thumb(tmp_path):
    asyncio.run(_annotate_on_a_phone(tmp_path))


async def _annotate_on_a_phone(tmp_path: Path) -> None:
    session = tiny_pipe().session(clip(12), output="rle", undo_levels=20)
    page = page_of(tmp_path / "project", session)
    async with (
        TestServer(page.app()) as server,
        open_tab(str(server.make_url("/")), tmp_path / "profile", (390, 844), phone=True) as tab,
    ):
        await tab.until("state.open && document.querySelector('#frame').naturalWidth === 80")
        assert await tab.run("document.documentElement.scrollWidth") <= 390  # nothing sticks out
        left, top, width, height = await tab.run("(r => [r.x, r.y, r.width, r.height])(view.getBoundingClientRect())")
        assert width > 350 and top + height < 844

        def at(x, y):
            return left + x / 80 * width, top + y / 48 * height

        await tab.tap(*at(20, 20))
        await tab.until("state.prompts[0]?.[1]?.points.length === 1")
        await tab.press("#exclude")
        await tab.tap(*at(60, 40))
        await tab.until("state.prompts[0][1].points.length === 2")
        assert session.prompts[0][1].labels == [1, 0]
        await tab.press("#add")

        # Two fingers magnify, and click nothing.
        x, y = at(40, 24)
        await tab.touch((x - 20, y), (x + 20, y))
        await tab.touch((x - 40, y), (x + 40, y))
        await tab.touch((x - 60, y), (x + 60, y))
        await tab.touch()
        await tab.until("zoom > 1.2")
        assert await tab.run("state.version") == 2
        await tab.press("#zoom")
        await tab.press("#brush")
        await tab.touch(at(60, 10))
        await tab.touch(at(70, 12))
        await tab.touch()
        await tab.until("state.prompts[0][1].mask === true")
        assert session.segments(0).binary(1)[11, 65]
        await tab.press("#forward")
        await tab.until("document.querySelector('#message').textContent === 'Tracked 12 frames.'")
        await tab.screenshot(Path(os.environ.get("PHONE_SCREENSHOT", tmp_path / "phone.png")))
        for control in ("accept", "done", "undo", "forward", "exclude", "slider"):
            seen = (
                f"(r => r.right <= 391 && r.left >= 0)(document.querySelector('#{control}').getBoundingClientRect())"
            )
            assert await tab.run(seen), control
        assert tab.errors == []


def test_a_queue_is_worked_through_with_keys(tmp_path):
    asyncio.run(_work_through_a_queue(tmp_path))


async def _work_through_a_queue(tmp_path: Path) -> None:
    films = [str(write_video(tmp_path / f"{number}.mp4", smooth(3 + number))) for number in range(2)]
    click = {0: {1: {"points": [[18, 20]]}, 2: {"points": [[60, 40]]}}}
    gate = QualityGate(0, 1.01, None)
    annotate(films, tiny_pipe(), lambda video, session: click, out=tmp_path / "project", gate=gate)
    project = AnnotationProject(tmp_path / "project", tiny_pipe())
    order = [(item.video, item.object) for item in project.queue.waiting("", 9)]
    page = AnnotationPage(project)
    async with TestServer(page.app()) as server, open_tab(str(server.make_url("/")), tmp_path / "profile") as tab:
        await tab.until("state.open && document.querySelector('#frame').naturalWidth")
        await tab.run("goOn()")
        for (name, obj), key in zip(order[:3], "axa", strict=True):
            await tab.until(f"state.clip === '{name}' && current === {obj} && {IDLE}")
            await tab.until("document.querySelector('#progress').hidden")
            await tab.key(key)
        name, obj = order[3]
        await tab.until(f"state.clip === '{name}' && current === {obj} && {IDLE}")
        await tab.until("document.querySelector('#counts').textContent === '1 wait · 2 accepted · 1 rejected'")
        await tab.screenshot(Path(os.environ.get("QUEUE_SCREENSHOT", tmp_path / "queue.png")))
        await tab.until("document.querySelector('#progress').hidden")
        await tab.key("a")
        await tab.until("document.querySelector('#message').textContent === 'Nothing waits any more.'")
        assert tab.errors == []
    await page.close()
    rows = annotate(films, tiny_pipe(), lambda *_: None, out=tmp_path / "project")
    statuses = {(row["name"], row["object"]): row["status"] for row in rows}
    assert [statuses[one] for one in order] == ["accepted", "rejected", "accepted", "accepted"]
