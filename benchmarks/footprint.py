"""
What `import hf_iclr` costs, in processor time of fresh interpreters, and how large the core and each extra are.

    python benchmarks/footprint.py

The interpreters start without `site`, whose own imports would hide some of ours. Sizes are those of the distributions
installed here, without torch and what torch brings; an extra counts for what it adds to the core.
"""

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

from common.arguments import make_parser, parse, write_json


ROOT = Path(__file__).resolve().parents[1]
STATEMENTS = ("pass", "import lazy_loader", "import ast", "import logging", "import hf_iclr")


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--runs", type=int, default=10, help="interpreters for each statement; the best counts")
    return parse(parser, runs=2)


def milliseconds(statement: str, runs: int) -> float:
    """Processor time of a statement in a fresh interpreter, the best of several."""
    paths = [str(ROOT), sysconfig.get_path("purelib")]
    code = (
        f"import sys, time; sys.path[:0] = {paths!r}; start = time.process_time(); {statement}; "
        "print(time.process_time() - start)"
    )
    command = [sys.executable, "-S", "-c", code]
    return 1000 * min(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(runs)
    )


def megabytes(name: str) -> float:
    """Size of an installed distribution."""
    import importlib.metadata

    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        return 0.0
    return sum(Path(file.locate()).stat().st_size for file in files if Path(file.locate()).is_file()) / 1e6


def sizes() -> dict[str, dict[str, float]]:
    """By the core and each extra, what it brings beside torch, in megabytes, the largest first."""
    sys.path.insert(0, str(ROOT))
    from hf_iclr.extras import EXTRAS
    from tests.without_extras import closure, project

    torch, about = closure(["torch"]), project()
    core = closure(about["dependencies"])
    brought = {"core": core - torch}
    parts = {name: lines for name, lines in about["optional-dependencies"].items() if name in EXTRAS}
    parts["all"] = [line for lines in parts.values() for line in lines]
    brought |= {extra: closure(lines) - core for extra, lines in parts.items()}
    return {
        part: dict(sorted(((name, megabytes(name)) for name in names), key=lambda row: -row[1]))
        for part, names in brought.items()
    }


def main(args: argparse.Namespace) -> None:
    times = {statement: milliseconds(statement, args.runs) for statement in STATEMENTS}
    for statement, time in times.items():
        print(f"{statement:20} {time:6.1f} ms")
    found = sizes()
    for part, packages in found.items():
        largest = ", ".join(f"{name} {size:.0f}" for name, size in list(packages.items())[:6])
        print(f"{part:10} {sum(packages.values()):6.0f} MB in {len(packages)} packages: {largest}, ...")
    write_json(args.out / "footprint.json", {"milliseconds": times, "megabytes": found})


if __name__ == "__main__":
    main(arguments())
