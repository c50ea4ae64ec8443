"""The store of In-Run Data Shapley values: what a killed writer loses, and what a resumed run keeps."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pandas as pd
import pytest

from hf_iclr.trainers.data_shapley.store import ShapleyStore


def rows_of(step: int, size: int = 3) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(step)
    return {
        "index": draw.integers(0, 50, size),
        "target": np.full(size, "validation"),
        "value": draw.normal(size=size),
        "tokens": draw.integers(1, 9, size),
    }


def train(folder, first: int, last: int, flush_every: int = 4) -> ShapleyStore:
    """What a run does with its store; only step 1, 6, 11, ... measure the loss."""
    store = ShapleyStore(folder)
    store.truncate(first - 1)
    for step in range(first, last + 1):
        rows = rows_of(step)
        record = {"lr": 1 / step, "sum_validation": rows["value"].sum()}
        store.add(step, rows, record | ({"loss_validation": 5.0 - step} if step % 5 == 1 else {}))
        if step % flush_every == 0:
            store.flush()
    return store


def assert_equal(store: ShapleyStore, other: ShapleyStore) -> None:
    for ours, theirs in zip(store.read(), other.read(), strict=True):
        pd.testing.assert_frame_equal(ours, theirs)


# Ends at `kill` of the store's own life: before any flush, between flushes, or inside one.
WRITER = """
    import os, signal, sys
    from pathlib import Path

    import numpy as np

    from hf_iclr.trainers.data_shapley import store as shapley_store
    from tests.trainers.data_shapley.test_store import rows_of

    folder, flushes, inside = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    store, replace, renamed = shapley_store.ShapleyStore(folder), os.replace, []

    def killing_replace(source, target):
        if inside != "between" and len(renamed) == 2 * flushes + (inside == "before steps"):
            os.kill(os.getpid(), signal.SIGKILL)
        renamed.append(target)
        replace(source, target)

    os.replace = killing_replace
    store.truncate(0)
    for step in range(1, 100):
        rows = rows_of(step)
        store.add(step, rows, {"sum_validation": float(rows["value"].sum())})
        if inside == "between" and len(renamed) == 2 * flushes and step % 4 == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 4 == 0:
            store.flush()
"""


@pytest.mark.parametrize("moment", ["between", "before rows", "before steps"])
@pytest.mark.parametrize("flushes", [0, 2])
def test_a_killed_process_loses_only_what_was_not_flushed(tmp_path, moment, flushes):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(flushes), moment],
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    store = ShapleyStore(tmp_path)
    if not flushes:
        with pytest.raises(FileNotFoundError, match="found none"):
            store.read()
        return
    rows, steps = store.read()
    assert steps["step"].tolist() == list(range(1, 9))
    expected = pd.concat([pd.DataFrame({"step": step, **rows_of(step)}) for step in range(1, 9)], ignore_index=True)
    pd.testing.assert_frame_equal(rows, expected)

    # The run is resumed from a checkpoint of step 6, and what the killed writer left does not count.
    resumed = train(tmp_path, 7, 20)
    whole = train(tmp_path / "whole", 1, 20)
    pd.testing.assert_frame_equal(resumed.read()[0], whole.read()[0])
    assert not list(tmp_path.glob("shapley/*/*.tmp"))


def test_killed_from_outside_the_store_is_a_beginning_of_the_run(tmp_path):
    busy = """
        import sys
        from tests.trainers.data_shapley.test_store import train

        train(sys.argv[1], 1, 10**6, flush_every=2)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(busy), str(tmp_path)])
    while not (tmp_path / "shapley/steps/part-000000041.parquet").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    last = ShapleyStore(tmp_path).read()[1]["step"].max()
    assert last >= 42 and last % 2 == 0
    assert_equal(ShapleyStore(tmp_path), train(tmp_path / "whole", 1, last))


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = train(tmp_path / "whole", 1, 30)
    train(tmp_path / "cut", 1, 23)
    resumed = train(tmp_path / "cut", 18, 30)
    assert_equal(resumed, whole)
    resumed.flush()
    assert_equal(ShapleyStore(tmp_path / "cut"), whole)


def test_resuming_takes_what_the_checkpoint_holds(tmp_path):
    whole = train(tmp_path / "whole", 1, 20)
    (tmp_path / "cut" / "checkpoint-10").mkdir(parents=True)
    train(tmp_path / "cut", 1, 10).snapshot(tmp_path / "cut" / "checkpoint-10")
    # Another run began anew in the same folder; then the first one is resumed from its checkpoint.
    other = ShapleyStore(tmp_path / "cut")
    other.truncate(0)
    other.add(1, rows_of(99), {})
    other.flush()
    assert_equal(train(tmp_path / "cut", 11, 20), whole)


def test_a_run_that_had_ended_goes_on_after_its_last_step(tmp_path):
    ended = train(tmp_path / "ended", 1, 10)
    nothing = {name: values[:0] for name, values in rows_of(11).items()}
    ended.add(11, nothing, {"loss_validation": -6.0})  # measured at the end, before a step that isn't made
    (tmp_path / "ended" / "checkpoint-10").mkdir()
    ended.snapshot(tmp_path / "ended" / "checkpoint-10")
    assert ended.read()[1]["loss_validation"].iloc[-1] == -6.0 and ended.read()[0]["step"].max() == 10
    assert_equal(train(tmp_path / "ended", 11, 20), train(tmp_path / "whole", 1, 20))


def test_a_snapshot_is_the_store_of_that_step(tmp_path):
    store = train(tmp_path, 1, 6)
    store.snapshot(tmp_path / "checkpoint-6")
    store.add(7, rows_of(7), {})
    store.flush()
    assert_equal(ShapleyStore(tmp_path / "checkpoint-6"), train(tmp_path / "other", 1, 6))
    store.snapshot(tmp_path / "checkpoint-6")  # saved again
    assert ShapleyStore(tmp_path / "checkpoint-6").read()[1]["step"].max() == 7


def test_a_fresh_run_clears_the_store(tmp_path):
    train(tmp_path, 1, 20)
    store = train(tmp_path, 1, 3)
    assert store.read()[1]["step"].tolist() == [1, 2, 3]


def test_values_and_their_tokens_come_back_as_they_were(tmp_path):
    store = ShapleyStore(tmp_path)
    rows = {
        "id": np.array(["a", "b"]),
        "target": np.array(["validation", "safety"]),
        "value": np.array([0.1, -1e-300]),
        "tokens": np.array([2, 3]),
        "token_values": [np.array([0.05, 0.05]), np.array([1.0, -1.0, 0.0])],
    }
    store.add(3, rows, {"lr": 0.1})
    store.flush()
    frame = ShapleyStore(tmp_path).read()[0]
    assert frame["id"].tolist() == ["a", "b"] and frame["target"].tolist() == ["validation", "safety"]
    assert frame["value"].tolist() == [0.1, -1e-300] and frame["tokens"].tolist() == [2, 3]
    assert [list(values) for values in frame["token_values"]] == [[0.05, 0.05], [1.0, -1.0, 0.0]]


def test_a_step_twice_is_refused(tmp_path):
    store = train(tmp_path, 1, 4)
    with pytest.raises(ValueError, match="after 4, got 4.*truncate"):
        store.add(4, rows_of(4), {})


def test_reading_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        ShapleyStore(tmp_path / "nowhere").read()
    assert os.listdir(tmp_path) == []
