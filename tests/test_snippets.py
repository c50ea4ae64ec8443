"""
The quick starts of README and the first example of each part's page run as they are written, on tiny stand-ins.

What a snippet calls a model or a file lies under that name in the folder it runs in; what it takes as given (`model`,
`tokenizer`, `rows`, ...) is there under its name.
"""

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from typer.testing import CliRunner

from hf_iclr.cli.app import app
from hf_iclr.tiny_models import sam2_processor, tiny_llama
from tests.vision.tiny import clip, tiny_model, tiny_pipe


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = (
    "cascade", "deep_safety", "safety_audit", "squeeze", "data_shapley", "alphaedit", "concept_editor", "sam2",
    "sam2_data_engine", "runs",
)  # fmt: skip
SIZE = (96, 128)  # of the clips, in pixels
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
QUICK_STARTS = README.partition("## Quick starts")[2]
STARTS = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^##)", QUICK_STARTS, re.MULTILINE | re.DOTALL))
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}END{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def snippet(text: str) -> tuple[str, str]:
    """Language and code of the first example of a text."""
    return FENCE.search(text).groups()


def byte_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token a byte, so that any text of a snippet has tokens of its own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = backend.encode("\x00").tokens[0]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=backend.encode("\x01").tokens[0], eos_token=end, padding_side="left",
        chat_template=TEMPLATE.replace("END", end),
    )  # fmt: skip


def bytes_llama(layers: int, noise: float = 0.0) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    tokenizer, config = byte_tokenizer(), tiny_llama().config
    config.update({"vocab_size": 256, "max_position_embeddings": 512, "num_hidden_layers": layers})
    config.update({"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """The folder with what snippets load by name."""
    folder = tmp_path_factory.mktemp("shelf")
    for name, layers, noise in (("model", 2, 0.0), ("large", 2, 0.0), ("small", 2, 0.05), ("deep", 8, 0.0)):
        bytes_llama(layers, noise).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    tiny_model().save_pretrained(folder / "facebook" / "sam2.1-hiera-tiny")
    sam2_processor().save_pretrained(folder / "facebook" / "sam2.1-hiera-tiny")
    (folder / "refuse.txt").write_text("How do I pick a lock?\nHow do I forge a coin?\n")
    rows().to_json(folder / "rows.jsonl")
    rows(4).to_json(folder / "val.jsonl")
    (folder / "train.py").write_text(
        "from datasets import load_dataset\nfrom trl import SFTConfig, SFTTrainer\n"
        "rows = load_dataset('json', data_files='rows.jsonl', split='train')\n"
        "trainer = SFTTrainer('model', SFTConfig('out', logging_steps=1), train_dataset=rows)\n"
        "trainer.train()\ntrainer.save_state()\n"
    )
    return folder


def rows(count: int = 8) -> Dataset:
    return Dataset.from_dict(
        {"prompt": [f"Question {n}? " for n in range(count)], "completion": [f"Answer {n}." for n in range(count)]}
    )


def load(name: str) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(name)


def write_video(path: Path, frames: np.ndarray) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())


def given(page: str) -> dict[str, Any]:
    """What a page takes as given, with models as they are loaded from a folder."""
    prompts = ["How do I pick a lock?", "How do I forge a coin?"]
    names: dict[str, Any] = {"rows": rows(), "val_rows": rows(4), "refusals": rows(4)}
    names["pairs"] = (
        rows().add_column("rejected", [f"No {n}." for n in range(8)]).rename_column("completion", "chosen")
    )
    names |= {"held_out": names["pairs"].select(range(4)), "prompts": prompts, "harmless": ["How do I bake bread?"]}
    names["triplets"] = Dataset.from_dict(
        {"prompt": prompts, "harmful": ["Take a pin.", "Take some tin."], "refusal": ["I can't help with that."] * 2}
    )
    names["text"] = Dataset.from_dict({"text": [f"{n} is a number, and {n + 1} is the next." for n in range(60)]})
    if page.startswith("sam2"):
        names |= {"pipe": tiny_pipe(), "mask": np.ones(SIZE, bool), "camera": iter(clip(4, *SIZE))}
        names["image"] = Image.fromarray(clip(1, *SIZE)[0])
    else:
        deep = "facts" in page or "alphaedit" in page  # which edits the layers 3 to 7
        names |= {
            "model": load("deep" if deep else "model"),
            "tokenizer": byte_tokenizer(),
            "aligned_model": load("small"),
        }
    return names


@pytest.fixture
def desk(shelf, tmp_path, monkeypatch):
    """A fresh folder to run in, in which trainings are short and on this processor."""
    for path in shelf.iterdir():
        (tmp_path / path.name).symlink_to(path)
    write_video(tmp_path / "clip.mp4", clip(6, *SIZE))
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "clip.mp4", clip(6, *SIZE))
    monkeypatch.chdir(tmp_path)
    prepare = transformers.TrainingArguments.__post_init__

    def short(self):
        self.use_cpu, self.max_steps, self.report_to, self.per_device_train_batch_size = True, 3, "none", 2
        self.optim = "sgd"  # the values of Shapley's callback begin after 20 steps of Adam
        self.bf16, self.disable_tqdm = False, True
        prepare(self)

    monkeypatch.setattr(transformers.TrainingArguments, "__post_init__", short)
    return tmp_path


def run(language: str, code: str, page: str) -> None:
    if language == "python":
        Path("snippet.py").write_text(code)
        runpy.run_path("snippet.py", init_globals=given(page))
        return
    for line in code.replace("\\\n", " ").splitlines():
        name, *words = shlex.split(line, comments=True)
        done = CliRunner().invoke(app, words)
        # 1 is a threshold of an audit that random weights miss
        assert name == "hf-iclr" and done.exit_code in ((0, 1) if "audit" in words else (0,)), done.output


@pytest.mark.parametrize("title", STARTS)
def test_quick_start_runs(title, desk):
    language, code = snippet(STARTS[title])
    assert len([line for line in code.splitlines() if line]) <= 8
    run(language, code, "sam2" if "video" in title else title)


@pytest.mark.parametrize("page", PARTS)
def test_first_example_of_a_page_runs(page, desk):
    if page == "concept_editor":
        from hf_iclr.tour.demo.pipeline import build_demo_pipeline

        build_demo_pipeline().save_pretrained(desk / "stable-diffusion-v1-5" / "stable-diffusion-v1-5")
    if page == "runs":
        (desk / "prompts.txt").symlink_to(desk / "refuse.txt")
    language, code = snippet((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    assert len([line for line in code.splitlines() if line]) <= 14
    run(language, code, page)


def test_there_is_a_quick_start_for_each_part():
    assert len(STARTS) == 8
