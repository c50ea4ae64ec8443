"""Logs of runs that are over: ours, TRL's and the authors'; whole, cut and odd."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from hf_iclr.trainers.squeeze.report import write_squeeze_report
from hf_iclr.trainers.squeeze.warning import read_log, replay_log
from tests.trainers.squeeze.test_warning import FALLS, RULE, entries


CURVES = Path(__file__).parents[4] / "shared" / "data" / "preference"
LOG = entries(FALLS)


def official(log):
    """The authors' rows: sums over 50 tokens."""
    return [
        {"logps_eval_prob_train/chosen": 50 * entry["probe/chosen/logp"], "argmax_prob_logits": -50.0, "step": None}
        for entry in log
    ]


def lines(rows):
    return "".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows)


def test_by_hand():
    (row,) = replay_log(LOG, **RULE).itertuples(index=False)
    assert (row.watched, row.evaluations, row.highest_at, row.alarm) == ("probe", 6, 10, 40)
    assert row.fall == pytest.approx(0.5)
    assert replay_log(LOG, delta=0.55)["alarm"].tolist() == [None]


def test_every_form_of_file_says_the_same(tmp_path):
    state = tmp_path / "out" / "checkpoint-50" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"global_step": 50, "log_history": LOG}, indent=2))
    (history := tmp_path / "history.json").write_text(json.dumps(LOG))
    (plain := tmp_path / "metrics.json").write_text(lines(official(LOG)))
    (packed := tmp_path / "metrics.json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    for source in (state, state.parent, str(tmp_path / "out"), history):
        assert replay_log(source, **RULE).equals(replay_log(LOG, **RULE))
    for source in (plain, packed):
        (row,) = replay_log(source, **RULE).itertuples(index=False)
        assert (row.highest_at, row.alarm) == (1, 4) and row.fall == pytest.approx(0.5)
    assert replay_log(plain, tokens_per_answer=5000, **RULE)["alarm"].tolist() == [None]


def test_a_run_of_trl_alone():
    """Evaluated as sums over the answer's 20 tokens; a train log of another batch says nothing."""
    log = [
        {"step": step, "eval_logps/chosen": 20 * value, "eval_logps/rejected": -9.0}
        for step, value in enumerate(FALLS)
    ]
    (row,) = replay_log([*log, {"step": 9, "logps/chosen": -999.0}], 20, **RULE).itertuples(index=False)
    assert (row.watched, row.alarm) == ("eval", 4) and row.fall == pytest.approx(0.5)


@pytest.mark.parametrize("packed", [False, True])
def test_a_half_written_last_line_loses_only_itself(tmp_path, caplog, packed):
    data = lines(official(LOG)).encode()
    data = gzip.compress(data, 0)[:-30] if packed else data[:-20]  # stored blocks: cuts the last line and the checksum
    (path := tmp_path / "cut").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert len(read_log(path)) == 5
    assert "Line 6 of" in caplog.text


def test_restarts_in_one_file(tmp_path, caplog):
    """The first run was cut within its second line, and the next one went on there."""
    rows = lines(official(LOG)).splitlines()
    path = tmp_path / "restarted.json"
    path.write_text(rows[0] + "\n" + rows[1][:20] + rows[0] + "\n" + "\n".join(rows[1:]) + "\n" + rows[0])
    with caplog.at_level(logging.WARNING):
        assert len(read_log(path)) == 6
    assert "Line 2 of" in caplog.text and "3 runs one after the other, of 1, 6, 1 evaluations" in caplog.text


def test_the_authors_curves():
    """See docs/squeeze_theory.md."""
    if not CURVES.exists():
        pytest.skip(f"The authors' curves are not in {CURVES}.")
    for name, delta in (("pythia410m", 0.1), ("qwen05", 0.2)):
        table = replay_log(CURVES / f"refcurve_{name}_baseline_dpo_checkbug_5e7.json.gz", delta=delta)
        (row,) = table[table["watched"] == "probe"].itertuples(index=False)
        assert row.alarm is not None and row.alarm > row.highest_at
    assert len(read_log(CURVES / "refcurve_baseline_sft_qwen05_ep8.json.gz")) == 1  # four times the first evaluation


ODD = {
    "7": "got 7",
    "null": "got None",
    "[]": "got none: nothing was logged",
    '[{"step": 1}, 3]': "got 3",
    '{"log_history": "x"}': "'x'",
}


@pytest.mark.parametrize("text", ODD)
def test_odd_json(tmp_path, text):
    (path := tmp_path / "odd.json").write_text(text)
    with pytest.raises(ValueError, match=f"Expected log entries.* in .*{ODD[text]}"):
        read_log(path)


@pytest.mark.parametrize("step", ["x", None, [1]])
def test_a_step_that_is_none(step):
    with pytest.raises(ValueError, match="The step of a log entry should be a whole number"):
        replay_log([*LOG, {"step": step, "probe/chosen/logp": -1.0}])


@pytest.mark.parametrize("read", [replay_log, lambda log: write_squeeze_report(log, "never")])
@pytest.mark.parametrize(
    ("log", "message"),
    [
        (None, "got None"),
        (["a"], "each a dictionary, got 'a'"),
        ({"log_history": LOG}, r"Type `state\['log_history'\]`"),
    ],
)
def test_no_list_of_entries(read, log, message):
    with pytest.raises(TypeError, match=message):
        read(log)


def test_bad_logs(tmp_path):
    (deep := tmp_path / "deep.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(ValueError, match="nested too deep to read"):
        read_log(deep)
    with pytest.raises(ValueError, match="in 1 log entries, found none"):
        replay_log([{"loss": 1.0, "step": 1}])
    with pytest.raises(ValueError, match="tokens_per_answer must be positive, got 0"):
        replay_log(LOG, tokens_per_answer=0)
    with pytest.raises(ValueError, match="got no such file"):
        read_log(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="or its checkpoints, got none"):
        read_log(tmp_path)
    (path := tmp_path / "notes.txt").write_text("no\njson\n")
    with pytest.raises(ValueError, match="Expected a JSON object on line 1 of .*notes.txt, got 'no'"):
        read_log(path)
    path.write_bytes(b"\x1f\x8bno gzip at all")
    with pytest.raises(ValueError, match="Expected a whole gzip file"):
        read_log(path)
    path.write_text("")
    with pytest.raises(ValueError, match="Expected log entries"):
        read_log(path)
