"""AlphaEdit: knowledge edits that keep the rest, as adapters that can be undone and shared."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.hub import HubMixin, pretrained_folder
from hf_iclr.models import hash_weights
from hf_iclr.saving import cached_revision
from hf_iclr.untrusted import check_links, whole_number

from ..records.edit_card import edit_card, give_card
from .batches import EditBatch, EditReport, add_adapters, concatenate_updates, remove_adapters
from .config import AlphaEditConfig
from .journal import EditJournal
from .requests import EditRequest, check_requests
from .rows import reasons_against, sample_contexts
from .scoring import edit_probabilities
from .solver import EditSetup, EditSolver
from .statistics import KeyStatistics
from .targets import find_target_states


class AlphaEditor(HubMixin):
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
            Keep the edits there: each batch is in its journal and its adapter as soon as it is made. Several editors,
            of several processes too, may keep one folder; each has the others' edits before it makes its own.

    Raises:
        ValueError: when the statistics are another model's or lack a layer, the folder holds edits already, or the
            model is none that can be edited.
        TypeError: when the model is a PEFT model or something is of another type.

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
        kinds = (tokenizer, PreTrainedTokenizerBase), (config, AlphaEditConfig), (statistics, KeyStatistics)
        for value, kind in kinds:
            if not isinstance(value, kind) and (value is not None or value is tokenizer):
                raise TypeError(f"Expected {kind.__name__}, got {type(value).__name__}: {value!r:.80}.")
        config = AlphaEditConfig() if config is None else replace(config)
        self._set_up(model, tokenizer, config, statistics)
        config.base_model_name_or_path = model.config.name_or_path or None
        config.base_model_revision = cached_revision(model.config.name_or_path)
        config.base_model_hash = hash_weights(model)
        if folder is not None:
            self._journal.save(folder)
            self._journal.folder = Path(folder)

    def _set_up(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AlphaEditConfig,
        statistics: KeyStatistics | None,
        folder: Path | None = None,
    ) -> None:
        self.setup = EditSetup.prepare(model, tokenizer, config, statistics, folder)
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config
        self._journal, self._solver = EditJournal(self.setup), EditSolver(self.setup)
        self._peft: PeftModel | None = None

    @property
    def batches(self) -> list[EditBatch]:
        """The edits in force by the batches they were made in."""
        return self._journal.batches

    @property
    def edits(self) -> list[EditRequest]:
        """The edits in force, in order."""
        return [request for batch in self.batches for request in batch.requests]

    def edit(self, requests: Iterable[EditRequest], batch_size: int = 100, progress: bool = True) -> EditReport:
        """
        Write facts into the model.

        Args:
            requests (iterable of `EditRequest`):
                The facts. A request that cannot be made is not made and stands in the report with its reason; so does
                a second one for the same text of prompt and subject. One for the text of an edit in force takes its
                place: the earlier edit is taken back as by [`~AlphaEditor.remove`].
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
        requests = check_requests(requests)
        whole_number(batch_size, "batch_size", 1)
        self._solver.check_statistics()
        report = EditReport()
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        with self._writing():
            if self.config.context_templates is None:
                self.config.context_templates = sample_contexts(self.model, self.tokenizer, self.config)
                if self._journal.folder is not None:
                    self.config.save_pretrained(self._journal.folder)
            made = {edit.id: edit for edit in self.edits}
            reasons = reasons_against(requests, self.tokenizer, self.config, limit, made)
            for index, reason in reasons.items():
                report.reject(requests[index], reason)
            accepted = [request for index, request in enumerate(requests) if index not in reasons]
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
            ValueError: when there are not so many batches, another editor has made the last one of the folder since,
                or the weights were changed by somebody else; then nothing changes.
        """
        known = [batch.name for batch in self.batches]
        with self._writing():
            if not isinstance(count, int) or not 1 <= count <= len(self.batches):
                raise ValueError(f"Expected to undo between 1 and {len(self.batches)} batches of edits, got {count}.")
            gone = self.batches[-count:]
            ids = [request.id for batch in gone for request in batch.requests]
            if {batch.name for batch in gone} - {*known}:
                raise ValueError(
                    f"Expected the last {count} batches to be known here, but another editor has made some since; of "
                    f"the edits {ids} see those in `editor.edits`, and call this again to take them back all the same."
                )
            self._solver.write(self.batches[:-count])
            self._commit({"event": "undo"}, count, [])
        return ids

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
        self._solver.check_statistics()
        with self._writing():
            if edit_id not in {edit.id for edit in self.edits}:
                raise ValueError(
                    f"Expected the id of an edit in force, got {edit_id!r}. They are {[e.id for e in self.edits]}."
                )
            kept, redone = self._without({edit_id})
            self._commit({"event": "remove", "id": edit_id}, len(self.batches) - len(kept), redone)

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
        updates = {batch.name: batch.updates for batch in self.batches}
        if rank is not None:
            updates = {"default": concatenate_updates(list(updates.values()), rank)}
        self._solver.write([])
        self._peft = add_adapters(self.model, self.setup.projections, updates, self.config.base_model_name_or_path)
        give_card(self._peft, edit_card(self.config, self.batches, adapters=list(updates)))
        return self._peft

    def merge(self) -> PreTrainedModel:
        """
        Have the edits in the weights; they are there unless [`~AlphaEditor.to_peft`] took them out.

        Returns:
            `~transformers.PreTrainedModel`: the plain edited model.
        """
        if self._peft is not None:
            self.model = remove_adapters(self._peft)
            self._peft = None
            self._solver.write(self.batches)
        return self.model

    def save_pretrained(self, save_directory: str | Path, rank: int | None = None) -> None:
        """
        Write the adapter, journal, target states, keys, null space, settings, tokenizer and a model card. The folder
        loads in PEFT and `pipeline("text-generation", model=folder)` as it is.

        Args:
            save_directory (`str` or `Path`):
                Folder, made if need be.
            rank (`int`, *optional*):
                Compress the adapter to this rank. vLLM serves 8, 16, 32, 64, 128, 256, 320 and 512; zeros fill up to
                the next of them.

        Raises:
            ValueError: when the folder holds the edits of another editor, or a link that leads out of it.
        """
        self._journal.save(save_directory, rank)
        self.save_card(save_directory)

    def _parent_commit(self, api: HfApi, repo_id: str, revision: str | None) -> str | None:
        with self._writing():
            head, theirs = self._journal.of_repository(api, repo_id, revision)
            if theirs is not None and not self._journal.has(theirs):
                self._solver.check_statistics()
                kept, left = self._journal.join(theirs)
                redone = self._solver.solve_anew(theirs.batches[:kept], left, theirs.new_name)
                self._commit({"event": "merge"}, len(theirs.batches) - kept, redone, theirs)
        return head

    def _card(self, repo_id: str) -> ModelCard:
        return edit_card(self.config, self.batches, repo_id)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        statistics: KeyStatistics | None = None,
        revision: str | None = None,
        check_base_model: bool = True,
        token: str | bool | None = None,
        **model_kwargs: Any,
    ) -> "AlphaEditor":
        """
        Load edits and put them into the model they were made for.

        Args:
            name_or_path (`str` or `Path`):
                Folder or repository. What is edited further is written to the folder, as with
                `AlphaEditor(folder=...)`; to a repository by [`~AlphaEditor.push_to_hub`].
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
            token (`str` or `bool`, *optional*):
                Token of the Hub, for the edits and for the model.
            model_kwargs (`dict`, *optional*):
                Passed on to `AutoModelForCausalLM.from_pretrained`, which here reads nothing but safetensors unless
                `use_safetensors=False` is among them.

        Returns:
            [`AlphaEditor`]

        Raises:
            ValueError: when there are no edits, the model is another one, or a file of the folder is not what
                [`~AlphaEditor.save_pretrained`] writes or lies outside the folder.
        """
        folder = check_links(pretrained_folder(name_or_path, revision=revision, token=token))
        config = AlphaEditConfig.from_pretrained(folder)
        name, version = config.base_model_name_or_path, config.base_model_revision
        if model is None:
            if name is None:
                raise ValueError("Expected a model, as the settings don't say which was edited. Pass model=...")
            defaults = {"revision": version, "use_safetensors": True, "token": token}
            model = AutoModelForCausalLM.from_pretrained(name, **defaults | model_kwargs)
        if check_base_model and hash_weights(model) != config.base_model_hash:
            raise ValueError(
                f"Expected {name!r} at revision {version}, for which these edits were made, got "
                f"{model.config.name_or_path!r} with other weights. Edits of another model do harm; to apply them all "
                "the same pass check_base_model=False."
            )
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        editor = cls.__new__(cls)
        editor._set_up(model, tokenizer, config, statistics, folder)
        editor._journal.load(folder, keep=Path(name_or_path).is_dir())
        editor._solver.write(editor.batches)
        give_card(model, edit_card(config, editor.batches, merged=True))
        return editor

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Alone with the folder, with everybody's edits in the weights; after an error they are as they were."""
        self.merge()
        with self._journal.writing() as changed:
            if changed:
                self._solver.write(self.batches)
            try:
                yield
            except BaseException:  # also an interrupt: nothing half-applied may stay
                self._solver.write(self.batches)
                raise

    def _edit_batch(self, requests: list[EditRequest], report: EditReport, progress: bool) -> None:
        p_before = edit_probabilities(self.model, self.tokenizer, requests, self.config)
        asked = {request.text for request in requests}
        kept, redone = self._without({edit.id for edit in self.edits if edit.text in asked})
        found = find_target_states(self.model, self.tokenizer, self.setup.projections, requests, self.config, progress)
        states = found.states.flatten(1)
        good = (states.isfinite().all(1) & states.any(1) & found.losses.isfinite()).tolist()
        if not all(good):  # what one of these would have corrected stays
            self._solver.write(self.batches)
            for request in itertools.compress(requests, [not fine for fine in good]):
                report.reject(request, "its target state is zero or not finite")
            rest = list(itertools.compress(requests, good))
            return self._edit_batch(rest, report, progress) if rest else None
        before = kept + redone
        batch = self._solver.solve(self._journal.new_name(len(before)), requests, found.states.cpu(), before)
        batch.report(
            before,
            p_before=p_before,
            p_after=edit_probabilities(self.model, self.tokenizer, requests, self.config),
            loss=found.losses.tolist(),
            steps=found.steps.tolist(),
        )
        self._commit({"event": "edit"}, len(self.batches) - len(kept), [*redone, batch])
        report.edits += batch.edits
        report.layers += batch.layers

    def _without(self, ids: set[str]) -> tuple[list[EditBatch], list[EditBatch]]:
        """The batches before the first of these edits, and the later ones made anew without them, in the weights."""
        at = next((i for i, b in enumerate(self.batches) if ids & {r.id for r in b.requests}), len(self.batches))
        kept, left = self.batches[:at], [b for b in (b.without(ids) for b in self.batches[at:]) if b.requests]
        return kept, self._solver.solve_anew(kept, left, self._journal.new_name) if ids else []

    def _commit(
        self, event: dict[str, Any], undone: int, batches: list[EditBatch], onto: EditJournal | None = None
    ) -> None:
        self._journal.commit(event | {"seed": self.config.seed}, undone, batches, onto)
        give_card(self.model, edit_card(self.config, self.batches, merged=True))
        if self._journal.folder is not None:
            self.save_card(self._journal.folder)
