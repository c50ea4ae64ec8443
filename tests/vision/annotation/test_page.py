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
from hf_iclr.vision.annotation import browser
from hf_iclr.vision.annotation.browser import annotate_in_browser, listen
from hf_iclr.vision.annotation.page import AnnotationPage
from hf_iclr.vision.annotation.project import AnnotationProject
from hf_iclr.vision.formats.annotation_json import read_sav
from hf_iclr.vision.session.segments import VideoSegments
from tests.vision.session.test_frames import smooth, write_video
from tests.vision.tiny import clip, tiny_pipe


VIDEO = clip(8)
CLICK = {"frame": 0, "obj": 1, "points": [[20, 20]], "labels": [1]}


@asynccontextmanager
async def served(page: AnnotationPage):
    async with TestClient(TestServer(page.app())) as client:
        yield client
    await page.close()


def session(video=VIDEO, **options):
    return tiny_pipe().session(video, output="rle", **options)


def page_of(folder, opened=None) -> AnnotationPage:
    """The page of a session, or one that asks for a video."""
    project = AnnotationProject(folder, tiny_pipe())
    return AnnotationPage(project, None if opened is None else project.adopt(opened))


def during(steps, opened=None, host="127.0.0.1"):
    """Runs `steps(client, page)` on the page of a session."""

    async def run():
        with tempfile.TemporaryDirectory() as folder:
            page = page_of(folder, opened)
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
        assert state["objects"][0]["frames"] == list(range(8)) == state["objects"][1]["frames"]
        assert len(state["objects"][0]["doubts"]) == 8 and state["version"] == 3

        expected = session()
        expected.add(0, 1, points=[[20, 20]], labels=[1])
        expected.add(2, 2, box=[30, 5, 70, 40])
        expected.propagate("both")
        expected.correct(5, 1, points=[[60, 30]], labels=[0])
        expected.propagate()
        assert page.segments()[5].corrected == {1}
        assert same(page.segments(), VideoSegments(map(expected.segments, range(8))))

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
        assert state["objects"] == [] and state["can_undo"] and not state["can_redo"]
        await post(client, "/undo")
        _, state = await post(client, "/redo")
        assert state["objects"] == [] and not state["can_redo"]

    during(steps, session())


def test_frames_and_masks_are_those_of_the_session():
    async def steps(client, page):
        response = await client.get("/frames/3")
        pixels = np.asarray(Image.open(io.BytesIO(await response.read()))).astype(float)
        assert pixels.shape == (48, 80, 3)
        assert np.abs(pixels[14:28, 18:30].mean((0, 1)) - (250, 60, 30)).max() < 12  # the rectangle, after JPEG
        await post(client, "/prompt", **CLICK)
        masks = await get(client, "/masks/0")
        overlay = np.asarray(Image.open(io.BytesIO(base64.b64decode(masks["overlay"]))).convert("RGBA"))
        segments = page.segments()[0]
        assert np.array_equal(overlay[..., 3] > 0, segments.binary(1)) and segments.areas[1] > 0
        assert masks["objects"]["1"]["score"] == segments.scores[1]
        assert await get(client, "/masks/5") == {"frame": 5, "objects": {}, "overlay": None}

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
        assert np.array_equal(segments[4].binary(1), page.segments()[4].binary(1))

        response = await client.get("/export?format=png")
        with ZipFile(io.BytesIO(await response.read())) as archive:
            assert len(archive.namelist()) == 8
            labels = np.asarray(Image.open(archive.open("00004.png")))
        assert np.array_equal(labels == 1, page.segments()[4].binary(1))

    during(steps, session())


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        ("/prompt", {**CLICK, "points": [[200, 20]]}, "Expected x in 0..80 and y in 0..48"),
        ("/prompt", {**CLICK, "frame": 8}, "Expected a frame in 0..7, got 8"),
        ("/prompt", {**CLICK, "labels": [0]}, "Object 1 has no mask on frame 0 yet. Click on the object first"),
        ("/prompt", {**CLICK, "points": None}, "Expected one label a point, got 0 points and 1 labels"),
        ("/prompt", {"frame": 0}, "Expected for prompt the fields frame, obj, points, labels, box, got frame"),
        ("/remove", {}, "Expected for remove the fields obj, got none"),
        ("/brush", {"frame": 0, "obj": 1, "stroke": "line", "radius": 2}, "Expected a stroke"),
        ("/remove", {"obj": 7}, "There is no object 7"),
        ("/clear", {"frame": 0, "obj": 7}, "There is no object 7"),
        ("/undo", {}, "There is nothing to undo"),
        ("/track", {"direction": "up"}, "Expected direction to be one of forward, backward, both"),
        ("/track", {}, "There is nothing to track. Add a prompt first"),
        ("/open", {}, "takes no other"),
        ("/redo", {}, "There is nothing to redo"),
        ("/prompt", {**CLICK, "obj": -3}, "Expected an object from 0 on, got -3"),
        ("/prompt", {**CLICK, "obj": "1"}, "Expected an object from 0 on, got '1'"),
        ("/prompt", {**CLICK, "obj": 2**31}, "Expected an object from 0 on"),
        ("/prompt", {**CLICK, "frame": 1.5}, "Expected a frame in 0..7, got 1.5"),
        ("/prompt", {**CLICK, "clip": "other"}, "There is no video 'other'"),
        ("/brush", {"frame": 0, "obj": 1, "stroke": [[1]], "radius": 2}, "Expected a stroke"),
        ("/brush", {"frame": 0, "obj": 1, "stroke": [[1, 1]], "radius": 2, "erase": True}, "no object 1 to rub out"),
        ("/name", {"obj": 1, "category": "dog"}, "There is no object 1 to name"),
        ("/decide", {"decision": "maybe"}, "Expected a decision of accept, reject or skip"),
        ("/decide", {"decision": "accept", "obj": 4}, "There is no object 4"),
    ],
)
def test_bad_input_gets_a_sentence_and_the_page_stays_usable(path, fields, words):
    async def steps(client, page):
        status, answer = await post(client, path, **fields)
        assert status == 400 and words in answer["error"]
        assert (await client.get("/frames/99")).status == 400
        for wrong in ("no json", "[]", "3", "null"):
            for where in ("/prompt", "/track", "/undo", "/decide", "/done", "/next", "/cancel"):
                assert (await client.post(where, data=wrong)).status == 400, (where, wrong)
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


def test_a_failure_while_tracking_is_shown(monkeypatch):
    async def steps(client, page):
        await post(client, "/prompt", **CLICK)
        page.project.session(page.clip).frames._read = None
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


def test_two_people_send_videos_of_one_name_at_once(tmp_path):
    films = [Path(write_video(tmp_path / f"{frames}.mp4", smooth(frames))).read_bytes() for frames in (3, 5)]

    async def steps(client, page):
        requests = (client.post("/open?name=clip.mp4", data=film) for film in films)
        states = [await response.json() for response in await asyncio.gather(*requests)]
        assert [state["num_frames"] for state in states] == [3, 5]
        paths = [page.project.queue.video(state["clip"])["path"] for state in states]
        assert [Path(path).read_bytes() for path in paths] == films

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


def test_the_page_answers_to_addresses_and_the_name_it_was_given(tmp_path):
    async def steps(folder):
        page = page_of(folder, session())
        async with TestClient(TestServer(page.app("studio.lan"))) as client:
            names = ("localhost:1", "studio.lan", "192.168.1.5:7860", "[::1]:7860", socket.gethostname())
            return [(await client.get("/job", headers={"Host": name})).status for name in (*names, "other.lan")]

    assert asyncio.run(steps(tmp_path)) == [200] * 5 + [403]


@pytest.mark.parametrize(("host", "warns"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_another_address_than_ones_own_is_warned_of(host, warns, caplog, tmp_path):
    async def steps():
        page = page_of(tmp_path, session())
        page.done.set()
        await browser._serve(page, listen(host, 0), host, lambda url: None)

    asyncio.run(steps())
    assert ("whoever reaches this machine there sees the video" in caplog.text) == warns


@pytest.mark.parametrize("kind", ["sav", "png"])
@pytest.mark.parametrize("name", ["..", "../../x", "a\\b", "/etc/passwd"])
def test_a_name_sent_by_the_page_leads_nowhere(name, kind, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    async def steps(client, page):
        page.project.queue.mark(page.clip, title=name)
        response = await client.get("/export", params={"format": kind})
        assert response.status in (200, 400)
        assert (response.status == 400) == ((name, kind) == ("..", "png")), await response.text()
        assert list(tmp_path.iterdir()) == [tmp_path / "temporary"]
        page._can_open = True
        response = await client.post("/open", params={"name": name}, data=b"no video")
        assert response.status == 400 and not list((page.project.folder / "videos").glob("*"))

    opened = session()
    opened.add(0, 1, points=[[20, 20]])
    during(steps, opened)


def test_the_page_asks_for_nothing_from_elsewhere():
    async def steps(client, page):
        response = await client.get("/")
        text = await response.text() + await (await client.get("/page.js")).text()
        assert response.content_type == "text/html"
        assert {word for word in text.split('"') if word.startswith("http")} == {"http://www.w3.org/2000/svg"}

    during(steps, session())


def test_a_stream_is_refused():
    with pytest.raises(ValueError, match="A stream can't be annotated"):
        annotate_in_browser(tiny_pipe(), tiny_pipe().session(iter(VIDEO)), port=0)


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


def test_a_taken_port_raises():
    async def steps(client, page):
        with pytest.raises(ValueError, match=r"Can't listen on 127.0.0.1:\d+ .* Pass another port."):
            await asyncio.to_thread(annotate_in_browser, tiny_pipe(), session(), port=client.port)

    during(steps, session())


def test_the_command_writes_the_masks_on_done(tmp_path, monkeypatch):
    tiny_pipe().save_pretrained(tmp_path / "model")
    film = write_video(tmp_path / "clip.mp4", smooth(4))

    def annotate(page, listener, host, on_ready):
        page.project.edit(page.clip, "prompt", CLICK)
        on_ready(f"http://{host}:{listener.getsockname()[1]}/")
        return page.project.session(page.clip).propagate()

    monkeypatch.setattr("hf_iclr.vision.annotation.browser.serve", annotate)
    arguments = ["annotate-ui", str(film), "--model", str(tmp_path / "model"), "--port", "0"]
    arguments += ["--out", str(tmp_path / "new" / "out.json")]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "Open http://127.0.0.1:" in result.output and (tmp_path / "new" / "out.project" / "project.sqlite").exists()
    assert read_sav(tmp_path / "new" / "out.json", stride=1)[0].frames == [0, 1, 2, 3]
    result = CliRunner().invoke(cli.app, [*arguments[:-1], str(tmp_path)])
    assert result.exit_code == 2 and "Expected a JSON file for --out" in result.output
    result = CliRunner().invoke(cli.app, ["annotate-ui", "none.mp4", "--model", str(tmp_path / "model")])
    assert result.exit_code == 2 and "There is no video none.mp4" in result.output


def test_what_is_too_large_is_refused_unread():
    async def steps(client, page):
        async def endless():
            for _ in range(700):
                sent.append(1)
                yield bytes(2**20)

        for path in ("/prompt", "/track", "/open"):
            sent: list[int] = []
            page._can_open = True
            response = await client.post(path, data=endless())
            assert response.status == 413 and "MiB at most" in (await response.json())["error"], path
        for path, size in (("/prompt", 2**23 + 1), ("/open", 2**29 + 1)):
            reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
            writer.write(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n\r\n".encode())
            assert b" 413 " in await asyncio.wait_for(reader.readline(), 20)  # nothing of the body was sent
            writer.close()
        assert not list((page.project.folder / "videos").iterdir())

    during(steps, session())


def test_a_stale_tab_gets_409():
    async def steps(client, page):
        _, one = await post(client, "/prompt", **CLICK)
        seen = {"clip": one["clip"], "version": one["version"]}
        status, two = await post(client, "/prompt", **{**CLICK, "obj": 2, "points": [[60, 40]]}, **seen)
        assert status == 200 and two["version"] == one["version"] + 1
        status, answer = await post(client, "/prompt", **{**CLICK, "obj": 2, "points": [[5, 5]]}, **seen)
        assert status == 409 and "changed in another tab" in answer["error"]
        state = await get(client, "/state")
        assert state["version"] == two["version"] and len(state["prompts"]["0"]["2"]["points"]) == 1
        await post(client, "/track", direction="forward")
        assert (await post(client, "/remove", obj=1, **seen))[0] == 409  # does not stop the tracking either
        while (job := await get(client, "/job"))["running"]:
            await asyncio.sleep(0.01)
        assert not job.get("cancelled") and job["done"] == 8

    during(steps, session())


def test_a_brush_draws_and_an_eraser_rubs_out():
    async def steps(client, page):
        line = {"frame": 3, "obj": 1, "stroke": [[20, 20], [50, 20]], "radius": 6}
        status, state = await post(client, "/brush", **line)
        assert status == 200 and state["prompts"]["3"]["1"] == {"mask": True} and state["shown"]["frame"] == 3
        drawn = page.segments()[3].binary(1)
        assert drawn[20, 35] and not drawn[40, 35] and not drawn[20, 70]
        await post(client, "/brush", **{**line, "stroke": [[50, 20]], "erase": True})
        rubbed = page.segments()[3].binary(1)
        assert rubbed[20, 25] and not rubbed[20, 50] and rubbed.sum() < drawn.sum()
        await post(client, "/undo")
        assert np.array_equal(page.segments()[3].binary(1), drawn)

    during(steps, session())


def test_names_of_objects_reach_exports(tmp_path):
    async def steps(client, page):
        await post(client, "/prompt", **CLICK)
        status, state = await post(client, "/name", obj=1, category="red box")
        assert status == 200 and state["objects"][0]["category"] == "red box"
        coco = await get(client, "/export?format=coco")
        assert "red box" in {category["name"] for category in coco["categories"]}
        response = await client.get("/export?format=yolo")
        with ZipFile(io.BytesIO(await response.read())) as archive:
            assert archive.read("classes.txt").decode().split("\n")[0] == "red box"
        for wrong in (3, "a" * 81, "a\nb"):
            assert (await post(client, "/name", obj=1, category=wrong))[0] == 400
        _, state = await post(client, "/name", obj=1, category=None)
        assert state["objects"][0]["category"] is None

    during(steps, session())
