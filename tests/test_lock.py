"""The lock holds a release for everything that pyproject.toml asks for, on every Python that is supported."""

import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


ROOT = Path(__file__).parents[1]
REQUIREMENTS = ROOT / "requirements"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIN = re.compile(r"^[\w.-]+==.*?(?:\n(?! )|\Z)", re.MULTILINE | re.DOTALL)


def pins(file: str) -> list[str]:
    return PIN.findall((REQUIREMENTS / file).read_text())


def locked(file: str, python: str) -> dict[str, str]:
    """The versions that count on Linux under this Python."""
    machine = {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    machine |= {
        "python_version": python,
        "python_full_version": f"{python}.4",
        "platform_python_implementation": "CPython",
    }
    found = {}
    for pin in pins(file):
        requirement = Requirement(pin.split("\\")[0].strip())
        if requirement.marker is None or requirement.marker.evaluate(machine):
            assert requirement.name not in found, f"{requirement.name} is pinned twice for Python {python}"
            found[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    return found


def needs(extras: list[str]) -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return [need for need in map(Requirement, lines) if need.name != PROJECT["name"]]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_is_within_the_bounds(python):
    held = locked("lock.txt", python) | locked("torch.txt", python)
    for need in needs(list(PROJECT["optional-dependencies"])):
        assert need.specifier.contains(held[canonicalize_name(need.name)]), need


def test_the_oldest_releases_are_the_lower_bounds_or_what_other_packages_need():
    held = locked("oldest.txt", "3.11")
    ours = needs([extra for extra in PROJECT["optional-dependencies"] if extra not in ("dev", "test")])
    assert all(
        need.specifier.contains(held[canonicalize_name(need.name)]) for need in ours if "torch" not in need.name
    )


def test_hashes_hold_everything_but_torch():
    assert all("--hash=sha256:" in pin for pin in pins("lock.txt"))
    assert not any("--hash" in pin for pin in pins("torch.txt"))
    parts = ("torch==", "torchvision==", "nvidia-", "cuda-", "triton==")
    assert all(pin.startswith(parts) for pin in pins("torch.txt"))
    assert not any(pin.startswith(parts) for pin in pins("lock.txt") + pins("oldest.txt"))


@pytest.mark.parametrize("file", ["lock.txt", "torch.txt", "oldest.txt"])
def test_a_lock_names_no_place_to_install_from(file):
    text = (REQUIREMENTS / file).read_text()
    assert "://" not in text and not re.search(r"--(extra-)?index|--find-links|@ ", text)


def test_an_older_python_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    monkeypatch.setattr(sys, "argv", ["set_up.py", "somewhere"])
    with pytest.raises(SystemExit, match=r"needs Python 3.11 or later, got .*make test PYTHON=python3.12"):
        runpy.run_path(str(REQUIREMENTS / "set_up.py"), run_name="__main__")


@pytest.fixture
def set_up():
    return runpy.run_path(str(REQUIREMENTS / "set_up.py"))


def pip_that_says(folder: Path, text: str, status: int = 0) -> Path:
    python = folder / "python"
    python.write_text(f"#!/bin/sh\ncat <<'end'\n{text}\nend\nexit {status}\n")
    python.chmod(0o755)
    return python


def test_what_was_downloaded_is_counted_apart_from_what_lay_on_the_disk(set_up, tmp_path, capsys):
    wheel = tmp_path / "b-1-py3-none-any.whl"
    wheel.write_bytes(bytes(3000))
    python = pip_that_says(
        tmp_path,
        "Collecting a==1\n  Downloading a-1-py3-none-any.whl.metadata (2 kB)\n"
        "  Downloading a-1-py3-none-any.whl (554.5 MB)\n"
        f"Processing {wheel} (from torch)\n  Using cached c-1-py3-none-any.whl (12 kB)\n"
        "Installing collected packages: a, b, c",
    )
    taken = list(set_up["install"](python, ["a"]))
    assert taken == [("Downloading", 554.5e6), ("Processing", 3000), ("Using cached", 12e3)]
    assert "a-1-py3-none-any.whl (554 MB)" in capsys.readouterr().out


def test_when_pip_fails_its_words_are_shown(set_up, tmp_path):
    python = pip_that_says(tmp_path, "ERROR: No matching distribution found for a==1", status=1)
    with pytest.raises(SystemExit, match="could not install(.|\n)*No matching distribution found for a==1"):
        list(set_up["install"](python, ["a==1"]))
