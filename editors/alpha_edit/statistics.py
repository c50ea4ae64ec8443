"""Second moments of what the down-projections of a model read: what an edit must leave alone."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from datasets import Dataset
from huggingface_hub import ModelCard
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.hub import HubMixin, pretrained_folder
from hf_iclr.models import evaluation_mode, hash_weights, pad_rows
from hf_iclr.saving import cached_revision, write_safetensors
from hf_iclr.untrusted import as_written_by, inside, parse_json, read_safetensors, whole_number

from ..records.statistics_card import statistics_card
from .closed_form import count_preserved, main_eigenvectors, null_space_rule, sum_of_squares
from .projections import DownProjection, capture, check_weights, choose_layers, find_down_projections, run_until
from .requests import text_of


logger = logging.getLogger(__name__)

FILE_NAME = "key_statistics.safetensors"


@dataclass
class KeyStatistics(HubMixin):
    """
    Sums of k k^T over the tokens of a text, k the input of a layer's down-projection.

    Make them with [`KeyStatistics.from_dataset`]. Sums of two texts add: `first + second`.

    Args:
        sums (`dict[int, torch.Tensor]`):
            For each layer the float64 sum of k k^T, of shape `(d, d)`; of compressed statistics a factor of it, of
            shape `(d, m)`: eigenvectors times the roots of their eigenvalues, the largest first.
        module_names (`dict[int, str]`):
            Path of each layer's down-projection in the model.
        tokens (`int`):
            How many keys were added.
        rows (`int`):
            From how many rows of text, read in order.
        model_name (`str`):
            Repository or folder the model came from.
        model_revision (`str`, *optional*):
            Its commit.
        weights_hash (`str`):
            [`~hf_iclr.models.hash_weights`] of the model: statistics of another model are refused.
        datasets (`list[str]`):
            Fingerprints of the texts read, and of how they were read.
        traces (`dict[int, float]`):
            Of compressed statistics the trace of each layer's sum, see [`~KeyStatistics.compress`].
    """

    sums: dict[int, torch.Tensor]
    module_names: dict[int, str]
    tokens: int
    rows: int
    model_name: str
    model_revision: str | None
    weights_hash: str
    datasets: list[str] = field(default_factory=list)
    traces: dict[int, float] = field(default_factory=dict)

    @classmethod
    def from_dataset(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Dataset | Iterable[dict[str, Any]],
        text_column: str = "text",
        layers: str | Sequence[int] = "auto",
        max_tokens: int = 200_000,
        max_length: int = 512,
        batch_size: int = 8,
        checkpoint: str | Path | None = None,
        progress: bool = True,
    ) -> "KeyStatistics":
        """
        Run the model once over a text and add up the keys of all layers wanted.

        In a run of several processes each takes every n-th row and the sums are added; all of them get the result.

        Args:
            model (`~transformers.PreTrainedModel`):
                A dense causal language model.
            tokenizer (`~transformers.PreTrainedTokenizerBase`):
                Its tokenizer.
            dataset (`datasets.Dataset` or iterable of `dict`):
                Rows of general text, of the kind that must not change.
            text_column (`str`, *optional*, defaults to `"text"`):
                Column with the text.
            layers (`str` or `list[int]`, *optional*, defaults to `"auto"`):
                Numbers of the layers, `"auto"` for those that [`AlphaEditConfig`] edits, or `"all"`.
            max_tokens (`int`, *optional*, defaults to 200,000):
                Tokens in all, at most. The paper has 100,000 articles; fewer than 100 times d is too few for a tight
                null space.
            max_length (`int`, *optional*, defaults to 512):
                Tokens of a row at most.
            batch_size (`int`, *optional*, defaults to 8):
                Rows in one forward.
            checkpoint (`str` or `Path`, *optional*):
                Folder in which the sums so far are kept; an interrupted run goes on from there.
            progress (`bool`, *optional*, defaults to `True`):
                Show a progress bar.

        Returns:
            [`KeyStatistics`]

        Raises:
            ValueError: when the dataset has no such column or no text, a layer does not exist, a key is not finite,
                or the checkpoint is of another model, text or settings.
            TypeError: when a row's text is none.
        """
        whole_number(batch_size, "batch_size", 1)
        whole_number(1 if max_length is None else max_length, "max_length", 1)
        has_rows = isinstance(dataset, Iterable) or hasattr(dataset, "__getitem__")
        if isinstance(dataset, str | Mapping) or not has_rows or not callable(tokenizer):
            raise TypeError(
                f"Expected a tokenizer and rows with text, got {type(tokenizer).__name__} and "
                f"{type(dataset).__name__}. Of a `DatasetDict` choose a split: `dataset['train']`."
            )
        projections = choose_layers(find_down_projections(model), layers)
        state = PartialState(cpu=model.device.type == "cpu")
        share = -(-max_tokens // state.num_processes)
        folder = None if checkpoint is None else Path(checkpoint) / f"rank_{state.process_index}"
        # Of how it is read and of the tokens of every text in its turn: two data sets may have one name.
        read = hashlib.sha256(f"{text_column} {max_tokens} {max_length}".encode())

        def tokens_of(rows: list[dict[str, Any]]) -> list[list[int]]:
            texts = [text_of(row, text_column) for row in rows]
            ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
            read.update("".join(f"{row}\n" for row in ids).encode())
            return ids

        made = cls(
            sums={
                p.index: torch.zeros(p.in_features, p.in_features, dtype=torch.float64, device=model.device)
                for p in projections
            },
            module_names={p.index: p.name for p in projections},
            tokens=0,
            rows=0,
            model_name=model.config.name_or_path,
            model_revision=cached_revision(model.config.name_or_path),
            weights_hash=hash_weights(model),
        )
        own = itertools.islice(dataset, state.process_index, None, state.num_processes)
        if folder is not None and (folder / FILE_NAME).exists():
            kept = cls.from_pretrained(folder)
            kept.check_model(model)
            for row in itertools.islice(own, kept.rows):
                tokens_of([row])
            if (kept.datasets, kept.layers, kept.traces) != ([read.hexdigest()[:16]], made.layers, {}):
                raise ValueError(
                    f"Expected {folder} to hold part of these statistics, got those of layers {kept.layers} and other "
                    "text or settings. Pass another checkpoint folder or remove this one."
                )
            made.tokens, made.rows = kept.tokens, kept.rows
            made.sums = {layer: kept.sums[layer].to(made.sums[layer]) for layer in made.layers}

        bar = tqdm(total=share, initial=made.tokens, unit="token", desc="keys", disable=not progress)
        with evaluation_mode(model), bar:
            for number, rows in enumerate(iter(lambda: list(itertools.islice(own, batch_size)), []), start=1):
                batch, before = pad_rows(tokens_of(rows), device=model.device), made.tokens
                made.datasets = [read.hexdigest()[:16]]
                made._add(model, projections, batch, share)
                bar.update(made.tokens - before)
                if made.tokens >= share:
                    break
                if folder is not None and number % 50 == 0:
                    made.save_pretrained(folder)
        if state.num_processes > 1:
            part = int(read.hexdigest()[:12], 16)
            made.tokens, made.rows, whole = reduce(
                torch.tensor([made.tokens, made.rows, part], device=state.device), "sum"
            ).tolist()
            made.datasets = [f"{whole:x}"]
            made.sums = {
                layer: reduce(value.to(state.device), "sum").to(value.device) for layer, value in made.sums.items()
            }
        if made.tokens == 0:
            raise ValueError(f"Expected rows with text in column {text_column!r}, got none.")
        made.sums = {layer: value.cpu() for layer, value in made.sums.items()}
        return made

    def _add(self, model: PreTrainedModel, projections: list[DownProjection], batch: dict, share: int) -> None:
        mask = batch["attention_mask"]
        self.rows += len(mask)
        if not mask.numel():  # nothing but empty texts
            return
        with capture({p.index: (p.module, "input") for p in projections}) as keys:
            run_until(model, projections[-1].layer, **batch)
        counted = mask.bool()
        counted &= (counted.flatten().long().cumsum(0) <= share - self.tokens).view_as(counted)
        for p in projections:
            rows = keys[p.index].reshape(*mask.shape, -1)[counted.to(keys[p.index].device)].float()
            if not rows.isfinite().all():
                raise ValueError(f"Expected finite keys at {p.name}, got NaN or infinity. Load the model in float32.")
            self.sums[p.index] += sum_of_squares(rows).to(self.sums[p.index])
        self.tokens += int(counted.sum())

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers, in order."""
        return sorted(self.sums)

    def second_moment(self, layer: int) -> torch.Tensor:
        """
        Mean of k k^T of a layer, float64, of shape `(d, d)`. Raises `ValueError` when the layer is not among the
        statistics, or they are compressed or not finite.
        """
        if layer not in self.sums:
            raise ValueError(
                f"Expected statistics of layer {layer}, got those of {self.layers}. Collect them with layers=[...]."
            )
        if layer in self.traces:
            raise ValueError(f"Expected whole statistics of layer {layer}, got compressed ones. Load the whole ones.")
        moment = self.sums[layer] / self.tokens
        if not moment.isfinite().all():
            raise ValueError(f"Expected finite statistics, got NaN or infinity in layer {layer}. Collect them again.")
        return moment

    def preserved(
        self, layer: int, threshold: float | None = None, energy: float | None = None, rank: int | None = None
    ) -> torch.Tensor:
        """
        Directions in which the text's keys lie; the rest is the null space of https://huggingface.co/papers/2410.02355.

        Args:
            layer (`int`):
                Number of the layer.
            threshold (`float`, *optional*):
                Keep eigenvectors of the second moment whose eigenvalue is at least this, the paper's rule with 2e-2.
            energy (`float`, *optional*):
                Keep the fewest eigenvectors with this share of the sum of eigenvalues.
            rank (`int`, *optional*):
                Keep this many.

        Returns:
            `torch.Tensor` of shape `(d, m)`, float64, orthonormal columns, largest eigenvalue first.

        Raises:
            ValueError: unless exactly one of `threshold`, `energy` and `rank` is given, and within its range.
        """
        null_space_rule(threshold, energy, rank)
        values, vectors = self._eigen(layer)
        total = self.traces.get(layer, 0.0) / self.tokens or None
        count = count_preserved(values, threshold, energy, rank, total)
        if count == len(values) < len(vectors):
            raise ValueError(
                f"Expected a rule that preserves fewer than {count} directions of layer {layer}, which is what these "
                "compressed statistics have, got one that preserves more. Compress the whole ones by that rule."
            )
        return vectors[:, :count].contiguous()

    def _eigen(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        if layer in self.traces:
            return main_eigenvectors(self.sums[layer] / self.tokens**0.5, factor=True)
        return main_eigenvectors(self.second_moment(layer))

    def compress(
        self, threshold: float | None = None, energy: float | None = None, rank: int | None = None
    ) -> "KeyStatistics":
        """
        Statistics that have, of each layer, only the main eigenvectors: d x m numbers in place of d x d. They do for
        the solver `"alphaedit"` and [`NullSpaceCallback`] with this rule or one that preserves less; `"memit"` and
        sums of two texts need the whole ones.

        Args:
            threshold, energy, rank (*optional*):
                One of them, as in [`~KeyStatistics.preserved`], which raises for the same reasons.

        Returns:
            [`KeyStatistics`]
        """
        factors = {}
        for layer in self.layers:
            # One more than is preserved, to tell a rule that preserves as many from one that would preserve more.
            count = self.preserved(layer, threshold, energy, rank).shape[1] + 1
            values, vectors = self._eigen(layer)
            factors[layer] = (vectors[:, :count] * (values[:count] * self.tokens).sqrt()).contiguous()
        traces = self.traces or {layer: float(total.trace()) for layer, total in self.sums.items()}
        return replace(self, sums=factors, traces=traces)

    def check_model(self, model: PreTrainedModel) -> None:
        """Raises `ValueError` unless these are statistics of a model, maybe with adapters on it, that is all here."""
        check_weights(model)
        if hash_weights(model) != self.weights_hash:
            raise ValueError(
                f"Expected statistics of this model, got those of {self.model_name!r} (revision "
                f"{self.model_revision}), whose weights differ. Collect them from this model: "
                "`KeyStatistics.from_dataset(model, tokenizer, dataset)`."
            )

    def __add__(self, other: "KeyStatistics") -> "KeyStatistics":
        if not isinstance(other, KeyStatistics):
            return NotImplemented
        if (self.weights_hash, self.module_names) != (other.weights_hash, other.module_names):
            raise ValueError(
                f"Expected statistics of the same model and layers, got {self.model_name!r} {self.layers} and "
                f"{other.model_name!r} {other.layers}."
            )
        if self.traces or other.traces:
            raise ValueError("Expected whole statistics to add, got compressed ones. Add them first, then compress.")
        return replace(
            self,
            sums={layer: self.sums[layer] + other.sums[layer] for layer in self.layers},
            tokens=self.tokens + other.tokens,
            rows=self.rows + other.rows,
            datasets=self.datasets + other.datasets,
        )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Write `key_statistics.safetensors` and a model card, each whole or not at all.

        Args:
            save_directory (`str` or `Path`):
                Folder, made if need be.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        about = {name: value for name, value in asdict(self).items() if name != "sums"}
        # One file: sums and count must never be of different moments.
        tensors = {str(layer): value.cpu() for layer, value in self.sums.items()}
        write_safetensors(tensors, folder / FILE_NAME, {"hf_iclr": json.dumps(about)})
        self.save_card(folder)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None, token: str | bool | None = None
    ) -> "KeyStatistics":
        """
        Read what [`~KeyStatistics.save_pretrained`] or [`~KeyStatistics.push_to_hub`] wrote.

        Args:
            name_or_path (`str` or `Path`):
                Folder or repository.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            token (`str` or `bool`, *optional*):
                Token of the Hub.

        Returns:
            [`KeyStatistics`]

        Raises:
            ValueError: when the folder holds no statistics, or a file that is not one of them.
        """
        path = inside(pretrained_folder(name_or_path, [FILE_NAME], revision=revision, token=token), FILE_NAME)
        if not path.exists():
            raise ValueError(f"Expected a folder or repository with {FILE_NAME}, got {name_or_path}, which has none.")
        tensors, metadata = read_safetensors(path)
        with as_written_by("KeyStatistics.save_pretrained", path):
            about = parse_json(metadata["hf_iclr"], path)
            for name in ("module_names", "traces"):
                about[name] = {int(layer): value for layer, value in about.get(name, {}).items()}
            for name in ("tokens", "rows"):
                whole_number(about[name], f"the number of {name} in {path}")
            read = cls(sums={int(layer): value for layer, value in tensors.items()}, **about)
            for value in read.sums.values():
                square = value.ndim == 2 and value.shape[-1] <= len(value) <= value.shape[-1] + len(value) * len(
                    read.traces
                )
                if value.dtype != torch.float64 or not square:
                    raise TypeError("sums that are no float64 matrices, square unless they are compressed")
            if read.layers != sorted(read.module_names) or read.traces and read.layers != sorted(read.traces):
                raise KeyError(f"sums of layers {read.layers} and names of {sorted(read.module_names)}")
        return read

    def _card(self, repo_id: str) -> ModelCard:
        return statistics_card(self, repo_id)
