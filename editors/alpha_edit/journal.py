"""The record of all edits, in memory or in a folder: a line of JSON an event, a file a batch, and the adapter."""

import json
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from hf_iclr.saving import write_safetensors
from hf_iclr.untrusted import as_written_by, check_links, inside, regular_file

from ..records.ledger import (
    JOURNAL_NAME,
    MARK,
    adding_to,
    batches_of,
    committed_events,
    digests,
    leftovers,
    locked,
    mark_of,
    write_ledger,
)
from .batches import ADAPTER, ADAPTER_CONFIG, BATCHES, EditBatch, concatenate_updates, save_adapter
from .config import CONFIG_NAME, AlphaEditConfig
from .requests import EditRequest
from .solver import NULL_SPACE, EditSetup


logger = logging.getLogger(__name__)


class EditJournal:
    """
    The batches of edits in force and the events that led to them, in memory or in a folder.

    A folder is written by one editor at a time, under a lock that ends with its process. Each event is a transaction:
    the batches' files, a line added to the ledger, the adapter, whose header has the digest of the events it is made
    of. That header is what counts: a line that no adapter was made of is as if it were not there, so whoever loads the
    adapter and whoever loads the edits have the same ones, however the editor ended.
    """

    def __init__(self, setup: EditSetup) -> None:
        self.setup = setup
        self.folder: Path | None = None
        self.events: list[dict[str, Any]] = []
        self.batches: list[EditBatch] = []
        self._thread = threading.RLock()

    def load(self, folder: Path, keep: bool = False) -> None:
        """
        Read a folder's edits. With `keep` it is written to from now on, and what a kill left undone is done.

        Raises:
            ValueError: when there is no journal, or one that cannot be trusted.
        """
        for name in (JOURNAL_NAME, CONFIG_NAME, NULL_SPACE, ADAPTER, ADAPTER_CONFIG, ".lock", "README.md"):
            if os.path.lexists(folder / name):
                regular_file(inside(folder, name))
        self._adopt(folder, committed_events(folder, ADAPTER))
        if keep and os.access(folder, os.W_OK) and not (folder / JOURNAL_NAME).is_symlink():
            self.folder = folder
            whole = (folder / ADAPTER_CONFIG).exists() and mark_of(folder / ADAPTER) == digests(self.events)[-1]
            if not whole or leftovers(folder, folder / BATCHES):
                try:
                    with locked(folder, 0.1):
                        self.refresh()
                        self._write(folder, self.events, self.batches)
                        for path in leftovers(folder, folder / BATCHES):
                            path.unlink()
                except TimeoutError:
                    logger.info("Another editor is writing to %s just now.", folder)
        elif keep:
            logger.warning("%s can't be written to: save what you edit to a folder of your own.", folder)

    @contextmanager
    def writing(self) -> Iterator[bool]:
        """Alone with editor and folder; says whether others added edits or took some back, which are then here too."""
        with self._thread, ExitStack() as stack:
            if self.folder is not None:
                stack.enter_context(locked(self.folder))
            yield self.refresh()

    def refresh(self) -> bool:
        """What the folder has, is in force here too; says whether that changed anything."""
        if self.folder is None:
            return False
        self.agree(AlphaEditConfig.from_pretrained(self.folder), self.folder)
        events = committed_events(self.folder, ADAPTER)
        if digests(events) == digests(self.events):
            return False
        self._adopt(self.folder, events)
        logger.info("Other editors have written to %s: now %d batches are in force.", self.folder, len(self.batches))
        return True

    def agree(self, other: AlphaEditConfig, where: str | Path) -> None:
        """Take over the contexts that edits were made with; raises `ValueError` when settings differ."""
        for_all = ("context_templates", "base_model_name_or_path", "base_model_revision")
        own, its = (json.loads(json.dumps(asdict(config))) for config in (self.setup.config, other))
        differing = [name for name in own if name not in for_all and own[name] != its[name]]
        if differing:
            raise ValueError(
                f"Expected {where} to have edits made with this editor's settings, got other "
                f"{', '.join(differing)}. Load those edits by `AlphaEditor.from_pretrained` to go on with them, or "
                "choose another place."
            )
        self.setup.config.context_templates = other.context_templates or self.setup.config.context_templates

    def new_name(self, position: int) -> str:
        """A name that no batch of any editor ever had."""
        return f"edit_{len(self.events) + 1:04d}_{position + 1:04d}_{secrets.token_hex(4)}"

    def commit(
        self, event: dict[str, Any], undone: int, batches: list[EditBatch], onto: "EditJournal | None" = None
    ) -> None:
        """
        From here on the batches are in force in place of the last `undone`, on the disk first. With `onto` they are
        so in another editor's journal, which becomes this one.
        """
        base = onto or self
        event |= {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "undone": undone,
            "batches": [batch.record() for batch in batches],
        }
        events = [*base.events, json.loads(json.dumps(event))]
        in_force = base.batches[: len(base.batches) - undone] + batches
        if self.folder is not None:
            self._write(self.folder, events, in_force)
        self.events, self.batches = events, in_force

    def save(self, folder: str | Path, rank: int | None = None) -> None:
        """
        Write to a folder what it does not have yet. `rank` compresses the adapter.

        Raises:
            ValueError: when it has other edits, an adapter of something else, or a link that leads out of it.
        """
        folder = Path(folder)
        with adding_to(folder, self.events, ADAPTER, ADAPTER_CONFIG) as has_edits:
            if not has_edits:  # a kill amid the tokenizer's files must not leave edits without one
                basis = {str(layer): value for layer, value in self.setup.preserved.items()}
                write_safetensors(basis, inside(folder, NULL_SPACE))
                self.setup.tokenizer.save_pretrained(folder)
            self.setup.config.save_pretrained(folder)
            self._write(folder, self.events, self.batches, rank)

    def of_repository(self, api: HfApi, repo_id: str, revision: str | None) -> tuple[str | None, "EditJournal | None"]:
        """The last commit of a repository and, if it has one, its journal, in the settings of this one."""
        head = api.model_info(repo_id, revision=revision)
        there = [file.rfilename for file in head.siblings or ()]
        if JOURNAL_NAME not in there:
            if ADAPTER_CONFIG in there:
                raise ValueError(f"Expected a new repository or one with edits, got {repo_id} with another adapter.")
            return head.sha, None
        wanted = [JOURNAL_NAME, CONFIG_NAME, f"{BATCHES}/*"]
        folder = check_links(api.snapshot_download(repo_id, revision=head.sha, allow_patterns=wanted))
        self.agree(AlphaEditConfig.from_pretrained(folder), repo_id)
        journal = EditJournal(self.setup)
        journal.load(folder)
        return head.sha, journal

    def has(self, other: "EditJournal") -> bool:
        """Whether this one only goes on from the other."""
        return digests(other.events)[-1] in digests(self.events)

    def join(self, theirs: "EditJournal") -> tuple[int, list[EditBatch]]:
        """
        What is to be done for another editor's journal to have the edits of both: how many of its first batches stay
        as they are, and what is to be solved anew behind them, its later batches and those that it does not have.

        Raises:
            ValueError: when both answer one prompt in different ways.
        """
        common = 0
        for ours, other in zip(digests(self.events)[1:], digests(theirs.events)[1:], strict=False):
            common += ours == other
        own, its = (_by_content(r for batch in j.batches for r in batch.requests) for j in (self, theirs))
        records = batches_of(self.events[:common])
        before = _by_content(EditRequest.from_dict(r) for record in records for r in record["requests"])
        lost = before.keys() - own.keys()  # taken back or corrected here
        gone = {its[content].id for content in lost & its.keys()}
        stays = {content: request for content, request in its.items() if content not in lost}
        told, names = ({getattr(r, by): r for r in stays.values()} for by in ("text", "id"))
        said = {content[1:] for content in stays}
        added = [r for content, r in own.items() if content not in before and content[1:] not in said]
        clashes = [(r, told.get(r.text) or names[r.id]) for r in added if r.text in told or r.id in names]
        if clashes:
            named = "; ".join(
                f"{a.id} says {a.text!r} is {a.target_new!r}, {b.id} {b.target_new!r}" for a, b in clashes
            )
            raise ValueError(
                f"Expected edits that agree with those of another editor, got {named}. Take yours back first: "
                f"`editor.remove({clashes[0][0].id!r})`."
            )
        left = [batch.without(gone) for batch in theirs.batches]
        kept = next(
            (i for i, batch in enumerate(theirs.batches) if len(left[i].requests) < len(batch.requests)), len(left)
        )
        wanted = {request.id for request in added}
        left += [batch.without({request.id for request in own.values()} - wanted) for batch in self.batches]
        return kept, [batch for batch in left[kept:] if batch.requests]

    def _adopt(self, folder: Path, events: list[dict[str, Any]]) -> None:
        known = {batch.name: batch for batch in self.batches}
        with as_written_by("AlphaEditor.save_pretrained", folder):
            records = batches_of(events)
            batches = [known.get(record["name"]) or EditBatch.load(folder, record) for record in records]
            for batch in batches:
                batch.check(self.setup.projections)
        self.events, self.batches = events, batches

    def _write(
        self, folder: Path, events: list[dict[str, Any]], batches: list[EditBatch], rank: int | None = None
    ) -> None:
        for batch in batches:
            batch.save(folder)
        write_ledger(folder, events, ADAPTER)
        updates = concatenate_updates([batch.updates for batch in batches], rank)
        base, mark = self.setup.config.base_model_name_or_path, {MARK: digests(events)[-1]}
        save_adapter(folder, self.setup.projections, updates, base, mark)


def _by_content(requests: Iterable[EditRequest]) -> dict[tuple[str, str, str], EditRequest]:
    """Requests by what they are told apart by: a correction may have the name of what it corrects."""
    return {(request.id, request.text, request.target_new.strip()): request for request in requests}
