"""
How often the refusal judges err: on texts written afresh, on families of templates left out of the fit, and on
labelled completions of your own.

    python benchmarks/refusal_judge.py
    python benchmarks/refusal_judge.py --labelled xstest_v2_completions_gpt4.csv --labelled ...

A labelled file has the columns `completion` and `final_label` of XSTest (paul-rottger/exaggerated-safety on GitHub);
full and partial refusals count as refusals.
"""

import argparse
import sys
from pathlib import Path

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--labelled", type=Path, action="append", default=[], help="CSV file of XSTest's shape")
    return parse(parser)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

sys.path.insert(0, str(Path(__file__).parents[1]))  # the examples are those of the tests


import pandas as pd

from hf_iclr.trainers.safety_audit.judge import CLASSIFIER_THRESHOLD, RefusalJudge, fit_refusal_classifier
from hf_iclr.trainers.safety_audit.judge_texts import ANSWERS as ANSWER_FAMILIES
from hf_iclr.trainers.safety_audit.judge_texts import REFUSALS as REFUSAL_FAMILIES
from hf_iclr.trainers.safety_audit.judge_texts import make_refusal_texts
from tests.trainers.safety_audit.refusal_examples import ANSWERS, REFUSALS


def report(title: str, texts: list[str], labels: list[bool]) -> None:
    judge = RefusalJudge()
    votes, truth = judge.votes(texts), pd.Series(labels)
    print(f"\n{title}: {len(texts)} texts, {sum(labels)} refusals")
    rows = {
        name: {
            "refusals found": int((vote & truth).sum()),
            "refusals missed": int((~vote & truth).sum()),
            "false alarms": int((vote & ~truth).sum()),
            "answers passed": int((~vote & ~truth).sum()),
            "accuracy": round(float((vote == truth).mean()), 3),
        }
        for name, vote in votes.items()
    }
    print(pd.DataFrame(rows).T.to_string())
    print(judge.agreement(texts).to_string(index=False))


def report_left_out_families() -> None:
    """Each family of templates, judged by a classifier that was fitted without it."""
    cues, rows = RefusalJudge(["cues"]), []
    families = [*REFUSAL_FAMILIES, *ANSWER_FAMILIES]
    texts, labels = make_refusal_texts(seed=1)
    size = len(texts) // len(families)
    for index, family in enumerate(families):
        part = slice(index * size, (index + 1) * size)
        classifier = fit_refusal_classifier(*make_refusal_texts(leave_out=family))
        probability = classifier.predict_proba(texts[part])[:, 1]
        found = pd.DataFrame({"cues": cues.judge(texts[part]), "classifier": probability > CLASSIFIER_THRESHOLD})
        share = {**found.mean(), "either": found.any(axis=1).mean()}
        rows.append({"left out": family, "refusals": labels[part][0], **{k: round(v, 2) for k, v in share.items()}})
    print("\nShare called a refusal, in families that the classifier wasn't fitted on")
    print(pd.DataFrame(rows).to_string(index=False))


def main(args: argparse.Namespace) -> None:
    report("Written afresh", [*REFUSALS, *ANSWERS], [True] * len(REFUSALS) + [False] * len(ANSWERS))
    report_left_out_families()
    for path in args.labelled:
        table = pd.read_csv(path).dropna(subset=["completion", "final_label"])
        report(path.name, table["completion"].tolist(), table["final_label"].str.contains("refusal").tolist())


if __name__ == "__main__":
    main(ARGUMENTS)
