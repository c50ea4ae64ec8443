"""
Sets up the environment of `make test` and `make tour`: `python requirements/set_up.py .venv`.

It needs nothing but Python. What is installed is what `lock.txt` says, checked by hash; torch and what it alone needs
come by version (`torch.txt`), since their builds differ from machine to machine.
"""

import os
import re
import subprocess
import sys
import time
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
STEPS = [
    ("locked packages", ["--no-deps", "--require-hashes", "-r", "requirements/lock.txt"]),
    ("torch", ["-c", "requirements/torch.txt", "torch", "torchvision"]),
    ("hf_iclr", ["--no-deps", "--no-build-isolation", "-e", "."]),
]
BYTES = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
TAKEN = re.compile(r"(Downloading|Using cached|Processing) (\S+)(?: \(([\d.]+) (bytes|kB|MB|GB)\))?")


def main(folder):
    start = time.time()
    venv.create(folder, with_pip=True, symlinks=True)
    downloaded = on_disk = 0
    for number, (name, arguments) in enumerate(STEPS, 1):
        print(f"{number}/{len(STEPS)} {name}", flush=True)
        for how, size in install(folder / "bin" / "python", arguments):
            if how == "Downloading":
                downloaded += size
            else:
                on_disk += size
    held = sum(path.lstat().st_size for path in folder.rglob("*"))
    print(
        f"Set up in {time.time() - start:.0f} s: {readable(downloaded)} downloaded, {readable(on_disk)} taken from "
        f"this machine's disk, {readable(held)} in {folder}."
    )


def install(python, arguments):
    """Runs pip and yields (`"Downloading"`, `"Using cached"` or `"Processing"`, bytes) for each package it takes."""
    command = [str(python), "-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check", *arguments]
    pip = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said = []
    for line in pip.stdout:
        said.append(line)
        taken = TAKEN.match(line.strip())
        if not taken or taken[2].endswith(".metadata"):
            continue
        if taken[3]:
            size = float(taken[3]) * BYTES[taken[4]]
        else:
            size = os.path.getsize(taken[2]) if os.path.isfile(taken[2]) else 0
        if size > 50e6:
            print(f"    {taken[2].rpartition('/')[2]} ({readable(size)})", flush=True)
        yield taken[1], size
    if pip.wait():
        sys.exit("pip could not install this. Its last words:\n" + "".join(said[-30:]))


def readable(size):
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    # Whoever types `make test` may have an older one.
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit(
            f"hf_iclr needs Python 3.11 or later, got {sys.version.split()[0]} ({sys.executable}). If a later one is "
            "installed, name it: `make test PYTHON=python3.12`."
        )
    main(Path(sys.argv[1]))
