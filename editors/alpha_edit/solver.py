"""From target states to updates of the edited layers: reads keys, solves, and writes the weights layer by layer."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.models import pad_rows
from hf_iclr.saving import contiguous_clone
from hf_iclr.untrusted import inside, read_safetensors

from .batches import EditBatch
from .closed_form import EditedKeys, keep_relative_changes, low_rank_factors, project_out
from .config import AlphaEditConfig
from .projections import (
    DownProjection,
    EditedWeight,
    capture,
    choose_layers,
    decoder_layers,
    find_down_projections,
    run_until,
)
from .requests import EditRequest
from .rows import EditRow, encode_in_contexts
from .statistics import KeyStatistics
from .targets import replaced_layers


logger = logging.getLogger(__name__)

NULL_SPACE = "null_space.safetensors"
_ROWS_READ = 64  # in one forward


@dataclass
class EditSetup:
    """A model and what its edits are made with, which an editor shares with its solver and its journal."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: AlphaEditConfig  # which has context templates by the time of the first batch
    projections: list[DownProjection]  # of the edited layers
    preserved: dict[int, torch.Tensor]  # their directions that must not change, (d, m); none without projection
    statistics: KeyStatistics | None  # for the solvers "memit" and "memit_seq"

    @classmethod
    def prepare(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AlphaEditConfig,
        statistics: KeyStatistics | None,
        folder: Path | None,
    ) -> "EditSetup":
        """With the layers of a configuration, and the null space of statistics or of a journal's folder."""
        projections = find_down_projections(model)
        chosen = choose_layers(projections, config.layers)
        if len(chosen) > 1 and not projections[0].adds_to_residual:
            raise ValueError(
                f"Expected one layer to edit in {type(model).__name__}, whose layers normalise the projection's "
                f"output so that a residual cannot be spread over several, got {config.layers}. Pass layers='auto' or "
                "one number."
            )
        if statistics is not None:
            statistics.check_model(model)
        if folder is not None:
            preserved = _load_null_space(folder, chosen) if config.project else {}
        else:
            preserved = _null_spaces(config, chosen, statistics)
        return cls(model, tokenizer, config, chosen, preserved, statistics)


class EditSolver:
    """Solves batches of edits and keeps the weights."""

    def __init__(self, setup: EditSetup) -> None:
        self.setup = setup
        self._weights = {p.index: EditedWeight(p) for p in setup.projections}
        self._solved: dict[int, tuple[list[EditBatch], EditedKeys]] = {}

    def write(self, batches: Sequence[EditBatch]) -> None:
        """Make the weights the original ones plus these batches, in their order."""
        for check_first in (True, False):
            for layer, weight in self._weights.items():
                updates = [batch.updates[layer] for batch in batches]
                weight.check(updates) if check_first else weight.set(updates)

    def check_statistics(self) -> None:
        """Raises `ValueError` when a next batch could not be solved, as the edits were loaded without statistics."""
        solver = self.setup.config.solver
        if solver.startswith("memit") and self.setup.statistics is None:
            raise ValueError(
                f"Expected statistics to go on editing with the solver {solver!r}, got none. Pass them: "
                "`AlphaEditor.from_pretrained(..., statistics=KeyStatistics.from_pretrained(...))`."
            )

    def solve(
        self, name: str, requests: list[EditRequest], states: torch.Tensor, before: list[EditBatch]
    ) -> EditBatch:
        """
        The updates of one batch, layer by layer: each is in the weights when the next layer's keys are read. The
        caller writes the weights anew should this fail, and adds the rows of the edits' report.

        `states` are the requests' target states, see [`TargetStates`], `before` the batches in the weights.

        Raises:
            ValueError: when the equations cannot be solved or the update is not finite.
        """
        batch, tokenizer, config = EditBatch(name, requests, states), self.setup.tokenizer, self.setup.config
        rows = [  # of each request, up to the last token that is edited
            [replace(row, ids=row.ids[: row.places[-1] + 1]) for row in encode_in_contexts(tokenizer, request, config)]
            for request in requests
        ]
        places = [len(request[0].places) for request in rows]
        wanted = torch.cat([own.view(-1, own.shape[-1])[:n] for own, n in zip(states, places, strict=True)])
        plain = _Rows(self.setup.model, [row[0] for row in rows])
        contexts = _Rows(self.setup.model, [row for request in rows for row in request[1:]])
        for number, projection in enumerate(self.setup.projections):
            layer, weight = projection.index, self._weights[projection.index]
            keys, reached = self._read(plain, contexts, projection, batch.without_subject)
            residuals = ((wanted.to(reached) - reached) / (len(self.setup.projections) - number)).double().T
            keys = keys.double().T.cpu()
            factor = self._factor(layer, keys, before, batch)
            residuals = residuals.cpu()
            if not (residuals.isfinite().all() and factor.isfinite().all()):
                raise ValueError(
                    f"Expected a finite update of layer {layer}, got NaN or infinity; the batch is not made."
                )
            if self.setup.config.post_processing is not None:
                residuals, factor = self._post_process(layer, residuals @ factor, before)
            batch.keys[layer] = contiguous_clone(keys.float())
            batch.residuals[layer] = contiguous_clone(residuals.float())
            batch.factors[layer] = contiguous_clone(factor.float())
            weight.set([other.updates[layer] for other in [*before, batch]])
            outside = project_out(keys, self.setup.preserved[layer]) if layer in self.setup.preserved else keys
            batch.layers.append(
                {"batch": batch.name, "layer": layer, "width": keys.shape[0],
                 "preserved": self.setup.preserved[layer].shape[1] if layer in self.setup.preserved else 0,
                 "editable": (outside.norm(dim=0) / keys.norm(dim=0)).mean().item(),
                 "residual": batch.residuals[layer].norm(dim=0).mean().item(),
                 "change": self._relative_change(layer, residuals, factor)}
            )  # fmt: skip
            if batch.layers[-1]["editable"] < 0.3:
                logger.warning(
                    "Layer %d: only %.0f %% of the keys' norm is editable, the rest lies in preserved directions. "
                    "Raise nullspace_threshold, lower nullspace_energy or nullspace_rank, or edit lower layers.",
                    layer, 100 * batch.layers[-1]["editable"],
                )  # fmt: skip
        return batch

    def solve_anew(
        self, kept: list[EditBatch], left: Sequence[EditBatch], new_name: Callable[[int], str]
    ) -> list[EditBatch]:
        """Batches of which only the target states stand, [`~EditSolver.solve`]d in their order behind others."""
        self.write(kept)
        redone: list[EditBatch] = []
        for batch in left:
            name = new_name(len(kept) + len(redone))
            new = self.solve(name, batch.requests, batch.states, [*kept, *redone])
            new.edits = [{**row, "batch": name} for row in batch.edits]
            redone.append(new)
        return redone

    def _factor(self, layer: int, keys: torch.Tensor, before: list[EditBatch], batch: EditBatch) -> torch.Tensor:
        """The update's factor. Keys of the batches that the last solve has in common with this one stay."""
        config, preserved = self.setup.config, self.setup.preserved.get(layer)
        batches, edited = self._solved.get(layer) or self._solved.setdefault(layer, ([], self._no_keys(layer, keys)))
        before, common = [] if config.solver == "memit" else before, 0
        while common < min(len(batches), len(before)) and batches[common] is before[common]:
            common += 1
        edited.keep_first(sum(batch.keys[layer].shape[1] for batch in batches[:common]))
        del batches[common:]
        for other in before[common:]:
            edited.add(other.keys[layer].double(), other.without_subject)
            batches.append(other)
        factor = edited.add(keys, batch.without_subject)
        batches.append(batch)
        return factor if preserved is None or config.solver == "alphaedit" else project_out(factor.T, preserved).T

    def _no_keys(self, layer: int, keys: torch.Tensor) -> EditedKeys:
        config, statistics = self.setup.config, self.setup.statistics
        if not config.solver.startswith("memit"):
            return EditedKeys(self.setup.preserved[layer] if config.solver == "alphaedit" else keys[:, :0], config.l2)
        assert statistics is not None
        moment = config.moment_weight * statistics.second_moment(layer)
        cholesky, info = torch.linalg.cholesky_ex(moment)
        if info.any():
            raise ValueError(
                "Expected a second moment of full rank for the solvers memit and memit_seq, got a singular one of "
                f"{len(moment)} x {len(moment)}. Collect statistics from more tokens: "
                "`KeyStatistics.from_dataset(..., max_tokens=...)`."
            )
        return EditedKeys(keys[:, :0], 1.0, cholesky)

    def _post_process(
        self, layer: int, delta: torch.Tensor, before: list[EditBatch]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        projection, weight = self._weights[layer].projection, self._weights[layer]
        if weight.original is None:
            raise ValueError("Expected a floating-point model for post_processing, got a quantised one. Leave it out.")
        current = [other.updates[layer] for other in before]
        return low_rank_factors(
            keep_relative_changes(delta, projection.as_stored(weight.total(current)).double().cpu())
        )

    def _relative_change(self, layer: int, residuals: torch.Tensor, factor: torch.Tensor) -> float:
        original = self._weights[layer].original
        if original is None:
            return float("nan")
        squared = ((residuals.T @ residuals) * (factor @ factor.T)).sum().clamp_min(0)
        return float(squared.sqrt() / original.double().norm().cpu())

    def _read(
        self, plain: "_Rows", contexts: "_Rows", projection: DownProjection, without_subject: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Keys of one layer, (n, d), at each edited token of each request: half of each is the plain prompt's, half the
        mean over contexts, but without a subject all is the plain prompt's, as the last token's key is another in each
        context; and the last edited layer's present output on the plain prompts, (n, hidden_size).
        """
        last, key = self.setup.projections[-1], {"key": (projection.module, "input")}
        found = plain.read(projection, last.layer, key | {"out": (last.target, "output")})
        keys, reached = (torch.cat(found[name]) for name in ("key", "out"))
        each = len(contexts.rows) // len(plain.rows)
        if not each:
            return keys, reached
        others = contexts.read(projection, projection.layer, key)["key"]
        means = [torch.stack(others[i : i + each]).mean(0) for i in range(0, len(others), each)]
        return torch.where(without_subject.to(keys.device)[:, None], keys, (keys + torch.cat(means)) / 2), reached


class _Rows:
    """Rows that are read at one layer after another, upwards: each time from where the last time ended."""

    def __init__(self, model: PreTrainedModel, rows: list[EditRow]) -> None:
        self.model, self.rows = model, rows
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        self.batches = [order[first : first + _ROWS_READ] for first in range(0, len(order), _ROWS_READ)]
        self.below: list[torch.nn.Module] = []  # layers done with
        self.entering: list[torch.Tensor | None] = [None] * len(self.batches)  # states that the next layer receives

    @torch.no_grad()
    def read(
        self, projection: DownProjection, until: torch.nn.Module, wanted: dict[str, Any]
    ) -> dict[str, list[torch.Tensor]]:
        """For each row what modules take or give at its edited tokens, (places, size)."""
        found: dict[str, list[torch.Tensor]] = {name: [torch.empty(0)] * len(self.rows) for name in wanted}
        for number, chosen in enumerate(self.batches):
            batch = pad_rows([self.rows[i].ids for i in chosen], device=self.model.device)
            outputs: dict[torch.nn.Module, Any] = dict.fromkeys(self.below, self.entering[number])
            with replaced_layers(outputs, projection), capture(wanted | {"in": (projection.layer, "input")}) as seen:
                run_until(self.model, until, **batch)
            self.entering[number] = seen.pop("in")
            for name, value in seen.items():
                shaped = value.reshape(*batch["input_ids"].shape, -1)
                for line, i in enumerate(chosen):
                    found[name][i] = shaped[line, list(self.rows[i].places)].float()
        self.below = list(decoder_layers(self.model)[1][: projection.index])
        return found


def _null_spaces(
    config: AlphaEditConfig, projections: Sequence[DownProjection], statistics: KeyStatistics | None
) -> dict[int, torch.Tensor]:
    """
    The directions to be preserved in each edited layer, none without projection. Warns where they are next to none, or
    come of too few tokens.

    Raises:
        ValueError: when the settings need statistics and there are none.
    """
    if statistics is None:
        if config.project or config.solver.startswith("memit"):
            raise ValueError(
                f"Expected statistics for the solver {config.solver!r} with project={config.project}, got none. "
                "Collect them from text that must not change: `KeyStatistics.from_dataset(model, tokenizer, dataset)`."
            )
        return {}
    rule = (config.nullspace_threshold, config.nullspace_energy, config.nullspace_rank)
    layers = [p.index for p in projections] if config.project else []
    preserved = {layer: statistics.preserved(layer, *rule) for layer in layers}
    for layer, basis in preserved.items():
        width, count = basis.shape
        if count < 0.01 * width:
            logger.warning(
                "Layer %d: only %d of %d directions are preserved, so the null space constrains next to nothing. "
                "Lower nullspace_threshold (now %s), or set nullspace_energy or nullspace_rank.",
                layer, count, width, config.nullspace_threshold,
            )  # fmt: skip
    width = max((len(basis) for basis in preserved.values()), default=0)
    if statistics.tokens < 10 * width:
        logger.warning(
            "The statistics have %d tokens for %d directions: too few to know what text needs. A hundred times as "
            "many tokens as directions is a fair number.", statistics.tokens, width,
        )  # fmt: skip
    return preserved


def _load_null_space(folder: Path, projections: Sequence[DownProjection]) -> dict[int, torch.Tensor]:
    """What a journal wrote of them; raises `ValueError` when they are none of these layers'."""
    path = inside(folder, NULL_SPACE)
    basis = {name: contiguous_clone(value) for name, value in read_safetensors(path)[0].items()}
    expected = {str(p.index): p.in_features for p in projections}
    found = {name: len(value) for name, value in basis.items() if _orthonormal(value)}
    if found != expected or len(basis) != len(expected):
        raise ValueError(
            f"Expected orthonormal float64 directions of sizes {expected} by layer in {path}, got {found}. Get the "
            "edits again from where they came."
        )
    return {int(name): value for name, value in basis.items()}


def _orthonormal(columns: torch.Tensor) -> bool:
    if columns.ndim != 2 or columns.dtype != torch.float64:
        return False
    one = torch.eye(columns.shape[1], dtype=columns.dtype)
    return torch.allclose(columns.T @ columns, one, atol=1e-6)
