"""
Fetches the public data that `benchmarks/run.py --data DIR` wants, makes of it what is read, compares checksums.

    python benchmarks/fetch_data.py DIR           # what is there and right is not fetched again
    python benchmarks/fetch_data.py DIR --check   # fetches nothing

benchmarks/data.toml says of each file where it is from, under which licence, and which scripts read it; a few can't be
fetched, and what to do by hand is printed. Exit code 1: a file is missing or not the one that was measured with.
"""

import argparse
import gzip
import hashlib
import json
import tomllib
import urllib.request
from pathlib import Path


FILES = tomllib.loads(Path(__file__).with_name("data.toml").read_text(encoding="utf-8"))
# Records of CounterFact left out of its first 1086: the thousand that were measured with.
LEFT_OUT = {
    13, 18, 37, 51, 55, 70, 84, 87, 92, 106, 116, 172, 181, 193, 200, 212, 235, 251, 253, 256, 265, 267, 305,
    307, 316, 332, 376, 401, 414, 448, 456, 463, 483, 486, 502, 517, 532, 538, 565, 597, 614, 622, 635, 638,
    640, 666, 667, 679, 683, 689, 699, 718, 759, 775, 800, 812, 819, 820, 841, 844, 847, 849, 860, 861, 869,
    873, 883, 888, 904, 923, 929, 940, 945, 948, 951, 976, 992, 1004, 1016, 1020, 1029, 1041, 1051, 1061, 1069,
    1072,
}  # fmt: skip


def me_ppl(content: bytes) -> bytes:
    """The first 4000 sentences of ME-PPL, as JSON lines."""
    rows = [{"text": row["Text"].strip(), "corpus": row["Corpus"]} for row in json.loads(content)[:4000]]
    return json_lines(rows)


def counterfact(content: bytes) -> bytes:
    """A thousand of the first records, without what the benchmarks don't read."""
    keys = ("case_id", "requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts")
    rows = [row for row in json.loads(content) if row["case_id"] < 1086 and row["case_id"] not in LEFT_OUT]
    return json_lines([{key: row[key] for key in keys} for row in rows])


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


MAKE = {"me_ppl": me_ppl, "counterfact": counterfact, None: lambda content: content}


def is_right(path: Path, sha256: str) -> bool:
    if not path.exists():
        return False
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    return hashlib.sha256(content).hexdigest() == sha256


def bring(path: Path, about: dict[str, str], check: bool) -> str:
    """Fetch a file if need be, and say how it stands."""
    if is_right(path, about["sha256"]):
        return "right"
    if check or "by_hand" in about:
        state = "not the file that was measured with" if path.exists() else "missing"
        return f"{state}: {about['by_hand']}" if "by_hand" in about else state
    try:
        with urllib.request.urlopen(about["url"]) as answer:
            content = MAKE[about.get("make")](answer.read())
    except (OSError, ValueError, KeyError) as error:
        return f"could not be had from {about['url']}: {error}"
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        return f"not kept: what {about['url']} has now is not what was measured with"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return "fetched"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="compare what is there, fetch nothing")
    args = parser.parse_args()
    print("| file | licence | read by | state |\n| --- | --- | --- | --- |")
    states = []
    for name, about in FILES.items():
        states.append(bring(args.folder / name, about, args.check))
        print(f"| {name} | {about['licence']} | {about['used_by']} | {states[-1]} |", flush=True)
    return any(state not in ("right", "fetched") for state in states)


if __name__ == "__main__":
    raise SystemExit(main())
