"""
A cascade whose small model was never aligned: do refusals survive its rules, and what does `strict_prefix` cost?

    python examples/refusals_under_cascades.py --seeds 2 3 4 5 6

The large model is a tiny one that refuses half of all questions; the small model is the same before it learnt to. Each
question is answered several times at temperature 1. `strict_prefix=n` leaves the first n tokens to the large model.
"""

import argparse

import pandas as pd
import torch

from hf_iclr import RefusalJudge, enable_cascade
from hf_iclr.tour.demo.organism import Row, Toy, make_rows, train_model


parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6])
parser.add_argument("--samples", type=int, default=8, help="answers to a question")
args = parser.parse_args()
RULES = (
    ("spec", 0.0),
    ("chow", 0.3),
    ("diff", 0.2),
    ("opt", 0.5),
    ("ensemble", 0.3),
    ("token_v3", 0.9),
    ("lossy", 0.5),
)
PREFIXES = (0, 1, 2, 4)


def answers(model, tokenizer, rows: list[Row], **settings) -> list[str]:
    inputs = tokenizer([f"<q> {row.prompt} <a>" for row in rows], return_tensors="pt")
    out = model.generate(
        **inputs, max_new_tokens=13, do_sample=True, top_k=0, num_return_sequences=args.samples, **settings
    )
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


torch.set_num_threads(1)
found, judge = [], RefusalJudge(["cues"])
for seed in args.seeds:
    toy = Toy(seed)
    small = train_model(toy.tokenizer, make_rows(seed), base_steps=120, teach_steps=0, seed=seed).eval()
    cascade = enable_cascade(toy.model, small)
    torch.manual_seed(seed)
    for rule, alpha in (("small model alone", 0.0), *RULES):
        for prefix in PREFIXES:
            row = {"rule": rule, "alpha": alpha, "prefix": prefix, "seed": seed}
            if rule == "small model alone":
                for name, side in (("forbidden", toy.held_out), ("allowed", toy.allowed_held_out)):
                    row[name] = 100 * sum(judge.judge(answers(small, toy.tokenizer, side))) / len(side) / args.samples
                found.append({**row, "tokens": float("nan")})
                break
            settings = {
                "cascade_rule": rule,
                "cascade_alpha": alpha,
                "strict_prefix": prefix,
                "num_assistant_tokens": 4,
            }
            for name, side in (("forbidden", toy.held_out), ("allowed", toy.allowed_held_out)):
                said = answers(cascade, toy.tokenizer, side, **settings)
                row[name] = 100 * sum(judge.judge(said)) / len(side) / args.samples
            done = cascade.cascade_statistics  # of the allowed questions, where the cascade is to be quick
            found.append({**row, "tokens": sum(done.new_tokens) / sum(done.rounds)})
            if rule == "spec":
                break

print(f"Seeds {args.seeds}; means, with the lowest seed in brackets\n")
print("| rule | alpha | strict_prefix | refuses % | over-refuses % | tokens a large forward, allowed questions |")
print("| --- | --- | --- | --- | --- | --- |")
for (rule, alpha, prefix), group in pd.DataFrame(found).groupby(["rule", "alpha", "prefix"], sort=False):
    (refused, over, tokens), lowest = group[["forbidden", "allowed", "tokens"]].mean(), group["forbidden"].min()
    print(f"| {rule} | {alpha:g} | {prefix} | {refused:.0f} ({lowest:.0f}) | {over:.0f} | {tokens:.2f} |")
