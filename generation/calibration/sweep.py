"""Quality against cost for many rules and alphas, beside either model alone and speculative decoding."""

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from tqdm.auto import tqdm

from hf_iclr.extras import new_figure, require, save_figure
from hf_iclr.models import answer_logits, pad_rows, to_prompt_ids

from ..cached_decoder import vocabulary_size
from ..cascade_call import padding_token
from ..deferral_rules import check_rule
from .calibrate import write_alone
from .teacher_forcing import prepare_config, small_model


logger = logging.getLogger(__name__)

DEFAULT_RULES: dict[str, Sequence[float]] = {
    "spec": [0.0],
    "lossy": [0.2, 0.5, 0.8],
    "ensemble": [0.25, 0.5, 0.75],
    "chow": [0.2, 0.4, 0.6, 0.8],
    "diff": [-0.2, 0.0, 0.2, 0.4],
    "opt": [-0.2, 0.0, 0.2, 0.4],
    "token_v2": [0.05, 0.2, 0.4, 0.6],
    "token_v3": [0.1, 0.3, 0.5, 0.7, 0.9],
}
LARGE, SMALL = "large alone", "small alone"
COSTS = ("relative_latency", "relative_flops", "large_forwards_per_token")


class CascadeSweep:
    """
    What [`sweep_cascade`] measured.

    Attributes:
        table (`pandas.DataFrame`):
            A row for either model alone, and for each rule and alpha: `quality`; the costs `large_forwards_per_token`,
            `relative_latency` (wall time a token) and `relative_flops` (2 x weights x tokens read, a token), the last
            two over those of the large model alone; `tokens_per_large_forward`, `acceptance_rate`, `deferral_rate`,
            `drift` (mean TV(π, p); NaN where it isn't known), `new_tokens`; and `pareto`, true where no other row has
            more quality at lower `cost`.
        texts (`list[list[str]]`):
            The generated texts of each row.
        cost (`str`):
            The column that `pareto` and the plot take as the cost.
    """

    def __init__(self, table: pd.DataFrame, texts: list[list[str]], cost: str):
        self.table, self.texts, self.cost = table, texts, cost
        self.table["pareto"] = pareto_front(table["quality"], table[cost])

    def pareto(self) -> pd.DataFrame:
        """The rows that no other row beats in both quality and cost, cheapest first."""
        return self.table[self.table["pareto"]].sort_values(self.cost)

    def plot(self, path: str | Path | None = None):
        """
        Draws quality against cost with the Pareto front.

        Args:
            path (`str` or `Path`, *optional*):
                Where to save the figure.

        Returns:
            `matplotlib.figure.Figure`
        """
        figure = new_figure("CascadeSweep.plot", (8, 5))
        axes = figure.subplots()
        for rule, rows in self.table.groupby("rule", sort=False):
            axes.plot(rows[self.cost], rows["quality"], "o-", label=rule, linewidth=1)
        front = self.pareto()
        axes.step(front[self.cost], front["quality"], where="post", color="0.6", linewidth=4, alpha=0.5, zorder=0)
        axes.set_xlabel(self.cost.replace("_", " "))
        axes.set_ylabel("quality")
        axes.set_title("Grey: Pareto front")
        axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def save(self, directory: str | Path) -> None:
        """Writes `sweep.csv`, `sweep.json` (with the texts) and, with matplotlib, `sweep.png`."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.table.to_csv(directory / "sweep.csv", index=False)
        rows = json.loads(self.table.to_json(orient="records"))
        for row, texts in zip(rows, self.texts, strict=True):
            row["texts"] = texts
        (directory / "sweep.json").write_text(json.dumps({"cost": self.cost, "rows": rows}, indent=1))
        save_figure(self.plot, directory / "sweep.png")


def pareto_front(quality: npt.ArrayLike, cost: npt.ArrayLike) -> np.ndarray:
    """
    Which points no other point beats: none has at least as much quality at no more cost, and is better in one of the
    two.

    Args:
        quality (`Sequence[float]` or array):
            More is better.
        cost (`Sequence[float]` or array):
            Less is better.

    Returns:
        `np.ndarray` of booleans.
    """
    good, dear = np.asarray(quality, dtype=float), np.asarray(cost, dtype=float)
    no_worse = (good[:, None] >= good) & (dear[:, None] <= dear)  # [i, j]: i is no worse than j
    better = (good[:, None] > good) | (dear[:, None] < dear)
    return ~(no_worse & better).any(0) & ~np.isnan(good)


def sweep_cascade(
    model,
    prompts,
    metric: Callable[[list[str], list], float] | Any | str | None = None,
    *,
    tokenizer,
    rules: dict[str, Sequence[float]] | None = None,
    references: Sequence | None = None,
    cost: str = "relative_latency",
    num_assistant_tokens: int | None = None,
    max_new_tokens: int = 64,
    seed: int = 0,
    **generation_kwargs,
) -> CascadeSweep:
    """
    Generate from the same prompts with each rule and alpha, and with either model alone, and tabulate quality and
    cost. Prompts are run one at a time, so that wall times compare.

    Args:
        model ([`SpeculativeCascadeGenerationMixin`]):
            A composite model, or the result of [`enable_cascade`] with a small model.
        prompts (`list` of `str` or of chats):
            What to generate from.
        metric (`Callable`, `str` or `evaluate.EvaluationModule`, *optional*):
            `metric(texts, references)` returns the quality as one number, more is better; a name is loaded with
            `evaluate.load`, and the first number of its result counts. Defaults to the mean log-probability (nats) a
            generated token has under the large model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both models.
        rules (`dict[str, list[float]]`, *optional*):
            Alphas for each rule; defaults to a coarse grid of eight rules, speculative decoding (exact, lossy, with
            an ensemble as its target) among them.
        references (`Sequence`, *optional*, defaults to the prompts):
            Handed to `metric`, one for each prompt.
        cost (`str`, *optional*, defaults to `"relative_latency"`):
            Column for the Pareto front: `"relative_latency"`, `"relative_flops"` or `"large_forwards_per_token"`.
        num_assistant_tokens (`int`, *optional*):
            Draft length γ. Defaults to the model's.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Tokens to generate.
        seed (`int`, *optional*, defaults to 0):
            Seed of each method's run.
        generation_kwargs (*optional*):
            Arguments of `generate` such as `do_sample=True`.

    Returns:
        [`CascadeSweep`]

    Raises:
        TypeError: if `model` doesn't cascade.
        ValueError: if a rule, an alpha, the cost or the prompts don't fit.

    Example:

    ```python
    >>> sweep = sweep_cascade(model, prompts, tokenizer=tokenizer, rules={"token_v3": [0.2, 0.5, 0.8]}, do_sample=True)
    >>> sweep.pareto()
    >>> sweep.save("curve")
    ```
    """
    small = small_model(model)
    rules = DEFAULT_RULES if rules is None else rules
    for rule, alphas in rules.items():
        for alpha in alphas:
            check_rule(rule, alpha)
    if cost not in COSTS:
        raise ValueError(f"Expected a cost of {', '.join(COSTS)}, got {cost!r}.")
    if len(prompts) == 0:
        raise ValueError("Expected at least one prompt, got none.")
    references = prompts if references is None else references
    if len(references) != len(prompts):
        raise ValueError(f"Expected one reference a prompt, got {len(references)} and {len(prompts)}.")
    measure = _quality_function(metric)

    call = {"max_new_tokens": max_new_tokens, **generation_kwargs}
    config = prepare_config(model, **call)  # the small model samples as the large one would
    if padding_token(config) is None:
        call["pad_token_id"] = config.pad_token_id = 0
    alone = copy.deepcopy(config)  # what the small model has beyond the large one's vocabulary are no tokens
    surplus = range(vocabulary_size(model), vocabulary_size(small))
    alone.suppress_tokens = [*(config.suppress_tokens or ()), *surplus] or None
    if num_assistant_tokens is not None:
        call["num_assistant_tokens"] = num_assistant_tokens
    ids = [
        tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else to_prompt_ids(tokenizer, prompt)
        for prompt in prompts
    ]

    def run(rule, alpha, prompt):
        one = pad_rows([prompt], device=model.device)
        if rule in (LARGE, SMALL):
            half = rule.split()[0]
            output, new, seconds = write_alone(*((model, one, config) if rule == LARGE else (small, one, alone)))
            counts = {f"{half}_forwards": new, f"{half}_tokens": output.shape[1] - 1}
            counts |= {"deferred": new} if rule == LARGE else {"drift": math.nan}
            return output[0, len(prompt) :], {"new_tokens": new, "total_seconds": seconds, **counts}
        output = model.generate(**one, **call, cascade_rule=rule, cascade_alpha=alpha)
        return output[0, len(prompt) :], model.cascade_statistics.to_dict()

    runs = [(LARGE, math.nan), (SMALL, math.nan), *((rule, alpha) for rule in rules for alpha in rules[rule])]
    rows, texts = [], []
    weights = [matmul_weights(half) for half in model.cascade_pair]
    with torch.random.fork_rng(), tqdm(total=len(runs) * len(ids), desc="sweep", unit="prompt") as progress:
        run(*runs[0], ids[0])  # warm-up
        for rule, alpha in runs:
            torch.manual_seed(seed)
            outputs, done = [], []
            for prompt in ids:
                output, counts = run(rule, alpha, prompt)
                outputs.append(output)
                done.append(counts)
                progress.update()
            texts.append(tokenizer.batch_decode(outputs, skip_special_tokens=True))
            quality = (
                mean_log_probability(model, ids, outputs) if measure is None else measure(texts[-1], list(references))
            )
            rows.append({"rule": rule, "alpha": alpha, "quality": quality, **_costs(done, weights)})
            logger.info("%s alpha=%g: quality %.4g", rule, alpha, quality)
    table = pd.DataFrame(rows)
    for name in ("relative_latency", "relative_flops"):
        table[name] /= table[name][0]  # the large model alone stands first
    return CascadeSweep(table, texts, cost)


def _quality_function(metric) -> Callable[[list[str], list], float] | None:
    if isinstance(metric, str):
        require("metrics", f"quality={metric!r}", "evaluate")
        import evaluate

        metric = evaluate.load(metric)
    if metric is None or callable(metric):
        return metric

    def compute(texts, references):
        result = metric.compute(predictions=texts, references=references)
        return next(float(value) for value in result.values() if isinstance(value, (int, float)))

    return compute


def mean_log_probability(model, prompts: list[list[int]], outputs: list[torch.Tensor]) -> float:
    """Mean over all generated tokens of their log-probability (nats, temperature 1) under the large model."""
    total = 0.0
    for rows, logits in answer_logits(model, prompts, [output.tolist() for output in outputs], batch_size=1):
        total += float(logits[0].log_softmax(-1).gather(1, outputs[rows[0]][:, None]).sum())
    return total / sum(map(len, outputs))


def matmul_weights(model) -> int:
    """Weights that take part in a matrix product for each token: all but an input embedding that is no output head."""
    count = sum(parameter.numel() for parameter in model.parameters())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:
        count -= embedding.weight.numel()
    return count


def _costs(done: list[dict], weights: list[int]) -> dict[str, float]:
    """Costs of all prompts together; latency in seconds and FLOPs / 2, both a token, to be made relative."""

    def total(name):
        return sum(counts.get(name, 0) for counts in done)

    tokens, forwards, drafted = total("new_tokens"), total("large_forwards"), total("drafted")
    return {
        "large_forwards_per_token": forwards / tokens,
        "relative_latency": total("total_seconds") / tokens,
        "relative_flops": (total("large_tokens") * weights[0] + total("small_tokens") * weights[1]) / tokens,
        "tokens_per_large_forward": tokens / forwards if forwards else math.inf,
        "acceptance_rate": total("accepted") / drafted if drafted else math.nan,
        "deferral_rate": total("deferred") / tokens,
        "drift": total("drift") / tokens,
        "new_tokens": tokens,
    }
