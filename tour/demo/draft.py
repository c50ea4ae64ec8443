"""A draft of the demo model, made of texts that every installation has: docstrings and the model's own answers."""

import ast
import importlib.util
import logging
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_iclr.generation.drafting.draft_model import build_draft_model
from hf_iclr.generation.drafting.teacher import sample_texts
from hf_iclr.generation.modeling_draft import DraftForCausalLM, FeatureDraftForCausalLM

from .language_model import demo_model_path, fastest_dtype, load_demo_model


logger = logging.getLogger(__name__)

# What to build a draft from: seconds for the tour, ten minutes of one quiet core for the rest.
SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {"num_docstrings": 12, "num_samples": 0, "distill_steps": 10},
    "full": {"num_docstrings": 60, "num_samples": 192, "distill_steps": 300},
}

# fmt: off
TOPICS = (
    "photosynthesis", "the French Revolution", "a bicycle", "black holes", "baking bread", "learning the guitar",
    "volcanoes", "a job interview", "machine learning", "the human heart", "growing tomatoes",
    "a household budget", "the Roman Empire", "recycling", "sleep", "running a marathon", "a first aid kit",
    "public speaking", "whales", "the water cycle", "chess", "a good essay", "electric cars", "coffee",
    "climate change", "a garden in spring", "the stock market", "time management", "vaccines", "Shakespeare",
    "sorting a list in Python", "the moon", "dogs", "a birthday party", "a healthy breakfast", "the Internet",
    "ancient Egypt", "a visit to a museum", "stress", "friendship",
)
# fmt: on
TASKS = (
    "What is {topic}?",
    "Write a short story about {topic}.",
    "Give three tips about {topic}.",
    "Explain {topic} to a child.",
    "List five facts about {topic}.",
    "Write a poem about {topic}.",
    "Why does {topic} matter?",
    "How does one get started with {topic}?",
    "Write an email to a friend about {topic}.",
    "Summarize what people should know about {topic}.",
    "What are common mistakes with {topic}?",
    "Write a dialogue between two people about {topic}.",
    "Write a quiz question about {topic} with its answer.",
    "Describe {topic} in one paragraph.",
)


def load_demo_draft(setting: str = "full", dtype: torch.dtype = torch.bfloat16) -> FeatureDraftForCausalLM:
    """
    Load a draft of the demo model, built on first use and kept beside it.

    Args:
        setting (`str`, *optional*, defaults to `"full"`):
            `"quick"` (under a minute, for the tour) or `"full"` (about ten minutes). With `"quick"` a full draft is
            taken if there is one.
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`):
            Type of the weights.

    Returns:
        [`FeatureDraftForCausalLM`]: in evaluation mode.

    Raises:
        ValueError: if there is no such setting.
    """
    if setting not in SETTINGS:
        raise ValueError(f"Expected `setting` to be one of {', '.join(SETTINGS)}, got {setting!r}.")
    path, full_path = (
        demo_model_path().with_name(f"{demo_model_path().name}-feature-draft-{s}") for s in (setting, "full")
    )
    path = full_path if full_path.exists() else path
    if not path.exists():
        logger.info("Building a draft of the demo model in %s (once).", path)
        _save(build_demo_draft(setting), path)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True).eval()


def build_demo_draft(setting: str = "full") -> DraftForCausalLM | FeatureDraftForCausalLM:
    """
    Build a draft of the demo model without looking at what is kept.

    Args:
        setting (`str`, *optional*, defaults to `"full"`):
            A key of `SETTINGS`.

    Returns:
        [`FeatureDraftForCausalLM`]: in float32.
    """
    model, tokenizer = load_demo_model(torch.float32)  # faster than bfloat16 for long inputs on most processors
    chosen = SETTINGS[setting]
    texts: list[str | dict[str, str]] = [*docstrings()[: chosen["num_docstrings"]]]
    if chosen["num_samples"]:
        writer, _ = load_demo_model(fastest_dtype(32))  # its rows at a time
        texts += sample_texts(writer, tokenizer, demo_prompts()[: chosen["num_samples"]])
    return build_draft_model(model, tokenizer, texts, kind="features", distill_steps=chosen["distill_steps"])


def demo_prompts() -> list[str]:
    """All tasks about all topics, shuffled, always the same way."""
    prompts = [task.format(topic=topic) for task in TASKS for topic in TOPICS]
    random.Random(0).shuffle(prompts)
    return prompts


def docstrings(packages: tuple[str, ...] = ("transformers.generation", "torch.nn.modules")) -> list[str]:
    """
    Docstrings of 400 characters and more, shuffled, always the same way.

    Args:
        packages (`tuple[str]`, *optional*, defaults to `("transformers.generation", "torch.nn.modules")`):
            Whose files to read; nothing in them is run.

    Returns:
        `list[str]`.
    """
    texts = set()
    for package in packages:
        root, *inner = package.split(".")
        spec = importlib.util.find_spec(root)
        if spec is None or spec.origin is None:
            raise ValueError(f"Expected an installed package, got {root!r}. Install it or name another.")
        folder = Path(spec.origin).parent.joinpath(*inner)
        for path in folder.glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.FunctionDef | ast.ClassDef)
                    and len(text := ast.get_docstring(node) or "") >= 400
                ):
                    texts.add(text)
    shuffled = sorted(texts)
    random.Random(0).shuffle(shuffled)
    return shuffled


def _save(draft: DraftForCausalLM | FeatureDraftForCausalLM, path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        draft.save_pretrained(folder)
        folder.replace(path)
    except OSError:
        if not path.exists():  # otherwise another process has just put the same folder there
            raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
