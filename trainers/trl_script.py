"""TRL's own training scripts with one class swapped: what `hf-iclr sft` and `hf-iclr dpo` run."""

import importlib
import pkgutil

import trl


# Script of TRL -> for each name it imports from trl, the class that takes its place.
SWAPS = {
    "sft": {
        "SFTConfig": "hf_iclr.trainers.deep_safety_config:DeepSafetySFTConfig",
        "SFTTrainer": "hf_iclr.trainers.deep_safety_trainer:DeepSafetySFTTrainer",
    },
    "dpo": {
        "DPOConfig": "hf_iclr.trainers.squeeze_config:SqueezeDPOConfig",
        "DPOTrainer": "hf_iclr.trainers.squeeze_trainer:SqueezeDPOTrainer",
    },
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
    module = importlib.import_module(f"trl.scripts.{script}")
    originals = {name: getattr(trl, name) for name in SWAPS[script]}
    for name, path in SWAPS[script].items():
        setattr(trl, name, pkgutil.resolve_name(path))
    try:
        parser = module.make_parser(prog=f"hf-iclr {script}")
        module.main(*parser.parse_args_and_config(arguments))
    finally:
        for name, original in originals.items():
            setattr(trl, name, original)
