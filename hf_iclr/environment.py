"""What the code runs on: packages, machine and devices, for `hf-iclr doctor` and the tour."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


@dataclass(frozen=True)
class Package:
    """A dependency, the versions we ask for and the one installed (`None` when there is none)."""

    name: str
    wanted: str
    installed: str | None

    @property
    def ok(self) -> bool:
        return self.installed is not None and SpecifierSet(self.wanted).contains(self.installed, prereleases=True)


def packages() -> list[Package]:
    """The dependencies that `hf_iclr` declares, in alphabetical order."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("hf_iclr") or []]
    ours = [requirement for requirement in requirements if "extra" not in str(requirement.marker)]
    return [
        Package(requirement.name, str(requirement.specifier), _installed_version(requirement.name))
        for requirement in sorted(ours, key=lambda requirement: requirement.name.lower())
    ]


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, str | int]:
    """Python, operating system, processor, threads and devices."""
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append("Apple MPS")
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count() or 1,
        "torch threads": torch.get_num_threads(),
        "devices": ", ".join(devices) or "CPU only",
    }
