"""
Does causal tracing choose better layers to edit than the rule by depth? SmolLM2, CounterFact facts that it knows.

    python benchmarks/alphaedit_layers.py --data DIR

Causal tracing as https://huggingface.co/papers/2202.05262 has it, with windows of as many layers as are edited: noise
of three standard deviations is put on the subject's embeddings, the outputs of a window's MLPs at the subject's last
token are put back to what they were, and the gain is how much more likely that makes the known answer. "trace" edits
the window with the largest mean gain over the very facts that are edited, "auto" those of
`AlphaEditConfig(layers="auto")`. Each set of facts is edited by both, and by further windows that stand for what
tracing thinks less of. DIR is that of benchmarks/alphaedit.py; without it the facts are the package's capitals.
"""

import argparse
from pathlib import Path
from typing import Any

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, help="folder with the data; left out: the project's own facts")
    parser.add_argument("--facts", type=int, default=16, help="of a set")
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--windows", type=int, nargs="*", default=[10, 16], help="first layers of further windows")
    parser.add_argument("--tokens", type=int, default=20_000, help="of text for the statistics")
    return parse(parser, facts=2, sets=1, windows=[], tokens=1500)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch
from datasets import Dataset

from common.edit_data import load_edit_data
from common.report import print_table
from hf_iclr import AlphaEditConfig, AlphaEditor, EditRequest, KeyStatistics
from hf_iclr.editors.alpha_edit import evaluate_edits, perplexity, score_edits
from hf_iclr.editors.alpha_edit.projections import DownProjection, capture, choose_layers, find_down_projections
from hf_iclr.editors.alpha_edit.rows import encode_request
from hf_iclr.models import pad_rows
from hf_iclr.tour.demo.language_model import load_demo_model


@torch.no_grad()
def trace(
    model: Any, tokenizer: Any, projections: list[DownProjection], facts: list[EditRequest], width: int
) -> list[float]:
    """The mean gain of each window of layers, by its first layer; the answer is what the model says untouched."""
    rows = [encode_request(tokenizer, fact.prompt, fact.subject) for fact in facts]
    begins = [len(tokenizer(fact.prompt.partition("{}")[0].rstrip())["input_ids"]) for fact in facts]
    batch, lines = pad_rows([row.ids for row in rows]), torch.arange(len(rows))
    subject, last = (torch.tensor([get(row) for row in rows]) for get in (lambda r: r.subject, lambda r: r.start - 1))
    with capture({p.index: (p.module, "output") for p in projections}) as clean:
        logits = model(**batch, use_cache=False).logits
    answer = logits[lines, last].argmax(1)
    embedding = model.get_input_embeddings()
    noise = torch.randn(*batch["input_ids"].shape, embedding.weight.shape[1], generator=torch.manual_seed(0))
    place = torch.arange(noise.shape[1])
    inside = (place >= torch.tensor(begins)[:, None]) & (place <= subject[:, None])
    noise *= 3 * embedding.weight.std() * inside[..., None]

    def probability(window: list[DownProjection]) -> float:
        def put_back(index: int) -> Any:
            return lambda _, __, output: output.index_put((lines, subject), clean[index][lines, subject])

        hooks = [embedding.register_forward_hook(lambda _, __, output: output + noise)]
        hooks += [p.module.register_forward_hook(put_back(p.index)) for p in window]
        try:
            changed = model(**batch, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        return changed[lines, last].softmax(1)[lines, answer].mean().item()

    nothing = probability([])
    return [probability(projections[first : first + width]) - nothing for first in range(len(projections) - width + 1)]


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(torch.float32)
    data = load_edit_data(args.data)
    scores = score_edits(model, tokenizer, data.facts[: 2 * args.sets * args.facts], progress=False)
    scores = scores[scores.kind == "rewrite"]
    known = {*scores.request[scores.nll_true < scores.nll_new]}
    facts = [fact for fact in data.facts if fact.id in known][: args.sets * args.facts]
    sets = [facts[first : first + args.facts] for first in range(0, len(facts), args.facts)]
    projections = find_down_projections(model)
    auto = [p.index for p in choose_layers(projections, "auto")]
    gains = [trace(model, tokenizer, projections, some, len(auto)) for some in sets]
    for gain in gains:
        print("gain by first layer: " + " ".join(f"{value:.3f}" for value in gain), flush=True)
    traced = [max(range(len(gain)), key=gain.__getitem__) for gain in gains]
    windows = {first: [*range(first, first + len(auto))] for first in {auto[0], *traced, *args.windows}}
    texts, general = data.sentences[:24], Dataset.from_dict({"text": data.sentences[24:]})
    layers = sorted({layer for window in windows.values() for layer in window})
    statistics = KeyStatistics.from_dataset(
        model, tokenizer, general, layers=layers, max_tokens=args.tokens, max_length=96, batch_size=32, progress=False
    )
    before, rows = perplexity(model, tokenizer, texts, max_length=96, progress=False), []
    for number, (some, gain) in enumerate(zip(sets, gains, strict=True)):
        for first, window in sorted(windows.items()):
            config = AlphaEditConfig(layers=window, num_contexts=1, kl_factor=0.0)
            editor = AlphaEditor(model, tokenizer, config, statistics)
            report = editor.edit(some, progress=False).to_pandas()
            found = evaluate_edits(model, tokenizer, some, progress=False)
            drift = perplexity(model, tokenizer, texts, max_length=96, progress=False) / before - 1
            editor.undo()
            name = " and ".join(["auto"] * (first == auto[0]) + ["trace"] * (first == traced[number]))
            measured = [float(found[name]) for name in ("efficacy", "generalisation", "specificity")]
            rows.append(
                [number, f"{first} to {window[-1]}", name, gain[first], report.p_after.mean(), *measured, drift]
            )
    head = ["set", "layers", "", "gain", "p after", "efficacy", "generalisation", "specificity", "perplexity"]
    print_table(head, rows)
    write_json(args.out / "layers.json", [dict(zip(head, row, strict=True)) for row in rows])


if __name__ == "__main__":
    main(ARGUMENTS)
