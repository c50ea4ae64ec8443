"""
Edit facts in a causal language model, ask, load, undo, ask again. Edits are kept in a folder and added to those in it.

    python examples/alphaedit.py                                        # SmolLM2-135M and a few capitals
    python examples/alphaedit.py --model MODEL --requests facts.jsonl --text text.txt --push user/edits
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_iclr import AlphaEditConfig, AlphaEditor, EditRequest, KeyStatistics
from hf_iclr.tour.demo.facts import demo_requests, demo_text
from hf_iclr.tour.demo.language_model import demo_model_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="repository or folder; left out: SmolLM2-135M-Instruct")
    parser.add_argument("--requests", type=Path, help="JSON lines with prompt, subject and target_new")
    parser.add_argument("--text", type=Path, help="text that must not change, a paragraph a line")
    parser.add_argument("--tokens", type=int, default=10_000, help="of text; 100 per key dimension is a fair number")
    parser.add_argument("--out", default="edits")
    parser.add_argument("--push", help="repository to push the edits to")
    args = parser.parse_args()

    name = args.model or str(demo_model_path())
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(name)
    lines = args.requests.read_text().splitlines() if args.requests else []
    requests = [EditRequest(**json.loads(line)) for line in lines] or demo_requests(6)
    text = Dataset.from_dict({"text": args.text.read_text().splitlines()}) if args.text else demo_text()

    if Path(args.out).exists():
        editor = AlphaEditor.from_pretrained(args.out, model, tokenizer)
    else:
        statistics = KeyStatistics.from_dataset(model, tokenizer, text, max_tokens=args.tokens)
        config = AlphaEditConfig(num_contexts=2, kl_factor=0.0, num_steps=20)
        editor = AlphaEditor(model, tokenizer, config, statistics, folder=args.out)
    print(editor.edit(requests))
    if args.push:
        editor.push_to_hub(args.push)

    prompt = requests[0].text
    edited = pipeline("text-generation", model=args.out)  # loads the base model and the adapter: nothing of ours
    print("edited:", edited(prompt, max_new_tokens=6, do_sample=False)[0]["generated_text"])
    editor = AlphaEditor.from_pretrained(args.out)
    editor.undo()
    plain = pipeline("text-generation", model=editor.model, tokenizer=tokenizer)
    print("undone:", plain(prompt, max_new_tokens=6, do_sample=False)[0]["generated_text"])


if __name__ == "__main__":
    main()
