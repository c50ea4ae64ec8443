"""Runs each part in a process of its own making and says of each whether it works here and, if not, through whom."""

import gc
import importlib.util
import json
import logging
import os
import pkgutil
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_iclr.doctor.environment import Package, packages
from hf_iclr.doctor.self_check import PARTS


logger = logging.getLogger(__name__)

WORKS, MISSING, BROKEN = "works", "missing extra", "broken"
TIMEOUT = 300  # seconds a process may take; all parts together take ten
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # two threads on tiny matrices are twenty times slower than one
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "ACCELERATE_USE_CPU": "true",
}


@dataclass
class Finding:
    """
    What came of one job.

    Args:
        title (`str`):
            Name of the job.
        status (`str`):
            `"works"`, `"missing extra"` or `"broken"`.
        sentence (`str`, *optional*):
            Through whom it is broken or what to type; empty where it works.
        error (`str`, *optional*):
            The error in one line.
        details (`str`, *optional*):
            The traceback, or what a process that died had printed.
        seconds (`float`, *optional*, defaults to 0.0):
            How long it took, imports included.
        result (`Any`, *optional*):
            What the function returned.
    """

    title: str
    status: str
    sentence: str = ""
    error: str = ""
    details: str = ""
    seconds: float = 0.0
    result: Any = None


def run_checks(jobs: dict[str, str] | None = None, timeout: float = TIMEOUT) -> dict[str, Finding]:
    """
    Run functions in another process, one after the other, and go on behind one that kills the process.

    Args:
        jobs (`dict[str, str]`, *optional*, defaults to the machine, the six parts and the seams):
            `"module:function"` by title; what a function returns must be JSON.
        timeout (`float`, *optional*, defaults to 300):
            Seconds after which the job at work is given up.

    Returns:
        `dict[str, Finding]`: by title, in the order given.
    """
    if jobs is None:
        jobs = {
            "machine": "hf_iclr.doctor.environment:machine",
            **PARTS,
            "seams": "hf_iclr.doctor.report:compare_seams",
        }
    findings: dict[str, Finding] = {}
    while left := {title: path for title, path in jobs.items() if title not in findings}:
        with tempfile.TemporaryDirectory() as folder:
            results, output = Path(folder) / "results.jsonl", Path(folder) / "output.txt"
            results.touch()
            end = _run_process(results, output, left, timeout)
            for line in results.read_text(encoding="utf-8").splitlines():
                finding = Finding(**json.loads(line))
                findings[finding.title] = finding
            running = next((title for title in left if title not in findings), None)
            if running is not None:
                findings[running] = _crashed(running, end, output.read_text(encoding="utf-8", errors="replace"))
    return {title: findings[title] for title in jobs}


def _run_process(results: Path, output: Path, jobs: dict[str, str], timeout: float) -> str:
    """How the process ended, in words."""
    python = [sys.executable, "-P", "-X", "faulthandler"]
    command = [*python, "-m", "hf_iclr.doctor.report", str(results), json.dumps(jobs)]
    path = os.pathsep.join(entry for entry in sys.path if entry)  # the same packages as here
    with output.open("w") as file:
        try:
            code = subprocess.run(
                command, check=False, timeout=timeout, env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"no answer in {timeout:.0f} s"
    return f"the process ended by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def _crashed(title: str, end: str, output: str) -> Finding:
    known = {package.module: package for package in packages()}
    named = (known.get(name) for name in re.findall(r'File ".*?site-packages[/\\](\w+)', output))
    return Finding(title, BROKEN, _attribution(next(filter(None, named), None)), end, output)


def _run_jobs(results: Path, jobs: dict[str, str]) -> None:
    for title, path in jobs.items():
        start = time.perf_counter()
        try:
            finding = Finding(title, WORKS, result=pkgutil.resolve_name(path)())
        except (Exception, SystemExit) as error:  # whatever a package throws, the other parts are looked at
            logger.debug("%s failed", title, exc_info=True)
            finding = diagnose(title, error)
        finding.seconds = time.perf_counter() - start
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(finding)) + "\n")


def compare_seams() -> list[tuple[str, str, str | None]]:
    """Each seam with the parameters expected and found, those of packages that are not installed left out."""
    from hf_iclr.upstream import check_seams

    installed = {package.module for package in packages() if _importable(package.module)}
    checks = [check for check in check_seams() if check.found is not None or check.seam.split(".")[0] in installed]
    return [(check.seam, check.expected, check.found) for check in checks]


def diagnose(title: str, error: BaseException) -> Finding:
    """
    Say through whom a part failed.

    Args:
        title (`str`):
            Name of the part.
        error (`BaseException`):
            What it raised.

    Returns:
        [`Finding`]: "missing extra" with the command to type, or "broken" with the package that the error names, whose
        code the traceback ends in, or that lies outside of what was tested.
    """
    root = _root_cause(error)
    first = next(iter(str(root).strip().splitlines()), "")
    said, details = f"{type(root).__name__}: {first}", "".join(traceback.format_exception(error))
    known = packages()
    lacking = _missing_package(error, known)
    if lacking is not None:
        sentence = f"{lacking.name} is not installed: `{lacking.command}`"
        return Finding(title, MISSING if lacking.extra else BROKEN, sentence, said, details)
    blamed = _package_at_fault(root, {package.module: package for package in known})
    return Finding(title, BROKEN, _attribution(blamed), said, details)


def _root_cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root_cause(error.__cause__)


def _missing_package(error: BaseException | None, known: list[Package]) -> Package | None:
    """The package whose absence an error, or one that it came from, is about."""
    absent = [package for package in known if not _importable(package.module)]
    while error is not None:
        for package in absent if isinstance(error, ImportError) else ():
            named = re.search(rf"\b({re.escape(package.name)}|{package.module})\b", str(error), re.IGNORECASE)
            if named or (getattr(error, "name", None) or "").split(".")[0] == package.module:
                extra = re.search(r"hf_iclr\[(\w+)\]", str(error))  # as hf_iclr.extras says it
                return replace(package, extra=extra[1]) if extra else package
        error = error.__cause__ or error.__context__
    return None


def _package_at_fault(error: BaseException, known: dict[str, Package]) -> Package | None:
    """The package that an error names or, if it names none, whose code the traceback ends in."""
    if owner := next((known[name] for name in _owners(error) if name in known), None):
        return owner
    frames = [
        str(frame.f_globals.get("__name__")).split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    if frames[-1:] != ["torch"] or not known.keys().isdisjoint({*frames} - {"torch"}):
        frames = [name for name in frames if name != "torch"]  # it wraps every forward
    return next((known[name] for name in reversed(frames) if name in known), None)


def _owners(error: BaseException) -> Iterator[str]:
    """Packages that hold what an error is about, the nearest first."""
    if isinstance(error, ImportError) and error.name:
        yield error.name.split(".")[0]
    if isinstance(error, AttributeError) and error.obj is not None:
        if isinstance(error.obj, type(sys)):
            yield error.obj.__name__.split(".")[0]
        for cls in (error.obj if isinstance(error.obj, type) else type(error.obj)).__mro__:
            yield cls.__module__.split(".")[0]
    if isinstance(error, TypeError) and (called := re.match(r"([\w.]+)\(\) (got|missing|takes)", str(error))):
        first, *others = called[1].split(".")
        for name, module in list(sys.modules.items()):
            owner = vars(module).get(first) if module is not None else None
            if getattr(owner, "__module__", None) == name and all(hasattr(owner, other) for other in others[:1]):
                yield name.split(".")[0]


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _attribution(package: Package | None) -> str:
    """A sentence about the package at fault and those outside of what was tested."""
    outside = [other for other in packages() if other.installed is not None and not other.ok]
    suspects = [package] if package is not None and package not in outside else []
    if not (suspects := suspects + outside):
        return "in hf_iclr itself: please report what --debug shows"
    names = " or ".join(
        f"{other.name} {other.installed}" + ("" if other.ok else f" (outside of the tested {other.wanted})")
        for other in suspects
    )
    commands = " ".join(f"'{other.name}{other.wanted}'" for other in outside)
    return f"by {names}" + (f": `pip install {commands}`" if outside else "")


if __name__ == "__main__":
    gc.disable()  # a quarter of what importing all this takes
    _run_jobs(Path(sys.argv[1]), json.loads(sys.argv[2]))
    os._exit(0)  # all is written, and taking down what was imported takes seconds
