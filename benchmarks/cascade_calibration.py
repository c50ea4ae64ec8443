"""
Calibration of a cascade to three targets, and the curve of quality against cost, on SmolLM2-135M and a draft of it.

    python benchmarks/cascade_calibration.py --draft DIR

Texts are docstrings of installed packages; held-out prompts are those of texts the calibration never sees.
"""

import argparse
import inspect
import logging
import platform
import random
import time
import warnings

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument(
        "--draft", help="folder of a draft model; without it, one is built from the texts (closed form)"
    )
    parser.add_argument("--rule", default="token_v3")
    parser.add_argument("--max-tokens", type=int, default=4096, help="tokens read, and generated in each check")
    parser.add_argument("--sweep-prompts", type=int, default=4)
    return parse(parser, max_tokens=128, sweep_prompts=1)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import numpy as np
import pandas as pd
import scipy.signal
import scipy.stats
import torch
from transformers import AutoModelForCausalLM

from common.cascade_baselines import bild_generate, sequence_cascade_generate
from common.report import print_table
from hf_iclr import build_draft_model, enable_cascade
from hf_iclr.generation.calibration.calibrate import calibrate_cascade, write_alone
from hf_iclr.generation.calibration.sweep import mean_log_probability, sweep_cascade
from hf_iclr.generation.calibration.teacher_forcing import prepare_config
from hf_iclr.models import pad_rows
from hf_iclr.tour.demo.language_model import fastest_dtype, load_demo_model


TARGETS = ({"deferral_rate": 0.3}, {"acceptance": 0.5}, {"speedup": 1.3})
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def docstrings(count: int) -> list[str]:
    """English prose that every machine with our dependencies has: long docstrings, each once, in a fixed order."""
    modules = (torch, torch.nn, torch.nn.functional, np, pd, pd.DataFrame, pd.Series, scipy.stats, scipy.signal)
    found = {
        inspect.getdoc(getattr(module, name)) or ""
        for module in modules
        for name in dir(module)
        if not name.startswith("_") and callable(getattr(module, name))
    }
    texts = sorted(text for text in found if len(text) > 600)
    random.Random(0).shuffle(texts)
    return texts[:count]


def wall_speedup(model, tokenizer, texts: list[str], max_new_tokens: int) -> float:
    """Seconds a token of the large model alone over those of the cascade, prompt by prompt in turn."""
    config = prepare_config(model, **SAMPLING, max_new_tokens=max_new_tokens)
    plain = cascade = plain_tokens = cascade_tokens = 0.0
    for text in texts:
        inputs = pad_rows([tokenizer(text)["input_ids"][:32]], device=model.device)
        _, tokens, seconds = write_alone(model, inputs, config)
        plain, plain_tokens = plain + seconds, plain_tokens + tokens
        begin = time.perf_counter()
        output = model.generate(**inputs, **SAMPLING, max_new_tokens=max_new_tokens)
        cascade += time.perf_counter() - begin
        cascade_tokens += output.shape[1] - inputs["input_ids"].shape[1]
    return (plain / plain_tokens) / (cascade / cascade_tokens)


def baselines(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[list]:
    """Rows of the sequence-level cascade and of BiLD: setting, mean log-probability, large forwards per token."""
    runs = [(sequence_cascade_generate, SAMPLING, "threshold", value) for value in (-4.0, -3.0, -2.0, -1.0)]
    runs += [(bild_generate, {"do_sample": False}, "rollback_threshold", value) for value in (2.0, 5.0)]
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    rows = []
    for generate, options, name, value in runs:
        outputs, forwards = [], 0
        for prompt in ids:
            inputs = pad_rows([prompt], device=model.device)
            call = {**options, name: value, "max_new_tokens": max_new_tokens}
            sequences, counts = generate(*model.cascade_pair, **inputs, **call)
            outputs.append(sequences[0, len(prompt) :])
            forwards += counts.large_forwards
        quality = mean_log_probability(model, ids, outputs)
        rows.append([generate.__name__, f"{name}={value:g}", quality, forwards / sum(map(len, outputs))])
    return rows


def main(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")  # of deprecated names met while looking for docstrings
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)

    large, tokenizer = load_demo_model(fastest_dtype())
    texts = docstrings(328)
    texts, for_draft = texts[72:], texts[:72]
    if args.draft:
        small = AutoModelForCausalLM.from_pretrained(args.draft, dtype=large.dtype).eval()
    else:
        small = build_draft_model(large.float(), tokenizer, for_draft).to(fastest_dtype())
        large.to(fastest_dtype())
    model = enable_cascade(large, small, cascade_rule=args.rule)

    results = []
    for target in TARGETS:
        begin = time.perf_counter()
        result = calibrate_cascade(
            model, texts, target, tokenizer=tokenizer, max_tokens=args.max_tokens, max_new_tokens=32, batch_size=32,
            **SAMPLING,
        )  # fmt: skip
        row = {
            "target": result.target,
            "value": result.value,
            "alpha": result.alpha,
            "teacher_forced_alpha": result.teacher_forced_alpha,
            "predicted": result.predicted,
            "measured": result.measured,
            "standard_error": result.standard_error,
            "relative_error": result.relative_error,
            "seconds": time.perf_counter() - begin,
            "costs": result.costs._asdict(),
        }
        if result.target == "speedup":
            row["wall_speedup"] = wall_speedup(model, tokenizer, texts[:6], max_new_tokens=64)
        results.append(row)

    shown = [name for name in results[-1] if name != "costs"]
    print_table(shown, [[row.get(name, "") for name in shown] for row in results])

    prompts = [" ".join(text.split()[:12]) for text in texts[: args.sweep_prompts]]
    rules = {"token_v3": [0.3, 0.6, 0.9], "opt": [0.0, 0.3], "chow": [0.4, 0.7]}
    sweep = sweep_cascade(model, prompts, tokenizer=tokenizer, rules=rules, max_new_tokens=40, **SAMPLING)
    print(sweep.table.round(3).to_string())
    sweep.save(args.out)
    print_table(
        ["baseline", "setting", "quality", "large forwards per token"], baselines(model, tokenizer, prompts, 40)
    )
    record = {
        "rule": args.rule,
        "targets": results,
        "conditions": {
            "models": "SmolLM2-135M-Instruct, " + (args.draft or "closed-form draft of 2 layers"),
            "dtype": str(large.dtype),
            "threads": torch.get_num_threads(),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
        },
    }
    write_json(args.out / "targets.json", record)


if __name__ == "__main__":
    main(ARGUMENTS)
