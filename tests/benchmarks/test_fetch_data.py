"""benchmarks/fetch_data.py keeps a file only when it is the one that was measured with."""

import gzip
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """The script with one file to fetch, from this disk: `bring(content, wanted)` gives exit code and path."""
    spec = importlib.util.spec_from_file_location("fetch_data", ROOT / "benchmarks" / "fetch_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def bring(content: bytes, wanted: bytes, *flags: str, name: str = "rows.jsonl", **about: str):
        (tmp_path / "upstream").write_bytes(content)
        row = {"url": (tmp_path / "upstream").as_uri(), "licence": "MIT", "used_by": "a test", **about}
        monkeypatch.setattr(module, "FILES", {name: {**row, "sha256": hashlib.sha256(wanted).hexdigest()}})
        monkeypatch.setattr(sys, "argv", ["fetch_data.py", str(tmp_path / "data"), *flags])
        return module.main(), tmp_path / "data" / name

    bring.module = module
    return bring


def test_what_upstream_has_is_kept_and_not_fetched_twice(fetch):
    code, path = fetch(b"as measured", b"as measured", name="deep/rows.json.gz")
    assert code == 0 and gzip.decompress(path.read_bytes()) == b"as measured"
    assert fetch(b"changed since", b"as measured", name="deep/rows.json.gz")[0] == 0


def test_what_has_changed_is_not_kept(fetch, capsys):
    code, path = fetch(b"changed", b"as measured")
    assert code == 1 and not path.exists() and "is not what was measured with" in capsys.readouterr().out


def test_check_fetches_nothing_and_by_hand_says_what_to_do(fetch, capsys):
    assert fetch(b"x", b"x", "--check")[0] == 1
    assert fetch(b"x", b"x", by_hand="Ask the owner.")[0] == 1
    printed = capsys.readouterr().out
    assert "| missing |" in printed and "missing: Ask the owner." in printed


def test_sentences_and_facts_are_made_of_what_is_fetched(fetch):
    """Of records 12, 13 and 1086 the second was left out and the third comes after the thousand."""
    keys = ("requested_rewrite", "paraphrase_prompts", "neighborhood_prompts", "generation_prompts")
    records = [{"case_id": number, **dict.fromkeys(keys, "é"), "more": 1} for number in (12, 13, 1086)]
    made = fetch.module.counterfact(json.dumps(records).encode()).decode()
    assert made == json.dumps({"case_id": 12, **dict.fromkeys(keys, "é")}, ensure_ascii=False) + "\n"
    sentences = [{"Text": f" s{number} ", "Corpus": "C4"} for number in range(4001)]
    lines = fetch.module.me_ppl(json.dumps(sentences).encode()).decode().splitlines()
    assert len(lines) == 4000 and json.loads(lines[-1]) == {"text": "s3999", "corpus": "C4"}


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_the_files_here_are_those_of_the_table(fetch):
    module = fetch.module
    assert all(module.is_right(DATA / name, row["sha256"]) for name, row in module.FILES.items())
