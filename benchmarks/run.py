"""
Prints the figures of README and docs again, keeps them in benchmarks/results, and fails where a claim no longer holds.

    python benchmarks/run.py                        # what there is, and when it was last printed
    python benchmarks/run.py squeeze_toy refusal_judge --data ../shared/data
    python benchmarks/run.py docs/squeeze.md        # all that this page quotes; "all" is everything
    python benchmarks/run.py NAME --printed FILE    # keeps what an earlier run printed, dated by the file
    python benchmarks/run.py --write-docs           # results into the pages, where their marks stand

benchmarks/index.toml names the runs of each script: arguments, and claims. A claim is a pattern that finds one number,
or the same number of several rows, in what is printed; a bound, `at_least` or `at_most`; and `noise`, how far beyond
the bound it may lie by chance. `timed` runs want a core of their own. A page takes over `<!-- result NAME -->`,
everything printed; `<!-- result NAME 2 -->`, the second table; `<!-- result NAME claim -->`, the number. Exit code 1:
a claim does not hold, or a script failed; nothing is kept of a script that failed.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from common.arguments import RESULTS


ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "numpy")
MARK = re.compile(r"(<!-- result ([\w-]+)(?: ([\w-]+))? -->)(.*?)(<!-- end -->)", re.DOTALL)
TABLE = re.compile(r"^\|.*\|\n\|[-:| ]+\|\n(?:^\|.*\|\n?)*", re.MULTILINE)
Run = dict[str, Any]


def load_runs() -> dict[str, Run]:
    """By name, what index.toml says of each run, with its script and the page that quotes it."""
    runs: dict[str, Run] = {}
    for script, row in tomllib.loads((ROOT / "benchmarks" / "index.toml").read_text()).items():
        for run in row.get("runs", ()):
            run = {"script": f"benchmarks/{script}.py", "arguments": "", "page": row["docs"], "claims": {}, **run}
            runs[run.get("name", script)] = run
    return runs


def check(run: Run, printed: str) -> list[dict[str, Any]]:
    """Each claim with the numbers found, and whether it holds. One that finds no number does not."""
    found = []
    for name, claim in run["claims"].items():
        values = [float(value) for value in re.findall(claim["find"], printed)]
        noise = claim.get("noise", 0)
        low, high = claim.get("at_least", -float("inf")) - noise, claim.get("at_most", float("inf")) + noise
        bounds = {key: claim[key] for key in ("says", "at_least", "at_most", "noise") if key in claim}
        holds = bool(values) and all(low <= value <= high for value in values)
        found.append({"name": name, **bounds, "values": values, "holds": holds})
    return found


def tables(printed: str) -> list[dict[str, Any]]:
    """The Markdown tables of what was printed."""
    found = []
    for block in TABLE.findall(printed):
        head, _, *rows = ([cell.strip() for cell in line.strip()[1:-1].split("|")] for line in block.splitlines())
        found.append({"head": head, "rows": rows})
    return found


def execute(name: str, run: Run, data: Path | None) -> str:
    """Run the script as this Python does, and show and return what it prints."""
    command = [sys.executable, str(ROOT / run["script"]), *shlex.split(run["arguments"].replace("{data}", str(data)))]
    if run["script"].startswith("benchmarks/"):
        command += ["--out", str(RESULTS / name)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        command, cwd=ROOT, env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command)
    return "".join(lines)


def surroundings() -> dict[str, Any]:
    """The machine, how busy it is, and what is checked out, and whether code was changed since."""
    about, git = Path("/proc/cpuinfo"), ["git", "-C", str(ROOT)]
    cpu = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    commands = ([*git, "rev-parse", "--short", "HEAD"], [*git, "status", "--porcelain", "--", "*.py"])
    at, changed = (subprocess.run(c, capture_output=True, text=True, check=False).stdout.strip() for c in commands)
    machine = {"cpu": cpu[1] if cpu else platform.processor(), "cores": os.cpu_count()}
    return {**machine, "load": round(os.getloadavg()[0], 1), "commit": at + " and changes" * bool(changed)}


def keep(name: str, run: Run, printed: str, when: datetime.datetime, about: dict[str, Any]) -> bool:
    """Write NAME.json and NAME.md, and say which claims hold."""
    printed = re.sub(r"(?im)^(written to |\d+ s; wrote ).*\n?", "", printed).strip() + "\n"  # names of folders
    settings = RESULTS / name / "settings.json"
    chosen = json.loads(settings.read_text()) if settings.exists() else {}
    result = {
        "name": name,
        "command": f"python {run['script']} {run['arguments'].replace('{data}', 'DIR')}".strip(),
        "date": when.strftime("%Y-%m-%d"),
        **about,
        "settings": {key: value for key, value in chosen.items() if key not in ("out", "data")},
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "claims": check(run, printed),
        "tables": tables(printed),
        "printed": printed,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(page_of(result))
    for claim in result["claims"]:
        told = "holds" if claim["holds"] else "DOES NOT HOLD"
        print(f"{told}: {claim['says']} (found {claim['values'] or 'nothing'})")
    return all(claim["holds"] for claim in result["claims"])


def shown(printed: str) -> str:
    """What was printed, as Markdown: tables as they are, other lines as text."""
    parts, end = [], 0
    for match in [*TABLE.finditer(printed), None]:
        start = match.start() if match else len(printed)
        if text := printed[end:start].strip("\n"):
            parts.append(f"```text\n{text}\n```")
        if match:
            parts.append(match[0].strip())
            end = match.end()
    return "\n\n".join(parts)


def page_of(result: Run) -> str:
    """NAME.md: where it is from, what was printed, and the claims."""
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    claims = [
        f"| {c['says']} | {number(c['values'])} | {bound(c)} | {c.get('noise', 0)} | {('**no**', 'yes')[c['holds']]} |"
        for c in result["claims"]
    ]
    head = ["| claim | found | bound | noise | holds |", "| --- | --- | --- | --- | --- |"]
    table = "\n".join([*head, *claims]) + "\n" if claims else ""
    where = f"`{result['command']}`\n\n{result['date']}, commit {result['commit']}, {result['seconds']} seconds. "
    where += f"{result['cpu']}, {result['cores']} cores, load {result['load']} before. {versions}."
    return f"# {result['name']}\n\n{where}\n\n{shown(result['printed'])}\n\n{table}".rstrip() + "\n"


def bound(claim: Run) -> str:
    return " and ".join(f"{key.replace('_', ' ')} {claim[key]}" for key in ("at_least", "at_most") if key in claim)


def number(values: list[float]) -> str:
    if not values:
        return "nothing"
    low, high = (f"{value:.10g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def filled(page: Path) -> str:
    """The text of a page with what its marks ask for."""

    def fill(match: re.Match) -> str:
        begin, name, part, _, end = match.groups()
        if name == "all":
            return f"{begin}\n{overview()}\n{end}"
        result = json.loads((RESULTS / f"{name}.json").read_text())
        if part and not part.isdigit():
            value = next(number(claim["values"]) for claim in result["claims"] if claim["name"] == part)
            return f"{begin}{value}{end}"
        text = TABLE.findall(result["printed"])[int(part) - 1].strip() if part else shown(result["printed"])
        up = "../" * len(page.relative_to(ROOT).parents[:-1])
        source = f"[`{result['command']}`]({up}benchmarks/results/{name}.md), {result['date']}"
        return f"{begin}\n\n{text}\n\n{source}\n\n{end}"

    return MARK.sub(fill, page.read_text(encoding="utf-8"))


def overview() -> str:
    """One row a run: when it was printed, and whether its claims hold."""
    lines = ["| run | quoted in | printed | claims |", "| --- | --- | --- | --- |"]
    for name, run in load_runs().items():
        path = RESULTS / f"{name}.json"
        printed, claims = "not printed anew", ""
        if path.exists():
            result = json.loads(path.read_text())
            printed = f"{result['date']}, {result['commit']}"
            claims = f"{sum(claim['holds'] for claim in result['claims'])} of {len(result['claims'])} hold"
        lines.append(f"| {name} | {run['page']} | {printed} | {claims} |")
    return "\n".join(lines)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="runs, scripts, pages, or all")
    parser.add_argument("--data", type=Path, help="folder of data that some runs want: see benchmarks/fetch_data.py")
    parser.add_argument("--printed", type=Path, help="what a run of this name printed earlier, instead of running it")
    parser.add_argument("--write-docs", action="store_true", help="fill the marks of README and docs")
    args = parser.parse_args()
    runs = load_runs()
    chosen = {
        name: run
        for name, run in runs.items()
        if {name, run["script"], Path(run["script"]).stem, run["page"], "all"} & set(args.names)
    }
    if args.names and not chosen or args.printed and len(chosen) != 1:
        parser.error(f"expected names among {', '.join(runs)}, one with --printed; got {' '.join(args.names)}")
    failed = []
    for name, run in chosen.items():
        print(f"\n== {name}", flush=True)
        if args.printed:
            when = datetime.datetime.fromtimestamp(args.printed.stat().st_mtime)
            about = {**surroundings(), **dict.fromkeys(("load", "commit", "seconds"), "unknown")}
            good = keep(name, run, args.printed.read_text(), when, about)
        elif "{data}" in run["arguments"] and args.data is None:
            print("left out: it wants --data", flush=True)
            continue
        else:
            about, began = surroundings(), time.time()
            try:
                printed = execute(name, run, args.data and args.data.resolve())
            except subprocess.CalledProcessError as error:
                print(f"FAILED with code {error.returncode}")
                failed.append(name)
                continue
            about["seconds"] = round(time.time() - began)
            good = keep(name, run, printed, datetime.datetime.now(), about)
        failed += [] if good else [name]
    if args.write_docs:
        for page in pages():
            page.write_text(filled(page), encoding="utf-8")
    elif not chosen:
        print(overview())
    if failed:
        print(f"\nNot as claimed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
