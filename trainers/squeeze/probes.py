"""A probe set of answers nobody trains on, and the callback that watches them in any trainer."""

import json
import logging
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_iclr.trainers.measuring import forked_random, log_beside
from hf_iclr.untrusted import as_written_by, read_json, whole_number

from .probe_metrics import ProbeSet, take_what_fits
from .probe_scoring import choose_interval
from .rows import (
    CHOSEN,
    CONTEXT,
    REJECTED,
    check_kinds,
    check_probe_sets,
    other_row,
    preference_rows,
    shuffled,
    text_of,
    with_text,
)


logger = logging.getLogger(__name__)

STATE_FILE = "squeeze_probes.json"  # in a checkpoint
MEASURED_STEPS = 5  # before an interval is chosen; the first is left out


def build_probe_set(
    pairs: Dataset,
    *,
    num_probes: int = 500,
    seed: int = 0,
    test_pairs: Dataset | None = None,
    rephrases: Sequence[str] | None = None,
) -> Dataset:
    """
    The response kinds of the paper that need no other model, for some prompts of a preference dataset.

    | column | the answer | its role in the paper |
    |---|---|---|
    | `chosen`, `rejected` | of the prompt | pulled up and pushed down |
    | `other_train` | chosen for another training prompt | gains by SFT: hallucination |
    | `other_test` | chosen for a prompt of `test_pairs` | does not |
    | `permuted` | words of `chosen`, shuffled | no language |
    | `random_words` | words of an unrelated answer, shuffled | no language |

    `initial_greedy`, the answer of the model as it was, is added by [`SqueezeProbeCallback`]. Shuffled words and
    rephrases get the leading white space of `chosen`, which alone may be worth a nat.

    Args:
        pairs (`Dataset`):
            Rows `prompt`, `chosen`, `rejected`, text or messages, also a list of them; without `prompt` the answers'
            common start is it. `tools`, `chat_template_kwargs`, `image` and `images` go with their prompt.
        num_probes (`int`, *optional*, defaults to `500`):
            Prompts to take at random, as many as the paper does; all if there are fewer.
        seed (`int`, *optional*, defaults to `0`):
            Of the prompts taken and of the shuffles.
        test_pairs (`Dataset`, *optional*):
            Of the same form, and not trained on.
        rephrases (`Sequence[str]`, *optional*):
            Columns of `pairs` with further answers to watch, for instance a paraphrase of each chosen answer. Their
            names begin with `chosen_`, `rejected_` or `other_`.

    Returns:
        `Dataset`: rows where one of the answers is empty are left out, and their number is logged.

    Raises:
        `ValueError`: when columns are missing or named otherwise, all prompts are the same, or no row is left.
        `TypeError`: when `pairs` is a stream or no rows at all, or `rephrases` one string.
    """
    if isinstance(rephrases, str):
        raise TypeError(f"rephrases should be a list of columns, got one string. Type `rephrases=[{rephrases!r}]`.")
    rephrases = list(rephrases or [])
    rows = preference_rows(pairs, "pairs")
    if missing := [name for name in rephrases if name not in rows.column_names]:
        raise ValueError(
            f"pairs should hold the columns of rephrases={rephrases}, got {', '.join(rows.column_names)}. Leave out "
            f"{', '.join(missing)}, or rename with `rename_column`."
        )
    check_kinds(rephrases)
    test_rows = None if test_pairs is None else preference_rows(test_pairs, "test_pairs")
    if not isinstance(num_probes, int) or num_probes < 1:
        raise ValueError(f"num_probes must be a whole number from 1 on, got {num_probes!r}.")
    generator = random.Random(seed)
    context = [column for column in CONTEXT if column in rows.column_names]
    texts = rows.select_columns(["prompt", CHOSEN, REJECTED, *rephrases])  # images need not be read here
    test_rows = None if test_rows is None else test_rows.select_columns(["prompt", CHOSEN])
    taken: list[int] = []
    probes: list[dict[str, Any]] = []
    dropped = 0
    for index in generator.sample(range(len(rows)), len(rows)):
        if len(probes) == num_probes:
            break
        row = texts[index]
        chosen, other = row[CHOSEN], other_row(texts, row, generator)
        probe = {CHOSEN: chosen, REJECTED: row[REJECTED], "other_train": other[CHOSEN]}
        unrelated = other_row(texts, row, generator)
        if test_rows is not None:
            probe["other_test"] = other_row(test_rows, row, generator)[CHOSEN]
            unrelated = other_row(test_rows, row, generator)
        probe["permuted"] = with_text(chosen, shuffled(text_of(chosen), generator))
        probe["random_words"] = with_text(chosen, shuffled(text_of(unrelated[CHOSEN]), generator))
        probe |= {name: with_text(chosen, text_of(row[name])) for name in rephrases}
        if all(text_of(answer).strip() for answer in probe.values()):
            probes.append(probe)
            taken.append(index)
        else:
            dropped += 1
    if dropped:
        logger.warning(f"{dropped} of {dropped + len(probes)} prompts are left out of the probes: an answer is empty.")
    if not probes:
        raise ValueError(f"None of the {len(rows)} pairs has all its answers; there is nothing to probe.")
    # Prompts and their context keep the types they have, which may not be those of their values
    dataset = rows.select(taken).select_columns(["prompt", *context])
    for kind in probes[0]:
        dataset = dataset.add_column(kind, [probe[kind] for probe in probes])
    return dataset.select_columns(["prompt", *probes[0], *context])


class SqueezeProbeCallback(TrainerCallback):
    """
    Scores a probe set at the start, every `every` steps or more seldom, and at the end of a training, in any trainer
    of a causal language model: DPO, SFT, KTO, GRPO or plain [`~transformers.Trainer`]. Losses and weights are bit for
    bit those of a run without it.

    All passes together take the share `probe_budget` of the run. From what a few answers take to score, the prompts
    are chosen that fit, at random, once, and at least 12; from what a step takes, the interval. Both are logged and in
    checkpoints, so that a resumed run makes the passes that it would have made in one go.

    For each kind of answer it logs `probe/{kind}/logp`, its mean log-probability in nats per token, and
    `probe/{kind}/delta0`, the change of this since the start; besides

    | key | |
    |---|---|
    | `probe/chosen/logp_argmax`, also of `rejected` | of the most likely tokens, teacher-forced: the paper's |
    | `probe/chosen/frac_down` | share of chosen answers less likely than at the start |
    | `probe/rejected/pressure`, `valley_frac` | see [`~hf_iclr.trainers.squeeze.metrics.token_quantities`] |
    | `squeeze/index` | change of `chosen/logp_argmax` since the start less the bystanders' mean change |
    | `crosstalk/other_train` | change of `other_train` since the start less that of `other_test`, if there is one |
    | `repeat/...` | of greedy answers, see [`~hf_iclr.trainers.squeeze.probe_scoring.repetition_metrics`] |
    | `onpolicy/pressure_own` | squeeze pressure of own samples, about zero by theory |

    Bystanders are all kinds but `chosen`, `rejected` and its rephrases, and `initial_greedy`.

    Args:
        probe_dataset (`Dataset` or `dict[str, Dataset]`):
            From [`build_probe_set`], or `prompt` and any of its columns. With a dictionary all keys get the name and
            an underscore in front: `test_probe/chosen/logp`. Callbacks of one trainer need different names.
        trainer ([`~transformers.Trainer`], *optional*):
            The trainer it is added to; [`SqueezeDPOTrainer`] sets it by itself.
        every (`int`, *optional*, defaults to `25`):
            Least optimiser steps between two passes, as in the authors' runs; the interval is a multiple.
        probe_budget (`float`, *optional*, defaults to `0.05`):
            Share of the run's time that passes may take, in (0, 1]. 1.0: all prompts every `every` steps, whatever it
            takes.
        decode_every (`int`, *optional*, defaults to `4`):
            Passes between two that decode, besides the last. 0: never, then there is no `initial_greedy` either.
            Prompts with images are not decoded.
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Length of decoded answers.
        batch_size (`int`, *optional*):
            Answers in one forward; by default `per_device_eval_batch_size`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or processor, *optional*):
            By default the trainer's.

    Example:

    ```python
    >>> trainer = SFTTrainer(model, train_dataset=rows)
    >>> trainer.add_callback(SqueezeProbeCallback(build_probe_set(pairs), trainer=trainer))
    ```

    Raises:
        `ValueError`: when the probe set has no or unknown columns, no prompt fits into `max_length`, there is no
            trainer or another callback with the same names, a run is resumed with other probes, or a log-probability
            is not finite.
    """

    def __init__(
        self,
        probe_dataset: Dataset | dict[str, Dataset],
        *,
        trainer: Trainer | None = None,
        every: int = 25,
        probe_budget: float = 0.05,
        decode_every: int = 4,
        max_new_tokens: int = 32,
        batch_size: int | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    ) -> None:
        if every < 1 or decode_every < 0 or max_new_tokens < 1:
            raise ValueError(
                f"every and max_new_tokens must be at least 1 and decode_every at least 0, got {every}, "
                f"{max_new_tokens} and {decode_every}."
            )
        if not isinstance(probe_budget, int | float) or not 0 < probe_budget <= 1:
            raise ValueError(f"probe_budget must be in (0, 1], got {probe_budget!r}. 1.0: a pass every `every` steps.")
        self._datasets = check_probe_sets(probe_dataset)
        self.trainer, self.processing_class = trainer, processing_class
        self.every, self.probe_budget, self.decode_every = every, probe_budget, decode_every
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._sets: list[ProbeSet] = []
        self._forget()

    def _forget(self) -> None:
        self._last_step, self._passes = -1, 0
        self._interval: int | None = self.every if self.probe_budget == 1 else None  # 0: none but first and last
        self._seconds: tuple[float, float] | None = None  # of a pass, and of decoding in it
        self._steps: list[float] = []  # seconds
        self._spent = 0.0  # seconds before the first step
        self._clock = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trainer = self.trainer
        if trainer is None:
            raise ValueError(
                "SqueezeProbeCallback runs the model of a trainer and logs through it, but has none. Type "
                "`trainer.add_callback(SqueezeProbeCallback(probes, trainer=trainer))`."
            )
        for other in trainer.callback_handler.callbacks:
            shared = set(self._datasets) & set(other._datasets) if isinstance(other, SqueezeProbeCallback) else set()
            if other is not self and shared:
                raise ValueError(
                    f"Expected probe sets of a trainer's callbacks under different names, got {min(shared)!r} twice: "
                    "both would log the same keys. Type `SqueezeProbeCallback({'test': probes}, trainer=trainer)`."
                )
        processing_class = self.processing_class or trainer.processing_class
        if processing_class is None:
            raise ValueError(
                "SqueezeProbeCallback scores texts, but the trainer has no tokenizer. Type "
                "`Trainer(..., processing_class=tokenizer)`."
            )
        self._sets = [
            ProbeSet(name, probes, trainer, processing_class, self.max_new_tokens)
            for name, probes in self._datasets.items()
        ]
        self._forget()
        known = self._resume(args, state.global_step) if state.global_step else set()
        new = [probes for probes in self._sets if probes.name not in known]
        begin = time.perf_counter()
        if new and self.probe_budget < 1:
            take_what_fits(new, trainer, state.max_steps, self.every, self.probe_budget, self.decode_every > 0)
        if new:
            self._probe(args, state, control)
        else:  # the run goes on as if it had not been interrupted
            self._last_step = state.global_step
        self._clock = time.perf_counter()
        self._spent = self._clock - begin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        if self._interval is None:
            self._steps.append(time.perf_counter() - self._clock)
            # Where no pass was measured, as when resumed from an older checkpoint, one is made
            if step % self.every == 0 and len(self._steps) > MEASURED_STEPS and not last:
                if self._seconds is None:
                    self._probe(args, state, control)
                self._choose_interval(state.max_steps)
        if last or (self._interval and step % self._interval == 0):
            self._probe(args, state, control, last)
        self._clock = time.perf_counter()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_training_stop:
            self._probe(args, state, control, last=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Of a training that was stopped otherwise. Not in `on_train_end`: `load_best_model_at_end` comes before that.
        if "train_runtime" in (logs or {}):
            self._probe(args, state, control, last=True)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not (state.is_world_process_zero and folder.is_dir()):  # a hyperparameter search has others
            return
        path = folder / STATE_FILE
        own = {
            probes.name: {
                "fingerprint": probes.fingerprint,
                "passes": self._passes,
                "interval": self._interval,
                "seconds": self._seconds,
                "taken": [probes.count, len(probes.prompts)],
                "greedy": probes.greedy,
                "logps": probes.start.tolist(),
            }
            for probes in self._sets
        }
        if path.exists():  # of another callback
            own = {**read_json(path, nan=True).get("sets", {}), **own}
        path.write_text(json.dumps({"sets": own}))

    def _resume(self, args: TrainingArguments, step: int) -> set[str]:
        """The names of the sets whose start is known."""
        path, given = Path(args.output_dir, f"checkpoint-{step}", STATE_FILE), args.resume_from_checkpoint
        if isinstance(given, str) and Path(given).is_dir():  # of a run that goes on in another folder
            path = Path(given, STATE_FILE)
        with as_written_by("SqueezeProbeCallback", path):
            saved = read_json(path, nan=True).get("sets", {}) if path.exists() else {}
            for probes in self._sets:
                if probes.name not in saved:
                    logger.warning(
                        f"{path} says nothing of the probe set {probes.name!r}: changes are measured from here, not "
                        "from the start of the training."
                    )
                    continue
                start = saved[probes.name]
                if start["fingerprint"] != probes.fingerprint:
                    raise ValueError(
                        f"Expected the probe set {probes.name!r} that {path} was written with, got other answers or "
                        "the same tokenized otherwise, whose changes would be measured from the start of those. Give "
                        "the same set, or the new one another name: `probe_dataset={'new': probes}`."
                    )
                probes.take(*(whole_number(count, f"a number of prompts in {path}") for count in start["taken"]))
                if start["greedy"] is not None:
                    probes.set_greedy([[whole_number(token, "a token") for token in row] for row in start["greedy"]])
                logps = torch.tensor(start["logps"], dtype=torch.float64)
                if logps.shape != (len(probes.answers), 2):
                    raise TypeError(f"{tuple(logps.shape)} log-probabilities for {len(probes.answers)} answers")
                probes.start = logps
                self._passes = whole_number(start["passes"], "the number of passes")
                if self._interval is None and start["interval"] is not None:
                    self._interval = whole_number(start["interval"], "the interval of passes")
                if start["seconds"] is not None:
                    whole, decoding = map(float, start["seconds"])
                    self._seconds = whole, decoding
        return set(saved)

    def _choose_interval(self, max_steps: int) -> None:
        assert self.trainer is not None and self._seconds is not None
        step = statistics.median(self._steps[1:])
        whole, decoding = self._seconds
        between = whole - decoding + decoding / max(self.decode_every, 1)
        ends = max(self._spent, whole) + whole
        interval = [choose_interval(self.every, max_steps, self.probe_budget, step, ends, between)]
        broadcast_object_list(interval)  # every process has timed its own
        self._interval = interval[0]
        if self._interval == self.every or not self.trainer.is_world_process_zero():
            return
        when = f"every {self._interval} steps" if self._interval else "at the start and the end only"
        logger.warning(
            f"Probes are scored {when}, not every {self.every}: it takes {whole:.3g} s, a step {step:.3g} s, and "
            f"probe_budget={self.probe_budget:g} is their share of the run. Raise it for more."
        )

    def _probe(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, last: bool = False
    ) -> None:
        if state.global_step == self._last_step:
            return
        assert self.trainer is not None, "checked at the beginning of the training"
        trainer = self.trainer
        batch_size = self.batch_size or args.per_device_eval_batch_size
        decode = self.decode_every > 0 and (last or self._passes % self.decode_every == 0)
        progress = state.is_world_process_zero and not args.disable_tqdm
        logs: dict[str, float] = {}
        begin = time.perf_counter()
        # Sampling draws, and so may a model: the training goes on with the random state it had.
        with forked_random(trainer.accelerator.device):
            for probes in self._sets:
                logs |= probes.measure(trainer, batch_size, decode, progress)
        if self._seconds is None:
            self._seconds = time.perf_counter() - begin, sum(probes.decode_seconds for probes in self._sets)
        self._last_step, self._passes = state.global_step, self._passes + 1
        log_beside(trainer, logs, control)
