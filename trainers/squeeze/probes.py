"""A probe set of answers nobody trains on, and the callback that watches them in any trainer."""

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
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
from trl import maybe_extract_prompt

from hf_iclr.trainers.measuring import forked_random, log_beside
from hf_iclr.untrusted import as_written_by, read_json, whole_number

from .probe_metrics import CHOSEN, INITIAL_GREEDY, REJECTED, ProbeSet


logger = logging.getLogger(__name__)

KINDS = (CHOSEN, REJECTED, "other_train", "other_test", "permuted", "random_words", INITIAL_GREEDY)
REPHRASE_PREFIXES = ("chosen_", "rejected_", "other_")


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
            Rows `prompt`, `chosen`, `rejected`, text or messages; without `prompt` the answers' common start is it.
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
    """
    rephrases = list(rephrases or [])
    rows = _check_pairs(pairs, "pairs", rephrases)
    test_rows = None if test_pairs is None else _check_pairs(test_pairs, "test_pairs", [])
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}.")
    generator = random.Random(seed)
    probes: list[dict[str, Any]] = []
    dropped = 0
    for index in generator.sample(range(len(rows)), len(rows)):
        if len(probes) == num_probes:
            break
        row = rows[index]
        chosen, other = row[CHOSEN], _other(rows, row, generator)
        probe = {"prompt": row["prompt"], CHOSEN: chosen, REJECTED: row[REJECTED], "other_train": other[CHOSEN]}
        unrelated = _other(rows, row, generator)
        if test_rows is not None:
            probe["other_test"] = _other(test_rows, row, generator)[CHOSEN]
            unrelated = _other(test_rows, row, generator)
        probe["permuted"] = _with_text(chosen, _shuffled(_text(chosen), generator))
        probe["random_words"] = _with_text(chosen, _shuffled(_text(unrelated[CHOSEN]), generator))
        probe |= {name: _with_text(chosen, _text(row[name])) for name in rephrases}
        if all(_text(answer).strip() for kind, answer in probe.items() if kind != "prompt"):
            probes.append(probe)
        else:
            dropped += 1
    if dropped:
        logger.warning(f"{dropped} of {dropped + len(probes)} prompts are left out of the probes: an answer is empty.")
    if not probes:
        raise ValueError(f"None of the {len(rows)} pairs has all its answers; there is nothing to probe.")
    return Dataset.from_list(probes)


def _check_pairs(pairs: Dataset, name: str, rephrases: list[str]) -> Dataset:
    if "prompt" not in pairs.column_names and len(pairs):
        pairs = pairs.map(maybe_extract_prompt)
    missing = [column for column in ("prompt", CHOSEN, REJECTED, *rephrases) if column not in pairs.column_names]
    if missing or not len(pairs):
        raise ValueError(
            f"{name} should hold the columns {', '.join(('prompt', CHOSEN, REJECTED, *rephrases))} and a row, got "
            f"{', '.join(pairs.column_names) or 'no column'} and {len(pairs)} rows. Rename with `rename_column`."
        )
    check_kinds(rephrases)
    return pairs


def check_kinds(columns: Sequence[str]) -> None:
    """
    Refuse columns that are no response kind.

    Args:
        columns (`Sequence[str]`):
            Without `prompt`.

    Raises:
        `ValueError`: naming them and what would be one.
    """
    unknown = [name for name in columns if name not in KINDS and not name.startswith(REPHRASE_PREFIXES)]
    if unknown:
        raise ValueError(
            f"A probe set holds `prompt` and the answers {', '.join(KINDS)}, or others whose names begin with "
            f"{', '.join(REPHRASE_PREFIXES)}; got {', '.join(unknown)}. Rename what is an answer, for example to "
            f"`chosen_{unknown[0]}`, and drop the rest with `remove_columns({unknown})`."
        )


def _other(rows: Dataset, row: dict[str, Any], generator: random.Random) -> dict[str, Any]:
    """A row with another prompt; by chance first, since prompts seldom repeat."""
    for _ in range(20):
        other = rows[generator.randrange(len(rows))]
        if other["prompt"] != row["prompt"]:
            return other
    for other in rows:
        if other["prompt"] != row["prompt"]:
            return other
    raise ValueError("Probes need answers to other prompts, but all rows have the same prompt. Give more pairs.")


def _text(answer: str | list[dict]) -> str:
    if isinstance(answer, str):
        return answer
    return (answer[-1].get("content") or "") if answer else ""


def _with_text(answer: str | list[dict], text: str) -> str | list[dict]:
    """`answer` saying something else, after the same white space."""
    if not isinstance(answer, str):
        return [*answer[:-1], {**answer[-1], "content": text}] if answer else answer
    return answer[: len(answer) - len(answer.lstrip())] + text.lstrip() if text.strip() else ""


def _shuffled(text: str, generator: random.Random) -> str:
    words = text.split()
    shuffled = words[:]
    while shuffled == words and len(set(words)) > 1:
        generator.shuffle(shuffled)
    return " ".join(shuffled)


class SqueezeProbeCallback(TrainerCallback):
    """
    Scores a probe set at the start, every `every` steps and at the end of a training, in any trainer of a causal
    language model: DPO, SFT, KTO, GRPO or plain [`~transformers.Trainer`]. Losses and weights are bit for bit those of
    a run without it.

    For each kind of answer it logs, in nats per token,

    | key | |
    |---|---|
    | `probe/{kind}/logp` | mean log-probability |
    | `probe/{kind}/delta0`, `delta_step` | its change since the start, since the last time |
    | `probe/{kind}/signdelta` | mean over answers of the change since the last time, over ‖A‖ ‖G‖ |
    | `probe/{kind}/LBK` | the same with absolute changes |

    ‖A‖ is that of the kind and ‖G‖ that of the chosen answers. As the change is at most η ‖A‖ ‖K‖ ‖G‖ (proposition 1
    of https://huggingface.co/papers/2407.10490), `LBK` bounds the learning speed η ‖K‖ from below; the authors' code
    has these two with other norms. `chosen` and `rejected` also have `logp_argmax` (teacher-forced, the paper's
    argmax), `pressure` and `valley_frac`. Then, ours, with the bystanders being all kinds but `chosen`, `rejected` and
    `initial_greedy`:

    | key | |
    |---|---|
    | `squeeze/index` | change of `chosen/logp_argmax` since the start less the bystanders' mean change |
    | `squeeze/frac_probes_down` | share of bystander answers at least half a nat below their start |
    | `squeeze/displacement` | fall of `chosen` since the start |
    | `crosstalk/other_train` | change of `other_train` since the start less that of `other_test`, if there is one |
    | `repeat/...` | of greedy answers, see [`~hf_iclr.trainers.squeeze.probe_scoring.repetition_metrics`] |
    | `onpolicy/pressure_own` | squeeze pressure of own samples, about zero by theory; `onpolicy/valley_frac_own` |

    Args:
        probe_dataset (`Dataset` or `dict[str, Dataset]`):
            From [`build_probe_set`], or `prompt` and any of its columns. With a dictionary all keys get the name and
            an underscore in front: `test_probe/chosen/logp`.
        trainer ([`~transformers.Trainer`], *optional*):
            The trainer it is added to; [`SqueezeDPOTrainer`] sets it by itself.
        every (`int`, *optional*, defaults to `25`):
            Optimiser steps between two passes, as in the authors' runs.
        decode_every (`int`, *optional*, defaults to `4`):
            Passes between two that decode, besides the last. 0: never, then there is no `initial_greedy` either.
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
            trainer, or a log-probability is not finite.
    """

    def __init__(
        self,
        probe_dataset: Dataset | dict[str, Dataset],
        *,
        trainer: Trainer | None = None,
        every: int = 25,
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
        named = probe_dataset if isinstance(probe_dataset, dict) else {"": probe_dataset}
        for name, probes in named.items():
            check_kinds([column for column in probes.column_names if column != "prompt"])
            if not len(probes) or "prompt" not in probes.column_names or CHOSEN not in probes.column_names:
                raise ValueError(
                    f"The probe set {name!r} should have rows with at least `prompt` and `chosen`, got {len(probes)} "
                    f"rows with {', '.join(probes.column_names) or 'nothing'}. `build_probe_set(pairs)` makes one."
                )
        self.trainer, self.processing_class = trainer, processing_class
        self.every, self.decode_every = every, decode_every
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._datasets = named
        # Of its own, for a trainer may have several of these callbacks
        self._state_file = "_".join(filter(None, ("squeeze_probes", *named))) + ".json"
        self._sets: list[ProbeSet] = []
        self._last_step, self._passes = -1, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer is None:
            raise ValueError(
                "SqueezeProbeCallback runs the model of a trainer and logs through it, but has none. Type "
                "`trainer.add_callback(SqueezeProbeCallback(probes, trainer=trainer))`."
            )
        processing_class = self.processing_class or self.trainer.processing_class
        tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor's, for text
        max_length = getattr(args, "max_length", None)  # DPO, SFT and KTO have one
        self._sets = [
            ProbeSet(name, probes, tokenizer, max_length, self.max_new_tokens)
            for name, probes in self._datasets.items()
        ]
        self._last_step, self._passes = -1, 0
        if state.global_step:
            self._resume(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._probe(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        last = state.global_step >= state.max_steps
        if last or state.global_step % self.every == 0:
            self._probe(args, state, control, last)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._probe(args, state, control, last=True)  # of a training that was stopped

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            start = [{"greedy": probes.greedy, "logps": probes.start.tolist()} for probes in self._sets]
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():  # a hyperparameter search has others
                (folder / self._state_file).write_text(json.dumps({"passes": self._passes, "start": start}))

    def _resume(self, checkpoint: Path) -> None:
        path = checkpoint / self._state_file
        if not path.exists():
            logger.warning(f"{path} is missing: changes are measured from here, not from the start of the training.")
            return
        saved = read_json(path, nan=True)
        with as_written_by("SqueezeProbeCallback", path):
            self._passes = whole_number(saved["passes"], "the number of passes")
            for probes, start in zip(self._sets, saved["start"], strict=True):
                if start["greedy"] is not None:
                    probes.set_greedy(start["greedy"])
                probes.start = torch.tensor(start["logps"], dtype=torch.float64)

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
        # Sampling draws, and so may a model: the training goes on with the random state it had.
        with forked_random(trainer.accelerator.device):
            for probes in self._sets:
                logs |= probes.measure(trainer, batch_size, decode, progress)
        self._last_step, self._passes = state.global_step, self._passes + 1
        log_beside(trainer, logs, control)
