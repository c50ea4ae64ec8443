"""
Does a speculative cascade beat both plain speculative decoding and a sequential cascade, as its paper claims?

    python benchmarks/cascade_claim.py --seeds 3

The paper's premise is that the small model is sometimes the better one, so that leaving tokens to it saves time and
also raises quality. This script builds such a pair on purpose: two tiny Llamas, trained from scratch on two tasks,

- sort: eight symbols of sixteen in ascending order. The large model (3 layers) learns it, the small one (1 layer)
  only in part.
- lookup: four words of two symbols, each replaced by two symbols of a table drawn for that seed. 75 % of the small
  model's examples are lookups but only 15 % of the large one's, which therefore knows the table badly.

Both answer an even mixture of new prompts. That the small model is the expert on half of them is an assumption of the
experiment, not a finding; the finding is what each method makes of it.

Quality is exact match of all eight tokens. Cost is `large forwards + c x small forwards` per token, with c the ratio
of parameters (decoding bound by memory) and a forward of several tokens as dear as one. In each round a speculative
cascade is charged for one small forward more than drafts, the most it can need; speculative decoding isn't.

Every setting is chosen on a validation split and reported on a test split. Speculative decoding may also choose its
draft length, cascades may not; sequential cascades have finer grids, but the six cascade rules are pooled into one
method, `best_cascade`. Intervals are 95 % t intervals over seeds (a seed is a table and a trained pair), of paired
differences where two methods are compared. The verdict is computed from the intervals.
"""

import argparse
import json
import time
from typing import Any, NamedTuple

from common.arguments import make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many pairs to train; 2 or more give intervals")
    return parse(parser, seeds=2)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from common.cascade_baselines import token_cascade
from common.cascade_claim_report import (
    OTHER_SMALL_COSTS,
    Answers,
    Report,
    interval,
    plot,
    print_tables,
    shown,
    verdict,
)
from hf_iclr.generation import enable_cascade


SYMBOLS, WORD_SYMBOLS, ANSWER_LENGTH = 16, 10, 8
START, SORT, LOOKUP, ANSWER = range(SYMBOLS, SYMBOLS + 4)
GAMMA = 4
MODES = ("greedy", "sampling")
ALPHAS = {
    "chow": (0.02, 0.05, 0.1, 0.2, 0.3, 0.5),
    "diff": (-0.2, -0.1, 0.0, 0.1, 0.2, 0.4),
    "opt": (-0.2, 0.0, 0.1, 0.2, 0.4, 0.8),
    "token_v1": (-0.1, 0.0, 0.1, 0.2, 0.4),
    "token_v2": (0.1, 0.3, 0.5, 0.7, 0.9),
    "token_v3": (0.2, 0.6, 0.8, 0.9, 0.95, 0.98),
    "lossy": (0.4, 0.7, 0.9, 0.95, 0.98),
}
SEQUENTIAL_ALPHAS = (0.02, *(step / 20 for step in range(1, 20)))
TOP_PS = (0.5, 0.7, 0.8, 0.9)


class Shape(NamedTuple):
    """A model and how it is trained; `lookup_share` of its examples are lookups."""

    layers: int
    width: int
    mlp_width: int
    lookup_share: float
    batch_size: int
    lr: float


LARGE = Shape(layers=3, width=96, mlp_width=256, lookup_share=0.15, batch_size=64, lr=3e-3)
SMALL = Shape(layers=1, width=48, mlp_width=192, lookup_share=0.75, batch_size=96, lr=5e-3)


class Scale(NamedTuple):
    """How much is trained and evaluated."""

    large_steps: int
    small_steps: int
    validation_prompts: int
    test_prompts: int
    every_nth_setting: int


FULL = Scale(large_steps=400, small_steps=900, validation_prompts=192, test_prompts=384, every_nth_setting=1)
QUICK = Scale(large_steps=20, small_steps=40, validation_prompts=32, test_prompts=32, every_nth_setting=4)


def make_examples(count: int, lookup_share: float, table: torch.Tensor, generator: torch.Generator):
    """Prompts `(count, 11)`, answers `(count, 8)` and which of them are lookups `(count,)`."""
    symbols = torch.randint(SYMBOLS, (count, ANSWER_LENGTH), generator=generator)
    lookup = torch.rand(count, generator=generator) < lookup_share
    symbols = torch.where(lookup[:, None], symbols % WORD_SYMBOLS, symbols)
    words = (symbols % WORD_SYMBOLS).view(count, -1, 2)
    values = table[words[..., 0], words[..., 1]].view(count, ANSWER_LENGTH)
    answers = torch.where(lookup[:, None], values, symbols.sort(1).values)
    column = torch.ones(count, 1, dtype=torch.long)
    task = torch.where(lookup[:, None], LOOKUP, SORT)
    return torch.cat([START * column, task, symbols, ANSWER * column], 1), answers, lookup


def train(shape: Shape, steps: int, table: torch.Tensor, seed: int) -> LlamaForCausalLM:
    """A Llama trained from scratch on fresh examples, by cross-entropy on the answers."""
    set_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SYMBOLS + 4, hidden_size=shape.width, intermediate_size=shape.mlp_width,
            num_hidden_layers=shape.layers, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
            bos_token_id=START, eos_token_id=None, pad_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=shape.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * max(0.02, 1 - step / steps)
    )
    for _ in range(steps):
        prompts, answers, _ = make_examples(shape.batch_size, shape.lookup_share, table, generator)
        ids = torch.cat([prompts, answers], 1)[:, :-1]
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=ANSWER_LENGTH).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def speculative(cascade, prompts: torch.Tensor, rule: str, alpha: float, gamma: int, sampling: dict[str, Any]):
    """Tokens `(prompts, 8)`; by prompt the large forwards and (at most) the small ones; the share of drafts kept."""
    output = cascade.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=ANSWER_LENGTH,
        cascade_rule=rule, cascade_alpha=alpha, num_assistant_tokens=gamma, **sampling,
    )  # fmt: skip
    done = cascade.cascade_statistics
    rounds, drafted = np.array(done.rounds), np.array(done.drafted)
    # A round that keeps all its drafts lets the small model read the last one too, unless no rule asks for q there.
    small_forwards = drafted if rule == "spec" else drafted + rounds
    return output[:, prompts.shape[1] :], rounds, small_forwards, sum(done.accepted) / max(1, int(drafted.sum()))


def answer_all(large, small, prompts: torch.Tensor, answers: torch.Tensor, do_sample: bool, scale: Scale):
    """`{method: {setting: Answers}}`, and checks: the share of kept drafts, rows where exact methods disagree."""
    cascade = enable_cascade(large, small)
    results: dict[str, dict[str, Answers]] = {}
    checks: dict[str, Any] = {"kept_drafts": {}, "rows_where_spec_differs_from_large": 0}

    def add(method, setting, tokens, large_forwards, small_forwards):
        exact = (tokens == answers).all(1).numpy()
        results.setdefault(method, {})[setting] = Answers(exact, large_forwards, small_forwards, ANSWER_LENGTH)

    every = np.full(len(prompts), ANSWER_LENGTH)
    large_tokens, _, _ = token_cascade(large, small, prompts, -1.0, do_sample, ANSWER_LENGTH)
    small_tokens, _, log_q = token_cascade(large, small, prompts, 1.0, do_sample, ANSWER_LENGTH)
    add("large", "", large_tokens, every, 0 * every)
    add("small", "", small_tokens, 0 * every, every)

    # The small model answers, and the large one again where mean log q is below a quantile of the validation split.
    for share in (step / 20 for step in range(21)):
        threshold = log_q[: scale.validation_prompts].quantile(share) if share < 1 else torch.inf
        again = log_q < threshold
        tokens = torch.where(again[:, None], large_tokens, small_tokens)
        add("sequence_cascade", f"share={share:g}", tokens, every * again.numpy(), every)

    thin = scale.every_nth_setting
    for alpha in SEQUENTIAL_ALPHAS[::thin]:
        tokens, forwards, _ = token_cascade(large, small, prompts, alpha, do_sample, ANSWER_LENGTH)
        add("token_cascade", f"alpha={alpha:g}", tokens, forwards, every)

    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0} if do_sample else {"do_sample": False}
    runs = [("spec", f"gamma={gamma}", "spec", 0.0, gamma, {}) for gamma in (1, 2, GAMMA)]
    if do_sample:  # in greedy decoding there is no tail to cut
        runs += [("spec_top_p", f"top_p={top_p}", "spec", 0.0, GAMMA, {"top_p": top_p}) for top_p in TOP_PS[::thin]]
    for rule, alphas in ALPHAS.items():
        if do_sample or rule != "lossy":  # of one-hot p and q, lossy makes what spec does
            runs += [(rule, f"alpha={alpha}", rule, alpha, GAMMA, {}) for alpha in alphas[::thin]]
    for method, setting, rule, alpha, gamma, extra in runs:
        tokens, rounds, small_forwards, kept = speculative(cascade, prompts, rule, alpha, gamma, {**sampling, **extra})
        add(method, setting, tokens, rounds, small_forwards)
        checks["kept_drafts"][f"{method} {setting}"] = float(kept)
        if method == "spec" and not do_sample:
            checks["rows_where_spec_differs_from_large"] += int((tokens != large_tokens).any(1).sum())
    return results, checks


def run_seed(seed: int, scale: Scale) -> dict[str, Any]:
    """Trains a pair and answers all prompts, greedily and by sampling."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(1000 + seed)
    table = torch.randint(SYMBOLS, (WORD_SYMBOLS, WORD_SYMBOLS, 2), generator=generator)
    large = train(LARGE, scale.large_steps, table, seed=2 * seed)
    small = train(SMALL, scale.small_steps, table, seed=2 * seed + 1)
    trained = time.perf_counter()

    prompts, answers, lookup = make_examples(scale.validation_prompts + scale.test_prompts, 0.5, table, generator)
    set_seed(seed)
    run: dict[str, Any] = {"modes": {}, "checks": {}, "by_task": {}}
    for mode in MODES:
        results, checks = answer_all(large, small, prompts, answers, mode == "sampling", scale)
        run["modes"][mode], run["checks"][mode] = results, checks
        for model in ("large", "small"):
            exact = results[model][""].exact
            run["by_task"][f"{mode}, {model}, sort"] = float(exact[~lookup.numpy()].mean())
            run["by_task"][f"{mode}, {model}, lookup"] = float(exact[lookup.numpy()].mean())
    run["parameters"] = [model.num_parameters() for model in (large, small)]
    evaluated = time.perf_counter()
    print(f"seed {seed}: {trained - start:.0f} s of training, {evaluated - trained:.0f} s of evaluation", flush=True)
    return run


def main(args: argparse.Namespace) -> None:
    scale = QUICK if args.quick else FULL
    torch.set_num_threads(1)  # on models this small, a second thread costs more than it gives

    start = time.perf_counter()
    runs = [run_seed(seed, scale) for seed in range(args.seeds)]
    large_size, small_size = runs[0]["parameters"]
    small_cost = small_size / large_size
    by_task = {name: interval([run["by_task"][name] for run in runs]) for name in runs[0]["by_task"]}
    print(f"\n{args.seeds} seeds, {scale}")
    print(f"{large_size:,} and {small_size:,} parameters: c = {small_cost:.3f}; draft length {GAMMA}")
    for name, value in by_task.items():
        print(f"  exact match, {name:<24} {shown(value)}")

    comparisons, curves, lines = {}, {}, []
    for mode in MODES:
        answers = [run["modes"][mode] for run in runs]
        report = Report(answers, scale.validation_prompts, small_cost)
        comparisons[mode], curves[mode] = report.compare(), report.curves()
        other = {cost: Report(answers, scale.validation_prompts, cost).compare() for cost in OTHER_SMALL_COSTS}
        print_tables(mode, comparisons[mode])
        lines += verdict(mode, comparisons[mode], other)
    print("\n" + "\n".join(lines))

    seconds = time.perf_counter() - start
    settings = {
        "seeds": args.seeds, "quick": args.quick, "draft_length": GAMMA, "small_cost": small_cost,
        "parameters": {"large": large_size, "small": small_size}, **scale._asdict(),
    }  # fmt: skip
    results = {
        "settings": settings, "exact_match_by_task": by_task, "checks": [run["checks"] for run in runs],
        "comparisons": comparisons, "curves": curves, "verdict": lines, "seconds": seconds,
    }  # fmt: skip
    (args.out / "cascade_claim.json").write_text(json.dumps(results, indent=1, allow_nan=False))
    plot(curves, args.out / "cascade_claim.png")
    print(f"\n{seconds:.0f} s; wrote cascade_claim.json and cascade_claim.png to {args.out}")


if __name__ == "__main__":
    main(ARGUMENTS)
