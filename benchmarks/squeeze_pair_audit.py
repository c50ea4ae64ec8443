"""
Do the scores of the pair audit foretell what a DPO step does to the chosen answer? SmolLM2-135M-Instruct, 24 pairs.

    python benchmarks/squeeze_pair_audit.py
    python benchmarks/squeeze_pair_audit.py --data pairs.jsonl.gz --prompt-tokens 32 --answer-tokens 24

The pairs made up here have each of eight chosen answers against a near copy, another answer to the same question, and
the answer to another question. From the same weights, one plain gradient step on each pair alone; then Spearman's rank
correlation of each score with the fall of the chosen answer per token, and with the part of it that the rejected
answer causes, as it is and relative to the rise that the chosen answer causes.
"""

import argparse
import time
from pathlib import Path

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, help="JSON Lines with prompt, chosen, rejected; the first 24 are taken")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=24)
    parser.add_argument("--step-size", type=float, default=1e-4)
    return parse(parser)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from common.report import print_frame
from common.squeeze_step import measure_chosen_change
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.squeeze.pair_audit import SCORES, audit_pairs, filter_pairs


TARGETS = ("fall per token", "push per token", "push over pull")

# question, chosen, a near copy, another answer
QUESTIONS = [
    (
        "How do I keep bread fresh?",
        "Keep it in a paper bag, away from the fridge.",
        "Keep it in a plastic bag, inside of the fridge.",
        "It hardly matters, bread is cheap.",
    ),
    (
        "Why is the sky blue?",
        "Air scatters blue light more than red light.",
        "Air scatters red light more than blue light.",
        "Because it mirrors the sea.",
    ),
    (
        "What is seven times eight?",
        "Seven times eight is fifty-six.",
        "Seven times eight is fifty-four.",
        "I never liked sums.",
    ),
    (
        "When should I water my roses?",
        "Water them early in the morning, at the roots.",
        "Water them early in the evening, on the leaves.",
        "Roses drink when it rains.",
    ),
    (
        "What does a heart do?",
        "It pumps blood through the body.",
        "It cleans blood for the body.",
        "Hearts are a symbol of love.",
    ),
    (
        "How far away is the Moon?",
        "The Moon is about 384,000 kilometres away.",
        "The Moon is about 38,000 kilometres away.",
        "Quite far, you cannot walk there.",
    ),
    (
        "Which language is spoken in Brazil?",
        "Most people in Brazil speak Portuguese.",
        "Most people in Brazil speak Spanish.",
        "Brazil is a large country with many rivers.",
    ),
    (
        "How do I boil an egg?",
        "Put it into boiling water for eight minutes.",
        "Put it into boiling water for eighty minutes.",
        "Ask somebody who can cook.",
    ),
]


def made_up_pairs() -> Dataset:
    rows = []
    for index, (question, chosen, copy, other) in enumerate(QUESTIONS):
        elsewhere = QUESTIONS[(index + 3) % len(QUESTIONS)][1]
        for kind, rejected in (("near copy", copy), ("another answer", other), ("elsewhere", elsewhere)):
            prompt = f"User: {question}\nAssistant:"
            rows.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}", "kind": kind})
    return Dataset.from_list(rows)


def cut(tokenizer, rows: pd.DataFrame, prompt_tokens: int, answer_tokens: int) -> Dataset:
    """The last tokens of each prompt and the first of its answers."""

    def keep(text: str, tokens: slice) -> str:
        return tokenizer.decode(tokenizer(text)["input_ids"][tokens])

    answers = {name: [keep(text, slice(answer_tokens)) for text in rows[name]] for name in ("chosen", "rejected")}
    prompts = [keep(text, slice(-prompt_tokens, None)) for text in rows["prompt"]]
    return Dataset.from_dict({"prompt": prompts, **answers, "kind": ["given"] * len(rows)})


def correlations(table: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for score in SCORES:
        results = {name: spearmanr(table[score], table[name]) for name in TARGETS}
        rows.append({"score": score, **{n: f"{r.statistic:+.2f} (p {r.pvalue:.3f})" for n, r in results.items()}})
    return pd.DataFrame(rows)


def main(args: argparse.Namespace) -> None:
    model, tokenizer = load_demo_model(torch.float32)
    if args.data:
        given = pd.read_json(args.data, lines=True)
        given = given[(given["chosen"] != "") & (given["rejected"] != "")].head(24)
        pairs = cut(tokenizer, given, args.prompt_tokens, args.answer_tokens)
    else:
        pairs = made_up_pairs()
    begin = time.perf_counter()
    table = audit_pairs(model, tokenizer, pairs)
    audit_seconds = time.perf_counter() - begin
    change = measure_chosen_change(model, tokenizer, pairs, step_size=args.step_size)
    table = pd.concat([pd.DataFrame({"kind": pairs["kind"]}), table, change], axis=1)
    tokens = table["tokens_chosen"]
    table["fall per token"] = -table["chosen_change"] / tokens
    table["push per token"] = -table["push_on_chosen"] / tokens
    table["push over pull"] = -table["push_on_chosen"] / (table["chosen_change"] - table["push_on_chosen"])
    print_frame(table, digits=4)

    for label, group in (("all", table), ("without near copies", table[table["kind"] != "near copy"])):
        print(f"\nSpearman, {len(group)} pairs, {label}:")
        print_frame(correlations(group))
    print(f"\n{(table['chosen_change'] < 0).sum()} of {len(pairs)} chosen answers fell; audit {audit_seconds:.1f} s")
    kept = filter_pairs(pairs, table, drop=0.25)
    print(f"kept of {len(pairs)} at drop=.25, by kind: {pd.Series(kept['kind']).value_counts().to_dict()}")

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), ("ches_per_token", "pressure"), strict=True):
        for kind, group in table.groupby("kind"):
            axes.scatter(group[score], group["push over pull"], label=kind, s=16)
        axes.set_xlabel(score)
        axes.set_ylabel("push on chosen over pull")
        axes.legend(fontsize=7)
    table.to_csv(args.out / "squeeze_pair_audit.csv", index=False)
    figure.savefig(args.out / "squeeze_pair_audit.png", dpi=130)


if __name__ == "__main__":
    main(ARGUMENTS)
