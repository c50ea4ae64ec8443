"""TRL's own training scripts with one class swapped: what `hf-iclr sft` and `hf-iclr dpo` run."""

import contextlib
import importlib
import pkgutil
from pathlib import Path
from typing import Any

import trl
import yaml


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


def run_trl_script(script: str, arguments: list[str]) -> None:
    """
    Run `trl/scripts/{script}.py` as it is installed, with our trainer and config in the place of TRL's.

    Args:
        script (`str`):
            `"sft"` or `"dpo"`.
        arguments (`list[str]`):
            Command line: TRL's flags and those of our config, or `--config file.yaml`.

    Raises:
        ValueError: if a name is no setting, or a value is out of its range.
    """
    config, name, trainer = SWAPS[script]
    dataclasses = (trl.ScriptArguments, pkgutil.resolve_name(config), trl.ModelConfig, trl.DatasetMixtureConfig)
    parsed = parse_flags(dataclasses, script, arguments)
    out = Path(parsed[1].output_dir)
    module = importlib.import_module(f"trl.scripts.{script}")
    original = getattr(trl, name)
    setattr(trl, name, pkgutil.resolve_name(trainer))
    try:
        module.main(*parsed)
    finally:
        setattr(trl, name, original)
        with contextlib.suppress(OSError):  # Trainer makes the folder before it looks at the data
            out.rmdir()  # only an empty one


def parse_flags(dataclasses: tuple[type, ...], command: str, arguments: list[str]) -> tuple[Any, ...]:
    """
    What is typed behind a command, as TRL reads it; `--help` ends the process.

    Args:
        dataclasses (`tuple[type]`):
            What to make.
        command (`str`):
            Name of the command.
        arguments (`list[str]`):
            Flags, and `--config file.yaml`.

    Returns:
        `tuple`: one object a dataclass.

    Raises:
        ValueError: if a name is no setting, a value is out of its range, or the file is none of YAML.
    """

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser = trl.TrlParser(dataclasses, prog=f"hf-iclr {command}")
    parser.error = refuse  # instead of hundreds of flags and an end of the process
    try:
        return parser.parse_args_and_config(arguments)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected a file in YAML or JSON. {error}") from error
