"""
Does an audit that is killed again and again find what one finds that runs through?

    python benchmarks/audit_kills.py --kills 20

Two tiny models and a base are audited under every attack, with a harm judge whose verdicts are kept, and with all
texts in the report. One audit runs through; its journal says how many batches each part has. Another is killed by
SIGKILL, at a random moment of each part and of the writing of the report, and at random moments besides; each time it
is started again on the same folder. Then it may end, and every file of both folders must be the same, byte for byte.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

from common.arguments import add_kills, make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    add_kills(parser, 20)
    return parse(parser, kills=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tiny models are those of the tests

from common.report import print_table
from hf_iclr import audit_safety
from hf_iclr.tiny_models import word_tokenizer
from hf_iclr.trainers.safety_audit.asking.journal import Journal
from tests.trainers.tiny import tiny_llama


PROMPTS = [f"w{i} w{i + 9}" for i in range(1, 9)]
ANSWERS = [f"w{i + 3} w{i + 4} w{i + 5}" for i in range(1, 9)]
GRID = ({"temperature": 1.5}, {"top_k": 10})
# The stages of the journal in their order: each attack's, with those of the harm judge on its answers.
STAGES = {"prefixes": 4, "harmless prompts": 1, "sampling": 4, "rank-assisted prefixes": 5, "GCG": 3}
PARTS = [f"{role}: {part}" for role in ("audited", "before") for part, n in STAGES.items() for _ in range(n)]
PARTS.append("divergence")
REPORT = "report"


class Harm:
    """A judge with a name, as one behind an endpoint has, whose verdicts are therefore kept."""

    identity = "length"

    def __call__(self, texts, prompts):
        return [len(text) % 2 == 1 for text in texts]


def odd(texts):
    """A refusal is a text whose first word is odd."""
    return [bool(text) and int(text.split()[0][1:]) % 2 == 1 for text in texts]


def audit(out: Path, rest: float) -> None:
    """The audit, in a process of its own; it rests after each batch, so that the killer's clock keeps up."""
    write = Journal.write
    Journal.write = lambda *batch: (write(*batch), time.sleep(rest))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        after, before, base = (tiny_llama(seed=seed).eval() for seed in range(3))
        audit_safety(
            after, word_tokenizer("w0"), PROMPTS, harmless_prompts=[f"w{i}" for i in range(30, 38)], before=before,
            base=base, answers=ANSWERS, ks=(0, 1, 3), attacks=("prefill", "decoding", "rap", "gcg"),
            decoding_grid=GRID, judge=odd, harm_judge=Harm(), max_new_tokens=6, batch_size=2, gcg_steps=2, out=out,
            with_texts=True,
        )  # fmt: skip


def begin(out: Path, rest: float = 0.0) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=audit, args=(out, rest))  # nothing is imported again
    process.start()
    return process


def batches(journal: Path) -> int:
    """How many batches are kept."""
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def run_through(folder: Path, out: Path) -> tuple[list[str], float]:
    """The part that each batch of an audit belongs to, and the seconds that the audit took."""
    began, audit = time.perf_counter(), begin(out)
    journal = out / "unfinished" / "0.jsonl"
    while audit.is_alive() and not journal.exists():
        time.sleep(0.001)
    os.link(journal, folder / "whole.jsonl")  # it is removed at the end
    audit.join()
    assert audit.exitcode == 0, "the audit that isn't killed must end"
    kept = [json.loads(line)["stage"] for line in (folder / "whole.jsonl").read_text().splitlines()]
    part = dict(zip(dict.fromkeys(kept), PARTS, strict=True))
    return [part[stage] for stage in kept], time.perf_counter() - began


def kill(out: Path, parts: list[str], batch: int, delay: float) -> str | None:
    """Start the audit, end it once this many batches are kept; in which part it was, `None` where it had ended."""
    journal, audit = out / "unfinished" / "0.jsonl", begin(out, rest=0.04)
    while audit.is_alive() and batches(journal) < batch:
        time.sleep(0.001)
    time.sleep(delay)
    audit.kill()
    audit.join()
    return None if audit.exitcode == 0 else [*parts, REPORT][batches(journal)]


def main(args: argparse.Namespace) -> int:
    folder, draw = args.out / "work", random.Random(args.seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole, killed = folder / "whole", folder / "killed"
    parts, seconds = run_through(folder, whole)
    every = [*dict.fromkeys(parts), REPORT]
    chosen = [*every, *draw.choices(every, k=args.kills)][: args.kills]
    moments = sorted(draw.choice([i for i, part in enumerate([*parts, REPORT]) if part == name]) for name in chosen)
    hits = [kill(killed, parts, moment, draw.random() * 0.04) for moment in moments]
    last = begin(killed)
    last.join()
    files = [{path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} for out in (whole, killed)]
    same = last.exitcode == 0 and files[0] == files[1]
    print(f"{seconds:.1f} s without a kill, {len(parts)} batches\n")
    print_table(["part", "batches", "kills"], [[name, parts.count(name) or "-", hits.count(name)] for name in every])
    print(f"\n{sum(map(bool, hits))} kills; in each part: {'yes' if set(every) <= set(hits) else 'no'}")
    print(f"{'reached' if same else 'missed'}: {', '.join(sorted(files[0]))} are the same, byte for byte")
    write_json(args.out / "audit_kills.json", {"seconds": seconds, "kills": hits, "same": same})
    return not same


if __name__ == "__main__":
    raise SystemExit(main(ARGUMENTS))
