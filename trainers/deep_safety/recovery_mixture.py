"""Utility rows and safety-recovery rows in one epoch, in the same proportion at every step."""

import logging
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from trl import pack_dataset

from .config import DeepSafetySFTConfig
from .recovery_rows import draw_recovery_row


logger = logging.getLogger(__name__)

_COLUMNS = ("input_ids", "labels", "constrain")


class RecoveryMixture(torch.utils.data.Dataset):
    """
    Utility rows and safety-recovery rows behind one integer index. Index i below N, the number of utility rows, is
    that row; from N on, with M triplets, it is triplet `(i - N) % M` in its copy `(i - N) // M`, whose prefix
    [`draw_recovery_row`] draws from seed, copy and triplet. The index holds all that is needed, so any worker process
    gives the same row. [`RecoveryMixtureSampler`] gives the indices of an epoch.

    Args:
        utility ([`~datasets.Dataset`]):
            Prepared rows with `input_ids`, `labels` and any other columns. They are given `constrain=True` unless they
            have such a column; recovery rows have `constrain=False`.
        triplets ([`~datasets.Dataset`]):
            Rows of [`tokenize_triplets`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the prefixes.
        draw (*optional*):
            `prefix_probability`, `max_prefix_tokens` and `max_length`, as for [`draw_recovery_row`].
    """

    def __init__(self, utility: Dataset, triplets: Dataset, *, seed: int = 0, **draw: Any) -> None:
        self.utility, self.triplets, self.seed, self.draw, self.epoch = utility, triplets, seed, draw, 0

    def __len__(self) -> int:
        """Utility rows and triplets; an epoch is as long as its sampler says."""
        return len(self.utility) + len(self.triplets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index < len(self.utility):
            return {"constrain": True, **self.utility[index]}
        copy, triplet = divmod(index - len(self.utility), len(self.triplets))
        row = draw_recovery_row(self.triplets[triplet], seed=self.seed, copy=copy, index=triplet, **self.draw)
        return {**row, "constrain": False}

    def set_epoch(self, epoch: int) -> None:
        """
        Sets the epoch that the sampler gives. Accelerate calls it here where it does not reach the sampler: on
        resuming within an epoch with several processes, whose batch sampler is wrapped twice.
        """
        self.epoch = epoch


class RecoveryMixtureSampler(torch.utils.data.Sampler[int]):
    """
    Indices of one epoch of a [`RecoveryMixture`]. Place t is a recovery row where `floor((t + 1) * ratio)` exceeds
    `floor(t * ratio)`, so T places in a row hold `ratio * T` recovery rows, rounded up or down where that is no whole
    number. Accelerate hands batches in turn to the processes and an optimizer step takes batches in a row, therefore
    each step over T rows holds that many, whatever the processes, batch size and gradient accumulation steps.

    Utility rows come once, shuffled by seed and epoch. Triplets come in shuffled passes that go on over the epochs;
    each pass is a new copy, so a prefix is drawn anew every time a triplet is seen. The order depends on seed and
    epoch alone: every process makes the same, and a resumed run skips what was seen.

    Args:
        mixture ([`RecoveryMixture`]):
            What the indices are of. It also keeps the epoch.
        ratio (`float` or [`~fractions.Fraction`], *optional*, defaults to `0.2`):
            Share of the recovery rows by number of examples, "alpha = 0.2" of equation 2 in the paper; taken as the
            nearest fraction with a denominator up to 10000.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the order.

    Raises:
        ValueError: if the ratio is not between 0 and 1, or an epoch of so few utility rows has no recovery row.
    """

    def __init__(self, mixture: RecoveryMixture, *, ratio: float | Fraction = 0.2, seed: int = 0) -> None:
        self.mixture, self.seed = mixture, seed
        self.ratio = Fraction(ratio).limit_denominator(10_000)
        if not 0 < self.ratio < 1:
            raise ValueError(f"Expected a share of recovery rows between 0 and 1, both excluded, got {ratio}.")
        # The longest epoch in which each utility row comes once: 64 utility rows and ratio 1/5 give 80 rows.
        self._length = int(len(mixture.utility) / (1 - self.ratio))
        if self._length == len(mixture.utility):
            raise ValueError(
                f"Expected at least {math.ceil((1 - self.ratio) / self.ratio)} utility rows for a ratio of "
                f"{self.ratio}, got {len(mixture.utility)}: an epoch would hold no recovery row."
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        part, whole = self.ratio.as_integer_ratio()
        epoch, num_utility, num_triplets = self.mixture.epoch, len(self.mixture.utility), len(self.mixture.triplets)
        utility = iter(np.random.default_rng([self.seed, epoch]).permutation(num_utility).tolist())
        seen = epoch * (len(self) - num_utility)  # recovery rows of earlier epochs
        order: dict[int, list[int]] = {}
        for place in range(len(self)):
            if (place + 1) * part // whole == place * part // whole:
                yield next(utility)
                continue
            copy, position = divmod(seen, num_triplets)
            if copy not in order:
                order = {copy: np.random.default_rng([self.seed, copy, 0, 1]).permutation(num_triplets).tolist()}
            yield num_utility + copy * num_triplets + order[copy][position]
            seen += 1

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch whose indices come next; the trainer calls it before each."""
        self.mixture.set_epoch(epoch)


def check_rows_to_mix(rows: Any, images: bool = False) -> None:
    """Raises `ValueError` where recovery rows can't be mixed in."""
    if not isinstance(rows, Dataset) or images:
        raise ValueError(
            f"Recovery rows are mixed into a `datasets.Dataset` of texts, got {type(rows).__name__}. Mix rows of "
            "`make_safety_recovery_dataset` into the stream yourself."
        )


def columns_of(rows: Any) -> list[str]:
    """Columns of a dataset, of a stream that doesn't name them those of its first row."""
    return rows.column_names or list(next(iter(rows), {}))


def partly_tokenized(rows: Any) -> bool:
    """Whether texts were concatenated with rows of token ids."""
    return isinstance(rows, Dataset) and "input_ids" in rows.column_names and rows.data["input_ids"].null_count > 0


def prepare_texts(rows: Any, prepare: Callable[[Any], Any]) -> Any:
    """Rows whose texts `prepare` has made token ids of; those that have them already come last and as they are."""
    if not partly_tokenized(rows):
        return prepare(rows)
    ready = np.array([ids is not None for ids in rows["input_ids"]])
    texts = rows.select(np.flatnonzero(~ready)).remove_columns(
        [name for name in _COLUMNS[:2] if name in rows.column_names]
    )
    parts = [prepare(texts), rows.select(np.flatnonzero(ready))]
    names = [name for name in _COLUMNS if name in rows.column_names]
    first, last = (part.select_columns(names) for part in parts)
    return concatenate_datasets([first, last.cast(first.features)])


def pack_with_recovery_rows(rows: Any, triplets: Dataset | None, args: DeepSafetySFTConfig) -> Any:
    """
    Rows and, of triplets, the share `safety_ratio` of recovery rows, packed together. TRL packs `input_ids` and
    `labels` alone; here `constrain` goes along, one flag a token.
    """
    columns = [name for name in _COLUMNS if name in columns_of(rows)]
    rows = rows.select_columns(columns)
    if triplets is not None:
        share = Fraction(args.safety_ratio).limit_denominator(10_000)
        mixture = _mixture(rows, triplets, args)
        recovery = [mixture[len(rows) + index] for index in range(max(1, round(len(rows) * share / (1 - share))))]
        features = Features({**{name: rows.features[name] for name in columns}, "constrain": Value("bool")})
        rows = concatenate_datasets([rows, Dataset.from_list(recovery, features=features)]).shuffle(seed=args.seed)
    flags = rows.map(
        lambda row: {"flags": [row.get("constrain") is not False] * len(row["input_ids"])},
        remove_columns=[name for name in columns_of(rows) if name == "constrain"],
    ).rename_column("flags", "constrain")
    packed = pack_dataset(flags, args.max_length, args.packing_strategy)
    return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed


def mix_in_recovery_rows(trainer: Any, triplets: list[dict[str, list[int]]]) -> None:
    """Make the trainer's rows a [`RecoveryMixture`] with triplets and, if it rehearses them, its own refusals."""
    check_rows_to_mix(trainer.train_dataset, trainer._is_vision_dataset)
    args = trainer.args
    if args.rehearse_refusals:
        rehearsed = sorted(trainer.own_refusals.items())
        nothing: dict[str, list[int]] = {name: [] for name in ("harmful_ids", "spaced_ids", "bare_ids", "blank_ends")}
        own = [{**nothing, "prompt_ids": list(prompt), "refusal_ids": refusal} for prompt, refusal in rehearsed]
        triplets = [*own, *triplets]
    if not triplets:
        logger.warning("The reference refuses no training prompt: `rehearse_refusals=True` has nothing to rehearse.")
        return
    token_ids = List(Value("int64"))
    rows = Dataset.from_list(triplets, features=Features(dict.fromkeys(triplets[0], token_ids)))
    mixture = _mixture(trainer.train_dataset, rows, args)
    RecoveryMixtureSampler(mixture, ratio=args.safety_ratio)  # raises where there are too few rows
    trainer.train_dataset = mixture


def _mixture(rows: Dataset, triplets: Dataset, args: DeepSafetySFTConfig) -> RecoveryMixture:
    draw = {"prefix_probability": args.recovery_probability, "max_prefix_tokens": args.max_prefix_tokens}
    return RecoveryMixture(rows, triplets, seed=args.seed, max_length=args.max_length, **draw)
