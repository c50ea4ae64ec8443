"""
Run as `python -m tests.without_extras EXTRA ...`: hides the packages that only these extras bring, uses what is left,
asks for what is not, and prints what it found as JSON.
"""

import contextlib
import importlib
import importlib.machinery
import importlib.metadata
import io
import json
import logging
import re
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from hf_iclr.extras import EXTRAS, MissingExtraError


ROOT = Path(__file__).parents[1]
AREAS = ("trainers", "generation", "editors", "vision", "tour")


def project() -> dict:
    """The table of pyproject.toml."""
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    """A distribution's name as packages are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(requirements: list[str]) -> set[str]:
    """The distributions that some requirements bring, as they are installed here."""
    found: set[str] = set()
    todo = [(Requirement(line), "") for line in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = normal(requirement.name)
        for wanted in requirement.extras | ({""} if name not in found else set()):
            found.add(name)
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                todo += [(Requirement(line), wanted) for line in importlib.metadata.requires(name) or []]
    return found


def hidden_packages(absent: list[str]) -> tuple[set[str], set[str]]:
    """Distributions that are not there where these extras are not installed and all others are, and their modules."""
    parts = project()["optional-dependencies"]
    present = [line for extra in EXTRAS if extra not in absent for line in parts[extra]]
    rest = closure([*project()["dependencies"], *present])
    gone = closure([line for extra in absent for line in parts[extra]]) - rest
    modules = {
        module
        for module, names in importlib.metadata.packages_distributions().items()
        if all(normal(name) in gone for name in names)
    }
    also = {"typer", "rich"} if "cli" in absent else set()  # transformers brings these two as well, today
    return gone | also, modules | also


def hide(distributions: set[str], modules: set[str]) -> None:
    """Makes them as absent as if they were not installed, for imports and for metadata."""

    class Finder(importlib.machinery.PathFinder):
        @classmethod
        def find_spec(cls, fullname, path=None, target=None):
            return None if fullname.partition(".")[0] in modules else super().find_spec(fullname, path, target)

        @classmethod
        def find_distributions(cls, context=importlib.metadata.DistributionFinder.Context()):  # noqa: B008
            return [] if normal(context.name or "") in distributions else super().find_distributions(context)

    sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]


def sentence(question) -> str:
    """What a missing extra says to a question; empty where nothing is missing."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as error:
            question()
    except MissingExtraError as missing:
        return str(missing)
    except SystemExit as end:
        return f"{error.getvalue()} [exit code {end.code}]" if end.code else ""
    except Exception:  # noqa: BLE001  the part is there, and refuses this: `pipeline()` by a bare Exception
        return ""
    return ""


def import_all() -> dict[str, str]:
    """Every module of the package that does not import, and why."""
    files = [path.relative_to(ROOT) for area in AREAS for path in (ROOT / area).rglob("[!_]*.py")]
    files += [path.relative_to(ROOT / "hf_iclr") for path in (ROOT / "hf_iclr").rglob("[!_]*.py")]
    failed = {}
    for name in sorted(".".join(["hf_iclr", *path.with_suffix("").parts]) for path in files):
        try:
            importlib.import_module(name)
        except ImportError as error:
            failed[name] = str(error)
    return failed


def use_parts(folder: Path) -> dict[str, float]:
    """Trains a step with each trainer, edits, cascades and audits; numbers that show it was done."""
    import torch
    from transformers import pipeline

    import hf_iclr
    from hf_iclr.tiny_models import word_tokenizer
    from tests.editors.tiny import REQUESTS, quick_config, tiny_model, tiny_statistics
    from tests.generation.toy import perturbed_copy
    from tests.trainers.squeeze.pairs_and_logs import pair_rows
    from tests.trainers.tiny import QUICK, tiny_llama, triplet_rows, word_rows

    torch.set_num_threads(1)
    tokenizer = word_tokenizer("w0")
    quick = {**QUICK, "max_steps": 2, "optim": "sgd"}
    shapley = hf_iclr.InRunDataShapleyCallback(word_rows(4, seed=3), refresh_every=1, adam_warmup=0)
    sft = hf_iclr.DeepSafetySFTTrainer(
        tiny_llama(),
        args=hf_iclr.DeepSafetySFTConfig(str(folder), **quick),
        train_dataset=word_rows(8),
        safety_dataset=triplet_rows(),
        processing_class=tokenizer,
        callbacks=[shapley],
    )
    sft.train()
    dpo = hf_iclr.SqueezeDPOTrainer(
        tiny_llama(),
        tiny_llama(),
        args=hf_iclr.SqueezeDPOConfig(str(folder), **quick),
        train_dataset=pair_rows(),
        processing_class=tokenizer,
    )
    dpo.train()
    model = tiny_model("llama")
    editor = hf_iclr.AlphaEditor(
        model, tokenizer, quick_config(), tiny_statistics(model, tokenizer, layers=quick_config().layers)
    )
    report = editor.edit(REQUESTS)
    editor.undo()
    pipe = pipeline("speculative-cascade", model=model, assistant_model=perturbed_copy(model), tokenizer=tokenizer)
    cascade = pipe("w1 w2", cascade_rule="opt", cascade_alpha=0.2, max_new_tokens=4, do_sample=False)
    audit = hf_iclr.audit_safety(
        model, tokenizer, ["w1 w2", "w3"], judge=hf_iclr.RefusalJudge(["cues"]), ks=(0,), attacks=(), max_new_tokens=3
    )
    audit.save(folder / "audit")
    return {
        "sft": sft.state.log_history[-1]["train_loss"],
        "dpo": dpo.state.log_history[-1]["train_loss"],
        "shapley": len(shapley.result.values()),
        "edits": len(report.edits),
        "cascaded": len(cascade[0]["generated_text"].split()) - 2,
        "audited": (folder / "audit" / "report.json").stat().st_size,
        "figure": (folder / "audit" / "prefill_curve.png").exists(),
    }


def main(absent: list[str]) -> None:
    hide(*hidden_packages(absent))
    said = io.StringIO()
    logging.getLogger("hf_iclr").addHandler(logging.StreamHandler(said))
    from transformers import pipeline
    from transformers.pipelines import PIPELINE_REGISTRY

    import hf_iclr

    registering = said.getvalue()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        used = use_parts(Path(folder)) if len(absent) == len(EXTRAS) else {}
    from hf_iclr.__main__ import main as command
    from hf_iclr.trainers.squeeze.report import write_squeeze_report

    sys.argv = ["hf-iclr", "--help"]
    log = [{"step": 1, "squeeze/index": 0.5}]
    questions = {
        "from hf_iclr import Sam2VideoPipeline": lambda: hf_iclr.Sam2VideoPipeline,
        "import hf_iclr.vision.session.session": lambda: importlib.import_module("hf_iclr.vision.session.session"),
        "pipeline(task)": lambda: pipeline("promptable-video-segmentation"),
        "pipeline(task, model)": lambda: pipeline("promptable-video-segmentation", model=object()),
        "ConceptEditor": lambda: hf_iclr.ConceptEditor(object(), ["a cat"]),
        "load_metric": lambda: hf_iclr.load_metric("fluency"),
        "write_squeeze_report": lambda: write_squeeze_report(log, tempfile.mkdtemp()),
        "hf-iclr": command,
    }
    found = {
        "registering": registering,
        "said": said.getvalue(),
        "tasks": PIPELINE_REGISTRY.get_supported_tasks(),
        "used": used,
        "sentences": {name: sentence(question) for name, question in questions.items()},
        "names": {name: sentence(lambda name=name: getattr(hf_iclr, name)) for name in hf_iclr.__all__},
        "modules": import_all(),
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
