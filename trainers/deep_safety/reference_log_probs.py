"""Reference log-probabilities of answer tokens: computed once for a dataset, laid out again for each batch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from datasets.arrow_writer import ArrowWriter
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader
from tqdm import tqdm

from hf_iclr.saving import atomic_file

from .constrained_loss import window_positions


REF_LOGPS, CONSTRAIN, POSITIONS = "ref_logps", "constrain", "window_positions"


@dataclass(frozen=True)
class Window:
    """Where the protected window lies: arguments of [`window_positions`], and how much of it is stored."""

    start: str
    template_ids: frozenset[int] = frozenset()
    end_of_thinking_id: int | None = None
    stored_tokens: int | None = None  # from the window's start; all answer tokens where it is `None`

    def positions(self, labels: torch.Tensor) -> torch.Tensor:
        """Positions of the answer tokens of `labels` (`torch.LongTensor` of shape `(batch, seq_len)`)."""
        return window_positions(labels, self.start, self.template_ids, self.end_of_thinking_id)

    def stored(self, positions: torch.Tensor) -> torch.Tensor:
        """Which answer tokens have a stored reference (`torch.BoolTensor` of the shape of `positions`)."""
        if self.stored_tokens is None:
            return positions > 0
        return (positions > 0) & (positions <= self.stored_tokens)


@dataclass
class ConstrainedCollator:
    """
    A collator of TRL plus what the constrained loss needs of each token: `window_positions`, and `ref_logps` where the
    rows carry them. Rows whose column `constrain` is `False`, and tokens for which a `constrain` of one flag a token
    is, get position 0, which is plain cross-entropy.
    """

    collator: Callable[[list[dict[str, Any]]], dict[str, Any]]  # as the trainer set it up
    window: Window
    stored: bool  # whether rows carry `ref_logps`, the reference of their stored tokens one after the other

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for row in rows:
            if "labels" in row:
                check_answer_labels(row["labels"])
        batch = self.collator([{k: v for k, v in row.items() if k not in (REF_LOGPS, CONSTRAIN)} for row in rows])
        positions = self.window.positions(F.pad(batch["labels"][:, 1:], (1, 0), value=-100))  # none predicts the first
        # A row that another dataset brought along has no flag, `None` once the two are concatenated.
        flags = [True if row.get(CONSTRAIN) is None else row[CONSTRAIN] for row in rows]
        scored = [REF_LOGPS in row for row in rows]
        if self.stored and all(has or flag is False for has, flag in zip(scored, flags, strict=True)):
            values = [value for row in rows for value in row.get(REF_LOGPS, ())]
            places = self.window.stored(positions) & _spread(scored, rows, batch["labels"])
            batch[REF_LOGPS] = torch.zeros(positions.shape).masked_scatter(places, torch.tensor(values))
        batch[POSITIONS] = positions * _spread(flags, rows, batch["labels"])
        return batch


def check_answer_labels(labels: Sequence[int]) -> None:
    """Raises `ValueError` where a row's loss starts at its first token."""
    if len(labels) and labels[0] != -100:
        raise ValueError(
            "Expected labels on answers only, got a row whose loss starts at its first token: the window would "
            "protect the prompt. Use rows with `prompt` and `completion`, or conversations with "
            "`assistant_only_loss=True`; or set `constrain='none'`."
        )


def _spread(flags: list, rows: Sequence[Mapping[str, Any]], labels: torch.Tensor) -> torch.Tensor:
    """Flags of rows or of their tokens -> one a token, whether rows lie below each other or one after the other."""
    below = labels.shape[0] == len(rows)
    if below and all(isinstance(flag, bool) for flag in flags):
        return torch.tensor(flags)[:, None]
    tokens = [torch.tensor(flag).expand(len(row["input_ids"])) for flag, row in zip(flags, rows, strict=True)]
    lines = tokens if below else [torch.cat(tokens)]
    return torch.stack([F.pad(line, (0, labels.shape[1] - len(line))) for line in lines])


def add_reference_log_probs(
    dataset: Dataset,
    score: Callable[[dict[str, Any]], torch.Tensor],
    collator: ConstrainedCollator,
    accelerator: Accelerator,
    batch_size: int,
    model_hash: str | None,
    name: str,
) -> Dataset:
    """
    Add the column `ref_logps`: the reference log-probabilities (nats, float32) of the stored tokens of each row.

    Where the rows lie on disk, the column is kept in the cache of `datasets` under a fingerprint of the rows, the
    reference and the window, so that the next run of the same script reads it; without `model_hash`, which stands for
    the reference's weights, it isn't. Every process scores its share.

    Rows have `input_ids` and `labels`, packed or not. `score` gives a batch's log-probabilities under the reference,
    of shape `(batch, seq_len - 1)`. `collator` keeps rows below each other; each is cut after its last stored token.
    """
    window = collator.window
    computed = (dataset._fingerprint, model_hash, repr(window), accelerator.mixed_precision)
    fingerprint = [Hasher.hash(computed) if model_hash else ""]
    broadcast_object_list(fingerprint, from_process=0)
    on_disk = datasets.is_caching_enabled() and bool(dataset.cache_files) and model_hash is not None
    cache_file = None
    if on_disk:
        cache_file = Path(dataset.cache_files[0]["filename"]).with_name(f"cache-{fingerprint[0]}.arrow")
    found = torch.tensor(cache_file is not None and cache_file.exists(), device=accelerator.device)
    if accelerator.gather(found.long()[None]).all():
        return concatenate_datasets([dataset, Dataset.from_file(str(cache_file))], axis=1)

    columns = [column for column in ("input_ids", "labels", "seq_lengths") if column in dataset.column_names]
    cut = dataset.select_columns(columns).with_transform(lambda rows: _cut_rows(rows, window))
    loader = accelerator.prepare(DataLoader(cut, batch_size=batch_size, collate_fn=collator, shuffle=False))
    scored: list[list[float]] = []
    for batch in tqdm(loader, desc=f"Reference log-probs of {name}", disable=not accelerator.is_main_process):
        kept = window.stored(batch[POSITIONS])
        logps = F.pad(score(batch).float(), (1, 0))
        width = int(accelerator.gather(torch.tensor([kept.shape[1]], device=kept.device)).max())
        logps, kept = (F.pad(tensor, (0, width - kept.shape[1])) for tensor in (logps, kept))
        logps, kept = accelerator.gather_for_metrics((logps, kept))
        scored += [row[keep].tolist() for row, keep in zip(logps.cpu(), kept.cpu(), strict=True)]
    column = Dataset.from_dict(
        {REF_LOGPS: scored}, features=datasets.Features({REF_LOGPS: datasets.List(datasets.Value("float32"))})
    )
    if cache_file is not None and accelerator.is_local_main_process:
        with atomic_file(cache_file) as part, ArrowWriter(features=column.features, path=str(part)) as writer:
            writer.write_table(column.data.table)
            writer.finalize()
    accelerator.wait_for_everyone()
    return concatenate_datasets([dataset, column], axis=1)


def _cut_rows(rows: dict[str, list], window: Window) -> dict[str, list]:
    """Rows without what comes after their last stored token."""
    if "seq_lengths" in rows or window.stored_tokens is None:
        return rows
    lengths = []
    for labels in rows["labels"]:
        stored = window.stored(window.positions(torch.tensor([labels])))[0].nonzero()
        lengths.append(int(stored[-1]) + 1 if len(stored) else 1)
    return {name: [row[:length] for row, length in zip(rows[name], lengths, strict=True)] for name in rows}
