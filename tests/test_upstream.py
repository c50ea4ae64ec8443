"""Which upstream seams we lean on, in the exact shape we wrote against. A failure names the change: read it first."""

import ast
import importlib
import inspect
import logging
import pkgutil
from pathlib import Path

import pytest
import transformers

from hf_iclr.upstream import SEAMS, Seam, check_seams, checkpointing_argument
from tests.architectures import tiny


# Each of our classes -> the private methods of its parents that it overrides.
PRIVATE_OVERRIDES: dict[str, set[str]] = {
    "hf_iclr.generation.cascade_generation:SpeculativeCascadeGenerationMixin": {
        "_assisted_decoding",
        "_get_candidate_generator",
        "_validate_generation_mode",
    },
    "hf_iclr.generation.modeling_speculative_cascade:SpeculativeCascadeForCausalLM": {"_init_weights"},
    "hf_iclr.generation.modeling_draft:DraftForCausalLM": set(),
    "hf_iclr.generation.pipeline_speculative_cascade:SpeculativeCascadePipeline": {"_forward"},
    "hf_iclr.trainers.deep_safety.trainer:DeepSafetySFTTrainer": {
        "_get_train_sampler",
        "_prepare_dataset",
        "_set_signature_columns_if_needed",
    },
    "hf_iclr.trainers.squeeze.trainer:SqueezeDPOTrainer": {"_prepare_dataset"},
    "hf_iclr.editors.evaluate_modules:EditSuccess": {"_compute", "_info"},
    "hf_iclr.editors.evaluate_modules:Perplexity": {"_compute", "_info"},
    "hf_iclr.vision.session.pipeline:Sam2VideoPipeline": {"_forward", "_sanitize_parameters"},
}


# Hooks with one leading underscore that upstream's own guides tell a subclass to write.
DOCUMENTED_HOOKS = {
    "_compute",  # evaluate, "Creating and sharing a new evaluation"
    "_forward",  # transformers, "Adding a new pipeline"
    "_info",
    "_init_weights",  # transformers, "Contributing a new model"
    "_sanitize_parameters",
}
# Private attributes of upstream that we read or write: there is no signature to compare -> why nothing public serves.
PRIVATE_ATTRIBUTES = {
    "_BatchNorm": "torch: the class that all its batch norms share",
    "_ConvNd": "torch: the class that all its convolutions share",
    "_DropoutNd": "torch: the class that all its dropouts share",
    "_asdict": "python: a named tuple's counts by their names",
    "_atm_translator": "transformers: maps drafts of another vocabulary, and only the generator has it",
    "_attn_implementation": "transformers: what `set_attn_implementation` sets; nothing public reads it",
    "_compiled_call_impl": "torch: what `Module.compile` sets; nothing public reads it",
    "_execution_device": "diffusers: `device` is that of the offloaded weights",
    "_experts_implementation": "transformers: what `set_experts_implementation` sets; nothing public reads it",
    "_fields": "python: by which a named tuple is known",
    "_fingerprint": "datasets: shown in its guide to the cache, without a public name",
    "_formatting_func": "trl: an argument of the constructor that is kept nowhere else",
    "_forward_hooks": "torch: a shallow copy of a model counts its forwards by hooks of its own",
    "_forward_params": "transformers: options a pipeline was made with; `stream` is a call of ours beside `__call__`",
    "_forward_pre_hooks": "torch: as `_forward_hooks`",
    "_from_auto": "transformers: an argument that auto classes add to `from_pretrained`",
    "_hf_hook": "accelerate: the hook that it puts on `forward`, where a model's parts are called instead",
    "_hf_peft_config_loaded": "transformers: a mark that `unload` of PEFT leaves on the model",
    "_is_stateful": "transformers: whether a cache can be rolled back; nothing public says so",
    "_is_vision_dataset": "trl: what the trainer decided about the rows",
    "_iterator": "torch: persistent workers have copies of the data set, and nothing public lets go of them",
    "_mask_length": "transformers: how long the mask of ones was that `generate` dropped, kept nowhere else",
    "_modules": "torch: a shallow copy that exits early holds a body of its own",
    "_num_beams": "transformers: how many sequences `prefix_allowed_tokens_fn` has a prompt, kept nowhere else",
    "_loss_shifts_labels": "transformers: what the trainer found out about the model's loss",
    "_prefix_allowed_tokens_fn": "transformers: the function given to `generate`, kept nowhere else",
    "_preprocess_params": "transformers: as `_forward_params`",
    "_registered_impl": "transformers: makes a saved pipeline ask for remote code it does not need",
    "_signature_columns": "transformers: set by `_set_signature_columns_if_needed`, a seam",
    "_torchdynamo_orig_callable": "torch: marks what torch.compile returned; nothing public tells",
    "_tokenizer": "trl: the tokenizer within the processor the trainer was given",
}
ROOT = Path(__file__).parent.parent
AREAS = ("generation", "trainers", "editors", "vision", "tour", "hf_iclr")


@pytest.mark.parametrize("seam", SEAMS)
def test_seam_has_the_shape_we_wrote_against(seam):
    (check,) = check_seams({seam: SEAMS[seam]})
    assert check.found == check.expected


def test_a_changed_and_a_vanished_seam_are_reported():
    now = "(src, dst, *, follow_symlinks=True)"
    seams = {
        "shutil:copyfile": Seam("", "(src, dst)"),
        "shutil:copy_elsewhere": Seam("", "(src)"),
        "shutil:copy2": Seam("", "(src, dst)", older=(now,)),
    }
    changed, vanished, older = check_seams(seams)
    assert not changed.ok and changed.found == now
    assert not vanished.ok and vanished.found is None
    assert older.ok and older.expected == now


def test_seams_are_few_and_each_has_its_reason():
    assert len(SEAMS) <= 27  # a new one needs a public way looked for first
    assert all(len(seam.reason.split()) >= 3 for seam in SEAMS.values())


@pytest.mark.parametrize("area", AREAS)
def test_what_is_private_upstream_is_a_seam_or_allowed(area):
    known = {seam.rpartition(".")[2].rpartition(":")[2] for seam in SEAMS}
    assert private_names(area) <= known | DOCUMENTED_HOOKS | PRIVATE_ATTRIBUTES.keys()


def test_nothing_is_allowed_that_is_no_longer_used():
    sources = "".join(file.read_text() for area in AREAS for file in (ROOT / area).rglob("*.py"))
    assert [name for name in PRIVATE_ATTRIBUTES if name not in sources] == []


@pytest.mark.parametrize("area", AREAS)
def test_what_is_imported_from_inside_trl_is_a_seam_or_documented(area):
    documented = {"DataCollatorForLanguageModeling"}  # in its page of SFT
    known = {seam.rpartition(":")[2] for seam in SEAMS} | documented
    assert imports_from_inside("trl", area) <= known


def test_a_private_access_is_found(tmp_path):
    (tmp_path / "case.py").write_text(
        "from trl.trainer.utils import hash_module, _hidden\n"
        "class Ours(Theirs):\n"
        "    _told: str\n"
        "    _own = 1\n"
        "    def _ours(self): return self._ours, self._own, self._told, self._theirs, super()._parents()\n"
        "    def make(self): self._made = model._read; return self._made, getattr(model, '_asked', 0)\n"
    )
    names = {"_hidden", "_told", "_theirs", "_parents", "_read", "_asked"}
    assert private_names(tmp_path) == names and imports_from_inside("trl", tmp_path) == {"hash_module", "_hidden"}


@pytest.mark.parametrize("path", PRIVATE_OVERRIDES)
def test_private_overrides_are_declared(path):
    assert private_overrides(pkgutil.resolve_name(path)) == PRIVATE_OVERRIDES[path]


def test_an_announced_removal_is_an_error():
    with pytest.raises(FutureWarning, match="deprecated"):
        logging.getLogger("transformers.generation").warning("`x` is deprecated")


def private_names(area: str | Path) -> set[str]:
    """Names with one leading underscore that an area takes from upstream: what none of its files defines itself."""
    own, taken = set(), set()
    for file in (ROOT / area).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                own.add(node.name)
            if isinstance(node, ast.ClassDef):
                # An annotation without a value names what a parent sets.
                fields = [line for line in node.body if isinstance(line, ast.AnnAssign) and line.value is not None]
                lines = [target for line in node.body if isinstance(line, ast.Assign) for target in line.targets]
                own |= {line.id for line in [*lines, *(field.target for field in fields)] if hasattr(line, "id")}
            taken |= _taken(node)
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                parts = [part for target in targets for part in ast.walk(target) if isinstance(part, ast.Attribute)]
                own |= {part.attr for part in parts if ast.unparse(part.value) == "self"} - PRIVATE_ATTRIBUTES.keys()
    supers = {name.removeprefix("super.") for name in taken if name.startswith("super.")}
    taken = {name for name in taken if not name.startswith("super.")} - own | supers
    return {name for name in taken if name.startswith("_") and not name.startswith("__")}


def _taken(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("os", "sys"):  # Python documents theirs
        return {f"super.{node.attr}" if ast.unparse(node.value) == "super()" else node.attr}
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
        return {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    if isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("hf_iclr"):
        return {alias.name for alias in node.names}
    return set()


def imports_from_inside(package: str, area: str | Path) -> set[str]:
    """Names that an area imports from a module of `package` and that `package` itself does not export."""
    public = importlib.import_module(package)
    lines = [line for file in (ROOT / area).rglob("*.py") for line in ast.parse(file.read_text()).body]
    run = [line for line in lines if not (isinstance(line, ast.If) and ast.unparse(line.test) == "TYPE_CHECKING")]
    return {
        alias.name
        for line in run
        for node in ast.walk(line)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}.")
        for alias in node.names
        if not hasattr(public, alias.name)
    }


def private_overrides(cls: type) -> set[str]:
    """Methods with one leading underscore that a class, or a mixin of it that isn't listed, redefines from outside."""
    inside = [parent for parent in cls.__mro__ if parent.__module__.startswith("hf_iclr.")]
    parents = [parent for parent in cls.__mro__ if parent not in inside]
    ours = [one for one in inside if one is cls or f"{one.__module__}:{one.__name__}" not in PRIVATE_OVERRIDES]
    return {
        name
        for one in ours
        for name, value in vars(one).items()
        if name.startswith("_") and not name.startswith("__") and inspect.isroutine(value)
        if any(name in vars(parent) for parent in parents)
    }


def test_checkpointing_is_switched_by_the_name_of_this_release(tmp_path):
    name = checkpointing_argument()
    arguments = transformers.TrainingArguments(str(tmp_path), **{name: True})
    model = tiny("llama", 0)
    transformers.Trainer(model, arguments, train_dataset=[{"input_ids": [1, 2], "labels": [1, 2]}]).train()
    assert model.model.gradient_checkpointing
