"""TRL's own training scripts with one class swapped: what `hf-iclr sft` and `hf-iclr dpo` run."""

import contextlib
import dataclasses
import functools
import importlib
import logging
import os
import pkgutil
from typing import Any

import torch
import torch.distributed.run
import trl
import yaml

from hf_iclr.runs.parts import PARTS_HELP, parts_in_every_trainer, read_probes
from hf_iclr.saving import check_writable


logger = logging.getLogger(__name__)


# Script of TRL -> our config, the name of the trainer that the script imports from trl, and ours in its place.
SWAPS = {
    "sft": (
        "hf_iclr.trainers.deep_safety.config:DeepSafetySFTConfig",
        "SFTTrainer",
        "hf_iclr.trainers.deep_safety.trainer:DeepSafetySFTTrainer",
    ),
    "dpo": (
        "hf_iclr.trainers.squeeze.config:SqueezeDPOConfig",
        "DPOTrainer",
        "hf_iclr.trainers.squeeze.trainer:SqueezeDPOTrainer",
    ),
}


@dataclasses.dataclass
class PartArguments:
    """Callbacks of ours for the trainer of `hf-iclr sft` and `dpo`."""

    with_parts: list[str] | None = dataclasses.field(
        default=None, metadata={"aliases": ["--with"], "help": PARTS_HELP}
    )


@dataclasses.dataclass
class WatchArguments:
    """What `hf-iclr dpo` has beside the settings of its trainer: answers to watch, and whether to stop by them."""

    probes: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Answers to watch while training: a file of pairs that are not trained on, or of a probe set. "
            "JSON Lines, CSV or Parquet; or a folder or repository of a dataset."
        },
    )
    stop: bool = dataclasses.field(
        default=False,
        metadata={"help": "End the training when the watched chosen answers lose probability for good."},
    )

    def for_trainer(self, args: Any) -> dict[str, Any]:
        """Keyword arguments of the trainer, once what does not fit together is refused."""
        from hf_iclr.trainers.squeeze import SqueezeStoppingCallback

        wanted: dict[str, Any] = {}
        if self.stop:
            if self.probes is None and args.eval_strategy == "no":
                raise ValueError(
                    "--stop goes by answers that are scored again and again, but there are none. Add `--probes "
                    "pairs.jsonl` with pairs that are not trained on, or `--eval_strategy steps`."
                )
            wanted["callbacks"] = [SqueezeStoppingCallback("stop")]
        if self.probes is not None:
            wanted["probe_dataset"] = read_probes(self.probes)
        for field in dataclasses.fields(args):
            if field.name.startswith("probe_") and self.probes is None and getattr(args, field.name) != field.default:
                raise ValueError(
                    f"--{field.name} is about the answers of --probes, but there are none. Add `--probes pairs.jsonl` "
                    "with pairs that are not trained on."
                )
        return wanted


def run_trl_script(script: str, arguments: list[str]) -> None:
    """
    Run `trl/scripts/{script}.py` as it is installed, with our trainer and config in the place of TRL's. Flags of
    `accelerate launch` start it in as many processes as they say, as with `trl sft`.

    Args:
        script (`str`):
            `"sft"` or `"dpo"`.
        arguments (`list[str]`):
            Command line: TRL's flags, those of our config and of `accelerate launch`, or `--config file.yaml`.

    Raises:
        ValueError: if a name is no setting, or a value is out of its range.
    """
    config, name, path = SWAPS[script]
    kinds: tuple[type, ...] = (trl.ScriptArguments, pkgutil.resolve_name(config), trl.ModelConfig)
    kinds = (*kinds, trl.DatasetMixtureConfig, PartArguments, *((WatchArguments,) if script == "dpo" else ()))
    *parsed, in_file, typed = _parse(kinds, script, arguments, rest=True)
    if in_file or typed:
        launch = _launch_arguments([*in_file, *typed], script)
        if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which accelerate sets for what it launches
            _launch(launch, [script, *_without(arguments, typed)])
            return
    if os.path.isfile(parsed[0].dataset_name or ""):
        raise ValueError(
            f"Expected a dataset's folder or repository, got the file {parsed[0].dataset_name}. Put it into a folder "
            "of its own, and type `--dataset_name FOLDER`."
        )
    trainer, parts = pkgutil.resolve_name(path), parsed[4]
    if script == "dpo":
        trainer = functools.partial(trainer, **parsed[5].for_trainer(parsed[1]))
    out = check_writable(parsed[1].output_dir)
    module = importlib.import_module(f"trl.scripts.{script}")
    original = getattr(trl, name)
    with parts_in_every_trainer(parts.with_parts or ()):
        setattr(trl, name, trainer)
        try:
            module.main(*parsed[:4])
        finally:
            setattr(trl, name, original)
            with contextlib.suppress(OSError):  # Trainer makes the folder before it looks at the data
                out.rmdir()  # only an empty one


def _launch_arguments(flags: list[str], script: str) -> Any:
    """What is no setting of ours, as `accelerate launch` reads it."""
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = _refuse  # type: ignore[method-assign]
    launch, unknown = parser.parse_known_args([*flags, script])
    if unknown or launch.training_script != script:
        names = [repr(flag) for flag in unknown or flags if flag.startswith("-")] or [repr(flag) for flag in flags]
        raise ValueError(
            f"Expected settings of `hf-iclr {script}` or of `accelerate launch`, got {', '.join(names)}. "
            f"`hf-iclr {script} --help` lists them."
        )
    return launch


def _launch(launch: Any, command: list[str]) -> None:
    processes = launch.num_processes or 1
    if processes > 1 and not torch.accelerator.is_available():
        logger.info("Without an accelerator, accelerate wants mpirun: torchrun starts the %d processes.", processes)
        os.environ |= {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": launch.mixed_precision or "no"}
        torch.distributed.run.main(["--nproc_per_node", str(processes), "-m", "hf_iclr", *command])
        return
    from accelerate.commands.launch import launch_command

    launch.module, launch.training_script, launch.training_script_args = True, "hf_iclr", command
    launch_command(launch)


def _without(arguments: list[str], taken: list[str]) -> list[str]:
    """The arguments without `taken`, which stand among them in that order."""
    left, rest = list(taken), []
    for argument in arguments:
        if left and argument == left[0]:
            left.pop(0)
        else:
            rest.append(argument)
    return rest


def _refuse(message: str) -> None:
    raise ValueError(message)


def parse_flags(kinds: tuple[type, ...], command: str, arguments: list[str]) -> tuple[Any, ...]:
    """
    What is typed behind a command, as TRL reads it; `--help` ends the process.

    Args:
        kinds (`tuple[type]`):
            Dataclasses to make.
        command (`str`):
            Name of the command.
        arguments (`list[str]`):
            Flags, and `--config file.yaml`.

    Returns:
        `tuple`: one object a dataclass.

    Raises:
        ValueError: if a name is no setting, a value is out of its range, or the file is none of YAML.
    """

    return _parse(kinds, command, arguments)


def _parse(kinds: tuple[type, ...], command: str, arguments: list[str], rest: bool = False) -> tuple[Any, ...]:
    if arguments[-1:] == ["--config"]:
        raise ValueError("Expected a file after --config, got none.")
    parser = trl.TrlParser(kinds, prog=f"hf-iclr {command}")
    parser.error = _refuse  # instead of hundreds of flags and an end of the process
    try:
        return parser.parse_args_and_config(arguments, return_remaining_strings=rest, separate_remaining_strings=rest)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected a file in YAML or JSON. {error}") from error
