"""
Runs the contract tests under the releases that are supported: `make matrix`.

A cell is the environment as it is, with other releases put before it on the path. Such an overlay is a folder that
`pip install --target` makes, kept in .cache/matrix: a cell costs seconds and megabytes where an environment of its own
would cost minutes and gigabytes. The oldest releases are those of requirements/oldest.txt (the lower bounds of
pyproject.toml with what they need), the newest those of requirements/lock.txt.

Only torch cannot be laid over another one without the gigabytes that it needs itself: its cells run when asked for, by
`make matrix TORCH=1`. A release outside of all this: `python tests/matrix.py --add transformers==5.25.0`.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version


ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "matrix"
CONTRACT = ["tests/contract"]
STACK = ["transformers", "trl", "peft", "accelerate", "datasets"]
# Minor releases between the oldest and the newest.
BETWEEN = {"transformers": ["5.23.0"]}
# What a release puts an upper bound on, and so comes along.
ALONG = {"datasets": ["fsspec"]}
# The lock may hold an older one (requirements/renew.py).
OLDEST_TORCH, NEWEST_TORCH = "2.9.0", "2.15.0"
LIMIT = 900


@dataclass(frozen=True)
class Overlay:
    """
    A folder of packages.

    Args:
        pins (`tuple[str, ...]`): what pip is to install, as `name==version`.
        alone (`bool`, *optional*, defaults to `True`): without what these packages need.
    """

    pins: tuple[str, ...]
    alone: bool = True

    @property
    def folder(self) -> Path:
        key = hashlib.sha256("\n".join(self.pins).encode()).hexdigest()[:8]
        return CACHE / f"py{sys.version_info.major}{sys.version_info.minor}-{self.pins[0]}-{len(self.pins)}-{key}"


@dataclass(frozen=True)
class Cell:
    """Releases to test together: the first overlay that holds a package counts, the environment comes last."""

    name: str
    overlays: tuple[Overlay, ...] = ()


@dataclass
class Outcome:
    versions: dict[str, str]
    verdict: str
    passed: bool
    details: str = ""


def pinned(file: str) -> dict[str, str]:
    """The versions that a file of requirements/ pins for this Python, by normalized name."""
    lines = [line.removesuffix(" \\") for line in (ROOT / "requirements" / file).read_text().splitlines()]
    pins = [Requirement(line) for line in lines if re.match(r"\w", line)]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in here}


def releases(package: str) -> list[str]:
    """The releases of a package that the matrix runs, oldest first."""
    if package == "torch":
        found = {OLDEST_TORCH, pinned("torch.txt")["torch"], NEWEST_TORCH}
    else:
        found = {pinned("oldest.txt")[package], *BETWEEN.get(package, []), pinned("lock.txt")[package]}
    return sorted(found, key=Version)


def one(package: str, version: str) -> Overlay:
    if package == "torch":
        return Overlay((f"torch=={version}", "torchvision"), alone=False)
    others = pinned("oldest.txt" if version == releases(package)[0] else "lock.txt")
    return Overlay((f"{package}=={version}", *(f"{name}=={others[name]}" for name in ALONG.get(package, []))))


def oldest() -> Overlay:
    locked = pinned("lock.txt")
    return Overlay(
        tuple(f"{name}=={version}" for name, version in pinned("oldest.txt").items() if locked.get(name) != version)
    )


def light_cells() -> Iterator[Cell]:
    yield Cell("locked: newest of all but torch")
    yield Cell("oldest of all but torch", (oldest(),))
    for package in STACK:
        if len(releases(package)) > 1:
            yield Cell(f"oldest, newest {package}", (one(package, releases(package)[-1]), oldest()))
    for package in STACK:
        for version in releases(package)[:-1]:
            yield Cell(f"locked, {package} {version}", (one(package, version),))


def torch_cells() -> Iterator[Cell]:
    yield Cell("newest of all", (one("torch", NEWEST_TORCH),))
    yield Cell("oldest of all", (oldest(), one("torch", OLDEST_TORCH)))
    yield Cell("oldest, newest torch", (oldest(), one("torch", NEWEST_TORCH)))
    yield Cell("locked, oldest torch", (one("torch", OLDEST_TORCH),))


def make(overlay: Overlay) -> str:
    """Installs an overlay unless it is there; returns why it could not be, or nothing."""
    if overlay.folder.exists():
        return ""
    unfinished = overlay.folder.with_name(overlay.folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--only-binary", ":all:"]
    command += ["--target", str(unfinished)]
    if overlay.alone:
        command += ["--no-deps"]
    else:
        # What the environment also holds comes as the same release.
        constraints = unfinished / "constraints.txt"
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in pinned("lock.txt").items()))
        command += ["--constraint", str(constraints)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*command, *overlay.pins], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(unfinished)
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        return errors[-1].removeprefix("ERROR: ") if errors else done.stderr.strip()
    unfinished.rename(overlay.folder)
    return ""


def run(cell: Cell, tests: list[str]) -> Outcome:
    path = [*(str(overlay.folder) for overlay in cell.overlays), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}

    def started(*command: str) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, *command)
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT
        )

    seen = started("-c", "from tests import matrix; matrix.look()")
    if seen.returncode:
        return Outcome({}, "FAILED: " + seen.stderr.strip().splitlines()[-1], False, seen.stderr)
    versions, unmet = json.loads(seen.stdout)
    if unmet:
        return Outcome(versions, f"cannot be installed: {'; '.join(unmet)}", True)

    report = CACHE / (re.sub(r"[^\w.]+", "_", cell.name) + ".xml")
    report.unlink(missing_ok=True)
    start = time.time()
    try:
        done = started("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}", *tests)
    except subprocess.TimeoutExpired:
        return Outcome(versions, f"FAILED: no end after {LIMIT} s", False)
    if not report.exists():
        return Outcome(versions, "FAILED: pytest did not run", False, done.stdout + done.stderr)
    counts = ElementTree.parse(report).getroot()[0].attrib
    total, skipped = int(counts["tests"]), int(counts["skipped"])
    bad = int(counts["failures"]) + int(counts["errors"])
    verdict = (
        f"{total - skipped - bad} passed" + f", {skipped} skipped" * bool(skipped) + f", {bad} FAILED" * bool(bad)
    )
    verdict += f" in {time.time() - start:.0f} s"
    return Outcome(versions, verdict, done.returncode == 0, done.stdout + done.stderr)


def look() -> None:
    """In a cell: prints the versions that count there, and which need of a package another one does not meet."""
    names = [*pinned("oldest.txt"), "torch", "torchvision"]
    unmet, seen = [], set()
    while names:
        name = names.pop()
        if name in seen or (version := version_of(name)) is None:
            continue
        seen.add(name)
        for need in map(Requirement, importlib.metadata.requires(name) or []):
            if need.marker and not need.marker.evaluate({"extra": ""}):
                continue
            got = version_of(need.name)
            if got is None or not need.specifier.contains(got, prereleases=True):
                unmet.append(f"{name} {version} needs {need}, got {got or 'none'}")
            names.append(canonicalize_name(need.name))
    print(json.dumps([{package: version_of(package) for package in [*STACK, "torch"]}, unmet]))


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Runs the contract tests under the releases that are supported.")
    parser.add_argument("--torch", action="store_true", help="run the cells of torch as well: 15 GB")
    parser.add_argument("--only", default="", help="run the cells whose name holds this text")
    parser.add_argument("--add", nargs="*", default=[], metavar="NAME==VERSION", help="run the lock with this as well")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cells at a time")
    parser.add_argument("--tests", nargs="*", default=CONTRACT)
    options = parser.parse_args(arguments)

    cells = [*light_cells(), *(torch_cells() if options.torch else [])]
    if options.add:
        cells = [Cell(f"locked, {' '.join(options.add)}", tuple(Overlay((pin,)) for pin in options.add))]
    cells = [cell for cell in cells if options.only in cell.name]
    missing = {overlay: why for cell in cells for overlay in cell.overlays if (why := make(overlay))}

    print("| cell | " + " | ".join([*STACK, "torch"]) + " | result |")
    print("| --- " * (len(STACK) + 3) + "|")
    failed = []

    def outcome(cell: Cell) -> Outcome:
        if why := [missing[overlay] for overlay in cell.overlays if overlay in missing]:
            return Outcome({}, f"cannot be installed: {why[0]}", True)
        return run(cell, options.tests)

    with ThreadPoolExecutor(options.jobs) as pool:
        for cell, result in zip(cells, pool.map(outcome, cells), strict=True):
            versions = [result.versions.get(package, "") for package in [*STACK, "torch"]]
            print(f"| {cell.name} | {' | '.join(versions)} | {result.verdict} |", flush=True)
            if not result.passed:
                failed.append((cell, result))
    if not options.torch and not options.add:
        for cell in torch_cells():
            print(
                f"| {cell.name} |" + " |" * (len(STACK) + 1) + " left out: gigabytes. `make matrix TORCH=1` runs it |"
            )
    for cell, result in failed:
        print(f"\n== {cell.name}\n{result.details}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
