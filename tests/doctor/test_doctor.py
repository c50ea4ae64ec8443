"""The doctor's verdicts: what works, through whom something is broken, what to type for what is missing."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from hf_iclr.cli import app as cli
from hf_iclr.doctor import environment
from hf_iclr.doctor import report as doctor
from hf_iclr.doctor.environment import Package
from hf_iclr.doctor.report import BROKEN, MISSING, WORKS, Finding, diagnose, run_checks


PACKAGES = [
    Package("transformers", ">=5.22,<5.25", "5.24.0"),
    Package("trl", ">=1.15,<1.17", "1.17.2"),
    Package("torch", ">=2.9", "2.14.1"),
    Package("nosuchcore", ">=1", None),
    Package("nosuchvision", ">=0.24", None, "vision"),
]
INSIDE = [package for package in PACKAGES if package.name in ("transformers", "torch", "nosuchvision")]


@pytest.fixture
def installed(monkeypatch):
    """Declares the packages given instead of our own."""
    return lambda packages: monkeypatch.setattr(doctor, "packages", lambda: packages)


def raised(function) -> Exception:
    with pytest.raises(Exception) as caught:
        function()
    return caught.value


def vanished_name():
    from transformers import NoSuchModel  # noqa: F401


def vanished_function():
    import transformers

    transformers.cache_utils.no_such_function()


def vanished_method():
    from transformers import LlamaConfig

    class Ours(LlamaConfig):
        pass

    Ours().no_such_method()


def renamed_argument():
    from transformers import DynamicCache

    DynamicCache().get_seq_length(no_such_argument=1)


def raised_inside():
    from transformers import LlamaConfig

    LlamaConfig.from_pretrained("/no/such/folder")


def wrong_shapes():
    import torch

    torch.nn.Linear(2, 3)(torch.zeros(5))


def from_a_cause():
    try:
        renamed_argument()
    except TypeError as error:
        raise ValueError("The part failed.") from error


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (vanished_name, "transformers"),
        (vanished_function, "transformers"),
        (vanished_method, "transformers"),
        (renamed_argument, "transformers"),
        (raised_inside, "transformers"),
        (from_a_cause, "transformers"),
        (wrong_shapes, "torch"),
    ],
)
def test_what_is_broken_names_the_package(installed, function, name):
    installed(INSIDE)
    finding = diagnose("part", raised(function))
    version = next(package.installed for package in INSIDE if package.name == name)
    assert (finding.status, finding.sentence) == (BROKEN, f"by {name} {version}")
    assert function.__name__ in finding.details and "Error: " in finding.error


def test_what_no_package_raised_is_laid_to_those_outside_of_the_tested():
    def ours():
        raise ValueError("Expected a cache.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "packages", lambda: PACKAGES)
        finding = diagnose("part", raised(ours))
        assert finding.sentence == (
            "by trl 1.17.2 (outside of the tested >=1.15,<1.17): `pip install 'trl>=1.15,<1.17'`"
        )
        blamed = diagnose("part", raised(renamed_argument)).sentence
        assert blamed.startswith("by transformers 5.24.0 or trl 1.17.2 (outside of")
        patch.setattr(doctor, "packages", lambda: INSIDE)
        finding = diagnose("part", raised(ours))
        assert finding.status == BROKEN and finding.sentence.startswith("in hf_iclr itself")
        assert finding.error == "ValueError: Expected a cache."


@pytest.mark.parametrize(
    ("error", "status", "command"),
    [
        (ModuleNotFoundError("No module", name="nosuchvision.io"), MISSING, "pip install 'hf_iclr[vision]'"),
        (ImportError("Reader requires the NoSuchVision library."), MISSING, "pip install 'hf_iclr[vision]'"),
        (
            ImportError("Expected nosuchvision. Type `pip install 'hf_iclr[metrics]'`.", name="nosuchvision"),
            MISSING,
            "pip install 'hf_iclr[metrics]'",
        ),
        (ModuleNotFoundError("No module", name="nosuchcore"), BROKEN, "pip install 'nosuchcore>=1'"),
    ],
)
def test_what_is_missing_comes_with_the_command(installed, error, status, command):
    installed(PACKAGES)

    def wrapped():
        try:
            raise error
        except ImportError as cause:
            raise RuntimeError("Failed to import") from cause

    for found in (error, raised(wrapped)):
        finding = diagnose("part", found)
        assert finding.status == status and f"`{command}`" in finding.sentence


def test_an_installed_package_that_does_not_import_is_broken_and_not_missing(installed):
    installed([Package("torch", ">=2.9", "2.14.1", "vision")])
    finding = diagnose(
        "part", ImportError("torch: undefined symbol. Type `pip install 'hf_iclr[vision]'`.", name="torch")
    )
    assert (finding.status, finding.sentence) == (BROKEN, "by torch 2.14.1")


JOBS = """
import os

def fine():
    return {"answer": 42}

def fails():
    raise ValueError("no")

def leaves():
    raise SystemExit(3)

def dies():
    os.abort()
"""


def test_no_job_loses_the_others(tmp_path, monkeypatch):
    (tmp_path / "doctor_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    jobs = {name: f"doctor_jobs:{name}" for name in ("fine", "dies", "fails", "leaves", "no_such")}
    found = run_checks(jobs | {"last": "doctor_jobs:fine"})
    assert list(found) == [*jobs, "last"]
    status = {title: finding.status for title, finding in found.items()}
    assert status == dict.fromkeys(jobs, BROKEN) | {"fine": WORKS, "last": WORKS}
    assert found["fine"].result == found["last"].result == {"answer": 42}
    assert found["dies"].error == "the process ended by SIGABRT" and "in dies" in found["dies"].details
    assert found["fails"].error == "ValueError: no" and "in fails" in found["fails"].details


def test_a_job_that_hangs_is_given_up_and_the_next_has_its_turn(monkeypatch):
    def too_long(command, timeout, **kwargs):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(doctor.subprocess, "run", too_long)
    found = run_checks({"one": "a:one", "two": "a:two"}, timeout=7)
    assert [finding.error for finding in found.values()] == ["no answer in 7 s"] * 2


MACHINE = {"python": "3.11", "devices": "CPU only"}
SEAM = ("shutil:copyfile", "(src, dst)", "(src, dst)")


def findings(**changed) -> dict[str, Finding]:
    found = {title: Finding(title, WORKS, seconds=1.0) for title in ("cascades", "segmentation")}
    found |= {"machine": Finding("machine", WORKS, result=MACHINE), "seams": Finding("seams", WORKS, result=[SEAM])}
    return found | {title: Finding(title, **finding) for title, finding in changed.items()}


@pytest.fixture
def run(monkeypatch):
    def run(found, *options, packages=PACKAGES[:3]):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(doctor, "run_checks", lambda: found)
        monkeypatch.setattr("hf_iclr.doctor.tables.packages", lambda: packages)
        return CliRunner().invoke(cli.app, ["doctor", *options])

    return run


def test_all_well(run):
    result = run(findings())
    assert result.exit_code == 0 and "1 of 1 functions as expected" in result.output
    assert "copyfile" not in result.output and "copyfile" in run(findings(), "--seams").output
    assert "not tested" in result.output  # trl, though all works


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        ({"status": MISSING, "sentence": "av: `pip install 'hf_iclr[vision]'`"}, 0, "pip install 'hf_iclr[vision]'"),
        (
            {"status": BROKEN, "sentence": "by trl 1.17.2", "error": "TypeError: x", "details": "Trace"},
            1,
            "by trl 1.17.2",
        ),
    ],
)
def test_a_part_that_does_not_work(run, found, code, words):
    result = run(findings(segmentation=found))
    assert result.exit_code == code and words in result.output and "Trace" not in result.output
    assert "cascades" in result.output
    if code:
        assert "Trace" in run(findings(segmentation=found), "--debug").output


def test_missing_packages(run):
    extra = run(findings(), packages=PACKAGES[4:])
    assert extra.exit_code == 0 and "pip install 'hf_iclr[vision]'" in extra.output
    core = run(findings(), packages=PACKAGES[3:])
    assert core.exit_code == 1 and "pip install 'nosuchcore>=1'" in core.output


@pytest.mark.parametrize(("found", "code", "word"), [("(src)", 0, "changed"), (None, 1, "gone")])
def test_seams_that_are_not_as_expected(run, found, code, word):
    result = run(findings(seams={"status": WORKS, "result": [SEAM, ("shutil:move", "(a, b)", found)]}))
    assert result.exit_code == code and word in result.output and "expected (a, b)" in result.output
    assert "1 of 2 functions" in result.output and "copyfile" not in result.output


def test_a_machine_and_seams_that_cannot_be_read(run):
    broken = {"status": BROKEN, "sentence": "by torch 2.14.1", "error": "OSError: libc"}
    result = run(findings(machine=broken, seams=broken))
    assert result.exit_code == 1 and result.output.count("by torch 2.14.1") == 2 and "cascades" in result.output


def test_packages_of_extras(monkeypatch):
    lines = ["numpy>=1.26", "nosuch>=2; extra == 'vision'", "rich>=1; extra == 'all'", "nosuch>=2; extra == 'metrics'"]
    monkeypatch.setattr(environment.importlib.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(
        environment.importlib.metadata,
        "metadata",
        lambda name: type("", (), {"get_all": lambda self, key: ["all", "vision", "metrics"]})(),
    )
    numpy, nosuch = environment.packages()
    assert (numpy.name, numpy.extra, numpy.ok) == ("numpy", "", True)
    assert (nosuch.installed, nosuch.command) == (None, "pip install 'hf_iclr[vision]'")


METADATA = """
Metadata-Version: 2.4
Name: hf_iclr
Version: 0.1.0
Requires-Dist: transformers
Requires-Dist: trl
Requires-Dist: torch
Provides-Extra: vision
Requires-Dist: torchvision; extra == 'vision'
""".lstrip()
WITHOUT_TORCHVISION = """
from importlib.machinery import PathFinder

found = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, *others: None if name.split(".")[0] == "torchvision" else found(name, *others)
)
"""


def test_a_broken_package_and_a_missing_extra_for_real(tmp_path):
    """TRL with an argument renamed, put in front of the installed one, and torchvision out of sight."""
    (installed,) = importlib.util.find_spec("trl").submodule_search_locations
    shutil.copytree(installed, tmp_path / "trl", copy_function=os.symlink)
    module = tmp_path / "trl" / "trainer" / "dpo_trainer.py"
    before, after = module.read_text().split("class DPOTrainer(", 1)
    module.unlink()
    module.write_text(f"{before}class DPOTrainer({after.replace('processing_class:', 'tokenizer:', 1)}")
    (tmp_path / "sitecustomize.py").write_text(WITHOUT_TORCHVISION)
    (tmp_path / "hf_iclr-0.1.0.dist-info").mkdir()
    (tmp_path / "hf_iclr-0.1.0.dist-info" / "METADATA").write_text(METADATA)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", "from hf_iclr.cli.app import app; app(['doctor'])"],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
    )  # fmt: skip
    lines = {line.split("│")[1].strip(): line for line in done.stdout.splitlines() if line.count("│") == 4}
    assert done.returncode == 1, done.stdout + done.stderr
    for part in ("speculative cascades", "deep safety", "data Shapley", "knowledge editing"):
        assert "works" in lines[part]
    assert f"broken by trl {importlib.metadata.version('trl')}" in lines["squeeze"]
    assert "missing extra torchvision is not installed: `pip install 'hf_iclr[vision]'`" in lines["video segmentation"]
