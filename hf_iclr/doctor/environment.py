"""What the code runs on: packages, machine and devices, for `hf-iclr doctor` and the tour."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet


_NOT_FOR_USE = ("all", "dev", "test")  # extras that are no part's
_IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}


@dataclass(frozen=True)
class Package:
    """A dependency, the versions we ask for, the one installed (`None` when there is none), and its extra if any."""

    name: str
    wanted: str
    installed: str | None
    extra: str = ""

    @property
    def ok(self) -> bool:
        return self.installed is not None and SpecifierSet(self.wanted).contains(self.installed, prereleases=True)

    @property
    def module(self) -> str:
        """What it is imported as."""
        return _IMPORT_NAMES.get(self.name.lower(), self.name.replace("-", "_"))

    @property
    def command(self) -> str:
        """What to type to have it as we ask for it."""
        return f"pip install 'hf_iclr[{self.extra}]'" if self.extra else f"pip install '{self.name}{self.wanted}'"


def packages() -> list[Package]:
    """The dependencies that `hf_iclr` declares, in alphabetical order, those of its extras after the others."""
    requirements = [Requirement(line) for line in importlib.metadata.requires("hf_iclr") or []]
    extras = importlib.metadata.metadata("hf_iclr").get_all("Provides-Extra") or []
    found: dict[str, Package] = {}
    for extra in ("", *(extra for extra in extras if extra not in _NOT_FOR_USE)):
        for requirement in sorted(requirements, key=lambda requirement: requirement.name.lower()):
            name = requirement.name
            wanted_here = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
            if wanted_here and name not in found and name != "hf_iclr":
                found[name] = Package(name, str(requirement.specifier), _installed_version(name), extra)
    return list(found.values())


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
