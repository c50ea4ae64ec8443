"""A server of an annotation project that is killed while two people click: is what it answered there again?"""

import gc
import http.client
import json
import multiprocessing
import os
import signal
import socket
import sqlite3
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np

from hf_iclr.vision.annotation.browser import listen, serve
from hf_iclr.vision.annotation.page import AnnotationPage
from hf_iclr.vision.annotation.project import AnnotationProject


EDITS = ("prompt", "prompt", "prompt", "brush", "name", "undo", "redo", "clear", "remove")
STAGES = ("starting", *dict.fromkeys(EDITS), "decide", "track", "tracking", "masks")


def serve_project(pipe, folder: Path, videos: list[Path], listener: socket.socket) -> None:
    """What the child does: opens the folder as it is, and answers until it is killed."""
    project = AnnotationProject(folder, pipe)
    project.add_videos(videos)
    serve(AnnotationPage(project), listener, "127.0.0.1", lambda url: None)


class Server:
    """One life of it, in a fork, which has all imports and the model already."""

    def __init__(self, pipe, folder: Path, videos: list[Path]):
        listener = listen(port=0)
        self.port = listener.getsockname()[1]
        arguments = (pipe, folder, videos, listener)
        self.process = multiprocessing.get_context("fork").Process(target=serve_project, args=arguments)
        self.process.start()
        listener.close()

    def kill_in(self, seconds: float) -> None:
        threading.Timer(seconds, os.kill, (self.process.pid, signal.SIGKILL)).start()

    def ask(self, person: str, path: str, body: dict | None = None) -> dict:
        """The answer to a request; `OSError` if there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            data = None if body is None else json.dumps(body)
            connection.request("GET" if body is None else "POST", path, data, {"Cookie": f"person={person}"})
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (http.client.HTTPException, json.JSONDecodeError) as error:
            raise ConnectionResetError(str(error)) from None
        finally:
            connection.close()
        assert response.status == 200, f"{path} {body}: {answer}"
        return answer


def draw_request(rng: np.random.Generator, state: dict) -> tuple[str, dict]:
    """What a person does next."""
    points, objects = (
        [rng.uniform(0, [state["width"], state["height"]]).tolist()],
        [o["obj"] for o in state["objects"]],
    )
    frame, obj = int(rng.integers(state["num_frames"])), int(rng.integers(1, 4))
    kind = str(rng.choice([*EDITS, "decide", "track", "masks"]))
    possible = {"undo": state["can_undo"], "redo": state["can_redo"]}
    if not possible.get(kind, bool(objects)):
        kind = "prompt"
    if kind in ("name", "remove", "decide", "clear"):
        obj = int(rng.choice(objects))
    shown = [int(number) for number, prompts in state["prompts"].items() if str(obj) in prompts]
    fields: dict[str, dict] = {
        "prompt": {"frame": frame, "obj": obj, "points": points, "labels": [1]},
        "brush": {"frame": frame, "obj": obj, "stroke": [*points, [40, 20]], "radius": 4},
        "name": {"obj": obj, "category": f"class {rng.integers(100)}"},
        "clear": {"frame": shown[0] if shown else 0, "obj": obj},
        "remove": {"obj": obj},
        "decide": {"obj": obj, "decision": str(rng.choice(["accept", "reject", "skip"]))},
        "track": {"direction": str(rng.choice(["forward", "both"]))},
    }
    return kind, fields.get(kind, {})


class Person:
    """Works on the video that the queue gave, and knows what was answered."""

    def __init__(self, name: str, rng: np.random.Generator, counts: Counter):
        self.name, self.rng, self.counts = name, rng, counts
        self.state: dict = {}  # as it was answered last
        self.edits: list[tuple] = []  # answered: version, kind, fields
        self.shown: dict | None = None  # frame and overlay of the last edit, until objects are tracked
        self.asked: tuple[str, dict] | None = None  # a change that was not answered: it may be there or not

    def begin(self, server: Server) -> None:
        """Opens the page, and compares what it shows with what was answered last."""
        state = server.ask(self.name, f"/state?clip={self.state['clip']}" if self.state else "/state")
        if self.state and self.asked is None:
            self.counts["states compared"] += 1
            self.counts["states that differ"] += _essence(state) != _essence(self.state)
            if self.shown:
                masks = server.ask(self.name, f"/masks/{self.shown['frame']}?clip={state['clip']}")
                self.counts["masks compared"] += 1
                self.counts["masks that differ"] += masks["overlay"] != self.shown["overlay"]
        elif self.asked:
            self.shown = None
        self.state, self.asked = state, None

    def work(self, server: Server, during: list[str]) -> None:
        """One request; its kind is in `during` while it has no answer."""
        during[0], fields = draw_request(self.rng, self.state)
        kind, clip = during[0], self.state["clip"]
        if kind == "masks":
            server.ask(self.name, f"/masks/{self.rng.integers(self.state['num_frames'])}?clip={clip}")
            return
        if kind != "track":
            self.asked = kind, fields
        state = server.ask(self.name, f"/{kind}", {**fields, "clip": clip})
        self.asked = None
        self.counts["requests answered"] += 1
        if kind == "track":
            self.shown, during[0] = None, "tracking"
            while self.rng.random() < 0.95 and server.ask(self.name, f"/job?clip={clip}")["running"]:
                time.sleep(0.01)
            return
        if kind != "decide":
            self.counts["edits answered"] += 1
            self.edits.append((state["version"], kind, fields))
            self.shown = state["shown"]
        self.state = state

    def compare(self, database: sqlite3.Connection) -> None:
        """What the file holds after a kill, with what was answered."""
        clip = self.state["clip"]
        rows = database.execute("SELECT version, kind, fields FROM edits WHERE video = ? ORDER BY version", (clip,))
        written = [(version, kind, json.loads(fields)) for version, kind, fields in rows]
        self.counts["answered edits lost"] += sum(one not in written for one in self.edits)
        more = [one for one in written if one not in self.edits]
        self.counts["unanswered edits kept"] += len(more)
        self.counts["edits that nobody made"] += sum(one[1:] != self.asked for one in more)
        self.edits += more
        if self.asked is None:
            rows = database.execute("SELECT object, status FROM masklets WHERE video = ?", (clip,))
            statuses, known = dict(rows.fetchall()), self.state["objects"]
            self.counts["decisions compared"] += len(known)
            self.counts["answered decisions lost"] += sum(statuses.get(one["obj"]) != one["status"] for one in known)


def _essence(state: dict) -> tuple:
    objects = [(one["obj"], one["category"], one["status"]) for one in state["objects"]]
    return state["version"], state["prompts"], objects, state["can_undo"], state["can_redo"]


def kill_again_and_again(pipe, folder: Path, videos: list[Path], kills: int, seed: int = 0, longest: float = 3.0):
    """
    Two people work on two videos, one request after another, and the server is killed at a random time, in a fifth of
    all cases of its life, else after both have begun. After each kill the database is compared with what was answered,
    and what the next server shows with what the last one did.

    Returns:
        `tuple[Counter, Counter]`: kills by what was going on, and counts of what was answered, lost or wrong.
    """
    rng, stages = np.random.default_rng(seed), Counter()
    counts = Counter(
        dict.fromkeys(("kills", "requests answered", "edits answered", "answered edits lost", "states compared"), 0)
    )
    people = [Person(name, rng, counts) for name in ("ann", "bob")]
    gc.collect()
    gc.freeze()  # a fork that collected what is of this process' threads would wait for them
    while counts["kills"] < kills:
        server, during = Server(pipe, folder, videos), ["starting"]
        early, seconds = rng.random() < 0.2, rng.uniform(0, longest)
        if early:
            server.kill_in(seconds)
        try:
            for person in people:
                person.begin(server)
            if not early:
                server.kill_in(seconds)
            while True:
                people[rng.integers(2)].work(server, during)
        except OSError:
            server.process.join(longest + 5)
            assert server.process.exitcode == -signal.SIGKILL, "the server hangs or ended by itself"
        finally:
            server.process.kill()
        counts["kills"] += 1
        stages[during[0]] += 1
        if all(person.state for person in people):
            assert people[0].state["clip"] != people[1].state["clip"], "two people got one video"
            with closing(sqlite3.connect(folder / "project.sqlite")) as database:
                for person in people:
                    person.compare(database)
    gc.unfreeze()
    return stages, counts
