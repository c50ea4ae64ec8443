"""
Random one-token mutants of the core of each part, each against the tests of its file: `python -m tests.mutants` prints
the table of docs/testing.md and every survivor. Run by hand: the default, 9 mutants a file, takes an hour of CPU.

Tests run in a copy of the tree, in a forked process that finds all but our own code imported.
"""

import argparse
import ast
import contextlib
import importlib
import json
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
    "generation/batched_cascade.py": ["test_cascade_generation.py", "test_cascade_law.py", "test_candidates.py"],
    "vision/session/session.py": ["test_session.py"],
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

    def at(node: ast.AST, end: bool = False) -> int:
        row, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
        return lines[row - 1] + column

    def between(start: int, end: int) -> Iterator[tuple[int, int, str]]:
        text = re.sub(rb"#[^\n]*", lambda comment: b" " * len(comment[0]), source.encode()[start:end]).decode()
        if (found := OPERATOR.search(text)) and found[0] in OTHER:
            yield start + found.start(), start + found.end(), OTHER[found[0]]

    def visit(node: ast.AST) -> Iterator[tuple[int, int, str]]:
        if isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                yield from between(at(left, True), at(right))
        elif isinstance(node, ast.BinOp):
            yield from between(at(node.left, True), at(node.right))
        elif isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from between(at(left, True), at(right))
        elif isinstance(node, ast.UnaryOp):
            yield at(node), at(node) + (3 if isinstance(node.op, ast.Not) else 1), ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            value = str(not node.value) if isinstance(node.value, bool) else str(node.value + 1)
            yield at(node), at(node, True), value
        elif isinstance(node, ast.Name) and node.id in OTHER:
            yield at(node), at(node, True), OTHER[node.id]
        elif isinstance(node, ast.Continue | ast.Break):
            yield at(node), at(node, True), OTHER[type(node).__name__.lower()]
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from visit(child)

    return sorted(set(visit(ast.parse(source))))


def passes(tree: Path, tests: list[str], limit: int, modules: Path) -> tuple[bool, float]:
    """Whether tests pass in a forked process, within `limit` seconds of CPU, and how many they took."""
    if (child := os.fork()) == 0:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        os.chdir(tree)
        sys.path[:0] = [str(tree)]
        sys.modules.pop("tests", None)
        os.environ["PYTHONPATH"] = str(tree)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])
        modules.write_text(json.dumps([*sys.modules]), encoding="utf-8")
        os._exit(int(code))
    done, until = 0, time.monotonic() + 20 * limit  # one that waits for ever takes no CPU
    while not done and time.monotonic() < until:
        done, status, used = os.wait4(child, os.WNOHANG)
        time.sleep(0.05)
    if not done:
        os.killpg(child, signal.SIGKILL)
        _, status, used = os.wait4(child, 0)
    return status == 0, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="*", default=[*CORE])
    parser.add_argument("--count", type=int, default=9, help="mutants a file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    survivors, table = [], ["| file | mutants | killed |", "| --- | --- | --- |"]
    with tempfile.TemporaryDirectory() as folder:
        tree, modules = Path(folder, "tree"), Path(folder, "modules.json")
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in listed.splitlines():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
        for name in args.files:
            tests = [str(Path("tests", name).parent / test) for test in CORE[name]]
            well, seconds = passes(tree, tests, 600, modules)
            assert well, f"{tests} fail without a mutant"
            for module in json.loads(modules.read_text(encoding="utf-8")):
                if not module.startswith(("hf_iclr", "tests", "conftest", "__")):
                    with contextlib.suppress(Exception):
                        importlib.import_module(module)
            source = (ROOT / name).read_text(encoding="utf-8")
            chosen = random.Random(f"{args.seed} {name}").sample(found := spots(source), min(args.count, len(found)))
            lived = 0
            for start, end, new in sorted(chosen):
                code = source.encode()
                mutant = code[:start] + f"{new} ".encode() + code[end:]
                (tree / name).write_bytes(mutant)
                if passes(tree, tests, int(10 + 3 * seconds), modules)[0]:
                    lived += 1
                    line = code[:start].count(b"\n") + 1
                    now = mutant.decode().splitlines()[line - 1].strip()
                    survivors.append(f"- {name}:{line}, `{code[start:end].decode()}` before: `{now}`")
                    print(survivors[-1], file=sys.stderr, flush=True)
            (tree / name).write_bytes(source.encode())
            table.append(f"| `{name}` | {len(chosen)} | {len(chosen) - lived} |")
            print(table[-1], file=sys.stderr, flush=True)
    print("\n".join([*table, "", *survivors]))


if __name__ == "__main__":
    main()
