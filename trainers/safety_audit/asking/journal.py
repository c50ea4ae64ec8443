"""What an audit has finished so far: kept line by line, so that one that was killed goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from filelock import FileLock, Timeout

from hf_iclr.models import hash_weights
from hf_iclr.saving import check_writable
from hf_iclr.untrusted import as_written_by, check_links, parse_json, regular_file, whole_number

from .endpoint import OpenAIEndpoint


_FOLDER = "unfinished"


class Journal:
    """
    The parts of an audit that are done, by what they are made of: a stage's name is a hash of the token ids, options
    and weights that it hangs on, so that an audit with other settings takes over only what is the same.

    Args:
        out (`str` or `Path`, *optional*):
            Folder of the audit; a folder `unfinished` in it holds the journal until the audit ends. Without one
            nothing is written.
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Its processes share the batches. The batches are the same with any number of processes.
    """

    def __init__(self, out: str | Path | None = None, accelerator: Any = None) -> None:
        self.folder = None if out is None else Path(out, _FOLDER)
        self.accelerator = accelerator
        self.identity: list[str] = []
        self._stages: dict[str, dict[int, Any]] = {}

    @contextmanager
    def keep(self) -> Iterator["Journal"]:
        """While it lasts, the folder is this audit's alone; at a good end the journal is removed."""
        if self.folder is None:
            yield self
            return
        rank = self.accelerator.process_index if self.accelerator else 0
        made = not check_out(self.folder.parent).exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        if rank == 0:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise ValueError(
                    f"Expected a folder of its own, got {self.folder.parent}, to which another audit is writing."
                ) from None
        try:
            self._read()
            self._wait()
            self._path = self.folder / f"{rank}.jsonl"
            if self._path.exists():  # a line that a kill has cut
                whole = self._path.read_bytes()
                with self._path.open("r+b") as file:
                    file.truncate(whole.rfind(b"\n") + 1)
            yield self
            self._wait()
            finished = True
        except BaseException:
            finished = not any(path.stat().st_size for path in self.folder.glob("*.jsonl"))  # nothing to go on from
            raise
        finally:
            lock.release()
            if finished and rank == 0:
                shutil.rmtree(self.folder, ignore_errors=True)
                if made:
                    with suppress(OSError):
                        self.folder.parent.rmdir()  # only where nothing came of it

    def of(self, *identity: str) -> "Journal":
        """The same journal for stages that hang on this too."""
        other = Journal.__new__(Journal)
        other.__dict__ = {**self.__dict__, "identity": [*self.identity, *identity]}
        return other

    def identify(self, model: Any, other: Any = None) -> str:
        """A name for a model, with its adapters off where `other` is a string; the same in a later run."""
        adapters = other if isinstance(other, str) else ""
        if isinstance(model, OpenAIEndpoint):
            return model.identity
        if self.folder is None:
            return f"{id(model)} {adapters}"
        if any(parameter.is_meta for parameter in model.parameters()):  # on a disk, and not read for this
            return f"{model.name_or_path} {adapters}"
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return f"{hash_weights(base)} {model.dtype} {adapters}"

    def stage(self, *content: Any) -> "Stage":
        """The stage that hangs on `content`, which JSON can hold."""
        text = json.dumps([self.identity, content], sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return Stage(self, name, self._stages.setdefault(name, {}))

    def write(self, name: str, rows: dict[int, Any]) -> None:
        if self.folder is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"stage": name, "rows": list(rows.items())}) + "\n")

    def _read(self) -> None:
        assert self.folder is not None
        for path in sorted(check_links(self.folder).glob("*.jsonl")):
            lines = regular_file(path).read_bytes().split(b"\n")[:-1]  # the last one is empty, or was cut by a kill
            with as_written_by("an unfinished audit", path):
                for line in lines:
                    entry = parse_json(line, path)
                    rows = {whole_number(pair[0], f"a row in {path}"): pair[1] for pair in entry["rows"]}
                    self._stages.setdefault(str(entry["stage"]), {}).update(rows)

    def _wait(self) -> None:
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()


class Stage:
    """The finished rows of one part of an audit."""

    def __init__(self, journal: Journal, name: str, known: dict[int, Any]) -> None:
        self.journal, self.name, self.known = journal, name, known

    def share(self, batches: list[list[int]]) -> list[list[int]]:
        """Of the batches that are not finished, those of this process."""
        left = [batch for batch in batches if not all(row in self.known for row in batch)]
        accelerator = self.journal.accelerator
        return left if accelerator is None else left[accelerator.process_index :: accelerator.num_processes]

    def add(self, rows: dict[int, Any]) -> None:
        """A batch is done."""
        self.known.update(rows)
        self.journal.write(self.name, rows)

    def collect(self) -> dict[int, Any]:
        """What all processes have."""
        if self.journal.accelerator is not None:
            for part in gather_object([self.known]):
                self.known.update(part)
        return self.known


def check_out(out: str | Path) -> Path:
    """The folder that an audit is saved to; raises where it can't be one, before any work."""
    unfinished = Path(out, _FOLDER)
    if unfinished.is_file():
        raise ValueError(f"Expected {unfinished} to be a folder, got a file.")
    return check_links(check_writable(out, "report.json", "report.html", "model_card.md", "prefill_curve.png"))
