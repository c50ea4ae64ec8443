"""The command `hf-iclr`: quick help, exit codes that say what happened."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_iclr import cli, tour, upstream


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *args: CliRunner().invoke(cli.app, args)


def test_help_loads_no_torch():
    code = "import sys; from hf_iclr import cli; print('torch' in sys.modules or 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_help_names_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert "tour" in result.output and "doctor" in result.output


def test_doctor_is_content_here(run):
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "transformers" in result.output and "GenerationMixin._assisted_decoding" in result.output


def test_doctor_names_a_changed_seam(run, monkeypatch):
    row = upstream.SeamCheck("shutil:copyfile", "(src, dst)", None)
    monkeypatch.setattr(upstream, "check_seams", lambda: [row])
    result = run("doctor")
    assert result.exit_code == 1
    assert "expected (src, dst)" in result.output and "nothing of that name" in result.output


@pytest.mark.parametrize("failed", [False, True])
def test_tour_exit_code(run, monkeypatch, tmp_path, failed):
    results = [tour.FailedSection("part", "ValueError: no", "", 0.0)] if failed else []
    monkeypatch.setattr(tour, "run_tour", lambda out, quick: results)
    assert run("tour", "--out", str(tmp_path), "--quick").exit_code == int(failed)
