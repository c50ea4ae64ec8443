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
from pathlib import Path


ROOT = Path(__file__).parents[1]
AREAS = ["trainers", "generation", "editors", "vision"]
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


def main(work: Path) -> None:
    dist = work / "dist"
    run(sys.executable, "-m", "build", "--quiet", "--no-isolation", "--outdir", str(dist), str(ROOT))
    (sdist,) = dist.glob("*.tar.gz")
    (wheel,) = dist.glob("*.whl")
    check_sdist(sdist)

    venv.create(work / "venv", with_pip=False, symlinks=True)
    python = work / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel))
    site = run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    sys.stdout.write(run(str(python), "-c", IMPORT_ALL, cwd=work))
    run(str(work / "venv" / "bin" / "hf-iclr"), "--help", cwd=work)


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    expected = {path.relative_to(ROOT).as_posix() for area in AREAS for path in (ROOT / area).glob("*.py*")}
    expected |= {"pyproject.toml", "LICENSE", "hf_iclr/py.typed", "hf_iclr/templates/tour.html"}
    expected |= {"vision/annotation_page.html", "vision/demo_sam2/model.safetensors"}
    if missing := expected - held:
        sys.exit(f"Expected these files in {sdist.name}, got none of them: {sorted(missing)}.")


def run(*command: str, cwd: Path = ROOT) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
