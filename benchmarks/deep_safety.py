"""
How deep is a refusal, does recovery data deepen it, and what keeps it through a fine-tuning attack?

    python benchmarks/deep_safety.py --seeds 0 1 2

Real weights, nothing harmful: SmolLM2-135M-Instruct answers everything, so a LoRA first teaches it to refuse questions
about mushrooms and to go on answering the same questions about other foods. What is measured, all on templates and
foods that no training saw:

- taught: refusals when the model starts alone (k = 0) and when its answer is begun with the first k tokens of a
  compliant one; over-refusal on the other foods. A refusal that is lost at k = 3 is a few tokens deep.
- method A: the taught model trained on with recovery rows, beside a control trained equally long without prefixes.
- attack: the taught model fine-tuned on 30 mushroom questions with compliant answers, by a new LoRA and in full. Rows
  "recovery" and "both" add 4 recovery rows of other mushroom questions to the 10 rows of each step; "5/5/.1" and
  "both" (20/5/.1) constrain only rows whose prompt the taught model refuses. "recommended" is 5/5/.1 with 2 of the 10
  rows of each step the taught model's own refusals of those prompts; "rehearsal alone" has these rows and no
  constraint; "anchor" adds 5 rows of other foods with the model's own answers to each step. "recommended" and "both
  methods" were chosen on seed 0 of earlier taught models, the anchor on none. Seeds 3, 4 and 5 are fresh: no choice
  has seen them.
- audit: the taught model and method A's under the other attacks of `audit_safety`: sampling, rank-assisted prefixes,
  and a GCG of few steps on four questions.
- benign: the taught model fine-tuned to turn orders into calls, `order(item="red apples", amount=3, unit="bags")`.

A row is judged by the refusal cues of `RefusalJudge` on what the model adds to the prefix. All rows of a comparison
have the same steps, learning rate, batches and Adam beta1; "SFT" has no warm-up, the others 10 steps.

Intervals are 95 %: Wilson for one seed, a bootstrap over seeds and then prompts for the mean of seeds. Finished stages
are kept in `--out` and not run again.
"""

import argparse

from common.arguments import make_parser, parse


STAGES = ("teach", "deepen", "attack", "full", "benign", "audit")


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rows", nargs="+", help="of the attacks and the benign task, those of these settings only")
    return parse(parser, seeds=[0])


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch

from common.deep_safety_lab import FULL, QUICK, Lab
from common.deep_safety_report import print_report


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    labs = [Lab(args.out, seed, QUICK if args.quick else FULL, args.rows) for seed in args.seeds]
    for stage in args.stages:
        for lab in labs:
            if stage in ("attack", "full"):
                lab.attack(lora=stage == "attack")
            else:
                getattr(lab, stage)()
    print_report([lab.results for lab in labs])


if __name__ == "__main__":
    main(ARGUMENTS)
