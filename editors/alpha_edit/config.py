"""Settings of `AlphaEditor`."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from hf_iclr.hub import pretrained_folder
from hf_iclr.saving import atomic_file
from hf_iclr.untrusted import as_written_by, check_field_types, inside, read_json

from .closed_form import PAPERS_THRESHOLD, null_space_rule


_CHOICES = {
    "solver": ("alphaedit", "memit", "memit_seq", "ridge"),
    "post_processing": (None, "rect"),
    "optimization_dtype": ("auto", "bfloat16", "float32"),
}
_AT_LEAST_1 = ("num_steps", "context_length", "optimization_batch_size", "chunk_length")
_AT_LEAST_0 = ("l2", "loss_threshold", "nll_threshold", "weight_decay", "kl_factor", "num_contexts")
_POSITIVE = ("moment_weight", "learning_rate", "clamp_factor")
CONFIG_NAME = "alpha_edit_config.json"


@dataclass
class AlphaEditConfig:
    """
    Settings of [`AlphaEditor`]. Defaults are those of the AlphaEdit paper's Llama 3 and GPT-J runs
    (https://huggingface.co/papers/2410.02355), except where a line says otherwise.

    Args:
        solver (`str`, *optional*, defaults to `"alphaedit"`):
            `"alphaedit"`, `"memit"` (second moment as a soft constraint), `"memit_seq"` (that and earlier edits' keys)
            or `"ridge"` (neither).
        project (`bool`, *optional*):
            Project the update onto the null space, the paper's one line for other methods. Left out: only for
            `"alphaedit"`, which has it in its system.
        post_processing (`str`, *optional*):
            `"rect"` keeps the 40 % of an update's entries that change a weight most.
        layers (`str` or `list[int]`, *optional*, defaults to `"auto"`):
            Layers to edit; `"auto"` as in [`KeyStatistics.from_dataset`].
        nullspace_threshold (`float`, *optional*):
            Directions with an eigenvalue of at least this are preserved; 2e-2 in the paper, and here when no rule is
            given. One number means other things in other models: look at the report's editable share.
        nullspace_energy (`float`, *optional*):
            Instead: share of the sum of eigenvalues that is preserved.
        nullspace_rank (`int`, *optional*):
            Instead: number of directions preserved.
        l2 (`float`, *optional*, defaults to 10.0):
            Ridge of `"alphaedit"` and `"ridge"`, in squared units of a key. Without a subject it is at most a
            hundredth of what can be edited of the key: that of a last word such as "is" is small.
        moment_weight (`float`, *optional*, defaults to 15000.0):
            Weight of the second moment in `"memit"` and `"memit_seq"`; the MEMIT paper's lambda.
        learning_rate (`float`, *optional*, defaults to 0.5):
            Adam's, for the target states; 0.5 for GPT-J, 0.1 for Llama 3.
        num_steps (`int`, *optional*, defaults to 25):
            Steps at most.
        loss_threshold (`float`, *optional*, defaults to 0.05):
            A request is done when its loss (nats per target token) is below this.
        nll_threshold (`float`, *optional*, defaults to 0.05):
            It is done as well when its loss without weight decay and KL is below this. The paper goes on, 0 here: it
            mostly takes all its steps, as these two terms keep the loss up.
        clamp_factor (`float`, *optional*, defaults to 0.75):
            Largest move, in norms of the original state.
        weight_decay (`float`, *optional*, defaults to 0.5):
            Weight of the move's norm divided by the original state's squared norm.
        kl_factor (`float`, *optional*, defaults to 0.0625):
            Weight of KL(now || before) of the next token after "{subject} is a", at the subject.
        num_contexts (`int`, *optional*, defaults to 5):
            Sampled contexts beside the plain prompt. The time an edit takes grows with it.
        context_length (`int`, *optional*, defaults to 10):
            Tokens of a context.
        context_templates (`list[str]`, *optional*):
            Contexts to use, each ending in `{}`, the first of them `"{}"`; with `chat_template` rendered turns, each
            with one `{}`. Left out: sampled at the first edit and kept.
        chat_template (`bool`, *optional*, defaults to `False`):
            Prompts are turns of a chat, by the tokenizer's chat template, and targets are answers to them. The report
            asks in the same form, and so does [`~hf_iclr.editors.alpha_edit.evaluate_edits`] with `chat_template`.
        chunk_length (`int`, *optional*, defaults to 8):
            Longest part of a target, in tokens, that one state has to bring about; longer targets have one for each
            part, at the token before it. For sentences 1 did best.
        optimization_batch_size (`int`, *optional*, defaults to 25):
            Requests whose target states are sought at once.
        optimization_dtype (`str`, *optional*, defaults to `"auto"`):
            `"bfloat16"` or `"float32"`, in which the layers above the edited ones of a float32 model are run to find
            target states; `"auto"` is bfloat16 for large matrices where the device has instructions for it. Only
            matrix products are: states, norms, attention and logits stay in float32.
        seed (`int`, *optional*, defaults to 0):
            Seed of the contexts.
        base_model_name_or_path (`str`, *optional*):
            Set by the editor: the model that is edited.
        base_model_revision (`str`, *optional*):
            Set by the editor: its commit.
        base_model_hash (`str`, *optional*):
            Set by the editor: [`~hf_iclr.models.hash_weights`] of it.

    Raises:
        ValueError: when a setting is out of range, unknown, or two rules for the null space are given.
    """

    solver: str = "alphaedit"
    project: bool | None = None
    post_processing: str | None = None
    layers: str | list[int] = "auto"
    nullspace_threshold: float | None = None
    nullspace_energy: float | None = None
    nullspace_rank: int | None = None
    l2: float = 10.0
    moment_weight: float = 15_000.0
    learning_rate: float = 0.5
    num_steps: int = 25
    loss_threshold: float = 0.05
    nll_threshold: float = 0.05
    clamp_factor: float = 0.75
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    num_contexts: int = 5
    context_length: int = 10
    context_templates: list[str] | None = None
    chat_template: bool = False
    chunk_length: int = 8
    optimization_batch_size: int = 25
    optimization_dtype: str = "auto"
    seed: int = 0
    base_model_name_or_path: str | None = None
    base_model_revision: str | None = None
    base_model_hash: str | None = None

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Expected {name} among {', '.join(map(str, choices))}, got {getattr(self, name)!r}.")
        check_field_types(self, AlphaEditConfig)
        rule = (self.nullspace_threshold, self.nullspace_energy, self.nullspace_rank)
        self.nullspace_threshold, self.nullspace_energy, self.nullspace_rank = null_space_rule(*rule, PAPERS_THRESHOLD)
        for name in (*_AT_LEAST_1, *_AT_LEAST_0):
            if getattr(self, name) < (least := int(name in _AT_LEAST_1)):
                raise ValueError(f"Expected {name} to be at least {least}, got {getattr(self, name)}.")
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"Expected {name} to be positive, got {getattr(self, name)}.")
        if self.project is None:
            self.project = self.solver == "alphaedit"
        elif self.solver == "alphaedit" and not self.project:
            raise ValueError(
                "Expected project=True with the solver 'alphaedit', which is the projection. Without it: "
                "solver='ridge'."
            )
        if self.context_templates == []:
            raise ValueError("Expected context templates, got an empty list. Type ['{}'] for the plain prompt alone.")
        if not isinstance(self.context_templates, list | None):
            raise TypeError(f"Expected a list of context templates, got {self.context_templates!r}.")
        for template in self.context_templates or []:
            if not isinstance(template, str):
                raise TypeError(f"Expected context templates to be text, got {template!r}.")
            if template.count("{}") != 1 or not (self.chat_template or template.endswith("{}")):
                raise ValueError(f"Expected context templates that end in {{}} and have it once, got {template!r}.")
        if self.context_templates and self.context_templates[0] != "{}" and not self.chat_template:
            raise ValueError(
                f"Expected the first context template to be '{{}}', the plain prompt, got "
                f"{self.context_templates[0]!r}."
            )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write `alpha_edit_config.json` to a folder, made if need be."""
        with atomic_file(inside(save_directory, CONFIG_NAME)) as part:
            part.write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, revision: str | None = None, token: str | bool | None = None
    ) -> "AlphaEditConfig":
        """
        Read `alpha_edit_config.json` of a folder or repository, as [`AlphaEditor.from_pretrained`] does.

        Raises:
            ValueError: when there is none, or it has settings that this version does not know.
        """
        path = inside(pretrained_folder(name_or_path, [CONFIG_NAME], revision=revision, token=token), CONFIG_NAME)
        if not path.exists():
            raise ValueError(f"Expected {CONFIG_NAME} in {name_or_path}, got none: no editor was saved there.")
        values = read_json(path)
        with as_written_by("AlphaEditConfig.save_pretrained", path):
            unknown = set(values) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"Expected the settings of AlphaEditConfig in {path}, got {sorted(unknown)} too.")
            return cls(**values)
