"""The script that tests the paper's claim runs, and what it writes hangs together; the result itself isn't a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_quick_run_is_consistent(tmp_path):
    command = [sys.executable, BENCHMARKS / "cascade_claim.py", "--quick", "--seeds", "2", "--out", tmp_path]
    # as from a shell, so that the models of tests/conftest.py play no part
    output = subprocess.run(command, env={**os.environ}, capture_output=True, text=True, check=True).stdout
    results = json.loads((tmp_path / "cascade_claim.json").read_text())
    assert (tmp_path / "cascade_claim.png").stat().st_size > 0
    assert all(line in output for line in results["verdict"])

    for checks in results["checks"]:  # one of each seed
        assert checks["greedy"]["rows_where_spec_differs_from_large"] == 0
        assert all(0 <= share <= 1 for mode in checks.values() for share in mode["kept_drafts"].values())

    small_cost = results["settings"]["small_cost"]
    for mode, comparison in results["comparisons"].items():
        curves = results["curves"][mode]
        assert curves["large"][0]["cost"]["mean"] == 1
        assert curves["small"][0]["cost"]["mean"] == pytest.approx(small_cost)
        for points in curves.values():
            assert all(0 <= point["exact_match"]["mean"] <= 1 for point in points)
            assert all(
                point["large_forwards"]["mean"] <= point["cost"]["mean"] <= 1 + 6 * small_cost for point in points
            )
        # what costs nothing, and all of it, of the large model
        nobody, everybody = curves["sequence_cascade"][0], curves["sequence_cascade"][-1]
        assert nobody["exact_match"] == pytest.approx(curves["small"][0]["exact_match"], abs=0.1)
        assert everybody["exact_match"] == curves["large"][0]["exact_match"]

        at_spec = comparison["at_spec_cost"]
        above = at_spec["best_cascade_above"].get("spec")
        if above is not None:
            ours, theirs = (at_spec["methods"][name]["exact_match"]["mean"] for name in ("best_cascade", "spec"))
            assert above["mean"] == pytest.approx(ours - theirs)
        claimed = any(line.endswith(f": SHOWN for {mode}.") for line in results["verdict"])
        assert claimed == comparison["claim_shown"]
        if comparison["claim_shown"]:
            assert min(at_spec["best_cascade_above"][name]["low"] for name in ("spec", "token_cascade")) > 0


def test_interval_is_that_of_students_t(monkeypatch):
    """Three values 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.3027, so 2 ± 4.3027 / sqrt(3) = 2 ± 2.4842."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from common.cascade_claim_report import interval

    assert interval([1, 2, 3]) == {
        "mean": 2,
        "low": pytest.approx(-0.4842, abs=1e-3),
        "high": pytest.approx(4.4842, abs=1e-3),
    }
    assert interval([1]) == {"mean": 1, "low": None, "high": None}
