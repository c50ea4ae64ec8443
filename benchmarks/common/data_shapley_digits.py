"""Stage a of benchmarks/data_shapley.py: handwritten digits, a fifth of them with a wrong label."""

import itertools
import math
import tempfile
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator, set_seed

from hf_iclr.trainers.data_shapley import DataShapleyResult, InRunDataShapleyCallback


NOISE, TRAIN_ROWS, VALIDATION_ROWS = 0.2, 1000, 300
OPTIMIZERS = {"SGD": ("sgd", 0.1), "small-step SGD": ("sgd", 0.02), "AdamW": ("adamw_torch", 1e-3)}
GAME_RATES = (0.1, 0.01)
EPOCHS, RETRAIN_EPOCHS, BATCH = 5, 15, 32
GAME_ROWS, GAME_BATCH, GAME_EPOCHS = 48, 8, 3


class Digits(NamedTuple):
    """Rows with `x` (64 pixels in [0, 1]) and `labels`, and which training rows have a wrong label."""

    train: Dataset
    validation: Dataset
    test: Dataset
    wrong: np.ndarray


class Classifier(nn.Module):
    """64 pixels, two hidden layers, ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.layers(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def load_noisy_digits(seed: int) -> Digits:
    """Another split and other wrong labels for every seed."""
    draw = np.random.default_rng(seed)
    pixels, labels = load_digits(return_X_y=True)
    order = draw.permutation(len(labels))
    pixels, labels = (pixels[order] / 16).astype(np.float32), labels[order]
    wrong = draw.random(TRAIN_ROWS) < NOISE
    given = labels.copy()
    given[:TRAIN_ROWS][wrong] = (labels[:TRAIN_ROWS][wrong] + draw.integers(1, 10, wrong.sum())) % 10
    ends = (0, TRAIN_ROWS, TRAIN_ROWS + VALIDATION_ROWS, len(labels))
    parts = [
        Dataset.from_dict({"x": pixels[start:end], "labels": given[start:end]}).with_format("torch")
        for start, end in itertools.pairwise(ends)
    ]
    return Digits(*parts, wrong)


def train(
    rows: Dataset,
    optimizer: str,
    seed: int,
    epochs: int,
    batch: int = BATCH,
    callback: InRunDataShapleyCallback | None = None,
    lr: float | None = None,
    schedule: str = "constant",
) -> tuple[Classifier, DataShapleyResult | None]:
    """A new classifier trained on the rows, and the values that the callback measured."""
    set_seed(seed)
    model = Classifier()
    optim, default_lr = OPTIMIZERS[optimizer]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, per_device_train_batch_size=batch, num_train_epochs=epochs, learning_rate=lr or default_lr,
            optim=optim, lr_scheduler_type=schedule, max_grad_norm=0.0, weight_decay=0.0, seed=seed, use_cpu=True,
            report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            model, args, train_dataset=rows, data_collator=default_data_collator,
            callbacks=[callback] if callback else None,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model.eval(), callback.result if callback else None


def find_noise(seed: int) -> dict[str, Any]:
    """AUROC of each method for the wrong labels, and test accuracy after training without what each would drop."""
    digits = load_noisy_digits(seed)
    scores, found = {}, {}
    for name in OPTIMIZERS:
        callback = InRunDataShapleyCallback(digits.validation, refresh_every=1, exact=True)
        model, result = train(digits.train, name, seed, EPOCHS, callback=callback)
        scores[f"in-run values, {name}"] = -result.values().reindex(range(TRAIN_ROWS)).to_numpy()
        scores[f"final loss, {name}"], scores[f"gradient norm, {name}"] = loss_and_gradient_norm(model, digits.train)
        found[f"explained ratio, {name}"] = result.explained_ratio()
        found[f"harmful, {name}"] = float((result.values() < 0).mean())
    scores["KNN-Shapley"] = -knn_shapley(digits.train, digits.validation)
    found["auroc"] = {name: float(roc_auc_score(digits.wrong, score)) for name, score in scores.items()}
    found["accuracy"] = {name: retrain(digits, scores, name, seed) for name in OPTIMIZERS}
    return found


def retrain(digits: Digits, scores: dict[str, np.ndarray], optimizer: str, seed: int) -> dict[str, dict[str, float]]:
    """
    Test accuracy and share of wrong labels left, each time with as many rows as have a positive in-run value and as
    many steps. The learning rate falls to zero, so that the last steps do not decide.
    """
    values = -scores[f"in-run values, {optimizer}"]
    count = int((values > 0).sum())
    best = {
        "in-run values > 0": np.flatnonzero(values > 0),
        "KNN-Shapley": np.argsort(scores["KNN-Shapley"], kind="stable")[:count],
        "final loss": np.argsort(scores[f"final loss, {optimizer}"], kind="stable")[:count],
        "random": np.random.default_rng(seed).permutation(TRAIN_ROWS)[:count],
        "all rows, as many steps": np.arange(TRAIN_ROWS),
    }
    steps = RETRAIN_EPOCHS * math.ceil(count / BATCH)
    found = {}
    for name, rows in best.items():
        epochs = steps / math.ceil(len(rows) / BATCH)
        model, _ = train(digits.train.select(np.sort(rows)), optimizer, seed + 100, epochs, schedule="linear")
        found[name] = {"rows": len(rows), "wrong": float(digits.wrong[rows].mean()), **accuracy(model, digits.test)}
    return found


def accuracy(model: Classifier, rows: Dataset) -> dict[str, float]:
    with torch.no_grad():
        output = model(**rows[:])
    right = output["logits"].argmax(-1) == rows[:]["labels"]
    return {"accuracy": right.double().mean().item(), "loss": output["loss"].item()}


def loss_and_gradient_norm(model: Classifier, rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, at the end of training."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}

    def loss(weights, x, label):
        return torch.func.functional_call(model, weights, (x[None], label[None]))["loss"]

    of_rows = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0, 0))
    gradients, losses = of_rows(weights, rows[:]["x"], rows[:]["labels"])
    squares = sum(gradient.flatten(1).square().sum(1) for gradient in gradients.values())
    return losses.numpy(), squares.sqrt().numpy()


def knn_shapley(train_rows: Dataset, validation: Dataset, neighbours: int = 5) -> np.ndarray:
    """Exact Shapley values of a nearest-neighbour classifier (https://huggingface.co/papers/1908.08619, theorem 1)."""
    distances = torch.cdist(validation[:]["x"], train_rows[:]["x"])
    order = distances.argsort(1).numpy()  # (validation, train), nearest first
    right = (train_rows[:]["labels"].numpy()[order] == validation[:]["labels"].numpy()[:, None]).astype(float)
    rank = np.arange(1, right.shape[1])
    steps = (right[:, :-1] - right[:, 1:]) / neighbours * np.minimum(neighbours, rank) / rank
    last = right[:, -1:] / right.shape[1]
    sorted_values = np.concatenate([steps[:, ::-1].cumsum(1)[:, ::-1] + last, last], axis=1)
    values = np.zeros_like(sorted_values)
    np.put_along_axis(values, order, sorted_values, 1)
    return values.mean(0)


def play_games(seed: int, lr: float) -> dict[str, Any]:
    """
    Exact Shapley values of every step of a short run, from the losses of all 256 subsets of its batch of 8, beside the
    callback's. The run is repeated by hand from the same start and the same batches.
    """
    digits = load_noisy_digits(seed)
    rows = digits.train.select(range(GAME_ROWS))
    callback = InRunDataShapleyCallback(digits.validation, refresh_every=1, exact=True)
    trained, result = train(rows, "SGD", seed, GAME_EPOCHS, GAME_BATCH, callback, lr)
    set_seed(seed)
    model = Classifier()
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    exact, gap = np.zeros(GAME_ROWS), 0.0
    for _, step in result.rows.groupby("step", sort=True):
        index = step["index"].to_numpy()
        updates = row_updates(model, weights, rows.select(index), lr)
        utility = subset_losses(model, weights, updates, digits.validation)
        values = shapley_values(utility[0] - utility)
        np.add.at(exact, index, values)
        gap += abs(values.sum() - step["value"].sum()) / abs(values.sum())
        weights = {name: weight - updates[name].sum(0) for name, weight in weights.items()}
    replayed = max((weights[name] - weight).abs().max().item() for name, weight in trained.named_parameters())
    first_order = result.values().reindex(range(GAME_ROWS)).to_numpy()
    wrong = digits.wrong[:GAME_ROWS]
    return {
        "pearson": float(stats.pearsonr(exact, first_order)[0]),
        "spearman": float(stats.spearmanr(exact, first_order)[0]),
        "relative error": float(np.abs(exact - first_order).max() / np.abs(exact).max()),
        "gap of a step": float(gap) / result.rows["step"].nunique(),
        "auroc, exact": float(roc_auc_score(wrong, -exact)),
        "auroc, order 1": float(roc_auc_score(wrong, -first_order)),
        "replay error": replayed,
    }


def row_updates(model: Classifier, weights: dict, rows: Dataset, lr: float) -> dict[str, torch.Tensor]:
    """What each row of a batch takes from the weights in a step of SGD."""

    def loss(weights, x, label):
        return torch.func.functional_call(model, weights, (x[None], label[None]))["loss"]

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights, rows[:]["x"], rows[:]["labels"])
    return {name: gradient * lr / len(rows) for name, gradient in gradients.items()}


@torch.no_grad()
def subset_losses(model: Classifier, weights: dict, updates: dict, validation: Dataset) -> np.ndarray:
    """Validation loss after the step of each subset of the batch; bit i of its number tells whether row i is in."""
    members = torch.arange(2**GAME_BATCH)[:, None] >> torch.arange(GAME_BATCH) & 1
    moved = {
        name: weight - torch.einsum("si,i...->s...", members.float(), updates[name])
        for name, weight in weights.items()
    }
    batch = validation[:]

    def loss(weights):
        return torch.func.functional_call(model, weights, (batch["x"], batch["labels"]))["loss"]

    return torch.func.vmap(loss, chunk_size=32)(moved).double().numpy()


def shapley_values(gains: np.ndarray) -> np.ndarray:
    """Of a game given by the gain of each subset, numbered as in [`subset_losses`]."""
    players = int(math.log2(len(gains)))
    subsets = np.arange(len(gains))
    sizes = np.array([int(subset).bit_count() for subset in subsets])
    weight = np.array([1 / (players * math.comb(players - 1, size)) for size in range(players)])
    values = np.zeros(players)
    for player in range(players):
        without = subsets[subsets >> player & 1 == 0]
        values[player] = np.sum(weight[sizes[without]] * (gains[without | 1 << player] - gains[without]))
    return values
