"""An audit that was killed goes on where it was and finds the same; its folder is looked at first."""

import json

import pytest

from hf_iclr import audit_safety
from hf_iclr.trainers.safety_audit.asking.journal import Journal
from hf_iclr.trainers.safety_audit.report import SafetyReport
from tests.trainers.distributed import run_in_two
from tests.trainers.safety_audit.test_audit import ANSWERS, HARMLESS, PROMPTS, odd, tiny_llama


CALL = {
    "harmless_prompts": HARMLESS, "answers": ANSWERS, "judge": odd, "attacks": ["prefill", "decoding", "rap", "gcg"],
    "decoding_grid": [{"temperature": 2.0}], "ks": (0, 1, 2), "max_new_tokens": 3, "batch_size": 2, "gcg_steps": 1,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("few_candidates")


class Killed(BaseException):
    """What no code catches."""


def audit(tokenizer, out, limit=None, model=None, **more):
    """An audit that ends by a kill after `limit` forwards; how many there were, and the report."""
    model, count = model or tiny_llama(0), [0]

    def count_forwards(*_):
        count[0] += 1
        if count[0] == limit:
            raise Killed

    handles = [each.register_forward_pre_hook(count_forwards) for each in (model, more["before"]) if each]
    try:
        return count, audit_safety(model, tokenizer, PROMPTS, out=out, **{**CALL, **more})
    except Killed:
        return count, None
    finally:
        for handle in handles:
            handle.remove()


def test_a_killed_audit_goes_on(word_tokenizer, tmp_path):
    others = {"before": tiny_llama(1), "base": tiny_llama(2)}
    (forwards,), whole = audit(word_tokenizer, tmp_path / "whole", **others)
    assert not (tmp_path / "whole" / "unfinished").exists()
    for limit in range(9, forwards, forwards // 3):
        out = tmp_path / str(limit)
        assert audit(word_tokenizer, out, limit, **others)[1] is None
        assert (out / "unfinished" / "0.jsonl").exists() and not (out / "report.json").exists()
        with (out / "unfinished" / "0.jsonl").open("a") as file:
            file.write('{"stage": "cut in the mid')
        assert audit(word_tokenizer, out, 3, **others)[1] is None or forwards - limit < 9
        spent, again = audit(word_tokenizer, out, **others)
        assert again == whole and spent[0] < forwards - limit // 2
        assert (out / "report.json").read_bytes() == (tmp_path / "whole" / "report.json").read_bytes()
        assert sorted(path.name for path in out.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_what_is_kept_is_of_the_same_weights_and_settings(word_tokenizer, tmp_path):
    for change in ({"max_new_tokens": 4}, {"model": tiny_llama(1)}):
        audit(word_tokenizer, tmp_path / "out", 30, before=None)
        _, report = audit(word_tokenizer, tmp_path / "out", before=None, **change)
        fresh = audit(word_tokenizer, tmp_path / "fresh", before=None, **change)[1]
        assert report == fresh and not (tmp_path / "out" / "unfinished").exists()


def test_two_processes_share_the_prompts(word_tokenizer, tmp_path):
    _, alone = audit(word_tokenizer, None, before=None)

    def share():
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        (count,), report = audit(word_tokenizer, tmp_path / "out", before=None, accelerator=accelerator)
        return count, report

    (first, report), (second, other) = run_in_two(share, tmp_path)
    assert report == other == alone and SafetyReport.load(tmp_path / "out").to_frame().equals(alone.to_frame())
    (everything,), _ = audit(word_tokenizer, None, before=None)
    assert max(first, second) < 0.8 * everything
    assert not (tmp_path / "out" / "unfinished").exists()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("file", "file is a file"),
        ("file/below", "file is a file"),
        ("json", "report.json is a folder"),
        ("html", "report.html is a folder"),
        ("begun", "unfinished to be a folder, got a file"),
        ("dead", "dead is a dead link"),
    ],
)
def test_the_folder_is_looked_at_before_any_work(word_tokenizer, tmp_path, place, words):
    (tmp_path / "file").write_text("mine")
    for name in ("json", "html"):
        (tmp_path / name / f"report.{name}").mkdir(parents=True)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "unfinished").write_text("")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    out = tmp_path / place
    model = tiny_llama(0)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(ValueError, match=words):
        audit_safety(model, word_tokenizer, PROMPTS, out=out)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_has_one_audit_at_a_time(tmp_path):
    first, second = Journal(tmp_path), Journal(tmp_path)
    with first.keep(), pytest.raises(ValueError, match="another audit is writing"), second.keep():
        pass
    with second.keep():
        pass


def test_a_failed_audit_leaves_nothing(word_tokenizer, tmp_path):
    def broken(*_):
        raise RuntimeError

    model = tiny_llama(0)
    model.register_forward_pre_hook(broken)
    with pytest.raises(RuntimeError):
        audit_safety(model, word_tokenizer, PROMPTS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_journal_is_named(tmp_path):
    (tmp_path / "unfinished").mkdir()
    for line in ("no JSON", json.dumps({"stage": "a"}), json.dumps({"stage": "a", "rows": [["x", 1]]})):
        (tmp_path / "unfinished" / "0.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match=r"0\.jsonl|invalid literal"), Journal(tmp_path).keep():
            pass
