"""AlphaEdit: knowledge edits that keep the rest, as adapters that can be undone and shared."""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.saving import cached_revision, in_own_memory, push_saved, write_safetensors
from hf_iclr.untrusted import as_written_by, check_links, read_safetensors

from .adapter import Updates, add_adapters, concatenate_updates, save_adapter
from .card import edit_card
from .config import AlphaEditConfig
from .down_projections import DownProjection, choose_layers, find_down_projections
from .journal import LEDGER_NAME, EditBatch, append_event, batches_of, read_events
from .prompts import reasons_against, sample_contexts
from .report import EditReport
from .request import EditRequest
from .scoring import score_edits
from .solver import EditSolver
from .statistics import KeyStatistics, hash_weights
from .targets import find_target_states


logger = logging.getLogger(__name__)

_NULL_SPACE = "null_space.safetensors"


class AlphaEditor:
    """
    Writes facts into a causal language model by AlphaEdit (https://huggingface.co/papers/2410.02355): the update of a
    few down-projections is exact, of low rank, and lies in the null space of what the model reads in ordinary text.

    Args:
        model (`~transformers.PreTrainedModel`):
            A dense decoder, unedited. Its down-projections are changed in place by [`~AlphaEditor.edit`].
        tokenizer (`~transformers.PreTrainedTokenizerBase`):
            Its tokenizer, a fast one.
        config ([`AlphaEditConfig`], *optional*):
            Settings; the paper's when left out.
        statistics ([`KeyStatistics`], *optional*):
            Of this very model. Only the solver `"ridge"` without projection does without.
        folder (`str` or `Path`, *optional*):
            Write every batch there as soon as it is made: after a kill, [`AlphaEditor.from_pretrained`] has the last
            whole batch. Left out: only [`~AlphaEditor.save_pretrained`] writes.

    Raises:
        ValueError: when the statistics are another model's or lack a layer, the folder holds edits already, or the
            model is none that can be edited.
        TypeError: when the model is a PEFT model.

    Example:

    ```python
    >>> from hf_iclr import AlphaEditor, EditRequest, KeyStatistics

    >>> statistics = KeyStatistics.from_dataset(model, tokenizer, dataset)
    >>> editor = AlphaEditor(model, tokenizer, statistics=statistics)
    >>> report = editor.edit(
    ...     [EditRequest("The mother tongue of {} is", subject="Danielle Darrieux", target_new="English")]
    ... )
    >>> editor.undo()
    ```
    """

    _folder: Path | None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AlphaEditConfig | None = None,
        statistics: KeyStatistics | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if isinstance(model, PeftModel):
            raise TypeError(
                "Expected a plain model, got one with PEFT adapters. Edit the merged one: `model.merge_and_unload()`."
            )
        config = AlphaEditConfig() if config is None else replace(config)
        projections = find_down_projections(model)
        edited = choose_layers(projections, config.layers)
        if len(edited) > 1 and not edited[0].adds_to_residual:
            raise ValueError(
                f"Expected one layer to edit in {type(model).__name__}, whose layers normalise the projection's "
                f"output so that a residual cannot be spread over several, got {config.layers}. Pass layers='auto' or "
                "one number."
            )
        if statistics is not None:
            statistics.check_model(model)
        if statistics is None and (config.project or config.solver.startswith("memit")):
            raise ValueError(
                f"Expected statistics for the solver {config.solver!r} with project={config.project}, got none. "
                "Collect them from text that must not change: `KeyStatistics.from_dataset(model, tokenizer, dataset)`."
            )
        rule = (config.nullspace_threshold, config.nullspace_energy, config.nullspace_rank)
        preserved = (
            {p.index: statistics.preserved(p.index, *rule) for p in edited}
            if statistics is not None and config.project
            else {}
        )
        _warn_of_odd_null_spaces(config, preserved, statistics)
        self._set_up(model, tokenizer, config, projections, preserved, statistics)
        config.base_model_name_or_path = model.config.name_or_path or None
        config.base_model_revision = cached_revision(model.config.name_or_path)
        config.base_model_hash = hash_weights(model)
        if folder is not None:
            if (Path(folder) / LEDGER_NAME).exists():
                raise ValueError(
                    f"Expected a folder without edits, got {folder}, which has some. Go on with them by "
                    f"`AlphaEditor.from_pretrained({str(folder)!r})`, or pass another folder."
                )
            self._folder = Path(folder)
            self._write_settings(self._folder)

    def _set_up(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AlphaEditConfig,
        projections: list[DownProjection],
        preserved: dict[int, torch.Tensor],
        statistics: KeyStatistics | None,
    ) -> None:
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self.projections = choose_layers(projections, config.layers)
        self.preserved = preserved
        self.batches: list[EditBatch] = []
        self._up_to_last = projections[: self.projections[-1].index + 1]
        self._solver = EditSolver(model, tokenizer, config, self.projections, preserved, statistics)
        self._folder = None
        self._events: list[dict[str, Any]] = []
        self._peft: PeftModel | None = None

    @property
    def edits(self) -> list[EditRequest]:
        """The edits in force, in order."""
        return [request for batch in self.batches for request in batch.requests]

    def edit(self, requests: Sequence[EditRequest], batch_size: int = 100, progress: bool = True) -> EditReport:
        """
        Write facts into the model.

        Args:
            requests (`list[EditRequest]`):
                The facts. A request that cannot be made is not made and stands in the report with its reason; so does
                a second one for the same prompt and subject.
            batch_size (`int`, *optional*, defaults to 100):
                Facts solved for at once. Later batches leave earlier ones alone as well as they can.
            progress (`bool`, *optional*, defaults to `True`):
                Show progress bars.

        Returns:
            [`EditReport`]

        Raises:
            TypeError: when something is no [`EditRequest`].
            ValueError: when there is no request, `batch_size` is not positive, or a batch's equations cannot be
                solved; the batches before it stay, and nothing of that batch.
        """
        for request in requests:
            if not isinstance(request, EditRequest):
                raise TypeError(f"Expected a list of EditRequest, got {type(request).__name__}: {request!r}.")
        if not requests or batch_size < 1:
            raise ValueError(f"Expected requests and a positive batch_size, got {len(requests)} and {batch_size}.")
        self.merge()
        self._check_solvable()
        if self.config.context_templates is None:
            self.config.context_templates = sample_contexts(
                self.model, self.tokenizer, self.config.num_contexts, self.config.context_length, self.config.seed
            )
            if self._folder is not None:
                self.config.save_pretrained(self._folder)
        report = EditReport()
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        made = {edit.id for edit in self.edits}
        reasons = reasons_against(requests, self.tokenizer, self.config.context_templates, limit, made)
        accepted = []
        for index, request in enumerate(requests):
            if index in reasons:
                self._reject(report, request, reasons[index])
            else:
                accepted.append(request)
        for first in range(0, len(accepted), batch_size):
            self._edit_batch(accepted[first : first + batch_size], report, progress)
        return report

    def undo(self, count: int = 1) -> list[str]:
        """
        Take back the last batches of edits: the weights are bit for bit those before them.

        Args:
            count (`int`, *optional*, defaults to 1):
                Number of batches.

        Returns:
            `list[str]`: ids of the edits taken back.

        Raises:
            ValueError: when there are not so many batches.
        """
        if not 1 <= count <= len(self.batches):
            raise ValueError(f"Expected to undo between 1 and {len(self.batches)} batches of edits, got {count}.")
        self.merge()
        gone = self.batches[-count:]
        self._commit({"event": "undo"}, count, [])
        self._solver.write(self.batches)
        return [request.id for batch in gone for request in batch.requests]

    def remove(self, edit_id: str) -> None:
        """
        Take back one edit and make the later ones anew without it, from their kept target states: the model is the one
        that these would have given if the edit had never been made.

        Args:
            edit_id (`str`):
                Its id: [`EditRequest`]'s, or in the report.

        Raises:
            ValueError: when no such edit is in force, or the equations without it cannot be solved; then nothing
                changes.
        """
        at = next((i for i, batch in enumerate(self.batches) if edit_id in [r.id for r in batch.requests]), None)
        if at is None:
            raise ValueError(
                f"Expected the id of an edit in force, got {edit_id!r}. They are {[e.id for e in self.edits]}."
            )
        self.merge()
        self._check_solvable()
        later, kept = self.batches[at:], self.batches[:at]
        redone: list[EditBatch] = []
        try:
            self._solver.write(kept)
            for batch in later:
                stays = [i for i, request in enumerate(batch.requests) if request.id != edit_id]
                if stays:
                    requests, name = [batch.requests[i] for i in stays], self._new_name(at + len(redone))
                    new = self._solver.solve(name, requests, batch.states[stays], kept + redone)
                    new.edits = [{**batch.edits[i], "batch": name} for i in stays]
                    redone.append(new)
            self._commit({"event": "remove", "id": edit_id}, len(later), redone)
        except BaseException:  # also an interrupt: nothing half-applied may stay
            self._solver.write(self.batches)
            raise

    def to_peft(self, rank: int | None = None) -> PeftModel:
        """
        Move the edits from the weights into LoRA adapters, one a batch and all active: `disable_adapter()` gives the
        unedited model exactly. [`~AlphaEditor.merge`] moves them back.

        Args:
            rank (`int`, *optional*):
                One adapter of this rank at most instead, by singular value decomposition.

        Returns:
            `peft.PeftModel`: around the editor's model.

        Raises:
            ValueError: when there are no edits.
        """
        if not self.batches:
            raise ValueError("Expected edits to put into adapters, got none. Make some first: `editor.edit([...])`.")
        self.merge()
        updates = {batch.name: self._updates(batch) for batch in self.batches}
        if rank is not None:
            updates = {"default": concatenate_updates(list(updates.values()), rank)}
        self._solver.write([])
        self._peft = add_adapters(self.model, self.projections, updates, self.config.base_model_name_or_path)
        return self._peft

    def merge(self) -> PreTrainedModel:
        """
        Have the edits in the weights; they are there unless [`~AlphaEditor.to_peft`] took them out.

        Returns:
            `~transformers.PreTrainedModel`: the plain edited model.
        """
        if self._peft is not None:
            self.model = self._peft.unload()
            self._peft = None
            self.model.eval()
            # PEFT leaves its configuration on the model; `save_pretrained` would then write an adapter.
            for name in ("peft_config", "_hf_peft_config_loaded"):
                vars(self.model).pop(name, None)
            self._solver.write(self.batches)
        return self.model

    def save_pretrained(self, save_directory: str | Path, rank: int | None = None) -> None:
        """
        Write the adapter, ledger, target states and keys, null space, settings, tokenizer and a model card. The folder
        loads in PEFT and `pipeline("text-generation", model=folder)` as it is. Every file is whole or not there, and
        what [`AlphaEditor.from_pretrained`] reads is complete before the ledger says so.

        Args:
            save_directory (`str` or `Path`):
                Folder, made if need be.
            rank (`int`, *optional*):
                Compress the adapter to this rank.

        Raises:
            ValueError: when the folder holds the edits of another editor, or a link that leads out of it.
        """
        folder = check_links(save_directory)
        if (folder / LEDGER_NAME).exists():
            known = read_events(folder)
            if known != self._events[: len(known)]:
                raise ValueError(
                    f"Expected a new folder or the one these edits were saved to, got {folder} with other edits."
                )
        else:
            known = []
        self._write_settings(folder)
        for batch in self.batches:
            batch.save(folder)
        for event in self._events[len(known) :]:
            append_event(folder, event)
        if self.batches:
            updates = concatenate_updates([self._updates(batch) for batch in self.batches], rank)
            save_adapter(folder, self.projections, updates, self.config.base_model_name_or_path)
        else:
            for name in ("adapter_model.safetensors", "adapter_config.json"):
                (folder / name).unlink(missing_ok=True)
        self.tokenizer.save_pretrained(folder)
        edit_card(self.config, self.batches).save(folder / "README.md")

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Knowledge edits",
    ) -> CommitInfo:
        """
        Upload what [`~AlphaEditor.save_pretrained`] writes.

        Args:
            repo_id (`str`):
                Repository, made if need be.
            private (`bool`, *optional*):
                Whether a new repository is private.
            revision (`str`, *optional*):
                Branch to push to.
            token (`str` or `bool`, *optional*):
                Token of the Hub.
            commit_message (`str`, *optional*, defaults to `"Knowledge edits"`):
                First line of the commit.

        Returns:
            `huggingface_hub.CommitInfo`
        """
        return push_saved(self.save_pretrained, repo_id, private, revision, token, commit_message)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        statistics: KeyStatistics | None = None,
        revision: str | None = None,
        check_base_model: bool = True,
        journal: bool = False,
        **model_kwargs: Any,
    ) -> "AlphaEditor":
        """
        Load edits and put them into the model they were made for.

        Args:
            name_or_path (`str` or `Path`):
                Folder or repository.
            model (`~transformers.PreTrainedModel`, *optional*):
                The unedited model. Left out: loaded by the name and revision on record.
            tokenizer (`~transformers.PreTrainedTokenizerBase`, *optional*):
                Its tokenizer. Left out: loaded from the folder.
            statistics ([`KeyStatistics`], *optional*):
                Only needed to go on editing with the solvers `"memit"` and `"memit_seq"`.
            revision (`str`, *optional*):
                Branch, tag or commit of the edits' repository.
            check_base_model (`bool`, *optional*, defaults to `True`):
                Refuse a model with other weights than those that were edited.
            journal (`bool`, *optional*, defaults to `False`):
                Write each further batch to the folder as soon as it is made, as with `AlphaEditor(folder=...)`.
            model_kwargs (`dict`, *optional*):
                Passed on to `AutoModelForCausalLM.from_pretrained`, which here reads nothing but safetensors unless
                `use_safetensors=False` is among them.

        Returns:
            [`AlphaEditor`]

        Raises:
            ValueError: when there are no edits, the model is another one, or a file of the folder is not what
                [`~AlphaEditor.save_pretrained`] writes or lies outside the folder.
        """
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(name_or_path), revision=revision))
        check_links(folder)
        config = AlphaEditConfig.from_pretrained(folder)
        events = read_events(folder)
        if model is None:
            if config.base_model_name_or_path is None:
                raise ValueError(f"Expected a model, as {name_or_path} doesn't say which was edited. Pass model=...")
            model = AutoModelForCausalLM.from_pretrained(
                config.base_model_name_or_path,
                **{"revision": config.base_model_revision, "use_safetensors": True, **model_kwargs},
            )
        if check_base_model and hash_weights(model) != config.base_model_hash:
            raise ValueError(
                f"Expected {config.base_model_name_or_path!r} at revision {config.base_model_revision}, for which "
                f"these edits were made, got {model.config.name_or_path!r} with other weights. Edits of another model "
                "do harm; to apply them all the same pass check_base_model=False."
            )
        editor = cls.__new__(cls)
        if statistics is not None:
            statistics.check_model(model)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        basis = read_safetensors(folder / _NULL_SPACE)[0] if (folder / _NULL_SPACE).exists() else {}
        with as_written_by("AlphaEditor.save_pretrained", folder):
            preserved = {int(layer): in_own_memory(value) for layer, value in basis.items()}
            batches = [EditBatch.load(folder, record) for record in batches_of(events)]
        editor._set_up(model, tokenizer, config, find_down_projections(model), preserved, statistics)
        editor._check_shapes(batches)
        editor._events, editor.batches, editor._folder = events, batches, folder if journal else None
        editor._solver.write(editor.batches)
        return editor

    def _check_shapes(self, batches: list[EditBatch]) -> None:
        for batch in batches:
            for p in self.projections:
                parts = [getattr(batch, kind).get(p.index, torch.empty(0)) for kind in ("residuals", "factors")]
                rank = parts[1].shape[0]
                if [tuple(part.shape) for part in parts] != [(p.out_features, rank), (rank, p.in_features)]:
                    raise ValueError(
                        f"Expected updates of shapes ({p.out_features}, n) and (n, {p.in_features}) for layer "
                        f"{p.index} in batch {batch.name!r}, got {tuple(parts[0].shape)} and {tuple(parts[1].shape)}. "
                        "Get the edits again from where they came."
                    )

    def _check_solvable(self) -> None:
        if self.config.solver.startswith("memit") and self._solver.statistics is None:
            raise ValueError(
                f"Expected statistics to go on editing with the solver {self.config.solver!r}, got none. Pass them: "
                "`AlphaEditor.from_pretrained(..., statistics=KeyStatistics.from_pretrained(...))`."
            )

    @staticmethod
    def _reject(report: EditReport, request: EditRequest, reason: str) -> None:
        logger.warning("Edit %s (%r -> %r) is not made: %s.", request.id, request.text, request.target_new, reason)
        report.rejected.append(
            {"id": request.id, "prompt": request.prompt, "subject": request.subject,
             "target_new": request.target_new, "reason": reason}
        )  # fmt: skip

    def _edit_batch(self, requests: list[EditRequest], report: EditReport, progress: bool) -> None:
        found = find_target_states(self.model, self.tokenizer, self._up_to_last, requests, self.config, progress)
        good = found.states.isfinite().all(1) & found.losses.isfinite()
        for request, fine in zip(requests, good.tolist(), strict=True):
            if not fine:
                self._reject(report, request, "its target state is not finite")
        keep = good.nonzero()[:, 0].tolist()
        if not keep:
            return
        try:
            made = [requests[i] for i in keep]
            batch = self._solver.solve(self._new_name(len(self.batches)), made, found.states[keep].cpu(), self.batches)
            asked = [replace(request, paraphrases=(), neighborhood=()) for request in made]
            nll = score_edits(self.model, self.tokenizer, asked, progress=False).nll_new
            batch.edits = [
                {
                    "id": request.id,
                    "prompt": request.prompt,
                    "subject": request.subject,
                    "target_new": request.target_new,
                    "batch": batch.name,
                    "p_before": found.log_probs[i].exp().item(),
                    "p_after": math.exp(-after),
                    "loss": found.losses[i].item(),
                    "steps": int(found.steps[i]),
                    "collision": collision,
                }
                for i, request, after, collision in zip(keep, made, nll, self._collisions(batch), strict=True)
            ]
            self._commit({"event": "edit"}, 0, [batch])
        except BaseException:  # also an interrupt: nothing half-applied may stay
            self._solver.write(self.batches)
            raise
        report.edits += batch.edits
        report.layers += batch.layers

    def _new_name(self, position: int) -> str:
        """A name that no batch of this ledger ever had."""
        return f"edit_{len(self._events) + 1:04d}_{position + 1:04d}"

    def _collisions(self, batch: EditBatch) -> list[float]:
        worst = torch.zeros(len(batch.requests))
        for layer, keys in batch.keys.items():
            others = torch.cat([keys, *(other.keys[layer] for other in self.batches)], 1)
            cosine = (keys / keys.norm(dim=0)).T @ (others / others.norm(dim=0))
            cosine.fill_diagonal_(0)
            worst = worst.maximum(cosine.abs().amax(1))
        return worst.tolist()

    def _updates(self, batch: EditBatch) -> Updates:
        return {layer: (batch.residuals[layer], batch.factors[layer]) for layer in batch.factors}

    def _commit(self, event: dict[str, Any], undone: int, batches: list[EditBatch]) -> None:
        """From here on the batches are in force, on the disk first."""
        event |= {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seed": self.config.seed,
            "undone": undone,
            "batches": [batch.record() for batch in batches],
        }
        if self._folder is not None:
            for batch in batches:
                batch.save(self._folder)
            append_event(self._folder, event)
        self._events.append(event)
        self.batches = self.batches[: len(self.batches) - undone] + batches

    def _write_settings(self, folder: Path) -> None:
        self.config.save_pretrained(folder)
        if self.preserved and not (folder / _NULL_SPACE).exists():
            write_safetensors({str(layer): value for layer, value in self.preserved.items()}, folder / _NULL_SPACE)


def _warn_of_odd_null_spaces(
    config: AlphaEditConfig, preserved: dict[int, torch.Tensor], statistics: KeyStatistics | None
) -> None:
    for layer, basis in preserved.items():
        width, count = basis.shape
        if count < 0.01 * width:
            logger.warning(
                "Layer %d: only %d of %d directions are preserved, so the null space constrains next to nothing. "
                "Lower nullspace_threshold (now %s), or set nullspace_energy or nullspace_rank.",
                layer, count, width, config.nullspace_threshold,
            )  # fmt: skip
    width = max((len(basis) for basis in preserved.values()), default=0)
    if statistics is not None and statistics.tokens < 10 * width:
        logger.warning(
            "The statistics have %d tokens for %d directions: too few to know what text needs. A hundred times as "
            "many tokens as directions is a fair number.", statistics.tokens, width,
        )  # fmt: skip
