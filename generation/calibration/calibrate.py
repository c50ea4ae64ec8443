"""Finds the alpha of a deferral rule that gives a wanted deferral rate, acceptance rate or speed-up."""

import logging
import math
import time
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hf_iclr.models import pad_rows

from ..cascade_call import CASCADE_DEFAULTS, complete_options, padding_token
from ..cascade_generation import SpeculativeCascadeGenerationMixin
from ..configuration_speculative_cascade import SpeculativeCascadeConfig
from ..deferral_rules import DEFERRAL_RULES
from .teacher_forcing import (
    THRESHOLD_RULES,
    TeacherForcedTexts,
    expected_rounds,
    prepare_config,
    read_texts,
    small_model,
)
from .texts import Text, split_texts


logger = logging.getLogger(__name__)

TARGETS = ("deferral_rate", "acceptance", "speedup")
_ROUNDS = 5  # of correction on the cascade's own text, at most
_TIMED_TEXTS = 3
_RATES = {
    "deferral_rate": ("deferred", "new_tokens"),
    "acceptance": ("accepted", "drafted"),
    "tokens_per_large_forward": ("new_tokens", "rounds"),
    "drift": ("drift", "new_tokens"),
}


class CascadeCosts(NamedTuple):
    """Median wall times in seconds, one prompt at a time."""

    plain: float  # a token of the large model alone
    draft: float  # a forward of the small model
    verify: float  # a forward of the large model over γ+1 tokens
    overhead: float  # the rest of a round

    def speedup(self, new_tokens, rounds, small_forwards):
        """Time of the large model alone over that of the cascade, `t_1 E / (s c + v + h)` with E tokens a round."""
        return new_tokens * self.plain / (small_forwards * self.draft + rounds * (self.verify + self.overhead))


@dataclass
class CascadeCalibration:
    """
    What [`calibrate_cascade`] found.

    Attributes:
        target (`str`), value (`float`):
            The quantity and the value that was asked for.
        rule (`str`), alpha (`float`):
            The rule and the alpha that was found.
        teacher_forced_alpha (`float`):
            The alpha that the given texts alone suggest, before the correction on the cascade's own text.
        predicted (`float`):
            The quantity at `alpha`, as predicted from the calibration half.
        measured, standard_error (`float`, *optional*):
            The quantity at `alpha` on generations from held-out prompts, and its standard error over prompts. `None`
            without `check`.
        table (`pandas.DataFrame`):
            For each alpha the predicted `deferral_rate`, `acceptance`, `tokens_per_large_forward`, `speedup` and
            `drift` (mean total variation to the large model), on the cascade's own text at `alpha` or, without
            `check`, on the given texts.
        costs ([`CascadeCosts`]):
            The times behind `speedup`.
    """

    target: str
    value: float
    rule: str
    alpha: float
    teacher_forced_alpha: float
    predicted: float
    measured: float | None
    standard_error: float | None
    table: pd.DataFrame
    costs: CascadeCosts

    @property
    def relative_error(self) -> float | None:
        """`measured / value - 1`."""
        return None if self.measured is None else self.measured / self.value - 1


def calibrate_cascade(
    model,
    dataset,
    target: dict[str, float],
    *,
    tokenizer,
    rule: str | None = None,
    text_column: str = "text",
    num_assistant_tokens: int | None = None,
    prompt_tokens: int = 32,
    max_new_tokens: int = 64,
    max_tokens: int = 4096,
    batch_size: int = 8,
    seed: int = 0,
    check: bool = True,
    apply: bool = True,
    **generation_kwargs,
) -> CascadeCalibration:
    """
    Find the alpha at which a cascade reaches a wanted rate, and check it on text the cascade itself generates.

    Both models read half of the texts once, which gives the rates at every alpha: a quantile of the positions' scores
    for threshold rules, a bisection for the others. The cascade then continues prompts of that half; reading these
    continuations corrects alpha for the shift from the given text to its own, up to five times. What is reported as
    `measured` comes from prompts of the other half.

    Args:
        model ([`SpeculativeCascadeGenerationMixin`]):
            A composite model, or the result of [`enable_cascade`] with a small model.
        dataset (`datasets.Dataset` or `list`):
            Rows with a text in `text_column` or a chat in `"messages"` that ends with an answer; or the texts or rows
            themselves. Text like that of the later use, at least two rows.
        target (`dict[str, float]`):
            One of `{"deferral_rate": 0.3}` (share of tokens that the large model decides), `{"acceptance": 0.8}`
            (share of drafted tokens that are kept), `{"speedup": 1.5}` (over the large model alone, one prompt at a
            time).
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of both models.
        rule (`str`, *optional*):
            One of [`DEFERRAL_RULES`] but `"spec"`. Defaults to the model's, or `"token_v3"` where that is
            `"spec"`.
        text_column (`str`, *optional*, defaults to `"text"`):
            Column of the texts.
        num_assistant_tokens (`int`, *optional*):
            Draft length γ. Defaults to the model's.
        prompt_tokens (`int`, *optional*, defaults to 32):
            How many tokens of a text serve as the prompt. Of a chat, it is all before the last answer.
        max_new_tokens (`int`, *optional*, defaults to 64):
            Length of the continuations that are read and generated.
        max_tokens (`int`, *optional*, defaults to 4096):
            Tokens to read, and to generate in each check. The error falls with its square root.
        batch_size (`int`, *optional*, defaults to 8):
            Prompts to generate from at a time.
        seed (`int`, *optional*, defaults to 0):
            Seed of the split and of sampling.
        check (`bool`, *optional*, defaults to `True`):
            Whether to correct and measure on generated text.
        apply (`bool`, *optional*, defaults to `True`):
            Whether to make rule, alpha and draft length the model's defaults.
        generation_kwargs (*optional*):
            Arguments of `generate` such as `do_sample=True, temperature=0.8`. The alpha found holds for these.

    Returns:
        [`CascadeCalibration`]

    Raises:
        TypeError: if `model` doesn't cascade.
        ValueError: if the target, rule or data don't fit, no alpha reaches the target, or the small model can't read
        texts by itself.

    Example:

    ```python
    >>> model = enable_cascade(large, small)
    >>> calibrate_cascade(model, dataset, {"deferral_rate": 0.3}, tokenizer=tokenizer, do_sample=True).alpha
    ```
    """
    small = small_model(model)
    name, value = _check_target(target)
    if rule is None:
        rule = _setting(model, small, "cascade_rule")
        rule = "token_v3" if rule == "spec" else rule  # the default has no alpha
    if rule == "spec" or rule not in DEFERRAL_RULES:
        raise ValueError(
            f"Expected a rule with an alpha to calibrate, got {rule!r}. Choose one of "
            f"{', '.join(known for known in DEFERRAL_RULES if known != 'spec')}."
        )
    least = {"max_new_tokens": 2, "prompt_tokens": 1, "max_tokens": 1, "batch_size": 1}  # one token is never drafted
    for argument, number in zip(least, (max_new_tokens, prompt_tokens, max_tokens, batch_size), strict=True):
        if isinstance(number, bool) or not isinstance(number, int) or number < least[argument]:
            raise ValueError(f"Expected {argument} of at least {least[argument]}, got {number!r}.")
    if generation_kwargs.get("num_return_sequences", 1) != 1 or generation_kwargs.get("return_dict_in_generate"):
        raise ValueError("A calibration writes one text a prompt: leave num_return_sequences and return_dict out.")
    gamma = _setting(model, small, "num_assistant_tokens") if num_assistant_tokens is None else num_assistant_tokens
    complete_options({"num_assistant_tokens": gamma})
    count = math.ceil(max_tokens / max_new_tokens)
    halves = split_texts(dataset, tokenizer, text_column, prompt_tokens, max_new_tokens, count, seed, two_halves=check)
    config = prepare_config(model, max_new_tokens=max_new_tokens, **generation_kwargs)
    call = {"num_assistant_tokens": int(gamma), "max_new_tokens": max_new_tokens, **generation_kwargs}
    if padding_token(config) is None:
        call["pad_token_id"] = config.pad_token_id = 0  # rows of a batch end at different lengths
    run = _Run(model, small, rule, int(gamma), config, call, batch_size, seed)
    run.time(halves[0][:_TIMED_TEXTS])
    texts = read_texts(model, small, halves[0], rule, config)
    alpha = teacher_forced = run.solve(texts, name, value, strict=True)
    logger.info("The given texts suggest %s alpha=%.4g for %s=%g.", rule, alpha, name, value)
    predicted, measured, error = run.read(texts, name, alpha), None, None
    if check:
        below = above = None  # the newest alphas and rates around the wanted one
        for _ in range(_ROUNDS):
            generated, counts = run.generate(halves[0], alpha)
            texts = read_texts(model, small, generated, rule, config)
            rate, read = run.measure(name, counts, run.expect(texts, alpha))[0], partial(run.read, texts, name)
            logger.info("%s alpha=%.4g gives %s=%.4g on its own text, wanted %g.", rule, alpha, name, rate, value)
            below, above = ((alpha, rate), above) if rate <= value else (below, (alpha, rate))
            # Reading the texts doesn't see all (end of text inside drafts, schedules), and another alpha writes
            # another text: rates between two that were measured are in proportion to what is read.
            if below and above and read(below[0]) != read(above[0]):
                scale = (above[1] - below[1]) / (read(above[0]) - read(below[0]))
                offset = below[1] - scale * read(below[0])
            else:
                scale, offset = (rate / read(alpha) if rate and read(alpha) else 1.0), 0.0
            alpha = run.solve(texts, name, (value - offset) / scale, strict=False)
            predicted = scale * read(alpha) + offset
            if abs(rate / value - 1) < 0.02:
                break
        _, counts = run.generate(halves[1], alpha)
        measured, error = run.measure(name, counts, run.expect(texts, alpha))
        logger.info("On held-out prompts %s alpha=%.4g gives %s=%.4g ± %.2g.", rule, alpha, name, measured, error)
        if abs(measured / value - 1) > 0.1:
            logger.warning(
                "%s=%.4g on held-out prompts is more than 10 %% from %g. Pass more text and a larger `max_tokens`.",
                name, measured, value,
            )  # fmt: skip
    if apply:
        composite = [model.config] if isinstance(model.config, SpeculativeCascadeConfig) else []
        for defaults in (model.generation_config, *composite):
            defaults.cascade_rule, defaults.cascade_alpha = rule, alpha
        model.generation_config.num_assistant_tokens = int(gamma)
    return CascadeCalibration(
        name, value, rule, alpha, teacher_forced, predicted, measured, error, run.table(texts), run.costs
    )


@dataclass
class _Run:
    """What every step of a calibration shares."""

    model: Any
    small: Any
    rule: str
    gamma: int
    config: Any
    call: dict[str, Any]
    batch_size: int
    seed: int
    costs: CascadeCosts = field(init=False)

    def generate(self, texts: list[Text], alpha: float) -> tuple[list[Text], pd.DataFrame]:
        """Continues the prompts of `texts`; the counts of each."""
        generated, counts = [], []
        with torch.random.fork_rng(), tqdm(total=len(texts), desc=f"alpha={alpha:.4g}", unit="prompt") as progress:
            torch.manual_seed(self.seed)
            for start in range(0, len(texts), self.batch_size):
                prompts = [text.prompt for text in texts[start : start + self.batch_size]]
                inputs = pad_rows(prompts, "left", device=self.model.device)
                output = self.model.generate(**inputs, **self.call, cascade_rule=self.rule, cascade_alpha=alpha)
                new, done = output[:, inputs["input_ids"].shape[1] :].tolist(), self.model.cascade_statistics
                for index, prompt in enumerate(prompts):
                    generated.append(Text(prompt, new[index][: done.new_tokens[index]]))
                    counts.append(done.row(index))
                progress.update(len(prompts))
        return generated, pd.DataFrame(counts)

    def time(self, texts: list[Text]) -> None:
        """Times the cascade and the large model alone, one after the other on each prompt, after a warm-up."""
        seconds = []
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            for text in tqdm([texts[0], *texts], desc="timing", unit="prompt"):
                inputs = pad_rows([text.prompt], device=self.model.device)
                _, tokens, alone = write_alone(self.model, inputs, self.config)
                # any alpha: it changes how many forwards there are, not what one costs
                alpha = 0.0 if self.rule in THRESHOLD_RULES else 0.5
                self.model.generate(**inputs, **self.call, cascade_rule=self.rule, cascade_alpha=alpha)
                done = self.model.cascade_statistics
                round_ = np.array([done.verify_seconds, done.overhead_seconds]) / done.large_forwards
                seconds.append([alone / tokens, done.draft_seconds / done.small_forwards, *round_])
        self.costs = CascadeCosts(*np.median(seconds[1:], axis=0).tolist())

    def expect(self, texts: TeacherForcedTexts, alpha: float) -> pd.Series:
        """Counts of all texts together at `alpha`, if the cascade wrote them."""
        deferred, acceptance, drift = texts.rates(alpha)
        rounds = expected_rounds(acceptance, texts.lengths, self.gamma)._asdict()
        totals = {"new_tokens": texts.lengths.sum(), "deferred": deferred.sum(), "drift": drift.sum()}
        return pd.Series(totals | rounds)

    def rate(self, name: str, counts):
        """A column of the table, of counts that are numbers or columns of numbers."""
        if name == "speedup":
            return self.costs.speedup(counts.new_tokens, counts.rounds, counts.small_forwards)
        above, below = _RATES[name]
        return counts[above] / counts[below]

    def read(self, texts: TeacherForcedTexts, name: str, alpha: float) -> float:
        """A rate that texts show at `alpha`."""
        return float(self.rate(name, self.expect(texts, alpha)))

    def measure(self, name: str, counts: pd.DataFrame, expected: pd.Series) -> tuple[float, float]:
        """
        A rate over all prompts, and its standard error by leaving out one prompt at a time. Forwards that the small
        model adds after fully accepted drafts are not counted by prompt, but are as `expected`.
        """
        small_forwards = counts.drafted * (expected.small_forwards / expected.drafted)
        counts = counts.drop(columns="call").assign(small_forwards=small_forwards).astype(float)
        totals, error = counts.sum(), 0.0
        if len(counts) > 1:
            error = float(self.rate(name, totals - counts).std(ddof=0)) * (len(counts) - 1) ** 0.5
        return float(self.rate(name, totals)), error

    def solve(self, texts: TeacherForcedTexts, name: str, value: float, strict: bool) -> float:
        """The alpha that gives `value`; the nearest one if none does, or with `strict` a `ValueError`."""
        rate = partial(self.read, texts, name)
        (low, below), (high, above) = sorted((rate(alpha), float(alpha)) for alpha in texts.alphas[[0, -1]])
        if not low <= value <= high:
            nearest, alpha = min((low, below), (high, above), key=lambda end: abs(end[0] - value))
            if strict:
                raise ValueError(
                    f"{name}={value:g} can't be reached with rule {self.rule!r} and {self.gamma} drafted tokens on "
                    f"this text: expected a value in [{low:.4g}, {high:.4g}]. The nearest is {nearest:.4g} at "
                    f"alpha={alpha:.4g}."
                )
            return alpha
        for _ in range(60):
            middle = (below + above) / 2
            if rate(middle) <= value:
                below = middle
            else:
                above = middle
        # The rate of a threshold rule has jumps: one end can be much nearer than the other.
        return min((below, above), key=lambda alpha: abs(rate(alpha) - value))

    def table(self, texts: TeacherForcedTexts) -> pd.DataFrame:
        counts = pd.DataFrame([self.expect(texts, alpha) for alpha in texts.alphas])
        names = ("deferral_rate", "acceptance", "tokens_per_large_forward", "speedup", "drift")
        return pd.DataFrame({"alpha": texts.alphas, **{name: self.rate(name, counts) for name in names}})


def write_alone(model, inputs: dict[str, torch.Tensor], config) -> tuple[torch.Tensor, int, float]:
    """Plain `generate` of one prompt, by the large model where it is a cascade: sequences, new tokens and seconds."""
    begin, plain = time.perf_counter(), model
    if isinstance(model, SpeculativeCascadeGenerationMixin):
        plain = super(SpeculativeCascadeGenerationMixin, model)
    output = plain.generate(**inputs, generation_config=config)
    return output, output.shape[1] - inputs["input_ids"].shape[1], time.perf_counter() - begin


def _check_target(target: dict[str, float]) -> tuple[str, float]:
    if not isinstance(target, dict) or len(target) != 1 or next(iter(target)) not in TARGETS:
        raise ValueError(
            f'Expected a target of one entry such as {{"deferral_rate": 0.3}}, with one of {", ".join(TARGETS)}, '
            f"got {target!r}."
        )
    ((name, value),) = target.items()
    number = isinstance(value, Real) and not isinstance(value, bool)
    if name == "speedup" and not (number and value > 0):
        raise ValueError(f"Expected a speedup above 0, where 1 is the large model alone, got {value!r}.")
    if name != "speedup" and not (number and 0 < value < 1):
        raise ValueError(f"Expected a share between 0 and 1 for {name}, got {value!r}. For example 0.3.")
    return name, float(value)


def _setting(model, small, name: str):
    """A cascade's default, looked up as its `generate` does."""
    for config in (model.generation_config, small.generation_config):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return CASCADE_DEFAULTS[name]
