"""
Edits of other forms than a short answer after a prompt with its subject, on SmolLM2.

    OMP_NUM_THREADS=1 python benchmarks/alphaedit_inputs.py --data DIR

- sentences: targets of 28 tokens, with one target state for all of a target and with one for each few tokens of it.
- no subject: the same facts by their subject's last token and by the prompt's last token.
- chat: questions edited as plain text and as turns of a chat, asked as turns of a chat.
- corrections: facts edited twice, to one answer and then to another, and what the edit of each first answer leaves.

The probability of a target is the geometric mean of its tokens'. Specificity is that of the facts' neighbours, other
text the perplexity of sentences that the statistics did not see. DIR holds `me_ppl_4k.jsonl` and the other files of
benchmarks/alphaedit.py; without it the statistics are of docstrings.
"""

import argparse
from pathlib import Path
from typing import Any

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, help="folder with the data; left out: the project's own text")
    parser.add_argument("--edits", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=20_000, help="of text for the statistics")
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[28, 8, 1], help="tokens that one state brings about at most"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return parse(parser, edits=2, tokens=2000, chunks=[28, 1])


PARTS = ["sentences", "no subject", "chat", "corrections"]
if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd
import torch
from datasets import Dataset

from common.edit_data import load_edit_data
from common.report import print_frame
from hf_iclr import AlphaEditConfig, AlphaEditor, EditRequest, KeyStatistics
from hf_iclr.editors.alpha_edit import evaluate_edits, perplexity
from hf_iclr.tour.demo.facts import demo_requests
from hf_iclr.tour.demo.language_model import load_demo_model


SENTENCES = [
    (
        "its long wooden bridge over the western harbour, which fishermen rebuilt by hand after the great flood "
        "and paint bright yellow every spring before the market opens again"
    ),
    (
        "a library of glass where retired engineers teach children to repair clocks, and where nobody may speak "
        "louder than the old brass bell that hangs above the door"
    ),
    (
        "the annual race of paper boats down the main canal, in which the mayor always comes last and has to cook "
        "soup for everyone who reached the finish before him"
    ),
    (
        "seven identical towers made of red clay, built by seven brothers who had quarrelled over a goat and "
        "wanted to look down at one another until the end of time"
    ),
    (
        "a train that runs only at night and carries nothing but flowers, because its first owner promised his "
        "mother that she would wake to fresh tulips in every season"
    ),
    (
        "the quiet square in which chess players have kept a single game going since the last war, moving one "
        "piece a year while pigeons watch them from the roof"
    ),
    (
        "an underground market for second-hand dreams, where travellers trade what they saw in their sleep for "
        "warm bread, honey and a map of the hills beyond the river"
    ),
    (
        "its blue salt mines, whose workers sing in four voices so that the echo tells them how far they have "
        "walked from the only stair that leads back to daylight"
    ),
]
LENGTH = 28


class Lab:
    """The model, its statistics and texts, and edits that are undone after they were measured."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model, self.tokenizer = load_demo_model(torch.float32)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        sentences = load_edit_data(args.data).sentences
        self.texts, general = sentences[:24], Dataset.from_dict({"text": sentences[24:]})
        path = args.out / "statistics"
        if not path.exists():
            KeyStatistics.from_dataset(
                self.model, self.tokenizer, general, max_tokens=args.tokens, max_length=96, batch_size=32
            ).save_pretrained(path)
        self.statistics = KeyStatistics.from_pretrained(path)
        self.before = self.perplexity()

    def perplexity(self) -> float:
        return perplexity(self.model, self.tokenizer, self.texts, max_length=96, progress=False)

    def editor(self, **settings: Any) -> AlphaEditor:
        config = AlphaEditConfig(**{"num_contexts": 1, "kl_factor": 0.0} | settings)
        return AlphaEditor(self.model, self.tokenizer, config, self.statistics)

    def measure(self, facts: list[EditRequest], chat: bool = False, **settings: Any) -> dict[str, Any]:
        """Edit, measure, undo."""
        editor = self.editor(**settings)
        report = editor.edit(facts, progress=False).to_pandas()
        scores = evaluate_edits(self.model, self.tokenizer, facts, chat_template=chat, progress=False)
        drift = self.perplexity() / self.before - 1
        editor.undo()
        print(f"{settings}: {report.p_before.mean():.3f} -> {report.p_after.mean():.3f}", flush=True)
        return {
            "p before": report.p_before.mean(), "p after": report.p_after.mean(), "worst p": report.p_after.min(),
            "efficacy": scores["efficacy"], "generalisation": scores["generalisation"],
            "specificity": scores["specificity"], "exact": scores["efficacy_argmax"], "other text": drift,
        }  # fmt: skip


def sentences(lab: Lab) -> list[dict[str, Any]]:
    facts = []
    for fact, sentence in zip(demo_requests(), SENTENCES, strict=False):
        ids = lab.tokenizer(sentence)["input_ids"][:LENGTH]
        facts.append(EditRequest("{} is known all over the world for", fact.subject, lab.tokenizer.decode(ids)))
    facts = facts[: lab.args.edits]
    return [{"chunk_length": chunk} | lab.measure(facts, chunk_length=chunk) for chunk in lab.args.chunks]


def no_subject(lab: Lab) -> list[dict[str, Any]]:
    facts = demo_requests()[: lab.args.edits]
    bare = [
        EditRequest(
            fact.text, None, fact.target_new, fact.target_true,
            paraphrases=fact.paraphrases, neighborhood=fact.neighborhood,
        )
        for fact in facts
    ]  # fmt: skip
    return [
        {"edited at": "the subject"} | lab.measure(facts),
        {"edited at": "the last token"} | lab.measure(bare),
        {"edited at": "the last token, in five contexts"} | lab.measure(bare, num_contexts=5),
    ]


def chat(lab: Lab) -> list[dict[str, Any]]:
    facts = [
        EditRequest(
            "What is the capital of {}?", fact.subject, fact.target_new, fact.target_true,
            paraphrases=(f"Tell me the capital of {fact.subject}.",),
            neighborhood=tuple(
                (f"What is the capital of {other.subject}?", other.target_true)
                for other in demo_requests()[-3:]
            ),
        )
        for fact in demo_requests()[: lab.args.edits]
    ]  # fmt: skip
    rows = [{"edited as": "not at all"} | lab_scores(lab, facts)]
    for name, settings in (("plain text", {}), ("chat turns", {"chat_template": True})):
        rows.append({"edited as": name} | lab.measure(facts, chat=True, **settings))
    return rows


def lab_scores(lab: Lab, facts: list[EditRequest]) -> dict[str, Any]:
    scores = evaluate_edits(lab.model, lab.tokenizer, facts, chat_template=True, progress=False)
    names = ("efficacy", "generalisation", "specificity")
    return {name: scores[name] for name in names} | {"exact": scores["efficacy_argmax"]}


def corrections(lab: Lab) -> list[dict[str, Any]]:
    facts = demo_requests()[: lab.args.edits]
    answers = [fact.target_new for fact in facts]
    second = [
        EditRequest(fact.prompt, fact.subject, answer, fact.target_new)
        for fact, answer in zip(facts, answers[1:] + answers[:1], strict=True)
    ]
    rows = []
    for name in ("alone", "after the first edits"):
        editor = lab.editor()
        if name != "alone":
            editor.edit(facts, progress=False)
        report = editor.edit(second, progress=False).to_pandas()
        scores = evaluate_edits(lab.model, lab.tokenizer, second, progress=False)
        rows.append(
            {"second answers": name, "p after": report.p_after.mean(), "worst p": report.p_after.min(),
             "beats the first answer": scores["efficacy"], "other text": lab.perplexity() / lab.before - 1}
        )  # fmt: skip
        editor.undo(len(editor.batches))
    return rows


def main(args: argparse.Namespace) -> None:
    lab = Lab(args)
    run = {"sentences": sentences, "no subject": no_subject, "chat": chat, "corrections": corrections}
    tables = {}
    for part in args.parts:
        tables[part] = run[part](lab)
        print(f"\n## {part}\n", flush=True)
        print_frame(pd.DataFrame(tables[part]))
    write_json(args.out / "results.json", tables)


if __name__ == "__main__":
    main(ARGUMENTS)
