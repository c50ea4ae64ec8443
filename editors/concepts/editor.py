"""Erases or replaces concepts of a text-to-image pipeline and leaves the others alone."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from huggingface_hub import HfApi, ModelCard

from hf_iclr.hub import HubMixin, pretrained_folder
from hf_iclr.models import hash_weights
from hf_iclr.saving import contiguous_clone, write_safetensors
from hf_iclr.untrusted import as_written_by, inside, read_safetensors, whole_number

from ..alpha_edit.closed_form import EditedKeys, null_space_rule, project_out
from ..alpha_edit.projections import DownProjection, EditedWeight
from ..records.concept_card import concept_card
from ..records.ledger import (
    JOURNAL_NAME,
    MARK,
    adding_to,
    batches_of,
    check_goes_on,
    committed_events,
    digests,
    read_events,
    write_ledger,
)
from .batches import ConceptBatch
from .pipelines import (
    ROUNDING,
    denoiser_name,
    encode_prompts,
    find_text_layers,
    guidance_options,
    preserved_directions,
)


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
_RULE = ("nullspace_threshold", "nullspace_energy", "nullspace_rank")


class ConceptEditor(HubMixin):
    """
    [`AlphaEditor`]'s constraint for pipelines of diffusers: what a layer returns for the text of one concept is made
    what it returns for another's, in closed form, and what it returns for the prompts to retain stays.

    Keys are the text encoder's states, values are W times the other concept's states, as in
    https://huggingface.co/papers/2308.14761. The update lies in the null space of the retained prompts' states and,
    exactly, of the empty prompt's, as in https://huggingface.co/papers/2503.07392, by the formula of
    https://huggingface.co/papers/2410.02355. What replaces a concept stays too, up to the ridge. Nothing is trained,
    and the text encoders are not touched.

    Of a UNet the keys and values of cross-attention are edited, of a transformer the layer that reads the text's
    states and the one that reads the pooled state.

    Args:
        pipeline (`~diffusers.DiffusionPipeline`):
            The pipeline; its denoiser is edited in place.
        retain (`Sequence[str]`):
            Prompts whose images should stay; concepts near the edited ones are the ones that need it.
        modules (`str`, *optional*):
            Regular expression for the full names of the layers to edit, where the pipeline's class is not known.
        nullspace_threshold (`float`, *optional*):
            Retain the directions whose mean squared share in the states is at least this. Left out, with no other rule
            given: 1e-1, "singular values < 1e-1" of the code of https://huggingface.co/papers/2503.07392.
        nullspace_energy (`float`, *optional*):
            Retain the fewest directions with this share of all.
        nullspace_rank (`int`, *optional*):
            Retain so many directions.
        l2 (`float`, *optional*, defaults to 0.5):
            Ridge, in squared units of states; "lamb = .5" in the code of https://huggingface.co/papers/2308.14761.
        encode_options (`dict`, *optional*):
            Further arguments of `pipeline.encode_prompt`, those the pipeline will be called with: with other values of
            `max_sequence_length` or `clip_skip` the states are others.

    Raises:
        TypeError: when `pipeline` is none or `retain` is one string.
        ValueError: when no layer to edit is found, several rules are given or `l2` is not positive.

    Example:

    ```python
    >>> pipeline = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    >>> editor = ConceptEditor(pipeline, retain=["a dog", "a mouse", "Mickey Mouse"])
    >>> editor.edit({"Snoopy": "", "a painting by Van Gogh": "a painting"})
    >>> editor.undo()
    ```
    """

    def __init__(
        self,
        pipeline: "DiffusionPipeline",
        retain: Sequence[str],
        *,
        modules: str | None = None,
        nullspace_threshold: float | None = None,
        nullspace_energy: float | None = None,
        nullspace_rank: int | None = None,
        l2: float = 0.5,
        encode_options: Mapping[str, Any] | None = None,
    ):
        prompts: list[Any] = [*retain] if isinstance(retain, Iterable) and not isinstance(retain, str) else [None]
        if not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError(f"Expected a list of prompts to retain, got {retain!r:.80}. Type `retain=['a dog']`.")
        if not isinstance(l2, int | float) or not l2 > 0:
            raise ValueError(f"Expected l2 above 0, got {l2!r}.")
        rule = null_space_rule(nullspace_threshold, nullspace_energy, nullspace_rank, default=1e-1)
        self.component = denoiser_name(pipeline)
        self.denoiser = getattr(pipeline, self.component)
        self.pipeline = pipeline
        self.settings: dict[str, Any] = {
            "modules": modules,
            **dict(zip(_RULE, rule, strict=True)),
            "l2": l2,
            "encode_options": dict(encode_options) if isinstance(encode_options, Mapping) else encode_options or {},
        }
        self.retain = list(dict.fromkeys(prompts))
        self.layers = find_text_layers(self.denoiser, modules)
        self.base_hash = hash_weights(self.denoiser)
        self._weights = {
            name: EditedWeight(DownProjection(0, name, layer, layer, True, False))
            for layers in self.layers.values()
            for name, layer in layers.items()
        }
        self._batches: list[ConceptBatch] = []
        self._events = [
            {"event": "begin", "base_model": pipeline.name_or_path, "base_hash": self.base_hash,
             "settings": self.settings, "retain": self.retain, "undone": 0, "batches": []}
        ]  # fmt: skip
        self._retained = self._encode(self.retain) if self.retain else {}
        self._preserved = self._preserved_directions()

    @property
    def concepts(self) -> dict[str, str]:
        """The concepts edited so far and what each was replaced by; `""` is the empty prompt."""
        return {concept: other for batch in self._batches for concept, other in batch.concepts.items()}

    def edit(self, concepts: Mapping[str, str]) -> pd.DataFrame:
        """
        Make concepts read as others. The states of both prompts are matched token by token.

        Args:
            concepts (`Mapping[str, str]`):
                From the concept, or a prompt with it, to what it is replaced by; `""`, the empty prompt, erases it.

        Returns:
            `pandas.DataFrame`: one row a concept, with `residual`, the distance from the other concept's values that
            is left (1 before the edit, 0 when replaced entirely), `editable`, the share of the states that differ
            which lies outside the retained directions, and `retain_shift`, the largest relative change of a retained
            prompt's value by this batch.

        Raises:
            ValueError: when there is no concept, one is empty, replaced by itself, edited already or to be retained,
                or a state or an update is not finite. The pipeline is then as it was.
        """
        concepts = self._check(concepts)
        targets, others = self._encode(list(concepts)), self._encode(list(concepts.values()))
        table = pd.DataFrame({"concept": list(concepts), "replaced_by": list(concepts.values())})
        batch, residuals, shifts, editable = ConceptBatch(concepts), [], [0.0], []
        for kind, layers in self.layers.items():
            keys = targets[kind].flatten(0, 1).T
            wanted = others[kind].flatten(0, 1).T
            # What replaces a concept keeps its own values, as earlier edits keep theirs.
            previous = torch.cat([wanted, *(earlier.keys[kind] for earlier in self._batches)], 1)
            edited = EditedKeys(self._preserved[kind], self.settings["l2"])
            edited.add(previous)
            factor = edited.add(keys)
            # Keys of neighbouring tokens are nearly parallel: the factor's own rank is what an update needs.
            left, values, right = torch.linalg.svd(factor, full_matrices=False)
            rank = max(1, int((values > values[0] * ROUNDING).sum()))
            batch.keys[kind], batch.factors[kind] = (
                torch.cat([wanted, keys], 1),
                contiguous_clone(right[:rank].float()),
            )
            count = len(concepts)
            differ = keys * ((wanted - keys).norm(dim=0) > ROUNDING * keys.norm(dim=0))
            editable.append(_norms(project_out(differ, self._preserved[kind]), count) / _norms(differ, count))
            for name, layer in layers.items():
                weight = layer.weight.detach().cpu().double()
                distance = weight @ (wanted - keys)
                batch.residuals[name] = contiguous_clone((distance @ left[:, :rank] * values[:rank]).float())
                update = batch.residuals[name].double() @ batch.factors[kind].double()
                residuals.append(_norms(distance - update @ keys, count) / _norms(distance, count))
                if self._retained:
                    kept = self._retained[kind].flatten(0, 1).T
                    shifts.append(((update @ kept).norm(dim=0) / (weight @ kept).norm(dim=0)).max().item())
        table["residual"] = torch.stack(residuals).nanmean(0).tolist()
        table["editable"] = torch.stack(editable).nanmean(0).tolist()
        table["retain_shift"] = max(shifts)
        if not all(residual.isfinite().all() for residual in batch.residuals.values()):
            raise ValueError(f"Expected a finite update, got NaN or infinity. Raise l2, now {self.settings['l2']:g}.")
        for row in table[table["editable"] < 0.3].itertuples():
            logger.warning(
                "%.0f %% of the states of %r lie in the retained directions; the rest needs a large update, which "
                "moves what is not retained. Retain fewer prompts, or raise nullspace_threshold.",
                100 * (1 - row.editable),
                row.concept,
            )
        self._write([*self._batches, batch])
        self._events.append({"event": "edit", "undone": 0, "batches": [batch.record()]})
        return table

    def undo(self, batches: int = 1) -> None:
        """
        Take back the last calls of [`~ConceptEditor.edit`], exactly: the weights are bit for bit what they were.

        Args:
            batches (`int`, *optional*, defaults to 1):
                How many.

        Raises:
            ValueError: when fewer were made, or a weight was changed by somebody else since.
        """
        if not isinstance(batches, int) or not 0 < batches <= len(self._batches):
            raise ValueError(f"Expected between 1 and {len(self._batches)} batches to undo, got {batches}.")
        self._write(self._batches[:-batches])
        self._events.append({"event": "undo", "undone": batches, "batches": []})

    def lora_state_dict(self) -> dict[str, torch.Tensor]:
        """
        All edits as a LoRA of the denoiser, with rank and alpha equal.

        Returns:
            `dict[str, torch.Tensor]`: `{layer}.lora_A.weight` and `{layer}.lora_B.weight`, float32; zeros without
            edits.
        """
        state = {}
        for kind, layers in self.layers.items():
            for name, layer in layers.items():
                zeros = [torch.zeros(0 if self._batches else 1, size) for size in reversed(layer.weight.shape)]
                factors = [zeros[0], *(batch.factors[kind] for batch in self._batches)]
                residuals = [zeros[1].T, *(batch.residuals[name] for batch in self._batches)]
                state[f"{name}.lora_A.weight"] = torch.cat(factors)
                state[f"{name}.lora_B.weight"] = torch.cat(residuals, 1)
        return state

    def save_pretrained(self, save_directory: str | Path) -> None:
        """
        Write the edits as a LoRA that `pipeline.load_lora_weights` takes, where the pipeline has that, the ledger that
        is needed to undo them, and a card.

        Args:
            save_directory (`str` or `Path`):
                Folder, made if need be.

        Raises:
            ValueError: when the folder has edits that this editor has not made or loaded, or another LoRA.
        """
        state = {f"{self.component}.{name}": value for name, value in self.lora_state_dict().items()}
        folder = Path(save_directory)
        with adding_to(folder, self._events, WEIGHTS_NAME, WEIGHTS_NAME):
            write_ledger(folder, self._events, WEIGHTS_NAME)
            mark = {"format": "pt", MARK: digests(self._events)[-1]}  # after a kill in between the edits before count
            write_safetensors(state, inside(folder, WEIGHTS_NAME), mark)
        self.save_card(folder)

    def _parent_commit(self, api: HfApi, repo_id: str, revision: str | None) -> str | None:
        head = api.model_info(repo_id, revision=revision)
        if JOURNAL_NAME in [file.rfilename for file in head.siblings or ()]:
            path = Path(api.hf_hub_download(repo_id, JOURNAL_NAME, revision=head.sha))
            check_goes_on(read_events(path.parent), self._events, repo_id)
        return head.sha

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        pipeline: "DiffusionPipeline",
        revision: str | None = None,
        token: Any = None,
        check_base_model: bool = True,
    ) -> "ConceptEditor":
        """
        Load edits and put them into the pipeline they were made for.

        Args:
            name_or_path (`str` or `Path`):
                Folder or repository.
            pipeline (`~diffusers.DiffusionPipeline`):
                The unedited pipeline.
            revision (`str`, *optional*):
                Branch, tag or commit of the edits' repository.
            token (`str` or `bool`, *optional*):
                Token of the Hub.
            check_base_model (`bool`, *optional*, defaults to `True`):
                Refuse a pipeline with other weights than those that were edited.

        Returns:
            [`ConceptEditor`]

        Raises:
            ValueError: when there are no edits, the pipeline is another one, or a file is not what
                [`~ConceptEditor.save_pretrained`] writes.
        """
        folder = pretrained_folder(name_or_path, [WEIGHTS_NAME, JOURNAL_NAME], revision=revision, token=token)
        events = committed_events(folder, WEIGHTS_NAME)
        found = hash_weights(getattr(pipeline, denoiser_name(pipeline)))
        tensors, _ = read_safetensors(inside(folder, WEIGHTS_NAME))
        with as_written_by("ConceptEditor.save_pretrained", folder):
            about = events[0]
            if check_base_model and found != about["base_hash"]:
                raise ValueError(
                    f"Expected the pipeline that was edited, {about['base_model']!r} with weights "
                    f"{about['base_hash']}, got weights {found}. Load that one, or pass `check_base_model=False`."
                )
            settings = dict(about["settings"])
            if settings.get("modules") is not None:  # the layers it found: an expression may take for ever
                names = [name.partition(".")[2].rpartition(".lora_")[0] for name in tensors]
                settings["modules"] = "|".join(map(re.escape, names))
            editor = cls(pipeline, about["retain"], **settings)
            state = {name.removeprefix(f"{editor.component}."): value for name, value in tensors.items()}
            starts = dict.fromkeys(editor.layers, 0)
            for entry in batches_of(events):
                editor._batches.append(editor._read_batch(entry, state, starts))
        editor._write(editor._batches)
        editor._events = events
        return editor

    def _read_batch(
        self, entry: dict[str, Any], state: dict[str, torch.Tensor], starts: dict[str, int]
    ) -> ConceptBatch:
        """A batch of the file, whose columns begin at `starts`, which are moved on."""
        concepts = self._check(entry["concepts"])
        keys = self._encode([*concepts.values(), *concepts])
        batch = ConceptBatch(concepts, name=entry["name"])
        for kind in self.layers:
            batch.keys[kind], rank = keys[kind].flatten(0, 1).T, entry["ranks"][kind]
            columns = slice(starts[kind], starts[kind] + whole_number(rank, "the rank of a batch"))
            starts[kind] += rank
            for name, layer in self.layers[kind].items():
                factor, residual = state[f"{name}.lora_A.weight"][columns], state[f"{name}.lora_B.weight"][:, columns]
                shapes = tuple(residual.shape), tuple(factor.shape)
                finite = bool(factor.isfinite().all() and residual.isfinite().all())
                if shapes != ((len(layer.weight), rank), (rank, layer.weight.shape[1])) or not finite:
                    raise TypeError(f"updates of shapes {shapes} for {name}, whose rank is {rank}, finite: {finite}")
                batch.factors[kind], batch.residuals[name] = contiguous_clone(factor), contiguous_clone(residual)
        return batch

    def _card(self, repo_id: str) -> ModelCard:
        lora = hasattr(self.pipeline, "load_lora_weights")
        return concept_card(self._events[0], self.concepts, repo_id, lora)

    def _encode(self, prompts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        own = self.settings["encode_options"]
        return encode_prompts(self.pipeline, prompts, {**own, **options} if options else own, self.layers)

    def _preserved_directions(self) -> dict[str, torch.Tensor]:
        rule = [self.settings[name] for name in _RULE]
        # The empty prompt as it is drawn and as guidance has it, which is another in Sana.
        empty = [self._encode([""], **options) for options in ({}, guidance_options(self.pipeline))]
        preserved = {}
        for kind in self.layers:
            fixed = torch.cat([states[kind].flatten(0, 1).T for states in empty], 1)
            retained = self._retained[kind].flatten(0, 1).T if self._retained else fixed[:, :0]
            preserved[kind] = preserved_directions(retained, fixed, *rule)
            dimension, count = preserved[kind].shape
            logger.info("%d of %d directions of the text's %s are preserved.", count, dimension, kind)
        return preserved

    def _check(self, concepts: Mapping[str, str]) -> dict[str, str]:
        if not isinstance(concepts, Mapping) or not concepts:
            raise ValueError(
                f"Expected concepts and what replaces each, got {concepts!r}. Type "
                "`editor.edit({'Snoopy': 'a dog'})`, or '' to erase."
            )
        for concept, other in concepts.items():
            if not isinstance(concept, str) or not isinstance(other, str) or not concept.strip():
                raise ValueError(f"Expected a concept and a text that replaces it, got {concept!r}: {other!r}.")
            if concept == other:
                raise ValueError(f"Expected {concept!r} to be replaced by something else, or by '' to erase it.")
            if concept in self.concepts:
                raise ValueError(
                    f"Expected concepts that were not edited yet, got {concept!r}, now {self.concepts[concept]!r}. "
                    "Undo that batch first: `editor.undo()`."
                )
            if concept in self.retain:
                raise ValueError(f"Expected {concept!r} either edited or retained, got both. Take it out of `retain`.")
        return dict(concepts)

    def _write(self, batches: list[ConceptBatch]) -> None:
        """Put these batches into the weights; they are then the ones in force."""
        for act in (EditedWeight.check, EditedWeight.set):
            for kind, layers in self.layers.items():
                for name in layers:
                    act(self._weights[name], [(batch.residuals[name], batch.factors[kind]) for batch in batches])
        self._batches = batches


def _norms(columns: torch.Tensor, parts: int) -> torch.Tensor:
    """Norm of each of the equal parts that the columns consist of."""
    return torch.stack([part.norm() for part in columns.chunk(parts, 1)])
