"""Candidate warnings, and how well each foretells that held-out chosen answers are lost; for squeeze_warning.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats


HEALTHY = ("null", "sft", "sft, long before", "sigmoid + sft", "gentle")  # arms that should lose nothing
MARGIN = 0.05  # nats a token: a fall of the held-out chosen answers that counts within the next quarter of a run
LOST = 0.1  # and one that counts at the end of a run
BYSTANDERS = ("other_test", "other_train", "permuted")


@dataclass
class Run:
    """
    What one run logged, a value an evaluation.

    Args:
        setting, arm, action, seed:
            Which one it is.
        curves (`dict[str, list[float]]`):
            By key.
        steps (`list[int]`):
            Of the evaluations, the first before any step.
    """

    setting: str
    arm: str
    action: str | None
    seed: int
    curves: dict[str, list[float]]
    steps: list[int]

    @property
    def held_out(self) -> list[float]:
        """Chosen answers of all held-out pairs, which no candidate sees but through its own probes."""
        return self.curves["eval_squeeze/logp_tok_chosen"]

    @property
    def loses(self) -> bool:
        """Whether they end lower than they began."""
        return self.held_out[0] - self.held_out[-1] >= LOST


def read_run(saved: dict[str, Any]) -> Run:
    by_step: dict[str, dict[int, float]] = {}
    for entry in saved["log_history"]:
        for key, value in entry.items():
            if isinstance(value, (int, float)):
                by_step.setdefault(key, {})[entry["step"]] = value
    curves = {key: [points[step] for step in sorted(points)] for key, points in by_step.items()}
    steps = sorted(by_step["eval_squeeze/logp_tok_chosen"])
    return Run(saved["setting"], saved["arm"], saved["action"], saved["seed"], curves, steps)


def below_highest(key: str) -> Callable[[Run], list[float]]:
    def score(run: Run) -> list[float]:
        values = run.curves[key]
        return [max(values[: at + 1]) - value for at, value in enumerate(values)]

    return score


def change(key: str) -> Callable[[Run], list[float]]:
    return lambda run: [value - run.curves[key][0] for value in run.curves[key]]


def bystanders_down(run: Run) -> list[float]:
    """Mean fall of the answers nobody trains on since the start."""
    kinds = [run.curves[f"probe/{kind}/logp"] for kind in BYSTANDERS]
    return [-sum(kind[at] - kind[0] for kind in kinds) / len(kinds) for at in range(len(kinds[0]))]


def excess_over_sft(rate: float) -> Callable[[Run], list[float]]:
    """The same less what SFT with this rise of the chosen answers would do."""

    def score(run: Run) -> list[float]:
        chosen = change("probe/chosen/logp")(run)
        return [down - rate * max(up, 0.0) for down, up in zip(bystanders_down(run), chosen, strict=True)]

    return score


def sft_rate(runs: Sequence[Run]) -> float:
    """Fall of the bystanders for a rise of the chosen answers by one, at the end of SFT runs."""
    ends = [
        (bystanders_down(run)[-1], change("probe/chosen/logp")(run)[-1]) for run in runs if run.arm.startswith("sft")
    ]
    return max(sum(down for down, _ in ends) / max(sum(up for _, up in ends), 1e-9), 0.0)


def candidates(calibration: Sequence[Run]) -> dict[str, Callable[[Run], list[float]]]:
    return {
        "held-out chosen below its highest": below_highest("held_out_probe/chosen/logp"),
        "trained chosen below its highest": below_highest("probe/chosen/logp"),
        "bystanders down in excess of SFT": excess_over_sft(sft_rate(calibration)),
        "argmax on rejected prefixes up": change("probe/rejected/logp_argmax"),
        "share of held-out pairs displaced": change("eval_squeeze/chosen_down"),
    }


def targets(run: Run) -> list[bool]:
    """Whether the held-out chosen answers fall within the next quarter, for each evaluation that has one to come."""
    values = run.held_out
    quarter = max((len(values) - 1) // 4, 1)
    return [values[at] - min(values[at + 1 : at + 1 + quarter]) >= MARGIN for at in range(len(values) - 1)]


def auc(runs: Sequence[Run], score: Callable[[Run], list[float]]) -> float:
    """Of the score as a forecast of the target over all evaluations but the first: 0.5 is chance."""
    points = [pair for run in runs for pair in list(zip(score(run), targets(run), strict=False))[1:]]
    yes, no = [s for s, hit in points if hit], [s for s, hit in points if not hit]
    if not yes or not no:
        return float("nan")
    return sum((a > b) + 0.5 * (a == b) for a in yes for b in no) / (len(yes) * len(no))


def alarm(scores: Sequence[float], threshold: float, patience: int = 1) -> int | None:
    """The evaluation at which the score has been at the threshold for `patience` evaluations."""
    for at in range(patience, len(scores)):
        if min(scores[at + 1 - patience : at + 1]) >= threshold:
            return at
    return None


def lowest_threshold(
    runs: Sequence[Run], score: Callable[[Run], list[float]], patience: int, rate: float = 0.05
) -> float:
    """The lowest at which at most this share of the runs that lose nothing raises an alarm."""
    reach = []  # a run alarms at every threshold up to its highest score, or row of scores
    for run in runs:
        if not run.loses:
            scores = score(run)
            rows = [scores[at + 1 - patience : at + 1] for at in range(patience, len(scores))]
            reach.append(max(map(min, rows)))
    reach.sort()
    return max(reach[len(reach) - 1 - int(rate * len(reach))], 0.0) * 1.0001 + 1e-6


def at_most(alarms: int, runs: int) -> float:
    """The rate of alarms that these runs leave possible: the exact one-sided 95 % limit of a binomial."""
    return float(stats.beta.ppf(0.95, alarms + 1, runs - alarms)) if alarms < runs else 1.0
