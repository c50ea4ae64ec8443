"""What `--with` takes: our callbacks, added to whatever trainer a script makes."""

import contextlib
import functools
import inspect
import logging
import runpy
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import trl
import yaml
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from .dataset_files import load_rows
from .prompt_files import read_prompts


logger = logging.getLogger(__name__)

MakeCallbacks = Callable[[Trainer], list[TrainerCallback]]
_SQUEEZED = ("DPOTrainer", "KTOTrainer", "GRPOTrainer")  # of TRL, of whose losses SqueezeMixin logs the effect


def _shapley(source: str, options: dict[str, Any]) -> MakeCallbacks:
    from hf_iclr.trainers import InRunDataShapleyCallback

    return _maker(InRunDataShapleyCallback, load_rows(source), options)


def read_probes(source: str) -> Dataset:
    """A probe set; of a file that holds only pairs, one is made."""
    from hf_iclr.trainers import build_probe_set

    rows = load_rows(source)
    only_pairs = not any(name in rows.column_names for name in ("other_train", "other_test", "permuted"))
    return build_probe_set(rows) if only_pairs else rows


def _squeeze(source: str, options: dict[str, Any]) -> MakeCallbacks:
    from hf_iclr.trainers import SqueezeMixin, SqueezeProbeCallback, SqueezeStoppingCallback

    def none(trainer: Trainer) -> list[TrainerCallback]:
        if not isinstance(trainer, SqueezeMixin):
            logger.warning(
                f"--with squeeze adds nothing to {type(trainer).__name__}: alone it is about the losses of TRL's "
                f"{', '.join(_SQUEEZED)}. Name pairs to watch, --with squeeze:pairs.jsonl."
            )
        return []

    if not source:
        return none
    probes = _maker(SqueezeProbeCallback, read_probes(source), options)
    return lambda trainer: [*probes(trainer), SqueezeStoppingCallback("warn")]


def _safety(source: str, options: dict[str, Any]) -> MakeCallbacks:
    from hf_iclr.trainers import SafetyDriftCallback

    return _maker(SafetyDriftCallback, read_prompts(source)[0], options)


def _null_space(source: str, options: dict[str, Any]) -> MakeCallbacks:
    from hf_iclr.editors import KeyStatistics, NullSpaceCallback

    return _maker(NullSpaceCallback, KeyStatistics.from_pretrained(source), options)


def _maker(callback: type[TrainerCallback], source: Any, options: dict[str, Any]) -> MakeCallbacks:
    """Makes one for each trainer, and one at once, so that wrong options are refused before the script runs."""
    names = list(inspect.signature(callback).parameters)
    known = [name for name in names[1:] if name != "trainer"]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(
            f"Expected options of {callback.__name__}, got {', '.join(unknown)}. It has {', '.join(known)}."
        )

    def make(trainer: Trainer | None) -> list[TrainerCallback]:
        return [callback(source, **options, **({"trainer": trainer} if "trainer" in names else {}))]

    try:
        make(None)
    except TypeError as error:  # a text where a number belongs
        given = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise ValueError(f"Expected options of {callback.__name__}, got {given}: {error}") from error
    return make


# What each makes of its file and options, and what the file is
PARTS: dict[str, tuple[Callable[[str, dict[str, Any]], MakeCallbacks], str]] = {
    "shapley": (_shapley, "shapley:val.jsonl, rows to value training rows by"),
    "squeeze": (
        _squeeze,
        "squeeze:pairs.jsonl, pairs that are not trained on; or alone, for DPO, KTO and GRPO",
    ),
    "safety": (_safety, "safety:prompts.txt, what should be refused"),
    "null_space": (_null_space, "null_space:folder, KeyStatistics of text whose outputs must stay"),
}
PARTS_HELP = f"Our callbacks: {'; '.join(text for _, text in PARTS.values())}. Options: shapley:val.jsonl,rank=8."


@contextlib.contextmanager
def parts_in_every_trainer(wanted: Sequence[str]) -> Iterator[None]:
    """
    Within it, each [`~transformers.Trainer`] that is made, of whatever class, gets our callbacks; and with `squeeze`
    TRL's preference trainers are subclasses with [`SqueezeMixin`].

    Args:
        wanted (`Sequence[str]`):
            What `--with` says: the name of a part, a colon, a file, folder or repository, and options after commas.

    Raises:
        ValueError: if a part is unknown, named twice, or has no file; or what its file holds is something else.
        OSError: if there is no such file.
    """
    made: dict[str, MakeCallbacks] = {}
    for text in wanted:
        name, _, rest = text.partition(":")
        source, *settings = rest.split(",")
        options = {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in settings)}
        if name not in PARTS:
            raise ValueError(f"Expected one of {', '.join(PARTS)} after --with, got {name!r}.")
        if not source and name != "squeeze":
            raise ValueError(f"Expected a file after {name}, got none. Type {PARTS[name][1]}.")
        if name in made:
            raise ValueError(f"Expected each part once, got {name} twice. Put the rows into one file.")
        made[name] = PARTS[name][0](source, options)
    original = Trainer.__init__

    @functools.wraps(original)
    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        for make in made.values():
            for callback in make(self):
                self.add_callback(callback)

    with contextlib.ExitStack() as stack:
        _replace(stack, Trainer, "__init__", init)
        for name in _SQUEEZED if "squeeze" in made else ():
            theirs = getattr(trl, name)
            for module in (trl, trl.trainer, sys.modules[theirs.__module__]):  # from any of which a script imports it
                _replace(stack, module, name, _squeezing(theirs))
        yield


def _replace(stack: contextlib.ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _squeezing(cls: type) -> type:
    from hf_iclr.trainers import SqueezeMixin

    if issubclass(cls, SqueezeMixin):
        return cls
    return type(cls.__name__, (SqueezeMixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def run_script(script: Path, arguments: Sequence[str], wanted: Sequence[str]) -> None:
    """
    Run a Python file as `python script arguments` does, with our callbacks in the trainers it makes.

    Args:
        script (`Path`):
            The file.
        arguments (`Sequence[str]`):
            What it finds in `sys.argv`.
        wanted (`Sequence[str]`):
            As for [`parts_in_every_trainer`].

    Raises:
        FileNotFoundError: if there is no such file.
        SystemExit: if the script fails with an error that is not of ours, which is then shown as Python does.
    """
    if not script.is_file():
        raise FileNotFoundError(f"Expected a Python file, got {script}, which is none. Type `hf-iclr run train.py`.")
    with parts_in_every_trainer(wanted), contextlib.ExitStack() as stack:
        _replace(stack, sys, "argv", [str(script), *arguments])
        _replace(stack, sys, "path", [str(script.parent.absolute()), *sys.path])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception as error:
            frames = list(traceback.walk_tb(error.__traceback__))
            if frames[-1][0].f_globals["__name__"].startswith("hf_iclr"):
                raise
            traceback.print_exception(error.with_traceback(_of_script(error, script)))
            raise SystemExit(1) from None


def _of_script(error: Exception, script: Path) -> TracebackType | None:
    """The traceback from the script's first line on; whole if it has none, as with an error of syntax."""
    found = error.__traceback__
    while found is not None and found.tb_frame.f_code.co_filename != str(script):
        found = found.tb_next
    return found or error.__traceback__
