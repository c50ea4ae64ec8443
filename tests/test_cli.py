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


@pytest.fixture
def composite(tmp_path, byte_tokenizer):
    """A folder with a composite of two tiny models."""
    from hf_iclr import SpeculativeCascadeForCausalLM
    from tests.generation.toy import tiny_llama

    pair = (tiny_llama(seed, vocab_size=256) for seed in (1, 2))
    SpeculativeCascadeForCausalLM.from_cascade_pretrained(*pair).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


def test_cascade_prints_text_and_statistics(run, composite):
    result = run("cascade", "hello", "--model", composite, "--max-new-tokens", "9", "--rule", "opt", "--alpha", "0.1")
    assert result.exit_code == 0, result.output
    lines = {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in result.output.splitlines() if "│" in line
    }
    assert lines["new tokens"] == "9" and lines["rule"] == "opt" and lines["alpha"] == "0.100"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rule", "best"], "Choose one of spec"),
        (["--alpha", "7"], "must lie in"),
        (["--num-assistant-tokens", "0"], "at least 1"),
    ],
)
def test_cascade_says_what_is_wrong(run, composite, options, words):
    result = run("cascade", "hello", "--model", composite, *options)
    assert result.exit_code == 2 and words in result.output
