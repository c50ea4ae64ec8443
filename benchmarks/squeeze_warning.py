"""
Collects runs (draft).
"""
import argparse, json, time
from pathlib import Path
from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--settings", nargs="+", default=["counting"])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--data", type=Path)
    return parse(parser, seeds=1)


if __name__ == "__main__":
    ARGUMENTS = arguments()

import torch
torch.set_num_threads(1)
from datasets import disable_progress_bars
disable_progress_bars()
from transformers.utils import logging as tl
tl.set_verbosity_error(); tl.disable_progress_bar()
from common.squeeze_arms import ARMS, own_answers, settings, supervised, train_arm


def main(args):
    for name in args.settings:
        setting = settings(args.data)[name]
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            pairs = setting.pairs(seed)
            begin = time.process_time()
            starts = {stage: supervised(setting, pairs[0], seed, steps) for stage, steps in (("short", setting.short), ("long", setting.long))}
            print(name, seed, "sft", round(time.process_time() - begin, 1), flush=True)
            for arm in args.arms or ARMS:
                stage, changes, rate = ARMS[arm]
                path = args.out / f"{name}_{arm.replace(' ', '_')}_{seed}.json"
                if path.exists():
                    continue
                own = pairs
                if arm == "on-policy":
                    own = tuple(own_answers(setting, starts[stage], rows, seed) for rows in pairs)
                run = train_arm(setting, starts[stage], own, seed, rate, **changes)
                path.write_text(json.dumps({"setting": name, "arm": arm, "seed": seed, **run}))
                curve = [round(e["held_out_probe/chosen/logp"], 2) for e in run["log_history"] if "held_out_probe/chosen/logp" in e]
                print(name, seed, arm, round(run["seconds"], 1), curve, flush=True)


if __name__ == "__main__":
    main(ARGUMENTS)
