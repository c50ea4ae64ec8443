"""
Two editors keep one folder and are killed at random moments, again and again: is what they reported in the ledger, and
is the adapter what the ledger says?

    python benchmarks/edit_kills.py --kills 1000
"""

import argparse
import gc
import json
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from common.arguments import add_kills, make_parser, parse


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    add_kills(parser, 1000)
    parser.add_argument("--seconds", type=float, default=3.0, help="longest time that two editors work")
    return parse(parser, kills=10)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tiny model is that of the tests

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tqdm.auto import tqdm

from common.report import print_table
from hf_iclr import AlphaEditor, EditRequest
from hf_iclr.editors.alpha_edit.batches import ADAPTER, EditBatch
from hf_iclr.editors.records.ledger import batches_of, committed_events
from hf_iclr.tiny_models import word_tokenizer
from tests.editors.tiny import quick_config, tiny_model, tiny_statistics


LAYERS = [1, 2]


def work(editor: AlphaEditor, pipe: int, seed: int) -> None:
    """Edit and undo until killed; each thing done is told in one write."""
    tqdm.set_lock(threading.RLock())  # its own is of all forks, and stays taken when the one that has it is killed
    draw, parent = random.Random(seed), os.getppid()
    while os.getppid() == parent:
        try:
            if len(editor.batches) > 12 or draw.random() < 0.3 and editor.batches:
                told = ["undo", *editor.undo(draw.randint(1, min(4, len(editor.batches))))]
            else:
                words = [f"w{draw.randrange(1, 50)}" for _ in range(3)]  # w0 stands for what is no word
                asked = EditRequest(f"{words[0]} {{}}", words[1], words[2], id=f"{seed}-{draw.random()}")
                told = ["edit", editor.edit([asked], progress=False).edits[0]["id"]]
        except ValueError:  # the other has made the last batch since
            continue
        os.write(pipe, (json.dumps(told) + "\n").encode())


def adapter_is_ledger(folder: Path) -> bool | None:
    """By the files alone, before anybody mends anything; `None` while there is no adapter, as its rank grows."""
    if not (folder / "adapter_config.json").exists():
        return None
    tensors = load_file(folder / ADAPTER)
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    batches = [EditBatch.load(folder, record) for record in batches_of(committed_events(folder, ADAPTER))]
    for layer in LAYERS:
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj.lora"
        down, up = tensors[f"{name}_A.weight"], tensors[f"{name}_B.weight"]
        total = torch.zeros(len(up), down.shape[1])
        for batch in batches:
            total += batch.residuals[layer] @ batch.factors[layer]
        if len(down) != rank or not torch.allclose(up @ down, total, rtol=1e-4, atol=1e-6):
            return False
    return True


def main(args: argparse.Namespace) -> None:
    fork, draw, counts = multiprocessing.get_context("fork"), random.Random(args.seed), Counter()
    folder, ids = args.out / f"edits_{os.getpid()}", torch.tensor([[1, 3, 4, 2]])
    model, tokenizer = tiny_model("llama"), word_tokenizer("w0")
    statistics = tiny_statistics(model, tokenizer, layers=LAYERS)
    loaded = AlphaEditor(model, tokenizer, quick_config(num_steps=1), statistics, folder)
    loaded.edit([EditRequest("w1 {}", "w2", "w3")], progress=False)  # what a first edit imports, forks have then
    known = 1
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all that the imports made
    while counts["kills"] < args.kills:
        pipes = [os.pipe() for _ in range(2)]
        workers = [
            fork.Process(target=work, args=(loaded, pipe[1], counts["kills"] + i)) for i, pipe in enumerate(pipes)
        ]
        for worker in workers:
            worker.start()
        for _ in range(2):
            time.sleep(draw.uniform(0, args.seconds / 2))
            worker = workers.pop(draw.randrange(len(workers)))
            counts["ended by itself"] += worker.exitcode is not None
            worker.kill()
            worker.join()
            counts["kills"] += 1
        told = []
        for reading, writing in pipes:
            os.close(writing)
            with os.fdopen(reading) as file:
                told += [json.loads(line) for line in file]
        same = adapter_is_ledger(folder)
        counts["adapter without its configuration"] += same is None
        counts["adapter differs from the ledger"] += same is False
        loaded = AlphaEditor.from_pretrained(folder, model=tiny_model("llama"))
        counts["adapter differs after loading"] += adapter_is_ledger(folder) is not True
        events = committed_events(folder, ADAPTER)
        done = [done_by(events[: number + 1]) for number in range(known, len(events))]
        known = len(events)
        counts["reported"] += len(told)
        counts["reported and lost"] += sum(one not in done for one in told)
        counts["done and not reported"] += len(done) - len(told)
        counts["more than one each not reported"] += len(done) - len(told) > 2
        if counts["kills"] % 50 < 2:
            adapted = PeftModel.from_pretrained(tiny_model("llama"), folder).eval()
            with torch.no_grad():
                apart = (adapted(ids).logits - loaded.model(ids).logits).abs().max().item()
            counts["models differ"] += apart > 1e-3
            counts["models compared"] += 1
        (args.out / "kills.json").write_text(json.dumps(counts, indent=1))
    print_table(["", "count"], [[name, count] for name, count in counts.items()])


def done_by(events: list[dict]) -> list[str]:
    """What its editor reports of the last event."""
    event = events[-1]  # whose last batch is the new one, behind those made anew for a correction
    if event["event"] == "edit":
        return ["edit", event["batches"][-1]["requests"][0]["id"]]
    gone = batches_of(events[:-1])[-event["undone"] :]
    return ["undo", *(request["id"] for batch in gone for request in batch["requests"])]


if __name__ == "__main__":
    main(ARGUMENTS)
