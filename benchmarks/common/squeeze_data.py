"""The pairs of benchmarks/squeeze.py: the authors' probing set from a folder that has it, else the package's own."""

import random
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from common.arguments import find_data
from hf_iclr.tour.demo.pairs import demo_pairs
from hf_iclr.trainers.squeeze import build_probe_set


HH_FILE = "learning_dynamics_hh_formal_prob_train.jsonl.gz"
TRAIN_PAIRS, MAX_PROMPT, MAX_ANSWER, MIN_ANSWER = 16, 20, 20, 6


def load_pairs(folder: Path | None, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[Dataset, Dataset, str]:
    """
    16 training pairs with prompts of at most 20 tokens, other pairs to hold out, and where they come from. Answers are
    cut after the last sentence that fits into 20 tokens, or after 20 tokens; columns beside the pair are rephrases and
    answers to something else.
    """
    path = find_data(folder, HH_FILE)
    if path is not None:
        names = {"chosen_gptsemantic": "chosen_rephrased", "irr_hum": "other_human"}
        rows = load_dataset("json", data_files=str(path), split="train")
        rows = rows.select_columns(["prompt", "chosen", "rejected", *names]).rename_columns(names)
        source = "HH helpful-base, the authors' probing set"
    else:
        rows, source = demo_pairs(), "the pairs of hf_iclr.tour.demo.pairs"
    columns = [column for column in rows.column_names if column != "prompt"]
    rows = rows.map(lambda row: {column: _cut(row[column], tokenizer) for column in columns})
    kept = [
        row
        for row in rows
        if len(tokenizer(row["prompt"])["input_ids"]) <= MAX_PROMPT
        and all(len(tokenizer(row[column])["input_ids"]) >= MIN_ANSWER for column in columns)
    ]
    random.Random(seed).shuffle(kept)
    return Dataset.from_list(kept[:TRAIN_PAIRS]), Dataset.from_list(kept[TRAIN_PAIRS:]), source


def make_probes(train: Dataset, held_out: Dataset, num_probes: int, seed: int) -> tuple[Dataset, Dataset]:
    """Probes on training prompts and on held-out ones, without `random_words`."""
    rephrases = [column for column in train.column_names if column not in ("prompt", "chosen", "rejected")]
    inside = build_probe_set(train, num_probes=num_probes, seed=seed, rephrases=rephrases)
    outside = build_probe_set(held_out, num_probes=num_probes, seed=seed, rephrases=rephrases)
    return (
        inside.remove_columns("random_words"),
        outside.remove_columns("random_words").rename_column("other_train", "other_test"),
    )


def _cut(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    ids = tokenizer(" " + text.strip())["input_ids"]
    short = tokenizer.decode(ids[:MAX_ANSWER])
    if len(ids) <= MAX_ANSWER:
        return short
    end = max(short.rfind(mark) for mark in (". ", "! ", "? "))
    whole = short[: end + 1]
    return whole if len(tokenizer(whole)["input_ids"]) >= MIN_ANSWER else short.rstrip()
