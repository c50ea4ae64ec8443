"""A headless Chromium, driven by its DevTools protocol over a websocket."""

import asyncio
import base64
import itertools
import json
import shutil
import time
from contextlib import asynccontextmanager
from pathlib import Path

from aiohttp import ClientSession


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0 "
    "--force-device-scale-factor=1"
)


class Tab:
    """One page of a browser; real mouse and keyboard events are sent to it."""

    def __init__(self, socket):
        self._socket = socket
        self._numbers = itertools.count(1)
        self._touching = False
        self.errors: list[str] = []  # that the page's console shows

    async def call(self, method: str, **params):
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            message = await self._socket.receive_json(timeout=60)
            said = json.dumps(message.get("params", {}))
            kind = message.get("method", "")
            if kind == "Runtime.exceptionThrown" or kind == "Log.entryAdded" and '"level": "error"' in said:
                self.errors.append(said)
            if message.get("id") == number:
                assert "error" not in message, message["error"]
                return message["result"]

    async def run(self, script: str):
        """The value of an expression in the page."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, script: str, seconds: float = 30):
        """Waits for an expression to be true."""
        end = time.monotonic() + seconds
        while not (value := await self.run(script)):
            assert time.monotonic() < end, f"never true: {script}; " + str(await self.run("document.body.innerText"))
            await asyncio.sleep(0.05)
        return value

    async def mouse(self, kind: str, x: float, y: float, button: str = "left", modifiers: int = 0):
        await self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1, modifiers=modifiers
        )

    async def click(self, x: float, y: float, button: str = "left", modifiers: int = 0):
        await self.mouse("mousePressed", x, y, button, modifiers)
        await self.mouse("mouseReleased", x, y, button, modifiers)

    async def press(self, selector: str):
        """Clicks in the middle of an element."""
        box = f"document.querySelector('{selector}').getBoundingClientRect()"
        x, y = await self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({box})")
        await self.click(x, y)

    async def touch(self, *points: tuple[float, float]):
        """Fingers on the screen; none lifts them."""
        kind = "touchEnd" if not points else "touchMove" if self._touching else "touchStart"
        self._touching = bool(points)
        await self.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y} for x, y in points])

    async def tap(self, x: float, y: float):
        await self.touch((x, y))
        await self.touch()

    async def key(self, key: str, modifiers: int = 0):
        typed = "\r" if key == "Enter" else key  # without it a text field is not told that its value is final
        text = {"text": typed} if len(typed) == 1 and not modifiers else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=modifiers, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers)

    async def screenshot(self, path: Path):
        shot = await self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def open_tab(url: str, folder: Path, size: tuple[int, int] = (1280, 800), phone: bool = False):
    """A page in a browser of its own, whose profile is in `folder`; a phone has fingers and no mouse."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *_FLAGS.split(),
        f"--user-data-dir={folder}",
        f"--window-size={size[0]},{size[1]}",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        port_file = folder / "DevToolsActivePort"
        for _ in range(600):
            if port_file.exists() and "\n" in port_file.read_text():
                break
            assert process.returncode is None, "Chromium ended at once"
            await asyncio.sleep(0.05)
        port = port_file.read_text().split()[0]
        async with ClientSession() as client:
            async with client.get(f"http://127.0.0.1:{port}/json/list") as response:
                (target,) = [page for page in json.loads(await response.text()) if page["type"] == "page"]
            async with client.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
                tab = Tab(socket)
                await tab.call(
                    "Emulation.setDeviceMetricsOverride",
                    width=size[0],
                    height=size[1],
                    deviceScaleFactor=1,
                    mobile=phone,
                )
                if phone:
                    await tab.call("Emulation.setTouchEmulationEnabled", enabled=True, maxTouchPoints=2)
                for domain in ("Runtime", "Log"):
                    await tab.call(f"{domain}.enable")
                await tab.call("Page.navigate", url=url)
                await tab.until("location.href !== 'about:blank' && document.readyState === 'complete'")
                yield tab
                await tab.call("Browser.close")
        await asyncio.wait_for(process.wait(), 20)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
