"""
How well does a draft made of SmolLM2 itself imitate it, and what does a token of it cost?

    python benchmarks/draft_model.py --save DIR                                 # reads the large model's states
    python benchmarks/draft_model.py --kind layers --num-layers 3 --save DIR    # the first three layers

Builds the draft twice, in closed form and with distillation, and measures the mean of `sum_v min(p(v), q(v))` (the
chance that a drafted token is accepted) and how often both models rank the same token first, each at temperature 1 and
0.7, on text of which no eight tokens in a row stand in the training texts: docstrings and the model's own answers to
other prompts. Of a feature draft, `second` is the overlap of a round's second draft, made from a predicted state.
`--data` adds `prompts/harmless_instructions.json.gz` (of https://github.com/andyrdt/refusal_direction) and wikitext-2
as plain text, `lm/wikitext2_valid.txt.gz`. Wall and CPU seconds are those of this run; a busy machine shows in their
difference.
"""

import argparse
import gzip
import json
import os
import random
import time
from contextlib import contextmanager
from pathlib import Path

from common.arguments import find_data, make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--save", type=Path, help="folder for the distilled draft")
    parser.add_argument("--data", type=Path, help="folder with prompts/ and lm/ of real text")
    parser.add_argument("--setting", choices=("quick", "full"), default="full")
    parser.add_argument("--kind", choices=("features", "layers"), default="features")
    parser.add_argument("--steps", type=int, help="steps of distillation instead of the setting's")
    parser.add_argument("--num-samples", type=int, help="own answers to learn from instead of the setting's")
    parser.add_argument("--num-layers", type=int, default=2, help="of a draft of layers")
    parser.add_argument("--draft-vocab-size", type=int, default=8192)
    parser.add_argument("--held-out", type=int, default=24, help="texts of each kind to measure on")
    return parse(parser, setting="quick", steps=2, num_samples=2, held_out=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch

from common.report import print_table
from hf_iclr.cache_argument import cache_inputs, find_cache
from hf_iclr.generation.drafting.draft_model import build_draft_model
from hf_iclr.generation.drafting.teacher import read_teacher, sample_texts, tokenize
from hf_iclr.tour.demo.draft import SETTINGS, demo_prompts, docstrings
from hf_iclr.tour.demo.language_model import load_demo_model


TEMPERATURES = (1.0, 0.7)


@contextmanager
def timed(record: dict, name: str):
    """Writes wall and CPU seconds of its body into `record`."""
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    record[name] = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


@torch.no_grad()
def compare(model, draft, rows, unseen) -> dict:
    """Overlap at each temperature and top-1 agreement over the positions that count and `unseen` allows."""
    names = [*(f"overlap T={t}" for t in TEMPERATURES), "second T=1.0", "top-1 agreement", "kept mass"]
    totals, count = dict.fromkeys(names, 0.0), 0
    for row, allowed in zip(rows, unseen, strict=True):
        mask = row.mask & allowed
        mask[:2] = False  # no state stands two tokens before these
        p_logits = model.get_output_embeddings()(row.hidden_states[mask])
        if hasattr(draft, "predict"):
            embeddings, states = model.get_input_embeddings()(row.input_ids), row.hidden_states
            guesses = []
            for _ in range(2):
                states = torch.nn.functional.pad(draft.predict(embeddings[1:], states[:-1]), (0, 0, 1, 0))
                guesses.append(states[mask])
            q_logits, second = (filled(draft, guess) for guess in guesses)
            totals["second T=1.0"] += overlap(p_logits, second, 1.0)
        else:
            q_logits = draft(row.input_ids[None]).logits[0, mask].float()
        for t in TEMPERATURES:
            totals[f"overlap T={t}"] += overlap(p_logits, q_logits, t)
        totals["top-1 agreement"] += (p_logits.argmax(-1) == q_logits.argmax(-1)).sum().item()
        totals["kept mass"] += p_logits.softmax(-1)[:, draft.draft_vocab_ids].sum().item()
        count += int(mask.sum())
    return {name: total / count for name, total in totals.items()} | {"positions": count}


def overlap(p_logits, q_logits, temperature: float) -> float:
    return torch.minimum((p_logits / temperature).softmax(-1), (q_logits / temperature).softmax(-1)).sum().item()


def filled(draft, states) -> torch.Tensor:
    """Logits of the whole vocabulary for predicted states."""
    logits = torch.full((len(states), draft.config.vocab_size), -1e4)
    logits[:, draft.draft_vocab_ids] = draft.head(states)
    return logits


def unseen_positions(rows, training_rows, length: int = 8) -> list[torch.Tensor]:
    """Of each row, the positions whose last `length` tokens stand nowhere in the training texts."""

    def runs(ids):
        return [tuple(ids[max(0, i - length + 1) : i + 1]) for i in range(len(ids))]

    seen = {run for row in training_rows for run in runs(row.input_ids.tolist()) if len(run) == length}
    return [torch.tensor([run not in seen for run in runs(row.input_ids.tolist())]) for row in rows]


@torch.no_grad()
def milliseconds_per_token(model, context: int = 128, repeats: int = 20) -> float:
    """Fastest forward of one token, behind a cache where the model has one."""
    if hasattr(model, "predict"):
        size = model.config.get_text_config().hidden_size
        inputs = torch.randn(2, 1, 1, size, dtype=model.dtype)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            model(*inputs)
            times.append(time.perf_counter() - start)
        return 1000 * min(times)
    ids = torch.randint(3, 1000, (1, context))
    cache = cache_inputs(model, find_cache(model(ids, use_cache=True)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        model(ids[:, :1], use_cache=True, **cache)
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def held_out_texts(model, tokenizer, setting: dict, data: Path | None, count: int) -> dict[str, list]:
    """Named texts that no draft was built from."""
    texts = {
        "docstrings": docstrings()[setting["num_docstrings"] :][:count],
        "own answers": sample_texts(model, tokenizer, demo_prompts()[-count:], seed=1),
    }
    if data is not None:
        with gzip.open(find_data(data, "prompts/harmless_instructions.json.gz"), "rt") as file:
            instructions = [i if isinstance(i, str) else i["instruction"] for i in json.load(file)]
        random.Random(1).shuffle(instructions)
        texts["own answers to real instructions"] = sample_texts(model, tokenizer, instructions[:count], seed=2)
        texts["the same at T=0.7"] = sample_texts(model, tokenizer, instructions[:count], temperature=0.7, seed=2)
        with gzip.open(find_data(data, "lm/wikitext2_valid.txt.gz"), "rt") as file:
            texts["wikitext"] = [line for line in file if len(line) > 600][:count]
    return texts


def main(args: argparse.Namespace) -> None:
    setting = SETTINGS[args.setting]
    steps = setting["distill_steps"] if args.steps is None else args.steps
    num_samples = setting["num_samples"] if args.num_samples is None else args.num_samples

    seconds: dict = {}
    model, tokenizer = load_demo_model(torch.float32)
    texts = docstrings()[: setting["num_docstrings"]]
    with timed(seconds, "sampling"):
        texts += sample_texts(model, tokenizer, demo_prompts()[:num_samples])
    drafts = {}
    for name, distill_steps in (("closed form", 0), ("distilled", steps)):
        with timed(seconds, name):
            drafts[name] = build_draft_model(
                model,
                tokenizer,
                texts,
                kind=args.kind,
                num_layers=args.num_layers,
                draft_vocab_size=args.draft_vocab_size,
                distill_steps=distill_steps,
            )
    if args.save:
        drafts["distilled"].save_pretrained(args.save)

    overlaps: dict = {name: {} for name in drafts}
    training_rows = list(tokenize(tokenizer, texts, 256))
    for text_name, held_out in held_out_texts(model, tokenizer, setting, args.data, args.held_out).items():
        rows = read_teacher(model, tokenizer, held_out)
        unseen = unseen_positions(rows, training_rows)
        for name, draft in drafts.items():
            overlaps[name][text_name] = compare(model, draft, rows, unseen)
    cost = {}
    for dtype in (torch.bfloat16, torch.float32):
        pair = (model.to(dtype), drafts["distilled"].to(dtype))
        cost[str(dtype)] = dict(zip(("large", "draft"), map(milliseconds_per_token, pair), strict=True))

    measured = [[name, text, *row.values()] for name, rows in overlaps.items() for text, row in rows.items()]
    names = next(row for rows in overlaps.values() for row in rows.values())
    print_table(["draft", "text", *names], measured)
    print_table(
        ["ms a token", "large", "draft", "ratio"],
        [[dtype, ms["large"], ms["draft"], ms["draft"] / ms["large"]] for dtype, ms in cost.items()],
    )
    print_table(["seconds", "wall", "CPU"], [[name, spent["wall"], spent["cpu"]] for name, spent in seconds.items()])
    setup = {"threads": torch.get_num_threads(), "load": os.getloadavg(), "torch": torch.__version__}
    report = {"overlap": overlaps, "milliseconds": cost, "seconds": seconds, "machine": setup}
    write_json(args.out / "draft_model.json", report)


if __name__ == "__main__":
    main(ARGUMENTS)
