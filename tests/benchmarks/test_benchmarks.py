"""The benchmarks answer `--help` at once, write where results belong, and `make bench` runs them all by the index."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
INDEX = tomllib.loads((BENCHMARKS / "index.toml").read_text())
SCRIPTS = {path.stem for path in BENCHMARKS.glob("*.py")} - {"__main__", "run", "fetch_data", "pictures"}

# Runs every script with each command line and reports how it ended, or what its parser would have answered.
RUN_ALL = """
import argparse, contextlib, io, json, runpy, sys
folder, *names = sys.argv[1:]
sys.path.insert(0, folder)
seen = {name: {} for name in names}
parse_args = argparse.ArgumentParser.parse_args

def answer(parser):
    seen[name]["quick" if "--quick" in sys.argv else "full"] = vars(parse_args(parser))
    raise SystemExit(0)

for name in names:
    for command in (["--help"], [], ["--quick"]):
        sys.argv = [f"{folder}/{name}.py", *command]
        argparse.ArgumentParser.parse_args = parse_args if command == ["--help"] else answer
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            if command == ["--help"]:
                seen[name] |= {"code": ended.code, "help": printed.getvalue()}
heavy = {"torch", "transformers", "hf_iclr", "numpy", "pandas", "datasets"} & set(sys.modules)
print(json.dumps({"scripts": seen, "heavy": sorted(heavy)}, default=str))
"""


@pytest.fixture(scope="module")
def answers():
    command = [sys.executable, "-c", RUN_ALL, str(BENCHMARKS), *sorted(SCRIPTS)]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def test_index_names_every_script():
    assert set(INDEX) == SCRIPTS
    for row in INDEX.values():
        assert set(row) - {"runs"} == {"claim", "time", "data", "docs"} and all(row.values())


def test_pages_of_the_index_quote_the_script():
    for name, row in INDEX.items():
        if row["docs"] != "none":
            assert f"benchmarks/{name}.py" in (ROOT / row["docs"]).read_text(), name


def test_files_named_elsewhere_exist():
    folders = (
        "",
        "docs",
        "benchmarks",
        "benchmarks/common",
        "examples",
        "generation",
        "trainers",
        "editors",
        "vision",
    )
    for path in (path for folder in folders for path in (ROOT / folder).glob("*.*")):
        if path.suffix in (".md", ".py", ".toml"):
            for found in re.findall(r"\bbenchmarks/[a-z0-9_/]+\.(?:py|toml)", path.read_text()):
                assert (ROOT / found).exists(), f"{path} names {found}"


def test_help_comes_before_heavy_imports(answers):
    assert answers["heavy"] == []
    for name, seen in answers["scripts"].items():
        assert seen["code"] == 0 and "--out" in seen["help"] and "--quick" in seen["help"], name
        assert f"benchmarks/{name}.py" in seen["help"], f"{name} doesn't say how it is called"


def test_all_write_to_results(answers):
    for name, seen in answers["scripts"].items():
        assert Path(seen["full"]["out"]) == BENCHMARKS / "results" / name
        assert Path(seen["quick"]["out"]) == BENCHMARKS / "results" / "quick" / name
    assert "/benchmarks/results/*/" in (ROOT / ".gitignore").read_text().splitlines()


def test_a_quick_run_is_smaller_and_what_is_given_counts(tmp_path):
    sys_path = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); sys.argv = ['toy.py', {{}}]; "
    code = (
        "from common import arguments; parser = arguments.make_parser('toy.py', 'A toy.'); "
        f"arguments.RESULTS = __import__('pathlib').Path({str(tmp_path)!r}); "
        "parser.set_defaults(out=arguments.RESULTS / 'toy'); "
        "parser.add_argument('--clips', type=int, default=60); parser.add_argument('--frames', type=int, default=8); "
        "args = arguments.parse(parser, clips=2, frames=4); print(args.clips, args.frames, args.out)"
    )
    left = tmp_path / "quick" / "toy" / "old.json"

    def run(*given: str) -> str:
        command = [sys.executable, "-c", sys_path.format(", ".join(map(repr, given))) + code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert run() == f"60 8 {tmp_path}/toy"
    assert run("--quick") == f"2 4 {tmp_path}/quick/toy"
    left.write_text("{}")
    assert run("--quick", "--clips", "7", "--out", str(left.parent / "mine")) == f"7 4 {left.parent}/mine"
    assert left.exists()
    run("--quick")
    assert not left.exists()  # a run that resumes must not find last time's results


def test_a_run_leaves_the_current_folder_alone(tmp_path):
    (tmp_path / "here").mkdir()
    command = [sys.executable, BENCHMARKS / "squeeze_toy.py", "--quick", "--out", tmp_path / "out"]
    printed = subprocess.run(command, cwd=tmp_path / "here", check=True, capture_output=True, text=True).stdout
    assert "others that lose" in printed and (tmp_path / "out" / "squeeze_toy.png").exists()
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("broken", [None, "squeeze_replay"])
def test_make_bench_goes_on_after_a_failure(tmp_path, broken):
    """A Python that notes what it is asked to run, and fails at one script."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$1" in *"/{broken}.py") exit 3; esac\n')
    python.chmod(0o755)
    (tmp_path / ".ready").touch()
    where = [f"VENV={tmp_path}", f"BIN={tmp_path}/bin", f"PYTHON={python}", f"READY={tmp_path}/.ready"]
    done = subprocess.run(["make", "-s", "bench", *where], cwd=ROOT, capture_output=True, text=True, check=False)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == [f"benchmarks/{name}.py --quick" for name in INDEX]
    assert (done.returncode == 0) == (broken is None)
    for name in INDEX:
        result = "FAILED with code 3" if name == broken else "ok"
        assert re.search(rf"\| {name} \| \d+ \| {result} \|", done.stdout)


def test_the_module_prints_the_index():
    printed = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name, row in INDEX.items():
        assert f"| {name} | {row['claim']} |" in printed.stdout
