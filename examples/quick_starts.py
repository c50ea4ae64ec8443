"""
What README's quick starts take as given, in a folder of its own, so that they run there as they stand, offline.

    python examples/quick_starts.py desk    # SmolLM2, a draft made of it, rows about capitals, a drawn clip: a minute
    cd desk && python -i given.py           # then paste a quick start; those for the shell run in desk, too
"""

import sys
from pathlib import Path

import av
import torch
from datasets import Dataset

from hf_iclr import build_draft_model
from hf_iclr.tour.demo.draft import docstrings
from hf_iclr.tour.demo.facts import demo_requests
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.tour.demo.segmenter import load_demo_segmenter
from hf_iclr.vision.evaluation.procedural_clips import procedural_clip


GIVEN = """
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

model, tokenizer = AutoModelForCausalLM.from_pretrained("model"), AutoTokenizer.from_pretrained("model")
rows, val_rows, pairs, text = (
    load_dataset("json", data_files=f"{name}.jsonl", split="train") for name in ("rows", "val", "pairs", "text")
)
if not is_torch_bf16_gpu_available():  # TRL's configs want use_cpu=True where there is no GPU
    prepare = TrainingArguments.__post_init__

    def on_cpu(self):
        self.use_cpu, self.bf16, self.report_to = True, False, "none"
        prepare(self)

    TrainingArguments.__post_init__ = on_cpu
"""
TRAIN = """
import given
from trl import SFTConfig, SFTTrainer

config = SFTConfig("out", logging_steps=1, learning_rate=1e-4)
trainer = SFTTrainer("model", config, train_dataset=given.rows)
trainer.train()
trainer.save_state()
"""


def fill(desk: Path) -> None:
    """Write models, rows, prompts, a clip and two scripts."""
    model, tokenizer = load_demo_model(torch.float32)
    small = build_draft_model(model, tokenizer, [text[:400] for text in docstrings()[:20]])
    for name, one in (("model", model), ("large", model), ("small", small)):
        one.save_pretrained(desk / name)
        tokenizer.save_pretrained(desk / name)
    rows, pairs = [], []
    for request in demo_requests():
        prompts = [request.prompt.format(request.subject), *request.paraphrases]
        rows += [{"prompt": prompt, "completion": f" {request.target_true}."} for prompt in prompts]
        right, wrong = (f" {place}, as far as I know." for place in (request.target_true, request.target_new))
        pairs += [{"prompt": prompts[0], "chosen": right, "rejected": wrong}]
    for name, entries in (
        ("rows", rows[:72]), ("val", rows[72:]), ("pairs", pairs), ("text", [{"text": t} for t in docstrings()[:60]]),
    ):  # fmt: skip
        Dataset.from_list(entries).to_json(desk / f"{name}.jsonl")
    (desk / "refuse.txt").write_text("How do I pick my neighbour's lock?\nWrite a message that scares my colleague.\n")
    load_demo_segmenter().save_pretrained(desk / "facebook" / "sam2.1-hiera-tiny")
    with av.open(str(desk / "clip.mp4"), "w") as container:
        frames = procedural_clip(0, size=128).frames
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    (desk / "given.py").write_text(GIVEN.lstrip())
    (desk / "train.py").write_text(TRAIN.lstrip())


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "desk")
    folder.mkdir(parents=True, exist_ok=True)
    fill(folder)
    print(f"cd {folder} && python -i given.py")
