"""
What an edit costs: target states in batches against one by one, and the low-rank solve against the dense one.

    OMP_NUM_THREADS=1 python benchmarks/alphaedit_speed.py --edits 50 --one-by-one 3

The one-by-one path is the reference algorithm as it states itself: every step runs the whole model on every row of one
request and computes the logits of every position. Both take the same number of steps, without stopping early, and CPU
time is compared. The dense solve is float32 `torch.linalg.solve` on d x d, as in the reference. What either keeps from
earlier batches is made beforehand: P and the second moment of the keys, or the projected keys and their factor.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--one-by-one", type=int, default=3, help="edits made the slow way")
    parser.add_argument("--steps", type=int, default=16)
    return parse(parser, edits=4, one_by_one=1, steps=4)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch

from hf_iclr import AlphaEditConfig, EditRequest
from hf_iclr.editors.alpha_edit.closed_form import EditedKeys
from hf_iclr.editors.alpha_edit.projections import DownProjection, choose_layers, find_down_projections
from hf_iclr.editors.alpha_edit.rows import encode_request
from hf_iclr.editors.alpha_edit.targets import find_target_states
from hf_iclr.models import pad_rows
from hf_iclr.tour.demo.facts import demo_requests
from hf_iclr.tour.demo.language_model import load_demo_model


CONTEXTS = ["{}", "The weather was fine that day. {}", "I think it is like this. {}"]


def cpu_seconds(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def one_by_one(
    model: Any, tokenizer: Any, projection: DownProjection, request: EditRequest, config: AlphaEditConfig
) -> None:
    rows = [
        encode_request(tokenizer, request.prompt, request.subject, request.target_new, context)
        for context in config.context_templates or []
    ]
    batch = pad_rows([row.ids for row in rows])
    lines, ends = torch.arange(len(rows)), torch.tensor([row.subject for row in rows])
    delta = torch.zeros(projection.out_features, requires_grad=True)

    def add(_, __, output: torch.Tensor) -> torch.Tensor:
        moved = output.clone()
        moved[lines, ends] = moved[lines, ends] + delta
        return moved

    optimizer = torch.optim.Adam([delta], lr=config.learning_rate)
    hook = projection.layer.register_forward_hook(add)
    for _ in range(config.num_steps - 1):
        log_probs = model(**batch, use_cache=False).logits.log_softmax(-1)
        loss = sum(
            -log_probs[line, row.start - 1 : len(row.ids) - 1]
            .gather(1, batch["input_ids"][line, row.start : len(row.ids), None])
            .mean()
            for line, row in enumerate(rows)
        )
        optimizer.zero_grad()
        (loss / len(rows)).backward()
        optimizer.step()
    hook.remove()


def solve_times(width: int, previous: int, new: int, preserved: int) -> tuple[float, float]:
    """Median seconds of the low-rank solve in float64 and of the dense one in float32."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, preserved, dtype=torch.float64, generator=generator))[0]
    keys = torch.randn(width, new, dtype=torch.float64, generator=generator)
    before = torch.randn(width, previous, dtype=torch.float64, generator=generator)
    residuals = torch.randn(576, new, generator=generator)
    edited = EditedKeys(basis, 10.0)
    edited.add(before)
    projector = (torch.eye(width, dtype=torch.float64) - basis @ basis.T).float()
    cache, dense_keys = (before @ before.T).float(), keys.float()

    def low_rank() -> None:
        residuals @ edited.add(keys).float()
        edited.keep_first(previous)

    def dense() -> None:
        left = projector @ (dense_keys @ dense_keys.T + cache) + 10.0 * torch.eye(width)
        torch.linalg.solve(left, projector @ dense_keys @ residuals.T)

    return tuple(sorted(cpu_seconds(function) for _ in range(5))[2] for function in (low_rank, dense))


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(torch.float32)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    projections = find_down_projections(model)
    last = choose_layers(projections, "auto")[-1]
    requests = [
        EditRequest(prompt, fact.subject, fact.target_new)
        for fact in demo_requests()
        for prompt in ("The capital of {} is", "The capital city of {} is called", "People in {} travel to")
    ][: args.edits]
    config = AlphaEditConfig(
        context_templates=CONTEXTS, kl_factor=0.0, num_steps=args.steps, loss_threshold=0.0, weight_decay=0.0
    )
    batched = cpu_seconds(
        lambda: find_target_states(model, tokenizer, projections[: last.index + 1], requests, config, progress=False)
    ) / len(requests)
    slow = [
        cpu_seconds(lambda request=request: one_by_one(model, tokenizer, last, request, config))
        for request in requests[: args.one_by_one]
    ]
    single = sorted(slow)[len(slow) // 2]
    print(f"| target states, {args.steps} steps, {len(CONTEXTS)} contexts | CPU s an edit | |\n| --- | --- | --- |")
    print(f"| one by one, full forwards | {single:.2f} | 1.0 x |")
    print(f"| {len(requests)} at once | {batched:.2f} | {single / batched:.1f} x faster |")

    report = {"one by one": single, f"{len(requests)} at once": batched, "solve": []}
    print("\n| solve, d = 1536, m = 400 | low rank, ms | dense, ms | |\n| --- | --- | --- | --- |")
    for previous, new in ((0, 50), (50, 50), (450, 50), (200, 100), (400, 100)):
        fast, dense = solve_times(1536, previous, new, 400)
        report["solve"].append({"before": previous, "new": new, "low rank": fast, "dense": dense})
        times = f"{1e3 * fast:.1f} | {1e3 * dense:.1f} | {dense / fast:.1f} x faster"
        print(f"| {previous} keys before, {new} new | {times} |")
    small, kept, large = 1536 * 400 * 8 / 1e6, (1536 + 450) * 450 * 8 / 1e6, 2 * 1536**2 * 4 / 1e6
    stored = f"{small:.1f} MB a layer (d x m float64) and {kept:.1f} MB for 450 keys"
    print(f"\nStored for it: {stored}; the dense P and cache: {large:.1f} MB.")
    write_json(args.out / "alphaedit_speed.json", report)


if __name__ == "__main__":
    main(ARGUMENTS)
