"""When the early warning would have fired, from curves made by hand and from the authors' own."""

import gzip
import json
import logging
import math
from pathlib import Path

import pytest

from benchmarks.common.squeeze_replay import replay
from tests.trainers.squeeze.toy import CURVE, NAMES


CURVES = Path(__file__).parents[3] / "shared" / "data" / "preference"


def test_by_hand():
    found = replay(CURVE)
    assert (found.signal, found.watch, found.squeeze, found.chosen_peak, found.lead) == ("probes", 3, 5, 3, 0)
    assert found.table["share_down"].tolist() == [0, 0.25, 1, 1, 1, 1]
    assert found.table["state"].tolist() == ["OK"] * 3 + ["WATCH"] * 2 + ["SQUEEZE"]
    kept = ("step", "probe/chosen/logp", "probe/chosen/logp_argmax")
    assert replay([{key: entry[key] for key in kept} for entry in CURVE]).signal == "peak"


def test_a_resumed_run_replaces_what_it_repeats():
    whole = replay(CURVE)
    resumed = replay([*CURVE[:5], *CURVE[3:]])
    assert resumed.table.equals(whole.table)


def official(rows, kinds=("chosen", *NAMES)):
    """The authors' rows: sums over 50 tokens."""
    return [
        {f"logps_eval_prob_train/{kind}": 50 * entry[f"probe/{kind}/logp"] for kind in kinds}
        | {"argmax_prob_logits": 50 * entry["probe/chosen/logp_argmax"], "except_argmax_prob_logits": math.nan}
        for entry in rows
    ]


def test_every_form_of_file_says_the_same(tmp_path):
    whole = replay(CURVE)
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"global_step": 5, "log_history": CURVE}, indent=2))
    lines = "".join(json.dumps(row) + "\n" for row in official(CURVE))
    (plain := tmp_path / "metrics.json").write_text(lines)
    (packed := tmp_path / "metrics.json.gz").write_bytes(gzip.compress(lines.encode()))
    history = tmp_path / "history.json"
    history.write_text(json.dumps(CURVE))
    for source in (state, str(plain), packed, history):
        found = replay(source)
        assert (found.watch, found.squeeze, found.chosen_peak) == (whole.watch, whole.squeeze, whole.chosen_peak)
        assert found.table["chosen"].tolist() == pytest.approx(whole.table["chosen"].tolist())
    assert replay(plain, tokens_per_answer=5000).watch is None  # a hundredth of the change per token


@pytest.mark.parametrize("packed", [False, True])
def test_a_half_written_last_line_loses_only_itself(tmp_path, caplog, packed):
    lines = "".join(json.dumps(row) + "\n" for row in official(CURVE))
    data = lines.encode()[:-20]
    if packed:
        compressor = gzip.compress(lines.encode(), 0)
        data = compressor[:-60]  # stored blocks: cuts the last line and the checksum
    (path := tmp_path / "cut").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        found = replay(path)
    assert "Line 6 of" in caplog.text and len(found.table) == 5 and found.watch == 3


def test_restarts_in_one_file(tmp_path, caplog):
    """The first run was cut within its second line, and the next one went on there."""
    lines = [json.dumps(row) for row in official(CURVE)]
    path = tmp_path / "restarted.json"
    path.write_text(lines[0] + "\n" + lines[1][:40] + lines[0] + "\n" + "\n".join(lines[1:]) + "\n" + lines[0])
    with caplog.at_level(logging.WARNING):
        found = replay(path)
    assert "Line 2 of" in caplog.text and "3 runs one after the other, of 1, 6, 1 evaluations" in caplog.text
    assert (len(found.table), found.watch, found.squeeze) == (6, 3, 5)


def test_the_authors_curves():
    """Evaluations from WATCH to the peak of the chosen answer; see benchmarks/squeeze_replay.py."""
    if not CURVES.exists():
        pytest.skip(f"The authors' curves are not in {CURVES}.")
    for name in ("pythia410", "pythia410m", "qwen05"):
        found = replay(CURVES / f"refcurve_{name}_baseline_dpo_checkbug_5e7.json.gz")
        assert found.signal == "peak" and found.watch < found.chosen_peak, name
        assert found.squeeze is None or found.squeeze > found.chosen_peak
    short = replay(CURVES / "refcurve_baseline_sft_qwen05_ep8.json.gz")  # four times the first evaluation
    assert len(short.table) == 1 and short.watch is None


def test_bad_logs(tmp_path):
    with pytest.raises(ValueError, match="in 1 log entries, found none"):
        replay([{"loss": 1.0, "step": 1}])
    with pytest.raises(ValueError, match="tokens_per_answer must be positive, got 0"):
        replay(CURVE, tokens_per_answer=0)
    (path := tmp_path / "notes.txt").write_text("no\njson\n")
    with pytest.raises(ValueError, match="Expected a JSON object on line 1 of .*notes.txt, got 'no'"):
        replay(path)
    path.write_text("")
    with pytest.raises(ValueError, match="in 0 log entries, found none"):
        replay(path)
