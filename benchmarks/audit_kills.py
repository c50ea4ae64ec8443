"""
An audit is killed at random moments, again and again, and started anew each time: does it end, and is its report that
of an audit that ran through?

    python benchmarks/audit_kills.py --kills 20

`hf-iclr audit` runs as a process of its own over every attack on a tiny model with a model before and a base, and is
killed by SIGKILL once it has begun to write. Printed: kills, and whether the files are the same byte for byte.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs before it may run to its end")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parse(parser, kills=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tiny models are those of the tests

from hf_iclr.tiny_models import word_tokenizer
from tests.trainers.tiny import tiny_llama


ATTACKS = [part for name in ("prefill", "decoding", "rap", "gcg") for part in ("--attack", name)]
FILES = ("report.json", "report.html", "model_card.md")


def begin(folder: Path, out: Path) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "hf_iclr", "audit", "after", "--prompts", "prompts.jsonl", "--harmless-prompts", "h.txt",
        "--before", "before", "--base", "base", "--out", str(out), "--max-new-tokens", "6", "--batch-size", "4",
        "--k", "1", "--k", "3", *ATTACKS,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main(args: argparse.Namespace) -> int:
    folder, draw = args.out / "work", random.Random(args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(("after", "before", "base")):
        tiny_llama(seed=seed).save_pretrained(folder / name)
        word_tokenizer("w0").save_pretrained(folder / name)
    rows = [f'{{"prompt": "w{i} w{i + 9}", "answer": "w{i + 3} w{i + 4} w{i + 5}"}}' for i in range(1, 25)]
    (folder / "prompts.jsonl").write_text("\n".join(rows))
    (folder / "h.txt").write_text("\n".join(f"w{i}" for i in range(30, 45)))
    whole, killed = folder / "whole", folder / f"killed-{args.seed}"
    assert begin(folder, whole).wait() == 0, "the audit that isn't killed must end"
    kept = killed / "unfinished" / "0.jsonl"
    sizes = []
    for _ in range(args.kills):
        before, audit = kept.stat().st_size if kept.exists() else 0, begin(folder, killed)
        while audit.poll() is None and not (kept.exists() and kept.stat().st_size > before):
            time.sleep(0.01)
        time.sleep(draw.random() * 0.5)
        audit.send_signal(signal.SIGKILL)
        if audit.wait() == 0:  # it was faster
            break
        sizes.append(kept.stat().st_size if kept.exists() else 0)
    ended = begin(folder, killed).wait() == 0
    same = ended and all((whole / name).read_bytes() == (killed / name).read_bytes() for name in FILES)
    print(f"{len(sizes)} kills; bytes kept after each: {sizes}")
    print(f"{'reached' if same else 'missed'}: the report equals that of an audit that ran through, byte for byte")
    write_json(args.out / "audit_kills.json", {"kills": len(sizes), "bytes": sizes, "same": same})
    return not same


if __name__ == "__main__":
    raise SystemExit(main(ARGUMENTS))
