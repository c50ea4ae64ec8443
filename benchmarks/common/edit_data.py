"""Facts to edit and text to keep: CounterFact and its companions from a folder, else what the package has."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from common.arguments import find_data
from hf_iclr import EditRequest
from hf_iclr.editors.alpha_edit import edit_requests
from hf_iclr.tour.demo.facts import demo_requests, demo_text


class EditData(NamedTuple):
    """Facts, sentences to keep, and texts of another source."""

    facts: list[EditRequest]
    sentences: list[str]
    other_texts: list[str]


def load_edit_data(folder: Path | None) -> EditData:
    """
    Args:
        folder (`Path`, *optional*):
            With `counterfact_1k.jsonl` (ROME layout), `me_ppl_4k.jsonl` and `wikitext2_valid_detok.jsonl`. Left out,
            the facts are the package's capitals, the sentences docstrings, and the other texts the facts as they are.
    """
    if folder is None:
        facts = demo_requests()
        return EditData(facts, list(demo_text()["text"]), [f"{fact.text} {fact.target_true}." for fact in facts])
    sentences = [row["text"] for row in _read(folder, "me_ppl_4k.jsonl")]
    others = [row["text"] for row in _read(folder, "wikitext2_valid_detok.jsonl")]
    return EditData(edit_requests(_read(folder, "counterfact_1k.jsonl")), sentences, others)


def _read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in find_data(folder, name).read_text(encoding="utf-8").splitlines()]
