"""What the probe callback logs of one probe set: every kind of answer, their sums, repetition and own samples."""

import bisect
import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import PreTrainedTokenizerBase, ProcessorMixin, Trainer
from trl import DPOTrainer

from hf_iclr.models import end_tokens, pad_answers
from hf_iclr.trainers.measuring import forked_random

from .probe_scoring import COLUMNS, decode_answers, repetition_metrics, score_answers
from .rows import CHOSEN, CONTEXT, IMAGES, INITIAL_GREEDY, REJECTED, calls_tools, encode_answer, text_of


logger = logging.getLogger(__name__)

LOGP, LOGP_ARGMAX = COLUMNS.index("logp_tok"), COLUMNS.index("logp_argmax")
SAMPLED_PROMPTS = 64  # at most so many, for a number that is about zero
FORWARDS_OF_A_STEP = 3  # at least: a backward is two
PASSES_BETWEEN = 4  # that there should be room for
PILOT_TOKENS = 4
ENOUGH_PROMPTS = 12  # of a set: fewer say little, so passes in between and decoding come after these
PROBES = "probes"  # the name under which the trainer's own preparation gets them


class ProbeSet:
    """
    A probe set as the trainer would train it, and what its answers were worth at the start.

    A [`~trl.DPOTrainer`] prepares and collates the rows itself, so that the scored sequences are those it trains:
    template arguments, tools, images, truncation, its own subclass and collator. In other trainers a chat goes
    through the template with the same columns, and `max_length` cuts as their configuration says.

    Args:
        name (`str`):
            In front of all keys, with an underscore, unless empty.
        dataset (`Dataset`):
            The column `prompt`, those of `CONTEXT`, and one column per kind.
        trainer ([`~transformers.Trainer`]):
            Whose rows they should be like.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or processor):
            The trainer's, or another.
        max_new_tokens (`int`):
            Length of decoded answers.

    Raises:
        `ValueError`: when no row has all its answers within `max_length`, or the trainer cannot take its images.
    """

    def __init__(
        self,
        name: str,
        dataset: Dataset,
        trainer: Trainer,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        max_new_tokens: int,
    ) -> None:
        self.name, self.prefix = name, f"{name}_" if name else ""
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)  # a processor's, for text
        self.max_new_tokens = max_new_tokens
        self.start = torch.empty(0)
        self.greedy: list[list[int]] | None = None
        self.decode_seconds = 0.0
        max_length = getattr(trainer.args, "max_length", None)  # DPO, SFT and KTO have one
        keep_end = getattr(trainer.args, "truncation_mode", "") == "keep_end"
        columns = [column for column in dataset.column_names if column != "prompt" and column not in CONTEXT]
        texts = dataset.select_columns(columns)
        whole = [
            index
            for index, row in enumerate(texts)
            if all(text_of(answer) or calls_tools(answer) for answer in row.values())
        ]
        whole_rows = dataset.select(whole)
        images = [column for column in IMAGES if column in dataset.column_names]
        with_images = getattr(trainer, "_is_vision_dataset", False)
        if bool(images) != with_images or (with_images and not isinstance(trainer, DPOTrainer)):
            raise ValueError(
                f"The probe set {name!r} should have images if the trained rows do, and only with a `DPOTrainer`, got "
                f"{', '.join(images) or 'none'} for a {type(trainer).__name__} {'with' if with_images else 'without'} "
                "images. Make it of the trained pairs by `build_probe_set`, or drop images with `remove_columns`."
            )
        self.prompts: list[list[int]] = []  # to decode from; none where there are images
        self.answers: list[tuple[Any, Any]] = []
        self.collate = pad_answers
        if with_images:
            self.answers = [(index, kind) for index in range(len(whole_rows)) for kind in columns]
            self.collate = partial(_collate_images, trainer, whole_rows)
            rows: list[dict[str, tuple[list[int], list[int]]]] = []
        elif isinstance(trainer, DPOTrainer):
            self.collate = partial(_collate_pairs, trainer)
            rows = _prepare_pairs(trainer, whole_rows, columns, processing_class)
        else:
            template = getattr(trainer.args, "chat_template_kwargs", None)  # GRPO has it
            if hasattr(trainer, "get_batch_logps") and "tools" in dataset.column_names:  # CPO and ORPO pass them over
                whole_rows = whole_rows.remove_columns("tools")
            rows = [
                {kind: encode_answer(self.tokenizer, row, kind, max_length, keep_end, template) for kind in columns}
                for row in whole_rows
            ]
        for row in rows:
            if len(row) == len(columns) and all(answer for _, answer in row.values()):
                prompt = row[CHOSEN][0]
                # Where the start is cut off, a prompt ends where an answer still fits behind it
                cut = max(len(prompt) - max(max_length - max_new_tokens, 1), 0) if keep_end and max_length else 0
                self.prompts.append(prompt[cut:])
                self.answers += row.values()
        self.columns, self.count = len(columns), len(self.answers) // len(columns)
        self.kinds = columns * self.count
        if len(self.answers) < len(dataset) * len(columns):
            left_out = len(dataset) - len(self.answers) // len(columns)
            message = (
                f"{left_out} of {len(dataset)} prompts are left out of the probes: an answer is empty, or the prompt "
                f"fills max_length={max_length} tokens."
            )
            if not self.answers:
                raise ValueError(f"{message} Raise `max_length`, or probe shorter prompts.")
            logger.warning(message)
        # The collator of a `DPOTrainer` cuts off what is too long
        cut = with_images or any(
            len(prompt) + len(answer) > (max_length or math.inf) for prompt, answer in self.answers
        )
        self.fingerprint = self._hash(
            whole_rows if with_images else self.answers, [max_length, keep_end] if cut else []
        )

    def _hash(self, answers: Any, cut: list) -> str:
        """A name for what is scored: the same kinds of the same token ids, or text and images, cut alike."""
        digest = hashlib.sha256(json.dumps([*self.kinds, *cut]).encode())
        for answer in answers:
            digest.update(json.dumps(answer, default=_bytes_hash, sort_keys=True).encode())
        return digest.hexdigest()

    def take(self, prompts: int, decoded: int) -> None:
        """Keep some random prompts, always the same for this number of them, and decode from a few of these."""
        taken = sorted(random.Random(0).sample(range(self.count), min(prompts, self.count)))
        starts = [self.columns * index for index in taken]
        self.answers = [answer for start in starts for answer in self.answers[start : start + self.columns]]
        self.kinds, self.count = self.kinds[: len(self.answers)], len(taken)
        self.prompts = [self.prompts[index] for index in taken if self.prompts][:decoded]

    def set_greedy(self, greedy: list[list[int]]) -> None:
        """Add y*, the answers to watch from now on; a model may also have ended at once, without a token."""
        self.greedy = greedy
        self.kinds = [*self.kinds, *[INITIAL_GREEDY] * len(greedy)]
        self.answers += zip(self.prompts, greedy, strict=True)

    def measure(self, trainer: Trainer, batch_size: int, decode: bool, progress: bool) -> dict[str, float]:
        """
        Score every answer with the trainer's model as it is now.

        Args:
            trainer ([`~transformers.Trainer`]):
                See [`score_answers`].
            batch_size (`int`):
                Answers in one forward.
            decode (`bool`):
                Also decode; the first greedy answers become the kind `initial_greedy`.
            progress (`bool`):
                Show a progress bar.

        Returns:
            `dict[str, float]`: the keys of [`SqueezeProbeCallback`].

        Raises:
            `ValueError`: when a log-probability is not finite.
        """
        decode = decode and bool(self.prompts)
        begin = time.perf_counter()
        decoded = self._decode(trainer, batch_size) if decode else {}
        self.decode_seconds = time.perf_counter() - begin
        pulled = [kind in (CHOSEN, REJECTED) for kind in self.kinds]
        table = score_answers(trainer, self.answers, pulled, batch_size, progress, self.collate)
        self._check_finite(table)
        if not len(self.start):
            self.start = table[:, [LOGP, LOGP_ARGMAX]]
        logs = {**self._metrics(table), **decoded}
        if decode:  # after the check: nobody samples from weights that have diverged
            begin = time.perf_counter()
            logs["onpolicy/pressure_own"] = self._pressure_of_samples(trainer, batch_size)
            self.decode_seconds += time.perf_counter() - begin
        return {f"{self.prefix}{key}": value for key, value in logs.items()}

    def _decode(self, trainer: Trainer, batch_size: int) -> dict[str, float]:
        # One token a row at a time: more rows fit than where whole answers are scored, and most of the time is waiting
        greedy = decode_answers(trainer, self.tokenizer, self.prompts, self.max_new_tokens, 4 * batch_size)
        if self.greedy is None and not len(self.start):
            self.set_greedy(greedy)
        ends = end_tokens(trainer.accelerator.unwrap_model(trainer.model), self.tokenizer)
        return {f"repeat/{key}": value for key, value in repetition_metrics(greedy, ends).items()}

    def _pressure_of_samples(self, trainer: Trainer, batch_size: int) -> float:
        prompts = self.prompts[:SAMPLED_PROMPTS]
        samples = decode_answers(trainer, self.tokenizer, prompts, self.max_new_tokens, 4 * batch_size, True)
        own = list(zip(prompts, samples, strict=True))
        return _token_mean(score_answers(trainer, own, [False] * len(own), batch_size), "pressure")

    def _metrics(self, table: torch.Tensor) -> dict[str, float]:
        rows = {kind: torch.tensor([other == kind for other in self.kinds]) for kind in dict.fromkeys(self.kinds)}
        change = table[:, LOGP] - self.start[:, 0]
        logs: dict[str, float] = {}
        for kind, these in rows.items():
            logs[f"probe/{kind}/logp"] = _token_mean(table[these], "logp_tok")
            logs[f"probe/{kind}/delta0"] = (change[these].sum() / table[these, 0].sum()).item()
            if kind in (CHOSEN, REJECTED):
                logs[f"probe/{kind}/logp_argmax"] = _token_mean(table[these], "logp_argmax")
        chosen, ours = rows[CHOSEN], (CHOSEN, REJECTED, INITIAL_GREEDY)
        logs["probe/chosen/frac_down"] = (change[chosen] < 0).double().mean().item()
        if REJECTED in rows:
            for name in ("pressure", "valley_frac"):
                logs[f"probe/rejected/{name}"] = _token_mean(table[rows[REJECTED]], name)
        if bystanders := [kind for kind in rows if kind not in ours and not kind.startswith(f"{REJECTED}_")]:
            rise = ((table[chosen, LOGP_ARGMAX] - self.start[chosen, 1]).sum() / table[chosen, 0].sum()).item()
            falls = [logs[f"probe/{kind}/delta0"] for kind in bystanders]
            logs["squeeze/index"] = rise - sum(falls) / len(falls)
        if {"other_train", "other_test"} <= set(rows):
            logs["crosstalk/other_train"] = logs["probe/other_train/delta0"] - logs["probe/other_test/delta0"]
        return logs

    def _check_finite(self, table: torch.Tensor) -> None:
        broken = {kind for kind, row in zip(self.kinds, table, strict=True) if not row.isfinite().all()}
        if broken:
            raise ValueError(
                f"The log-probabilities of the probes should be finite, those of {', '.join(sorted(broken))} are not. "
                "The weights have probably diverged: lower `learning_rate`, set `max_grad_norm`, or use `bf16`."
            )


def take_what_fits(
    sets: Sequence[ProbeSet], trainer: Trainer, max_steps: int, every: int, budget: float, decode: bool
) -> None:
    """
    Keep as many prompts of each probe set as leave room in the budget for a pass at the start, at the end, and for
    some in between, but at least one, and all of a set of twelve or fewer. How long a step will take is not known
    before the first one: it is taken for the forward and the backward of as many answers, which it takes at least.

    Args:
        sets (`Sequence[ProbeSet]`):
            Which share the budget.
        trainer ([`~transformers.Trainer`]):
            Before its first step.
        max_steps, every (`int`):
            Of the run, and the least steps between two passes.
        budget (`float`):
            In (0, 1).
        decode (`bool`):
            Whether passes decode; at most half of the budget is for that.
    """
    args, world, begin = trainer.args, trainer.accelerator.num_processes, time.perf_counter()
    pairs = any(name.startswith(REJECTED) for name in getattr(trainer.train_dataset, "column_names", None) or ())
    rows = world * args.per_device_train_batch_size * (2 if pairs else 1)
    some, kinds = (sets[0].answers * rows)[:rows], (sets[0].kinds * rows)[:rows]
    prompts = [prompt for probes in sets for prompt in probes.prompts] if decode else []
    seconds = []
    with forked_random(trainer.accelerator.device):
        for _ in range(2):  # the first is slower
            start = time.perf_counter()
            pulled = [kind in (CHOSEN, REJECTED) for kind in kinds]
            score_answers(trainer, some, pulled, rows // world, collate=sets[0].collate)
            seconds.append(time.perf_counter() - start)
        start, tokens = time.perf_counter(), max(probes.max_new_tokens for probes in sets)
        if prompts:
            decode_answers(trainer, sets[0].tokenizer, (prompts * rows)[:rows], PILOT_TOKENS, rows // world)
        drawn = (time.perf_counter() - start) / rows * tokens / PILOT_TOKENS
    step = FORWARDS_OF_A_STEP * min(seconds) * args.gradient_accumulation_steps
    an_answer = min(seconds) / rows
    room = budget / (1 - budget) * max_steps * step - (time.perf_counter() - begin)

    def taken(count: int, probes: ProbeSet) -> int:
        return probes.count if probes.count <= ENOUGH_PROMPTS else min(count, probes.count)

    def scoring(count: int) -> float:
        return an_answer * sum(probes.columns * taken(count, probes) for probes in sets)

    def decoding(count: int) -> float:  # greedily, and samples
        return 2 * (drawn + an_answer) * sum(min(count, len(probes.prompts)) for probes in sets if prompts)

    most, scored, decoded = max(probes.count for probes in sets), 0, 0
    for between in reversed(range(min(PASSES_BETWEEN, (max_steps - 1) // every) + 1)):
        a_pass = room / (2 + between)
        spare = a_pass - scoring(ENOUGH_PROMPTS)
        if spare >= 0 or not between:
            decoded = _most(decoding, most, min(a_pass / 2, spare)) if prompts else 0
            scored = max(_most(scoring, most, a_pass - decoding(decoded)), 1)
            break
    counts = [scored, decoded]
    broadcast_object_list(counts)  # every process has timed its own
    before = sum(probes.count for probes in sets)
    for probes in sets:
        probes.take(taken(counts[0], probes), counts[1])
    after, kept = sum(probes.count for probes in sets), sum(len(probes.prompts) for probes in sets)
    if (after < before or kept < len(prompts)) and trainer.is_world_process_zero():
        few = f" Fewer than {ENOUGH_PROMPTS} of a set say little." if counts[0] < ENOUGH_PROMPTS < most else ""
        logger.warning(
            f"{after} of {before} prompts are probed, taken at random, and {kept} of them decoded from: an "
            f"answer takes {an_answer:.3g} s, a step at least {step:.3g} s, and probe_budget={budget:g} is the share "
            f"of the run's {max_steps} steps that probes may take.{few} Raise it for more; `probe_budget=1.0` takes "
            "all."
        )


def _most(seconds: Callable[[int], float], limit: int, room: float) -> int:
    """How many, `limit` at most, can be had in this time."""
    return bisect.bisect_right(range(1, limit + 1), room, key=seconds)


def _prepare_pairs(
    trainer: DPOTrainer, dataset: Dataset, kinds: list[str], processing_class: Any
) -> list[dict[str, tuple[list[int], list[int]]]]:
    """Token ids of prompt and answer by kind for each row, by the trainer's own preparation, before it truncates."""
    rows: list[dict[str, tuple[list[int], list[int]]]] = [{} for _ in range(len(dataset))]
    if not rows:
        return rows
    context = [column for column in CONTEXT if column in dataset.column_names]
    # A pair is prepared as a pair, since the prompt ends where both answers agree; the others one by one.
    couples = [(CHOSEN, REJECTED), *((kind, kind) for kind in kinds if kind not in (CHOSEN, REJECTED))]
    if REJECTED not in kinds:
        couples[0] = (CHOSEN, CHOSEN)
    alike: dict[str, list[tuple[str, str]]] = {}  # prepared at once, since a preparation takes its time
    for couple in couples:
        alike.setdefault(str([dataset.features[kind] for kind in couple]), []).append(couple)
    with _no_progress_bars():
        for group in alike.values():
            pairs = dataset.select_columns(["prompt", *context]).select([*range(len(dataset))] * len(group))
            for side, kinds_of_side in zip((CHOSEN, REJECTED), zip(*group, strict=True), strict=True):
                pairs = pairs.add_column(side, [answer for kind in kinds_of_side for answer in dataset[kind]])
            pairs = pairs.add_column("probe", list(range(len(pairs))))
            for row in trainer._prepare_dataset(pairs, processing_class, trainer.args, PROBES):
                couple, index = divmod(row["probe"], len(dataset))
                for side, kind in zip((CHOSEN, REJECTED), group[couple], strict=True):
                    rows[index][kind] = row["prompt_ids"], row[f"{side}_ids"]
    return [{kind: row[kind] for kind in kinds if kind in row} for row in rows]


def _collate_pairs(trainer: Trainer, answers: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    rows = [{"prompt_ids": prompt, "chosen_ids": ids, "rejected_ids": ids} for prompt, ids in answers]
    return _first_half(trainer.data_collator(rows))


def _collate_images(trainer: Trainer, dataset: Dataset, answers: list[tuple[int, str]]) -> dict[str, torch.Tensor]:
    rows = [(dataset[index], kind) for index, kind in answers]
    context = ("prompt", *CONTEXT)
    return _first_half(
        trainer.data_collator(
            [
                {**{name: row[name] for name in context if name in row}, CHOSEN: row[kind], REJECTED: row[kind]}
                for row, kind in rows
            ]
        )
    )


def _first_half(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The chosen answers of a batch of pairs, with labels."""
    inputs = {name: value[: len(value) // 2] for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs.pop("completion_mask") == 0, -100)}


def _bytes_hash(value: Any) -> str:
    return hashlib.sha256(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()).hexdigest()


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Those of `datasets`, of which there would be three for each kind of answer."""
    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()


def _token_mean(table: torch.Tensor, column: str) -> float:
    return (table[:, COLUMNS.index(column)].sum() / table[:, 0].sum()).item()
