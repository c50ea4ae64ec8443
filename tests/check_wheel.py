"""
Builds the sdist and, from it, the wheel; installs the wheel in a fresh environment and imports every public name.

To save minutes the fresh environment reads the dependencies from the one that runs this script, by a .pth file. A .pth
file adds a folder but does not run the .pth files inside of it, so the editable install of the project stays unseen.
"""

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
AREAS = ["trainers", "generation", "editors", "vision", "tour", "hf_iclr"]
IMPORT_ALL = """
import sys
from pathlib import Path
import hf_iclr
for name in hf_iclr.__all__:
    getattr(hf_iclr, name)
for name, module in sys.modules.items():
    if name.partition(".")[0] == "hf_iclr":
        assert Path(module.__file__).is_relative_to(sys.prefix), f"{name} came from {module.__file__}"
print(f"{len(hf_iclr.__all__)} public names import from the wheel")
"""
DEMO_WEIGHTS = """
import os, shutil
from hf_iclr.tour.demo.segmenter import load_demo_segmenter
os.environ["HF_ICLR_CACHE"] = str(Path.cwd() / "cache")
try:
    load_demo_segmenter()
except FileNotFoundError as error:
    assert "cp -r tour/demo/sam2" in str(error), error
else:
    raise SystemExit("Expected a sentence about the weights, which the wheel does without, got a pipeline.")
shutil.copytree(Path({weights!r}), Path("cache/demo_sam2"))
load_demo_segmenter()
"""


def main(work: Path) -> None:
    dist = work / "dist"
    run(sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", str(dist), str(ROOT))
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    check_sdist(sdist)
    check_wheel(wheel)

    venv.create(work / "venv", with_pip=False, symlinks=True)
    python = work / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel))
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    weights = DEMO_WEIGHTS.format(weights=str(ROOT / "tour" / "demo" / "sam2"))
    sys.stdout.write(run(str(python), "-c", IMPORT_ALL + weights, cwd=work))
    run(str(work / "venv" / "bin" / "hf-iclr"), "--help", cwd=work)


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for area in AREAS
        for path in (ROOT / area).rglob("*.py*")
        if path.suffix in (".py", ".pyi")
    }
    expected |= {"pyproject.toml", "LICENSE", "hf_iclr/py.typed", "tour/page.html"}
    expected |= {"vision/annotation/page.html", "vision/annotation/page.js", "tour/demo/sam2/model.safetensors"}
    if missing := expected - held:
        sys.exit(f"Expected these files in {sdist.name}, got none of them: {sorted(missing)}.")


def check_wheel(wheel: Path) -> None:
    """The demo's weights stay outside: they were nine tenths of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        if weights := [name for name in archive.namelist() if name.endswith(".safetensors")]:
            sys.exit(f"Expected {wheel.name} without weights, got {', '.join(weights)}.")
    sys.stdout.write(f"{wheel.name} has {wheel.stat().st_size / 1e6:.2f} MB\n")


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
