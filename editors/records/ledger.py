"""A folder's ledger: a line of JSON an event, only ever added to, by one writer at a time."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError, safe_open

from hf_iclr.saving import atomic_file
from hf_iclr.untrusted import check_links, inside, parse_json, regular_file, whole_number


logger = logging.getLogger(__name__)

JOURNAL_NAME = "ledger.jsonl"
WAIT = 3600.0  # seconds for another editor's work
MARK = "hf_iclr.journal"  # in the header of weights: the digest of the events that they are made of


@contextmanager
def locked(folder: Path, timeout: float | None = None) -> Iterator[None]:
    """Alone with a folder. The kernel frees the lock of a process that ended, in whatever way."""
    folder.mkdir(parents=True, exist_ok=True)
    longest = WAIT if timeout is None else timeout
    with ExitStack() as stack:
        for seconds in (min(longest, 0.5), longest):
            try:
                stack.enter_context(WeakFileLock(inside(folder, ".lock"), timeout=seconds))
                break
            except TimeoutError:
                if seconds == longest:
                    raise TimeoutError(
                        f"Expected {folder} to be free within {longest:g} seconds, but another editor is still "
                        "writing to it. Try again once it is done."
                    ) from None
                logger.warning("Another editor is writing to %s: waiting for it.", folder)
        yield


@contextmanager
def adding_to(folder: str | Path, events: list[dict[str, Any]], weights: str, adapter: str) -> Iterator[bool]:
    """
    Alone with a folder whose ledger these events go on from; says whether it has some of them.

    Raises:
        ValueError: when it has other events, an adapter of something else, or a link that leads out of it.
    """
    folder = check_links(folder)
    with locked(folder):
        known = committed_events(folder, weights) if (folder / JOURNAL_NAME).exists() else []
        check_goes_on(known, events, folder)
        check_adapter(folder, adapter)
        yield bool(known)


def check_goes_on(there: list[dict[str, Any]], events: list[dict[str, Any]], where: str | Path) -> None:
    """Raises `ValueError` when the events of a place are not the first of these."""
    if digests(there)[-1] not in digests(events):
        raise ValueError(
            f"Expected a new place or the one these edits were saved to, got {where} with other edits. Load them by "
            "`from_pretrained` and make yours there, or choose another place."
        )


def check_adapter(folder: Path, name: str) -> None:
    """Raises `ValueError` when a folder has an adapter of something else, which edits would take the place of."""
    if not (folder / JOURNAL_NAME).exists() and (folder / name).exists():
        raise ValueError(f"Expected a new folder or one with edits, got {folder} with another adapter.")


def write_ledger(folder: Path, events: list[dict[str, Any]], weights: str) -> None:
    """
    Have exactly these events in the ledger, and that on the disk: lines are added, behind what was cut short. Where
    the file of weights is made of others, it goes first.
    """
    path = inside(folder, JOURNAL_NAME)
    there = _read_lines(folder) if path.exists() else []
    lines = [json.dumps(event) + "\n" for event in events]
    known = len(there)
    if digests([event for event, _ in there]) != digests(events[:known]):
        if mark_of(inside(folder, weights)) not in digests(events):
            inside(folder, weights).unlink(missing_ok=True)
        with atomic_file(path) as part:
            part.write_text("".join(lines))
        return
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(there[-1][1] if there else 0)
        file.seek(-1 if there else 0, os.SEEK_END)
        newline = file.read(1) in (b"\n", b"")
        file.write(b"\n" * (not newline) + "".join(lines[known:]).encode())
        file.flush()
        os.fsync(file.fileno())


def committed_events(folder: Path, weights: str) -> list[dict[str, Any]]:
    """
    The events of a folder that count: those of which its file of weights is made, or all if there is no such file.

    Raises:
        ValueError: when the weights are made of events that the ledger does not have, which has lost some then.
    """
    for _ in range(2):  # somebody may write between one reading and the other
        mark, events = mark_of(inside(folder, weights)), read_events(folder)
        if mark is None or mark in digests(events):
            return events if mark is None else events[: digests(events).index(mark)]
    raise ValueError(
        f"Expected {JOURNAL_NAME} in {folder} to have the events that {weights} there is made of, got {len(events)} "
        "others: lines were lost or changed. Put a copy of both files back; or remove the weights, to go on with what "
        "the ledger has."
    )


def mark_of(path: Path) -> str | None:
    """The digest of the events that a file of weights is made of; `None` where it does not say."""
    try:
        with safe_open(regular_file(path), "pt") as file:
            return (file.metadata() or {}).get(MARK)
    except (SafetensorError, OSError, ValueError):
        return None


def digests(events: list[dict[str, Any]]) -> list[str]:
    """Of no event, of the first, of the first two, and so on."""
    digest = hashlib.sha256()
    found = [digest.hexdigest()]
    for event in events:
        digest.update(json.dumps(event).encode() + b"\n")
        found.append(digest.hexdigest())
    return found


def leftovers(*folders: Path) -> list[Path]:
    """Parts of files that were being written when a process was killed."""
    return [path for folder in folders for path in folder.glob(".*") if re.match(r"\.\d+\.", path.name)]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """
    The events of a folder's ledger, without a line that was cut short.

    Raises:
        ValueError: when there is no ledger, or a line that is whole cannot be trusted.
    """
    return [event for event, _ in _read_lines(folder)]


def _read_lines(folder: Path) -> list[tuple[dict[str, Any], int]]:
    """Each event and where its line ends, in bytes."""
    path = inside(folder, JOURNAL_NAME)
    if not path.exists():
        raise ValueError(f"Expected {JOURNAL_NAME} in {folder}, got none: no edits were saved there.")
    events, end = [], 0
    for number, line in enumerate(regular_file(path).read_bytes().splitlines(keepends=True), 1):
        end += len(line)
        try:
            events.append((parse_json(line, f"line {number} of {path}", nan=True), end))
        except ValueError as error:
            whole = line.endswith(b"\n") and line.strip()
            if whole or not isinstance(error.__cause__, json.JSONDecodeError):
                raise
    return events


def batches_of(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """
    The records of the batches in force after some events, in order.

    Raises:
        ValueError: when more batches were undone than there were, or two have one name.
    """
    batches: list[dict[str, Any]] = []
    for event in events:
        kept = len(batches) - whole_number(event["undone"], "the number of batches undone", most=len(batches))
        batches = batches[:kept] + event["batches"]
    names = [batch["name"] for batch in batches]
    if len({*names}) < len(names):
        raise ValueError(f"Expected a file of its own for each batch of the journal, got the names {names}.")
    return batches
