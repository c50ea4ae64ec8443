"""
Random one-token mutants of the core of each part, each against the tests of its file: `python -m tests.mutants` prints
the table of docs/testing.md, and every survivor. Run by hand: the default, 9 mutants a file, takes an hour of CPU.

Tests run in a copy of the tree, in a forked process that finds all but our own code imported.
"""

import argparse
import ast
import contextlib
import importlib
import itertools
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
CORE = {
    "editors/alpha_edit/journal.py": ["test_journal.py"],
    "trainers/data_shapley/identity.py": ["test_identity.py"],
    "trainers/data_shapley/store.py": ["test_store.py"],
    "trainers/deep_safety/constrained_loss.py": ["test_constrained_loss.py"],
    "trainers/safety_audit/judge.py": ["test_judge.py"],
    "trainers/squeeze/warning.py": ["test_warning.py", "test_replay.py"],
    "trainers/squeeze/argmax.py": ["test_argmax.py"],
    "generation/deferral_rules.py": ["test_deferral_rules.py"],
    "trainers/data_shapley/trained_rows.py": ["test_trained_rows.py"],
    "vision/session/session.py": ["test_session.py", "test_streams.py", "test_mask_postprocessing.py"],
    "vision/formats/mask_folders.py": ["test_mask_folders.py"],
    "vision/annotation/project.py": ["test_project.py"],
}
OTHER = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "is": "is not", "is not": "is", "in": "not in",
    "not in": "in", "and": "or", "or": "and", "+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "//", "**": "*",
    "&": "|", "|": "&", "True": "False", "False": "True", "any": "all", "all": "any",
    "min": "max", "max": "min", "continue": "break", "break": "continue",
}  # fmt: skip
OPERATOR = re.compile(r"is not\b|not in\b|is\b|in\b|and\b|or\b|[<>=!]=|//|\*\*|<<|>>|[-<>+*/%&|]")


def spots(source: str) -> list[tuple[int, int, str]]:
    """Start, end and replacement of each token that has another; annotations and f-strings are left out."""
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))

    def at(node: ast.AST, end: str = "") -> int:
        return lines[getattr(node, f"{end}lineno") - 1] + getattr(node, f"{end}col_offset")

    def between(*nodes: ast.AST) -> Iterator[tuple[int, int, str]]:
        for left, right in itertools.pairwise(nodes):
            start = at(left, "end_")
            text = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), source.encode()[start : at(right)])
            if (found := OPERATOR.search(text.decode())) and found[0] in OTHER:
                yield start + found.start(), start + found.end(), OTHER[found[0]]

    def visit(node: ast.AST) -> Iterator[tuple[int, int, str]]:
        if isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.Compare):
            yield from between(node.left, *node.comparators)
        elif isinstance(node, ast.BinOp):
            yield from between(node.left, node.right)
        elif isinstance(node, ast.BoolOp):
            yield from between(*node.values)
        elif isinstance(node, ast.UnaryOp):
            yield at(node), at(node) + (3 if isinstance(node.op, ast.Not) else 1), ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            value = str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
            yield at(node), at(node, "end_"), value
        elif isinstance(node, ast.Name) and node.id in OTHER:
            yield at(node), at(node, "end_"), OTHER[node.id]
        elif isinstance(node, ast.Continue | ast.Break):
            yield at(node), at(node, "end_"), OTHER[type(node).__name__.lower()]
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child)

    return sorted(set(visit(ast.parse(source))))


def passes(tree: Path, tests: list[str], limit: int) -> tuple[bool, float]:
    """
    Whether tests pass in a forked process, within `limit` seconds of CPU, and how many they took. It leaves
    modules.txt, what was imported, and printed.txt.
    """
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        os.chdir(tree)
        sys.path[:0], os.environ["PYTHONPATH"] = [str(tree)], str(tree)
        sys.modules.pop("tests", None)
        for stream in (1, 2):
            os.dup2(os.open("printed.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        Path(tree, "modules.txt").write_text("\n".join(sys.modules), encoding="utf-8")
        os._exit(int(code))
    done, until = 0, time.monotonic() + 20 * limit  # one that waits for ever takes no CPU
    while not done and time.monotonic() < until:
        done, status, used = os.wait4(child, os.WNOHANG)
        time.sleep(0.05)
    if not done:
        os.killpg(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    return status == 0, used.ru_utime + used.ru_stime


def survivors(tree: Path, name: str, count: int, seed: int) -> Iterator[str]:
    """The mutants of a file that its tests let pass."""
    tests = [str(Path("tests", name).parent / test) for test in CORE[name]]
    well, seconds = passes(tree, tests, 600)
    assert well, f"{tests} fail without a mutant:\n{(tree / 'printed.txt').read_text(encoding='utf-8')[-3000:]}"
    for module in (tree / "modules.txt").read_text(encoding="utf-8").splitlines():
        if not module.startswith(("hf_iclr", "tests", "conftest", "__")):
            with contextlib.suppress(Exception):
                importlib.import_module(module)
    code = (ROOT / name).read_bytes()
    found = spots(code.decode())
    for start, end, new in sorted(random.Random(f"{seed} {name}").sample(found, min(count, len(found)))):
        mutant = code[:start] + f"{new} ".encode() + code[end:]
        (tree / name).write_bytes(mutant)
        if passes(tree, tests, int(10 + 3 * seconds))[0]:
            line = code[:start].count(b"\n")
            now = mutant.decode().splitlines()[line].strip()
            yield f"- {name}:{line + 1}, `{code[start:end].decode()}` before: `{now}`"
    (tree / name).write_bytes(code)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=[*CORE])
    parser.add_argument("--count", type=int, default=9, help="mutants a file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| file | mutants | killed |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in listed.splitlines():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, Path(folder, name), follow_symlinks=False)
        for name in args.files:
            lived = 0
            for lived, survivor in enumerate(survivors(Path(folder), name, args.count, args.seed), 1):  # noqa: B007
                print(survivor, file=sys.stderr, flush=True)
            print(f"| `{name}` | {args.count} | {args.count - lived} |", flush=True)


if __name__ == "__main__":
    main()
