"""TRL's own training scripts with one class swapped: what `hf-iclr sft` and `hf-iclr dpo` run."""

import contextlib
import dataclasses
import functools
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
        from hf_iclr.cli.dataset_files import load_rows
        from hf_iclr.trainers.squeeze import SqueezeStoppingCallback, build_probe_set

        wanted: dict[str, Any] = {}
        if self.stop:
            if self.probes is None and args.eval_strategy == "no":
                raise ValueError(
                    "--stop goes by answers that are scored again and again, but there are none. Add `--probes "
                    "pairs.jsonl` with pairs that are not trained on, or `--eval_strategy steps`."
                )
            wanted["callbacks"] = [SqueezeStoppingCallback("stop")]
        if self.probes is not None:
            rows = load_rows(self.probes)
            only_pairs = not any(name in rows.column_names for name in ("other_train", "other_test", "permuted"))
            wanted["probe_dataset"] = build_probe_set(rows) if only_pairs else rows
        for field in dataclasses.fields(args):
            if field.name.startswith("probe_") and self.probes is None and getattr(args, field.name) != field.default:
                raise ValueError(
                    f"--{field.name} is about the answers of --probes, but there are none. Add `--probes pairs.jsonl` "
                    "with pairs that are not trained on."
                )
        return wanted


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
    config, name, path = SWAPS[script]
    kinds = (trl.ScriptArguments, pkgutil.resolve_name(config), trl.ModelConfig, trl.DatasetMixtureConfig)
    trainer = pkgutil.resolve_name(path)
    if script == "dpo":
        *parsed, watching = parse_flags((*kinds, WatchArguments), script, arguments)
        trainer = functools.partial(trainer, **watching.for_trainer(parsed[1]))
    else:
        parsed = [*parse_flags(kinds, script, arguments)]
    out = Path(parsed[1].output_dir)
    module = importlib.import_module(f"trl.scripts.{script}")
    original = getattr(trl, name)
    setattr(trl, name, trainer)
    try:
        module.main(*parsed)
    finally:
        setattr(trl, name, original)
        with contextlib.suppress(OSError):  # Trainer makes the folder before it looks at the data
            out.rmdir()  # only an empty one


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

    def refuse(message: str) -> None:
        raise ValueError(message)

    parser = trl.TrlParser(kinds, prog=f"hf-iclr {command}")
    parser.error = refuse  # instead of hundreds of flags and an end of the process
    try:
        return parser.parse_args_and_config(arguments)
    except yaml.YAMLError as error:
        raise ValueError(f"Expected a file in YAML or JSON. {error}") from error
