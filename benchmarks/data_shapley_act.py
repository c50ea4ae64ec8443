"""Whether acting on values in the run helps: harmful rows are left out of what is still to come, beside other filters.

    python benchmarks/data_shapley_act.py --data ../shared/data

A Llama of 260 thousand parameters that has read children's stories (without --data: as large a model from scratch, on
bytes of docstrings) is trained for two epochs on 640 blocks of wikitext, half of which are harmful: with wrong
labels, or with answers that repeat a phrase. After the first epoch a filter names rows, and in what follows other rows
are drawn in their place: every arm makes as many steps with as many tokens.

- none, and the harmful rows themselves;
- negative value, by in-run values of the first epoch: within the default cost, and along exact directions;
- highest loss, each row's when it was trained on, and random: as many rows as have a negative value; for the loss
  also a share, which is chosen on some seeds;
- in the step, as GREATS does: of candidates, those with a negative value along the present direction are passed over,
  until the batch is full; a forward pass more for each candidate, and a validation pass every four steps.

All is judged on other seeds. Printed: the loss of held-out rows at the end, less that without a filter, with 95 % t
intervals over seeds.
"""

import argparse
import gzip
from pathlib import Path

from common.arguments import make_parser, parse, write_json


TASKS = ("wrong labels", "poor answers")


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, help="folder with models/stories260k and lm/, instead of bytes")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--choose", type=int, nargs="+", default=[0, 1], help="seeds that choose the share")
    parser.add_argument("--judge", type=int, nargs="+", default=[2, 3, 4], help="seeds that judge")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--harmful", type=float, default=0.5, help="share of the rows")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    return parse(parser, rows=64, epochs=2, choose=[0], judge=[1, 2])


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.report import half_interval
from hf_iclr import InRunDataShapleyCallback
from hf_iclr.tour.demo.draft import docstrings


BATCH, LENGTH, VALIDATION, TEST = 16, 32, 48, 128
SHARES = (0.1, 0.25, 0.5)


def losses(model, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of each row, the mean over its labels."""
    logits = model(input_ids=ids).logits[:, :-1]
    of_tokens = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="none")
    return of_tokens.sum(1) / labels[:, 1:].ne(-100).sum(1)


def mean_loss(model, batch) -> torch.Tensor:
    return losses(model, *batch).mean()


def load(args: argparse.Namespace):
    if args.data:
        return AutoModelForCausalLM.from_pretrained(args.data / "models/stories260k", dtype=torch.float32)
    sizes = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes))


def read(args: argparse.Namespace) -> list[int]:
    """Tokens to train on."""
    if not args.data:
        return list("\n\n".join(docstrings()).encode())
    tokenizer = AutoTokenizer.from_pretrained(args.data / "models/stories260k")
    wikitext = gzip.decompress((args.data / "lm/wikitext2_valid.txt.gz").read_bytes()).decode()
    return tokenizer(wikitext[:200_000])["input_ids"]


class Task:
    """Rows to train on, validation and test rows, and the model to begin with."""

    def __init__(self, name: str, seed: int, args: argparse.Namespace, text: list[int]) -> None:
        self.draw, self.args = np.random.default_rng(seed), args
        count = args.rows + VALIDATION + TEST
        starts = self.draw.permutation(len(text) // LENGTH)[:count] * LENGTH
        ids = torch.tensor([text[at : at + LENGTH] for at in starts])
        labels = ids.clone()
        harmful = self.draw.choice(args.rows, int(args.harmful * args.rows), replace=False)
        if name == "wrong labels":
            wrong = torch.from_numpy(self.draw.random((len(harmful), LENGTH)) < 0.5)
            random = torch.from_numpy(self.draw.integers(3, max(text), (len(harmful), LENGTH)))
            labels[harmful] = torch.where(wrong, random, labels[harmful])
        else:
            labels[:, : LENGTH // 2] = -100
            phrase = ids[harmful, LENGTH // 2 - 4 : LENGTH // 2]
            ids[harmful, LENGTH // 2 :] = labels[harmful, LENGTH // 2 :] = phrase.repeat(1, LENGTH // 8)
        self.harmful = np.isin(np.arange(args.rows), harmful)
        self.train = list(zip(ids[: args.rows], labels[: args.rows], strict=True))
        rest = list(zip(ids[args.rows :], labels[args.rows :], strict=True))
        self.validation = rest[:VALIDATION]
        self.test = tuple(torch.stack(part) for part in zip(*rest[VALIDATION:][: TEST // 2], strict=True))
        self.order = [self.draw.permutation(args.rows) for _ in range(args.epochs)]
        self.start = load(args).state_dict()

    def model(self):
        model = load(self.args)
        model.load_state_dict(self.start)  # random without --data
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.args.lr)
        return model, optimizer

    def batch(self, rows) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = zip(*(self.train[row] for row in rows), strict=True)
        return torch.stack(ids), torch.stack(labels)

    def tested(self, model) -> float:
        with torch.no_grad():
            return mean_loss(model.eval(), self.test).item()


def step(task: Task, model, optimizer, rows) -> torch.Tensor:
    found = losses(model.train(), *task.batch(rows))
    found.mean().backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return found.detach()


def first_epoch(task: Task, **options) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Values and losses of its rows, and where it ended."""
    model, optimizer = task.model()
    seen = np.zeros(len(task.train))
    loader = DataLoader(task.train, batch_size=BATCH, sampler=[int(row) for row in task.order[0]])
    options = {"adam_warmup": 2, "compute_loss": mean_loss, **options}
    with InRunDataShapleyCallback.attach(
        model, optimizer, loader, DataLoader(task.validation, 8), **options
    ) as shapley:
        for place, batch in enumerate(loader):
            found = losses(model.train(), *batch)
            found.mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seen[task.order[0][place * BATCH : (place + 1) * BATCH]] = found.detach()
    values = shapley.result.values().reindex(range(len(task.train)), fill_value=0.0).to_numpy()
    return values, seen, (model.state_dict(), optimizer.state_dict())


def go_on(task: Task, ended: tuple, left_out: np.ndarray, seed: int) -> float:
    """The other epochs, with kept rows in the place of those that are left out."""
    model, optimizer = task.model()
    model.load_state_dict(ended[0])
    optimizer.load_state_dict(ended[1])
    draw = np.random.default_rng(seed)
    kept = np.flatnonzero(~left_out)
    for order in task.order[1:]:
        order = np.where(left_out[order], draw.choice(kept, len(order)), order)
        for at in range(0, len(order), BATCH):
            step(task, model, optimizer, order[at : at + BATCH])
    return task.tested(model)


def in_the_step(task: Task) -> tuple[float, float]:
    """Test loss, and how many candidates a trained row took."""
    model, optimizer = task.model()
    parameters = list(model.parameters())
    ids, labels = (torch.stack(part) for part in zip(*task.validation, strict=True))
    steps, waiting, candidates, taken = task.args.epochs * len(task.train) // BATCH, [], 0, 0
    queue = [row for _ in range(4) for order in task.order for row in order]  # of which the first may suffice
    while taken < steps and candidates + BATCH <= len(queue):
        if taken % 4 == 0 or taken < 2:
            gradient = torch.autograd.grad(mean_loss(model.eval(), (ids, labels)), parameters)
        direction = []
        for parameter, found in zip(parameters, gradient, strict=True):
            state = optimizer.state.get(parameter)
            second = None if not state else state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
            direction.append(found if second is None else (second > 0) * found / (second.sqrt() + 1e-8))
        size = 1e-3 / torch.stack([found.square().sum() for found in direction]).sum().sqrt()
        some = queue[candidates : candidates + BATCH]
        candidates += BATCH
        with torch.no_grad():
            before = losses(model.eval(), *task.batch(some))
            torch._foreach_add_(parameters, direction, alpha=-float(size))
            after = losses(model, *task.batch(some))
            torch._foreach_add_(parameters, direction, alpha=float(size))
        waiting += [row for row, fell in zip(some, before > after, strict=True) if fell]
        while len(waiting) >= BATCH and taken < steps:
            step(task, model, optimizer, waiting[:BATCH])
            waiting, taken = waiting[BATCH:], taken + 1
    return task.tested(model), candidates / (taken * BATCH)


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    ranks = scores.argsort().argsort()
    return float(
        (ranks[positive].sum() - positive.sum() * (positive.sum() - 1) / 2) / positive.sum() / (~positive).sum()
    )


def lowest(scores: np.ndarray, count: int) -> np.ndarray:
    return np.isin(np.arange(len(scores)), scores.argsort()[:count])


def measure(name: str, seed: int, args: argparse.Namespace, text: list[int]) -> dict:
    torch.manual_seed(seed)
    task = Task(name, seed, args, text)
    exact, seen, ended = first_epoch(task, refresh_every=1, exact=True)
    cheap, *_ = first_epoch(task)
    random = np.random.default_rng(seed).random(len(task.train))
    nobody = np.zeros(len(task.train), dtype=bool)
    arms = {
        "none": nobody, "the harmful": task.harmful, "value < 0": cheap < 0, "exact value < 0": exact < 0,
        "random, as many": lowest(random, int((cheap < 0).sum())),
        "loss, as many": lowest(-seen, int((cheap < 0).sum())),
    }  # fmt: skip
    arms |= {f"loss, {share:g}": lowest(-seen, int(share * len(seen))) for share in SHARES}
    found = {arm: go_on(task, ended, left_out, seed) for arm, left_out in arms.items()}
    found["in the step"], candidates = in_the_step(task)
    return {
        "task": name, "seed": seed, "loss": found, "candidates": candidates, "negative": float((cheap < 0).mean()),
        "AUROC": {"value": auroc(-cheap, task.harmful), "exact value": auroc(-exact, task.harmful),
                  "loss": auroc(seen, task.harmful)},
    }  # fmt: skip


def interval(values: list[float]) -> str:
    return f"{np.mean(values):.3f} ± {half_interval(values):.3f}"


def report(name: str, lines: list[dict], args: argparse.Namespace) -> None:
    chosen = [line for line in lines if line["seed"] in args.choose]
    judged = [line for line in lines if line["seed"] in args.judge]
    print(f"\n{name}: loss without a filter {interval([line['loss']['none'] for line in judged])}")
    for kind in ("value", "exact value", "loss"):
        print(f"  AUROC for the harmful rows by {kind}: {interval([line['AUROC'][kind] for line in judged])}")
    best = min(SHARES, key=lambda share: sum(line["loss"][f"loss, {share:g}"] for line in chosen))
    arms = [arm for arm in judged[0]["loss"] if arm[-1] not in "0123456789" or arm.endswith("< 0")]
    for arm in [*arms, f"loss, {best:g}"]:
        print(f"  {arm}: {interval([line['loss'][arm] - line['loss']['none'] for line in judged])}")
    print(f"  candidates a row in the step: {np.mean([line['candidates'] for line in judged]):.2f}", flush=True)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    text = read(args)
    lines = []
    for name in args.tasks:
        mine = [measure(name, seed, args, text) for seed in (*args.choose, *args.judge)]
        report(name, mine, args)
        lines += mine
        write_json(args.out / "data_shapley_act.json", lines)


if __name__ == "__main__":
    main(ARGUMENTS)
