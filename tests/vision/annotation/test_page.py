"""The annotation page: its HTTP interface does to the session what is clicked, and bad input changes nothing."""

import asyncio
import base64
import io
import socket
import tempfile
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image
from typer.testing import CliRunner

from hf_iclr.cli import app as cli
from hf_iclr.vision.annotation import page as annotation_page
from hf_iclr.vision.annotation.page import AnnotationPage, annotate_in_browser
from hf_iclr.vision.formats.annotation_json import read_sav
from tests.vision.session.test_frames import smooth, write_video
from tests.vision.tiny import clip, tiny_pipe


VIDEO = clip(8)
CLICK = {"frame": 0, "obj": 1, "points": [[20, 20]], "labels": [1]}


@asynccontextmanager
async def served(page: AnnotationPage):
    async with TestClient(TestServer(page.app())) as client:
        yield client


def session(video=VIDEO, **options):
    return tiny_pipe().session(video, output="rle", **options)


def during(steps, opened=None):
    """Runs `steps(client, page)` on the page of a session."""

    async def run():
        page = AnnotationPage(tiny_pipe(), opened)
        async with served(page) as client:
            await steps(client, page)

    asyncio.run(run())


async def post(client, path, **fields):
    response = await client.post(path, json=fields)
    return response.status, await response.json()


async def get(client, path):
    response = await client.get(path)
    assert response.status == 200, await response.text()
    return await response.json()


async def tracked(client, direction="forward"):
    status, job = await post(client, "/track", direction=direction)
    assert status == 200 and job["running"], job
    while job["running"]:
        await asyncio.sleep(0.01)
        job = await get(client, "/job")
    assert "error" not in job
    return job


def same(left, right):
    return left.frames == right.frames and all(left[frame].masks == right[frame].masks for frame in left.frames)


def test_clicks_tracking_and_corrections_equal_those_of_a_session():
    async def steps(client, page):
        status, state = await post(client, "/prompt", **CLICK)
        assert status == 200 and state["prompts"] == {"0": {"1": {"points": [[20.0, 20.0]], "labels": [1]}}}
        await post(client, "/prompt", frame=2, obj=2, box=[30, 5, 70, 40])
        job = await tracked(client, "both")
        assert job["done"] == job["total"] == 8 + 2
        await post(client, "/prompt", frame=5, obj=1, points=[[60, 30]], labels=[0])  # has a mask: a correction
        await tracked(client)
        state = await get(client, "/state")
        assert state["corrected"] == [[5, 1]] and state["objects"][0]["frames"] == list(range(8))

        expected = session()
        expected.add(0, 1, points=[[20, 20]], labels=[1])
        expected.add(2, 2, box=[30, 5, 70, 40])
        expected.propagate("both")
        expected.correct(5, 1, points=[[60, 30]], labels=[0])
        expected.propagate()
        assert same(page.segments(), AnnotationPage(None, expected).segments())

    during(steps, session())


def test_edits_can_be_taken_back():
    async def steps(client, page):
        await post(client, "/prompt", **CLICK)
        await post(client, "/prompt", **{**CLICK, "points": [[50, 30]]})
        _, state = await post(client, "/undo")
        assert state["prompts"]["0"]["1"]["points"] == [[20.0, 20.0]]
        await post(client, "/prompt", **{**CLICK, "obj": 2})
        _, state = await post(client, "/remove", obj=1)
        assert [entry["obj"] for entry in state["objects"]] == [2]
        _, state = await post(client, "/clear", frame=0, obj=2)
        assert state["objects"] == [] and state["can_undo"]

    during(steps, session())


def test_frames_and_masks_are_those_of_the_session():
    async def steps(client, page):
        response = await client.get("/frames/3")
        pixels = np.asarray(Image.open(io.BytesIO(await response.read()))).astype(float)
        assert pixels.shape == (48, 80, 3)
        assert np.abs(pixels[14:28, 18:30].mean((0, 1)) - (250, 60, 30)).max() < 12  # the rectangle, after JPEG
        await post(client, "/prompt", **CLICK)
        masks = await get(client, "/masks/0")
        overlay = np.asarray(Image.open(io.BytesIO(base64.b64decode(masks["overlay"]))))
        segments = page.session.segments(0)
        assert np.array_equal(overlay[..., 3] > 0, segments.binary(1)) and segments.areas[1] > 0
        assert masks["objects"]["1"]["score"] == segments.scores[1]
        assert await get(client, "/masks/5") == {"objects": {}, "overlay": None}

    during(steps, session())


def test_export_holds_every_mask(tmp_path):
    async def steps(client, page):
        response = await client.get("/export")
        assert response.status == 400 and "at least one object" in await response.text()
        await post(client, "/prompt", **{**CLICK, "frame": 2})
        await tracked(client)
        response = await client.get("/export")
        assert response.headers["Content-Disposition"] == 'attachment; filename="video.json"'
        file = tmp_path / "video.json"
        file.write_bytes(await response.read())
        segments, about = read_sav(file, stride=1)
        assert segments.frames == list(range(8)) and about["masklet_first_appeared_frame"] == [2.0]
        assert np.array_equal(segments[4].binary(1), page.session.segments(4).binary(1))

        response = await client.get("/export?format=png")
        with ZipFile(io.BytesIO(await response.read())) as archive:
            assert len(archive.namelist()) == 8
            labels = np.asarray(Image.open(archive.open("00004.png")))
        assert np.array_equal(labels == 1, page.session.segments(4).binary(1))

    during(steps, session())


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/prompt", {**CLICK, "points": [[200, 20]]}, "Expected x in 0..80 and y in 0..48"),
        ("/prompt", {**CLICK, "frame": 8}, "Expected a frame in 0..7, got 8"),
        ("/prompt", {**CLICK, "labels": [0]}, "Object 1 has no mask on frame 0 yet. Click on the object first"),
        ("/prompt", {**CLICK, "points": None}, "Expected one label a point, got 0 points and 1 labels"),
        ("/prompt", {"frame": 0}, "missing 1 required positional argument"),
        ("/remove", {"obj": 7}, "There is no object 7"),
        ("/clear", {"frame": 0, "obj": 7}, "There is no object 7"),
        ("/undo", {}, "There is nothing to undo"),
        ("/track", {"direction": "up"}, "Expected direction to be one of forward, backward, both"),
        ("/track", {}, "There is nothing to track. Add a prompt first"),
        ("/open", {}, "takes no other"),
    ],
)
def test_bad_input_gets_a_sentence_and_the_page_stays_usable(path, fields, words):
    async def steps(client, page):
        status, answer = await post(client, path, **fields)
        assert status == 400 and words in answer["error"]
        assert (await client.get("/frames/99")).status == 400
        assert (await client.post("/prompt", data="no json")).status == 400
        status, state = await post(client, "/prompt", **CLICK)
        assert status == 200 and len(state["objects"]) == 1

    during(steps, session())


def test_tracking_can_be_stopped_and_an_edit_stops_it():
    async def steps(client, page):
        await post(client, "/prompt", **CLICK)
        await post(client, "/track", direction="forward")
        _, state = await post(client, "/cancel")
        job = await get(client, "/job")
        assert job["cancelled"] and not job["running"] and job["done"] == len(state["objects"][0]["frames"]) < 30
        await post(client, "/track", direction="forward")
        status, state = await post(client, "/prompt", **{**CLICK, "obj": 2})
        assert status == 200 and (await get(client, "/job"))["cancelled"]
        assert (await tracked(client))["done"] == 30

    during(steps, session(clip(30)))


def test_a_failure_while_tracking_is_told(monkeypatch):
    async def steps(client, page):
        await post(client, "/prompt", **CLICK)
        page.session.frames._read = None
        _, job = await post(client, "/track", direction="forward")
        while (job := await get(client, "/job"))["running"]:
            await asyncio.sleep(0.01)
        assert "NoneType" in job["error"]
        assert (await client.get("/state")).status == 200

    during(steps, session())


def test_a_video_is_opened_from_the_page(tmp_path):
    film = Path(write_video(tmp_path / "clip.mp4", smooth(6))).read_bytes()

    async def steps(client, page):
        state = await get(client, "/state")
        assert not state["open"] and state["can_open"]
        response = await client.post("/prompt", json=CLICK)
        assert response.status == 400 and "There is no video yet" in await response.text()
        response = await client.post("/open?name=broken.mp4", data=b"no video")
        assert response.status == 400 and "no video that FFmpeg can read" in await response.text()
        response = await client.post("/open?name=clip.mp4", data=film)
        opened = await response.json()
        assert response.status == 200, opened
        assert opened["open"] and opened["num_frames"] == 6 and opened["title"] == "clip.mp4"
        assert opened["clip"] != state["clip"]
        status, state = await post(client, "/prompt", **CLICK)
        assert status == 200 and len(state["objects"]) == 1

    during(steps)


def test_other_sites_are_refused():
    async def steps(client, page):
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            response = await client.post("/prompt", json=CLICK, headers=headers)
            assert response.status == 403
        origin = {"Origin": f"http://127.0.0.1:{client.port}"}
        response = await client.post("/prompt", json=CLICK, headers=origin)
        assert response.status == 200
        assert response.headers["X-Frame-Options"] == "DENY"
        assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"

    during(steps, session())


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:7860"]
)
@pytest.mark.parametrize("path", ["/", "/state", "/frames/0"])
def test_a_name_that_was_made_to_lead_here_is_refused(host, path):
    """DNS rebinding: to the browser the page is of the same origin, so only its name tells."""

    async def steps(client, page):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert (await client.get(path, headers=headers)).status == 403

    during(steps, session())


def test_the_page_answers_to_addresses_and_the_name_it_was_given():
    async def steps():
        page = AnnotationPage(tiny_pipe(), session())
        async with TestClient(TestServer(page.app("studio.lan"))) as client:
            names = ("localhost:1", "studio.lan", "192.168.1.5:7860", "[::1]:7860", socket.gethostname())
            return [(await client.get("/job", headers={"Host": name})).status for name in (*names, "other.lan")]

    assert asyncio.run(steps()) == [200] * 5 + [403]


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_another_address_than_ones_own_is_told(host, warns, caplog):
    async def steps():
        page = AnnotationPage(tiny_pipe(), session())
        page.done.set()
        await annotation_page._serve(page, host, 0, lambda url: None)

    asyncio.run(steps())
    assert ("whoever reaches this machine there sees the video" in caplog.text) == warns


@pytest.mark.parametrize("kind", ["json", "png"])
@pytest.mark.parametrize("name", ["..", "../../x", "a\\b", "/etc/passwd"])
def test_a_name_sent_by_the_page_leads_nowhere(name, kind, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    async def steps(client, page):
        page._title = name
        response = await client.get("/export", params={"format": kind})
        assert response.status in (200, 400)
        assert (response.status == 400) == ("\\" in name or (name, kind) == ("..", "png")), await response.text()
        assert list(tmp_path.rglob("*")) == [tmp_path / "temporary"]

    opened = session()
    opened.add(0, 1, points=[[20, 20]])
    during(steps, opened)


def test_the_page_asks_for_nothing_from_elsewhere():
    async def steps(client, page):
        response = await client.get("/")
        text = await response.text()
        assert response.content_type == "text/html"
        assert {word for word in text.split('"') if word.startswith("http")} == {"http://www.w3.org/2000/svg"}

    during(steps, session())


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match="A stream can't be annotated"):
        AnnotationPage(tiny_pipe(), tiny_pipe().session(iter(VIDEO)))


def test_annotate_in_browser_returns_what_was_corrected():
    opened = session()
    opened.add(0, 1, mask=VIDEO[0, :, :, 0] > 200)
    ready, results = threading.Event(), []
    address = []

    def serve():
        results.append(
            annotate_in_browser(tiny_pipe(), opened, port=0, on_ready=lambda url: (address.append(url), ready.set()))
        )

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(30)

    async def annotate():
        async with ClientSession(address[0]) as client:
            await tracked(client)
            await post(client, "/prompt", frame=4, obj=1, points=[[60, 30]], labels=[1])
            await post(client, "/done")

    asyncio.run(annotate())
    thread.join(30)
    (segments,) = results
    assert segments.frames == list(range(8)) and segments[4].corrected == {1}
    assert np.array_equal(segments[0].binary(1), opened.segments(0).binary(1))


def test_a_taken_port_is_told():
    async def steps(client, page):
        with pytest.raises(ValueError, match=r"Can't listen on 127.0.0.1:\d+ .* Pass another port."):
            await asyncio.to_thread(annotate_in_browser, tiny_pipe(), session(), port=client.port)

    during(steps, session())


def test_the_command_writes_the_masks_on_done(tmp_path, monkeypatch):
    tiny_pipe().save_pretrained(tmp_path / "model")
    film = write_video(tmp_path / "clip.mp4", smooth(4))

    def annotate(pipe, opened, host, port, on_ready):
        opened.add(0, 1, points=[[20, 20]])
        on_ready(f"http://{host}:{port}/")
        return opened.propagate()

    monkeypatch.setattr("hf_iclr.vision.annotation.page.annotate_in_browser", annotate)
    arguments = ["annotate-ui", str(film), "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out.json")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "Open http://127.0.0.1:7860/ in a browser" in result.output
    assert read_sav(tmp_path / "out.json", stride=1)[0].frames == [0, 1, 2, 3]
    result = CliRunner().invoke(cli.app, ["annotate-ui", "none.mp4", "--model", str(tmp_path / "model")])
    assert result.exit_code == 2 and "There is no video none.mp4" in result.output
