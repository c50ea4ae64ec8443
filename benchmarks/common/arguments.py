"""
Arguments that every benchmark has: where it writes, and smaller sizes to see that it runs. Imports nothing heavy, so
that `--help` answers at once.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).resolve().parents[1] / "results"


def make_parser(script: str, description: str) -> argparse.ArgumentParser:
    """
    A parser with `--out` and `--quick`.

    Args:
        script (`str`):
            File of the benchmark. Without `--out` it writes to `benchmarks/results/<its name>`.
        description (`str`):
            What `--help` says before the options.
    """
    name = Path(script).stem
    parser = argparse.ArgumentParser(
        description=description.strip(), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=RESULTS / name,
        help=f"folder to write to (default: benchmarks/results/{name}, with --quick benchmarks/results/quick/{name})",
    )
    return parser


def add_clips(parser: argparse.ArgumentParser, clips: int, frames: int, first_seed: int | None = None) -> None:
    """`--model`, `--clips` and `--frames`; with a first seed also `--seed`, and `--data` to take a folder instead."""
    parser.add_argument("--model", help="folder or repository of a SAM 2 video model (default: the package's own)")
    parser.add_argument("--clips", type=int, default=clips, help="drawn clips of each kind")
    parser.add_argument("--frames", type=int, default=frames, help="frames of a drawn clip")
    if first_seed is not None:
        parser.add_argument("--data", type=Path, help="folder of DAVIS instead of drawn clips")
        text = "of the first clip; training draws below 2**40"
        parser.add_argument("--seed", type=int, default=first_seed, help=text)


def add_kills(parser: argparse.ArgumentParser, kills: int) -> None:
    """`--kills` and `--seed`, of a benchmark that ends processes."""
    parser.add_argument("--kills", type=int, default=kills, help="SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")


def parse(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """
    What the command line says, once the folder of results is there.

    Args:
        parser (`argparse.ArgumentParser`):
            Of [`make_parser`], with the benchmark's own options.
        quick (`Any`):
            Defaults that `--quick` puts in place of the parser's. A quick run without `--out` starts with an empty
            folder, so that it doesn't find its results of last time and rest.
    """
    sizes = " ".join(f"--{name.replace('_', '-')} {_shown(value)}" for name, value in quick.items())
    parser.add_argument(
        "--quick", action="store_true", help=f"to see that it runs, not what it finds{sizes and f': {sizes}'}"
    )
    folder = parser.get_default("out")
    quick_folder = RESULTS / "quick" / folder.name
    if "--quick" in sys.argv[1:]:
        parser.set_defaults(out=quick_folder, **quick)
    args = parser.parse_args()
    if args.quick and args.out == quick_folder:
        shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "settings.json").write_text(json.dumps(vars(args), default=str) + "\n")
    return args


def find_data(folder: Path | None, name: str) -> Path | None:
    """
    A file of `--data`, `None` where that is left out. Ends with code 2 where it is given and the file isn't there, so
    that what is built in never stands for it unseen.
    """
    if folder is None:
        return None
    if not (folder / name).exists():
        print(
            f"Expected {name} in --data {folder}, found none. Without --data what is built in is taken.",
            file=sys.stderr,
        )
        sys.exit(2)
    return folder / name


def write_json(path: Path, content: Any) -> None:
    """Keep results, and say where."""
    path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    print(f"\nWritten to {path}")


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
