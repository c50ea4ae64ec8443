"""
Two people annotate two videos on the page, and its server is killed at random moments, again and again: is everything
that it answered there again?

    python benchmarks/annotation_kills.py --kills 50

They click, draw, name, remove, undo and redo, track, accept and reject, one request after another over HTTP; each life
of the server begins with the folder as the SIGKILL left it, and ends at a time drawn from 0 to `--seconds`. Printed is
during which request each kill came ("starting" is before the first answer), and counted: edits and decisions that were
answered and are not in the database; states (prompts, objects with class and decision, undo and redo) and masks that
differ from those of the last answer. An edit that was not answered may have been kept.
"""

import argparse
import os
import sys
from pathlib import Path

from common.arguments import add_kills, make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    add_kills(parser, 50)
    parser.add_argument("--seconds", type=float, default=4.0, help="longest life of a server")
    return parse(parser, kills=3)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))  # the people are those of the tests

import tempfile

import torch

from common.report import print_table
from common.segmenter import load_segmenter
from tests.vision.annotation.killed_server import STAGES, kill_again_and_again
from tests.vision.session.test_frames import smooth, write_video


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    pipe = load_segmenter(None)
    with tempfile.TemporaryDirectory() as folder:
        videos = [write_video(Path(folder, f"{name}.mp4"), smooth(number)) for name, number in (("a", 6), ("b", 8))]
        stages, counts = kill_again_and_again(
            pipe, Path(folder, "project"), videos, args.kills, args.seed, args.seconds
        )
    print_table(["killed during", "kills"], [[stage, stages[stage]] for stage in STAGES if stages[stage]])
    print()
    print_table(["", "count"], [[name, count] for name, count in counts.items()])
    write_json(args.out / "annotation_kills.json", {"seed": args.seed, "kills by stage": stages, **counts})


if __name__ == "__main__":
    main(ARGUMENTS)
