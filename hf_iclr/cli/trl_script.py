"""TRL's own training scripts with one class swapped: what `hf-iclr sft` and `hf-iclr dpo` run."""

import importlib
import pkgutil

import trl


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
        ValueError: if the config file holds a name that is no setting.
    """
    config, name, trainer = SWAPS[script]
    dataclasses = (trl.ScriptArguments, pkgutil.resolve_name(config), trl.ModelConfig, trl.DatasetMixtureConfig)
    parsed = trl.TrlParser(dataclasses, prog=f"hf-iclr {script}").parse_args_and_config(arguments)
    module = importlib.import_module(f"trl.scripts.{script}")
    original = getattr(trl, name)
    setattr(trl, name, pkgutil.resolve_name(trainer))
    try:
        module.main(*parsed)
    finally:
        setattr(trl, name, original)
