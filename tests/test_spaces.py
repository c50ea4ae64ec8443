"""The Space as a visitor has it: served here, and driven in a browser at the widths of a desk and of a phone."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vision.annotation.chromium import CHROMIUM, open_tab


APP = Path(__file__).parents[1] / "spaces" / "app.py"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_the_space_in_a_browser(tmp_path):
    pytest.importorskip("gradio", reason="needs spaces/requirements.txt")
    served = subprocess.Popen([sys.executable, "-u", APP], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", said)):
            line = served.stdout.readline()
            assert line, said
            said += line
        asyncio.run(visit(found[0], tmp_path))
    finally:
        served.terminate()
        served.wait()


async def visit(url, folder):
    async with open_tab(url, folder / "profile", (1280, 900)) as tab:

        async def width(pixels):
            size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 500}
            await tab.call("Emulation.setDeviceMetricsOverride", **size)
            await asyncio.sleep(1)
            assert await tab.run("document.documentElement.scrollWidth") <= pixels

        async def look(name):
            for pixels in (1280, 390):
                await width(pixels)
                await tab.screenshot(folder / f"{name}_{pixels}.png")
            await width(1280)

        async def tab_named(name):
            tabs = "[...document.querySelectorAll('[role=tab]')]"
            await tab.until(f"{tabs}.some(e => e.innerText.includes('{name}'))", 120)
            await tab.run(f"{tabs}.find(e => e.innerText.includes('{name}')).click()")

        await tab_named("Segmentation")
        await tab.until("document.querySelector('#first img')?.naturalWidth === 512", 120)
        await tab.press("#first img")
        await tab.until("document.querySelector('#followed img')?.naturalWidth === 512", 300)
        await look("segmentation")
        await tab_named("Edit")
        await tab.until("document.querySelector('#edit') !== null", 120)
        await tab.press("#edit")
        cells = (
            "[...document.querySelectorAll('#edited [role=gridcell]')].map(e => e.innerText.trim()).filter(Boolean)"
        )
        await tab.until(f"{cells}.length >= 8", 300)
        asked, before, edited, undone = (await tab.run(cells))[:4]
        assert asked == "The capital of France is" and edited.startswith("Rome")
        assert before.startswith("Paris") and undone == before
        await look("edit")
        await tab_named("Cascade")
        await tab.until("document.querySelector('#answer') !== null", 120)
        await tab.press("#answer")
        said = r"/\d+ tokens in \d+ passes of the large model/.test(document.querySelector('#saved')?.innerText)"
        await tab.until(said, 300)
        assert await tab.run("document.querySelector('#answered textarea').value.length") > 20
        await look("cascade")
        assert tab.errors == []
