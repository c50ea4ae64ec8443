"""What waits for people and what they decided, in one SQLite file."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple


LEASE_SECONDS = 600.0  # for which a video is one person's after their last request
STATUSES = ("waiting", "accepted", "rejected")
_TABLES = """
CREATE TABLE IF NOT EXISTS videos (
    name TEXT PRIMARY KEY, path TEXT, title TEXT NOT NULL, version INTEGER NOT NULL DEFAULT 0,
    person TEXT, expires REAL NOT NULL DEFAULT 0, finished INTEGER NOT NULL DEFAULT 0,
    unwritten INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS masklets (
    video TEXT NOT NULL, object INTEGER NOT NULL, category TEXT, status TEXT NOT NULL, reason TEXT,
    uncertainty REAL NOT NULL, edited INTEGER NOT NULL DEFAULT 0, skipped INTEGER NOT NULL DEFAULT 0, person TEXT,
    origin TEXT, time REAL NOT NULL, PRIMARY KEY (video, object)
);
CREATE TABLE IF NOT EXISTS edits (
    video TEXT NOT NULL, version INTEGER NOT NULL, kind TEXT NOT NULL, fields TEXT NOT NULL, person TEXT,
    time REAL NOT NULL, PRIMARY KEY (video, version)
);
CREATE INDEX IF NOT EXISTS by_status ON masklets (status, skipped, uncertainty);
"""


class StaleEdit(ValueError):
    """What was edited is not what was seen: another tab or another person came before."""


class Item(NamedTuple):
    """What is next: a masklet, or a video that nobody has looked at (`object` is `None`)."""

    video: str
    object: int | None
    reason: str | None


class Queue:
    """
    Videos, masklets, edits, decisions and who holds which video.

    Args:
        path (`Path`):
            The SQLite file; made if it does not exist. Several processes may use it.

    Raises:
        ValueError: if the file is no such database.
    """

    def __init__(self, path: Path):
        try:
            self._database = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")  # committed is on the disk, whatever ends us
            self._database.executescript(_TABLES)
            if (found := self._database.execute("PRAGMA quick_check").fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(found)  # rather than when a damaged page is read
        except sqlite3.DatabaseError as error:
            raise ValueError(f"Expected a project's database in {path}, got something else ({error}).") from None

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def change(self) -> Iterator[None]:
        """What is done within is there as a whole or not at all."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    def videos(self) -> list[dict[str, Any]]:
        """All videos in the order in which they came."""
        return self._all("SELECT * FROM videos ORDER BY rowid")

    def video(self, name: str) -> dict[str, Any]:
        found = self._all("SELECT * FROM videos WHERE name = ?", name)
        if not found:
            raise ValueError(f"There is no video {name!r:.80} in this project.")
        return found[0]

    def add_video(self, name: str, path: str | None, title: str) -> None:
        """Adds a video, or renews the path of a known one."""
        self._database.execute(
            "INSERT INTO videos (name, path, title) VALUES (?, ?, ?) "
            "ON CONFLICT (name) DO UPDATE SET path = excluded.path, title = excluded.title",
            (name, path, title),
        )

    def masklets(self, video: str) -> dict[int, dict[str, Any]]:
        """What is known of the objects of a video, by number."""
        rows = self._all("SELECT * FROM masklets WHERE video = ? ORDER BY object", video)
        return {row["object"]: row for row in rows}

    def put_masklet(self, video: str, obj: int, status: str, uncertainty: float, **fields: Any) -> None:
        """Adds or changes an object of a video."""
        known = {"status": status, "uncertainty": uncertainty, "time": time.time(), **fields}
        columns = ", ".join(known)
        update = ", ".join(f"{name} = excluded.{name}" for name in known)
        self._database.execute(
            f"INSERT INTO masklets (video, object, {columns}) VALUES (?, ?{', ?' * len(known)}) "
            f"ON CONFLICT (video, object) DO UPDATE SET {update}",
            (video, obj, *known.values()),
        )

    def decide(self, video: str, objects: Iterable[int], decision: str, person: str) -> None:
        """Accepts or rejects objects, or puts them behind all that wait."""
        for obj in objects:
            if decision == "skip":
                values: tuple = ("waiting", "skipped", 1)
            else:
                values = ("accepted", None, 0) if decision == "accept" else ("rejected", "rejected", 0)
            self._database.execute(
                "UPDATE masklets SET status = ?, reason = ?, skipped = ? * (skipped + 1), person = ?, time = ? "
                "WHERE video = ? AND object = ?",
                (*values, person, time.time(), video, obj),
            )

    def mark(self, video: str, **fields: Any) -> None:
        """Changes columns of a video."""
        columns = ", ".join(f"{name} = ?" for name in fields)
        self._database.execute(f"UPDATE videos SET {columns} WHERE name = ?", (*fields.values(), video))

    def add_edit(self, video: str, expected: int, kind: str, fields: dict[str, Any], person: str) -> int:
        """Writes an edit of the state with version `expected` down; gives the new version."""
        done = self._database.execute(
            "UPDATE videos SET version = version + 1, unwritten = 1 WHERE name = ? AND version = ?", (video, expected)
        )
        if not done.rowcount:
            raise StaleEdit("This video was changed by another program meanwhile. Open it again.")
        values = (video, expected + 1, kind, json.dumps(fields), person, time.time())
        self._database.execute("INSERT INTO edits VALUES (?, ?, ?, ?, ?, ?)", values)
        return expected + 1

    def edits_since(self, video: str, version: int) -> list[tuple[int, str, dict[str, Any]]]:
        """Edits after a version, oldest first, as (version, kind, fields)."""
        rows = self._all("SELECT * FROM edits WHERE video = ? AND version > ? ORDER BY version", video, version)
        return [(row["version"], row["kind"], json.loads(row["fields"])) for row in rows]

    def lease(self, video: str, person: str, seconds: float = LEASE_SECONDS) -> bool:
        """Makes a video one person's for a while, unless it is another's."""
        now = time.time()
        done = self._database.execute(
            "UPDATE videos SET person = ?, expires = ? "
            "WHERE name = ? AND (person IS NULL OR person = ? OR expires < ?)",
            (person, now + seconds, video, person, now),
        )
        return bool(done.rowcount)

    def release(self, video: str, person: str) -> None:
        """Gives a video back."""
        self._database.execute("UPDATE videos SET person = NULL WHERE name = ? AND person = ?", (video, person))

    def waiting(self, person: str, limit: int = 1) -> list[Item]:
        """
        What is next for a person, of the videos that nobody else holds: masklets, the most uncertain first and those
        that were skipped last, then videos without masklets.
        """
        free = "(v.person IS NULL OR v.person = ? OR v.expires < ?)"
        rows = self._all(
            f"SELECT m.video, m.object, m.reason FROM masklets m JOIN videos v ON v.name = m.video "
            f"WHERE m.status = 'waiting' AND {free} ORDER BY m.skipped, m.uncertainty DESC, v.rowid, m.object LIMIT ?",
            person, time.time(), limit,
        )  # fmt: skip
        if len(rows) < limit:
            rows += self._all(
                f"SELECT v.name AS video, NULL AS object, NULL AS reason FROM videos v WHERE NOT finished AND {free} "
                "AND NOT EXISTS (SELECT 1 FROM masklets m WHERE m.video = v.name AND m.status != 'rejected') "
                "ORDER BY v.rowid LIMIT ?",
                person, time.time(), limit - len(rows),
            )  # fmt: skip
        return [Item(row["video"], row["object"], row["reason"]) for row in rows]

    def counts(self) -> dict[str, int]:
        """How many masklets there are of each status, and videos."""
        known = {
            row["status"]: row["n"] for row in self._all("SELECT status, count(*) n FROM masklets GROUP BY status")
        }
        (videos,) = self._all("SELECT count(*) n, sum(finished) finished FROM videos")
        return {status: known.get(status, 0) for status in STATUSES} | {
            "videos": videos["n"],
            "finished": videos["finished"] or 0,
        }

    def holder(self, video: str) -> str | None:
        """Who holds a video now."""
        known = self.video(video)
        return known["person"] if known["expires"] >= time.time() else None

    def _all(self, query: str, *values: Any) -> list[dict[str, Any]]:
        return [dict(row) for row in self._database.execute(query, values)]
