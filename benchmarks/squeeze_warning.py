"""
Which warning foretells, or at least notices, that a preference training loses its chosen answers? Does acting help?

    python benchmarks/squeeze_warning.py --settings counting --seeds 18
    python benchmarks/squeeze_warning.py --settings stories260k --seeds 8 --data DIR
    python benchmarks/squeeze_warning.py --settings smollm2 --seeds 3 --arms dpo gentle null sft --data DIR

Settings: `counting`, a tiny Llama and made-up pairs that follow a rule; with `--data`, which then holds
`models/stories260k` and `preference/learning_dynamics_hh_formal_prob_train.jsonl.gz`, also `stories260k`, a real model
of 260k parameters, and `smollm2`, SmolLM2-135M-Instruct with LoRA, both on the paper's authors' probing set (answers
cut to 16 tokens). Arms of each seed, from one supervised stage: learning rate 0, SFT (also after a long supervised
stage), sigmoid + SFT, DPO at a twentieth of the rate, DPO on own samples, DPO, DPO after a long supervised stage, and
DPO five times as fast.

Whether a run loses is read off all held-out pairs: their chosen answers end .1 nats a token below their start.
Candidates see probes of 24 or 32 prompts (8 of `smollm2`). Thresholds are the lowest with at most 5 % alarms among the
runs of the first seeds (18 of `counting`, 8 of `stories260k`) that lose nothing, and the rule's own was chosen on
them; all other figures are of later seeds. With `--actions` the losing arms are also run with a gate on
rejected tokens (their gradient times exp(-10 max(S, 0)), S the squeeze pressure); "stop" is read off the runs without
an action.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

from common.arguments import make_parser, parse


CHOOSING = {"counting": 18, "stories260k": 8, "smollm2": 0}  # seeds below choose thresholds
DELTAS = (0.15, 0.2, 0.25, 0.3)
ACTED_ON = ("dpo", "dpo, fast", "dpo, long before", "on-policy")


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--settings", nargs="+", default=["counting"], choices=["counting", "stories260k", "smollm2"])
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--arms", nargs="+", help="some of the arms")
    parser.add_argument("--actions", action="store_true", help="also run the losing arms with a gate")
    parser.add_argument("--data", type=Path, help="folder with the models and the authors' probing set")
    parser.add_argument("--tables", action="store_true", help="only print the tables of the runs in --out again")
    return parse(parser, seeds=2, arms=["null", "dpo"])


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd
import torch
from datasets import disable_progress_bars
from transformers.utils import logging as transformers_logging

from common.squeeze_arms import ARMS, own_answers, settings, supervised, train_arm
from common.squeeze_rules import HEALTHY, Run, alarm, at_most, auc, candidates, lowest_threshold, read_run, targets
from hf_iclr.models import FusedOutputsProxy
from hf_iclr.trainers.squeeze import SqueezeDPOTrainer, SqueezeMonitor
from hf_iclr.trainers.squeeze.metrics import squeeze_pressure


class GatedTrainer(SqueezeDPOTrainer):
    """Scales the gradients of rejected tokens that lie in a valley; the loss keeps its value."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(FusedOutputsProxy(model, self._gate), inputs, *args, **kwargs)

    def _gate(self, outputs, kwargs):
        pressure = squeeze_pressure(outputs.log_probs, outputs.log_sum_sq_probs)
        gate = torch.exp(-10 * pressure.clamp(min=0))
        gate[: len(gate) // 2] = 1.0
        values = outputs.log_probs.detach()
        return type(outputs)(**{**outputs, "log_probs": values + gate * (outputs.log_probs - values)})


def collect(args: argparse.Namespace) -> None:
    disable_progress_bars()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in args.settings:
        setting = settings(args.data)[name]
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            pairs = setting.pairs(seed)
            starts: dict[str, Any] = {}
            for arm, action in [(arm, None) for arm in args.arms or ARMS] + (
                [(arm, "gate") for arm in ACTED_ON] if args.actions else []
            ):
                path = args.out / "_".join(filter(None, (name, arm.replace(" ", "-"), action, f"{seed}.json")))
                if path.exists():
                    continue
                begin = time.process_time()
                stage, changes, rate = ARMS[arm]
                if stage not in starts:
                    starts[stage] = supervised(setting, pairs[0], seed, getattr(setting, stage))
                own = pairs
                if arm == "on-policy":
                    own = tuple(own_answers(setting, starts[stage], rows, seed) for rows in pairs)
                trainer_class = GatedTrainer if action == "gate" else SqueezeDPOTrainer
                log = train_arm(setting, starts[stage], own, seed, rate, trainer_class, **changes)
                path.write_text(
                    json.dumps({"setting": name, "arm": arm, "action": action, "seed": seed, "log_history": log})
                )
                print(f"{path.stem}: {time.process_time() - begin:.0f} s", flush=True)


def scored_alarm(score, threshold: float, patience: int, run: Run) -> int | None:
    return alarm(score(run), threshold, patience)


def shipped_alarm(run: Run, key: str) -> int | None:
    """The evaluation at which the package's monitor warns by these chosen answers."""
    monitor = SqueezeMonitor()
    lost = [bool(monitor.update({key: value, "step": at})) for at, value in enumerate(run.curves[key])]
    return lost.index(True) if any(lost) else None


def judge(runs: list[Run], find) -> dict[str, Any]:
    """
    How often an alarm comes among runs that lose nothing and among those that do; of the latter when, how much of the
    fall is past by then, how many steps before the lowest point that is, and whether a fall in the next quarter of the
    run follows, the target.
    """
    kept, losing = [run for run in runs if not run.loses], [run for run in runs if run.loses]
    healthy = [run for run in kept if run.arm in HEALTHY]
    alarms, more = (sum(find(run) is not None for run in group) for group in (healthy, kept))
    caught = [(run, at) for run in losing if (at := find(run)) is not None]
    gone = [(run.held_out[0] - run.held_out[at]) / (run.held_out[0] - min(run.held_out)) for run, at in caught]
    lead = [run.steps[run.held_out.index(min(run.held_out))] - run.steps[at] for run, at in caught]
    ahead = [targets(run)[at] for run, at in caught if at < len(run.held_out) - 1]
    return {
        "false alarms": f"{alarms} of {len(healthy)}",
        "at most": f"{at_most(alarms, len(healthy)):.1%}" if healthy else "",
        "all that lose nothing": f"{more} of {len(kept)}",
        "caught": f"{len(caught)} of {len(losing)}",
        "at step": median([run.steps[at] for run, at in caught]),
        "past": median(gone),
        "steps to lowest": f"{median(lead)} ({min(lead)} to {max(lead)})" if lead else "",
        "falls on": f"{sum(ahead)} of {len(ahead)}",
    }


def median(values: list) -> Any:
    return round(statistics.median(values), 2) if values else ""


def print_tables(runs: list[Run]) -> None:
    held_out, trained = "held_out_probe/chosen/logp", "probe/chosen/logp"
    plain = [run for run in runs if run.action is None]
    choosing = [run for run in plain if run.seed < CHOOSING[run.setting]]
    judged = [run for run in plain if run not in choosing]
    rows = []
    for setting, arm in dict.fromkeys((run.setting, run.arm) for run in judged):
        group = [run for run in judged if (run.setting, run.arm) == (setting, arm)]
        ends = [run.held_out[-1] - run.held_out[0] for run in group]
        warned = {name: sum(shipped_alarm(run, key) is not None for run in group) for name, key in
                  (("warned, held-out probes", held_out), ("warned, trained probes", trained))}  # fmt: skip
        rows.append(
            {"setting": setting, "arm": arm, "runs": len(group), "change": f"{min(ends):+.2f} to {max(ends):+.2f}",
             "lose": sum(run.loses for run in group), **warned}
        )  # fmt: skip
    print("\nArms, seeds that chose nothing; the change is that of the held-out chosen answers, nats a token")
    print(pd.DataFrame(rows).to_string(index=False))

    rows = []
    for name, score in candidates(choosing).items() if choosing and judged else ():
        for patience in (1, 2):
            threshold = lowest_threshold(choosing, score, patience)
            found = judge(judged, partial(scored_alarm, score, threshold, patience))
            rows.append(
                {"candidate": name, "patience": patience, "AUC": round(auc(judged, score), 2),
                 "threshold": round(threshold, 3), **found}
            )  # fmt: skip
    if rows:
        print("\nCandidates: thresholds from the first seeds, judged on the others")
        print(pd.DataFrame(rows).to_string(index=False))

    score = candidates(choosing)["held-out chosen below its highest"]
    rows = [{"delta": delta, "patience": patience, **judge(choosing, partial(scored_alarm, score, delta, patience))}
            for delta in DELTAS for patience in (1, 2)]  # fmt: skip
    print("\nThe first seeds, which chose: of those surely below 5 % false alarms the one after which most fall on")
    print(pd.DataFrame(rows).to_string(index=False))

    rows = []
    for name, key in (("held-out probes", held_out), ("trained probes", trained)):
        for where in ("all", *dict.fromkeys(run.setting for run in judged)):
            some = [run for run in judged if where in ("all", run.setting)]
            rows.append({"rule by": name, "setting": where, **judge(some, partial(shipped_alarm, key=key))})
    print("\nThe rule as shipped, on the others")
    print(pd.DataFrame(rows).to_string(index=False))

    rows = []
    for run in judged:
        at = shipped_alarm(run, held_out)
        found = {"stop": ends_at(run, at)} if run.arm in ACTED_ON and at is not None else {}
        for other in runs:
            same = (other.setting, other.seed) == (run.setting, run.seed)
            if same and other.arm == run.arm and other.action:
                found[other.action] = ends_at(other)
            if same and run.arm == "dpo" and other.arm == "sigmoid + sft":
                found[other.arm] = ends_at(other)
        for action, ends in found.items():
            pairs = zip(("chosen", "margin", "accuracy"), ends, ends_at(run), strict=True)
            rows.append({"setting": run.setting, "action": action} | {name: a - b for name, a, b in pairs})
    if rows:
        groups = pd.DataFrame(rows).groupby(["setting", "action"], sort=False)
        print("\nActing: held-out chosen answers (nats a token), margin and accuracy at the end, less those without;")
        print("stop where the rule warns, sigmoid + sft in place of the arm dpo")
        table = groups.mean().round(2)
        print(table.assign(runs=groups.size(), better=groups["chosen"].apply(lambda d: (d > 0).sum())).to_string())


def ends_at(run: Run, at: int = -1) -> tuple[float, float, float]:
    return run.held_out[at], run.curves["eval_rewards/margins"][at], run.curves["eval_rewards/accuracies"][at]


def main(args: argparse.Namespace) -> None:
    if not args.tables:
        collect(args)
    print_tables([read_run(json.loads(path.read_text())) for path in sorted(args.out.glob("*.json"))])


if __name__ == "__main__":
    main(ARGUMENTS)
