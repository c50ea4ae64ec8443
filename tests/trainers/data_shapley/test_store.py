"""The store of In-Run Data Shapley values: what a killed writer loses, and what a resumed run keeps."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hf_iclr.trainers.data_shapley.store import RunRecords, ShapleyStore, StepValues, read_run
from hf_iclr.trainers.data_shapley.trained_rows import TrainedRows


RUN = "run-20260101T000000-00000000"
TRAINED = TrainedRows(length=50, digests={"input_ids": "ab"})


def rows_of(step: int, size: int = 3) -> pd.DataFrame:
    draw = np.random.default_rng(step)
    return pd.DataFrame(
        {
            "step": np.full(size, step),
            "index": draw.integers(0, 50, size),
            "tokens": draw.integers(1, 9, size),
            "value": draw.normal(size=size),
            "value_safety": draw.normal(size=size),
        }
    )


def train(
    folder: Path, first: int, last: int, flush_every: int = 4, checkpoint: Path | None = None, flush_last: bool = True
) -> ShapleyStore:
    """What a run does with its store; only step 1, 6, 11, ... measure the loss. The last steps may not be flushed."""
    store = ShapleyStore(folder, TRAINED)
    store.run = RUN
    if first > 1:
        store.resume(first - 1, RUN, checkpoint or Path(folder, f"checkpoint-{first - 1}"))
    rows, steps = [], []
    for step in range(first, last + 1):
        rows.append(rows_of(step))
        record = {"step": step, "lr": 1 / step, "sum_validation": rows[-1]["value"].sum()}
        steps.append(record | ({"loss_validation": 5.0 - step} if step % 5 == 1 else {}))
        if step % flush_every == 0 or step == last and flush_last:
            store.add(rows, steps)
            rows, steps = [], []
    return store


def assert_equal(ours: tuple, theirs: tuple) -> None:
    for left, right in zip(ours[:2], theirs[:2], strict=True):
        pd.testing.assert_frame_equal(left, right)


def write_until_killed(folder: Path, flushes: int, moment: str) -> None:
    """The process ends after so many flushes, between two of them or inside the next one."""
    store, replace, renamed = ShapleyStore(folder, TRAINED), os.replace, []
    store.run = RUN

    def killing_replace(source, target):
        if moment == "inside" and len(renamed) == flushes:
            os.kill(os.getpid(), signal.SIGKILL)
        renamed.append(target)
        replace(source, target)

    os.replace = killing_replace
    for first in range(1, 100, 4):
        rows = [rows_of(step) for step in range(first, first + 4)]
        if moment == "between" and len(renamed) == flushes:
            os.kill(os.getpid(), signal.SIGKILL)
        store.add(rows, [{"step": int(found["step"][0]), "sum_validation": found["value"].sum()} for found in rows])


FORK = multiprocessing.get_context("fork")


@pytest.mark.parametrize("moment", ["between", "inside"])
@pytest.mark.parametrize("flushes", [0, 2])
def test_a_killed_process_loses_only_what_was_not_flushed(tmp_path, moment, flushes):
    process = FORK.Process(target=write_until_killed, args=(tmp_path, flushes, moment))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    if not flushes:
        with pytest.raises(FileNotFoundError, match="found none"):
            read_run(tmp_path)
        return
    rows, steps, trained = read_run(tmp_path)
    assert steps["step"].tolist() == list(range(1, 9)) and trained == TRAINED
    expected = pd.concat([rows_of(step) for step in range(1, 9)], ignore_index=True)
    pd.testing.assert_frame_equal(rows, expected)

    # The run is resumed from a checkpoint of step 6, and what the killed writer left does not count.
    resumed = train(tmp_path, 7, 20)
    whole = train(tmp_path / "whole", 1, 20)
    pd.testing.assert_frame_equal(resumed.read()[0], whole.read()[0])
    assert not list(tmp_path.glob("shapley/*/*.tmp"))


def test_killed_from_outside_the_store_is_a_beginning_of_the_run(tmp_path):
    process = FORK.Process(target=train, args=(tmp_path, 1, 10**6, 2))
    process.start()
    while not (tmp_path / f"shapley/{RUN}/part-000000041.parquet").exists():
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = read_run(tmp_path)
    last = found[1]["step"].max()
    assert last >= 42 and last % 2 == 0
    assert_equal(found, train(tmp_path / "whole", 1, last).read())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(elsewhere, tmp_path):
    whole = train(tmp_path / "whole", 1, 30).read()
    train(tmp_path / "cut", 1, 23, flush_last=False)
    folder = tmp_path / ("other" if elsewhere else "cut")
    if elsewhere:  # which holds what an earlier attempt made
        train(folder, 1, 12)
    resumed = train(folder, 18, 30, checkpoint=tmp_path / "cut" / "checkpoint-17")
    assert_equal(resumed.read(), whole)
    assert_equal(read_run(folder), whole)
    assert read_run(tmp_path / "cut")[1]["step"].max() == (20 if elsewhere else 30)


def test_a_run_whose_values_are_not_beside_the_checkpoint_says_so(tmp_path, caplog):
    store = train(tmp_path / "new", 11, 20, checkpoint=tmp_path / "moved" / "checkpoint-10")
    assert "steps up to 10 are not in" in caplog.text and str(tmp_path / "moved" / "shapley" / RUN) in caplog.text
    assert store.read()[1]["step"].tolist() == list(range(11, 21))


def test_a_run_that_had_ended_goes_on_after_its_last_step(tmp_path):
    ended = train(tmp_path / "ended", 1, 10)
    # Measured at the end, before a step that isn't made
    ended.add([rows_of(11, 0)], [{"step": 11, "loss_validation": -6.0}])
    assert ended.read()[1]["loss_validation"].iloc[-1] == -6.0 and ended.read()[0]["step"].max() == 10
    assert_equal(train(tmp_path / "ended", 11, 20).read(), train(tmp_path / "whole", 1, 20).read())


def test_runs_of_one_folder_do_not_meet(tmp_path):
    """Two at once, even."""
    stores = [ShapleyStore(tmp_path, TRAINED) for _ in range(2)]
    for step in range(1, 5):
        for number, store in enumerate(stores):
            store.add([rows_of(10 * number + step).assign(step=step)], [{"step": step}])
    for number, store in enumerate(stores):
        found = read_run(tmp_path / "shapley" / store.run)
        assert_equal(found, store.read())
        assert found[0]["value"].iloc[0] == rows_of(10 * number + 1)["value"][0]
    (tmp_path / "shapley" / "run-20300101T000000-00000000").mkdir()  # of one that was killed before it had a value
    for second, store in enumerate(stores):  # the one written last, by times further apart than a clock's ticks
        for path in (tmp_path / "shapley" / store.run).iterdir():
            os.utime(path, (2e9 + second, 2e9 + second))
        assert_equal(read_run(tmp_path), store.read())


def test_a_name_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"name of a run.*'\.\./mine'"):
        ShapleyStore(tmp_path, TRAINED).resume(1, "../mine", tmp_path / "checkpoint-1")


def test_values_and_their_tokens_come_back_as_they_were(tmp_path):
    store = ShapleyStore(tmp_path, TRAINED)
    columns = {
        "step": [3, 3],
        "id": np.array(["a", "b"], dtype=object),
        "tokens": np.array([2, 3]),
        "value": np.array([0.1, -1e-300]),
        "token_values": [np.array([0.05, 0.05]), None],
        "value_safety": np.array([1.0, np.nan]),
    }
    store.add([pd.DataFrame(columns)], [{"step": 3, "lr": 0.1, "loss_validation": 1 / 3}])
    frame, steps, _ = read_run(tmp_path)
    assert frame["id"].tolist() == ["a", "b"] and frame["tokens"].tolist() == [2, 3]
    assert frame["value"].tolist() == [0.1, -1e-300] and frame["value_safety"][0] == 1.0
    assert list(frame["token_values"][0]) == [0.05, 0.05] and frame["token_values"][1] is None
    assert steps.to_dict("records") == [{"step": 3, "lr": 0.1, "loss_validation": 1 / 3}]


@pytest.mark.parametrize("steps", [["one"], [1, "two"]])
def test_records_without_a_number_are_refused(tmp_path, steps):
    store = train(tmp_path, 1, 4)
    part = store._parts[0]
    part.attrs["steps"] = [{"step": step} for step in steps]
    part.to_parquet(next(tmp_path.glob("shapley/*/part-*.parquet")), index=False)
    with pytest.raises(ValueError, match="InRunDataShapleyCallback"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="InRunDataShapleyCallback"):
        ShapleyStore(tmp_path, TRAINED).resume(4, store.run, tmp_path / "checkpoint-4")


def test_reading_writes_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_run(tmp_path / "nowhere")
    assert os.listdir(tmp_path) == []


def test_what_is_stored_grows_with_the_steps(tmp_path):
    """Twice the steps are twice the bytes; nothing is written again."""
    sizes = []
    for last in (500, 1000):
        train(tmp_path / str(last), 1, last, flush_every=50)
        sizes.append(sum(path.stat().st_size for path in (tmp_path / str(last)).rglob("*") if path.is_file()))
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.02)


def test_what_a_run_of_a_thousand_steps_writes_grows_linearly(tmp_path):
    """Each checkpoint writes what is new, and no copy of what there is."""
    records, sizes = RunRecords(tmp_path, TRAINED, ["validation"], False), []
    for step in range(1, 1001):
        values = np.random.default_rng(step).normal(size=(8, 1))
        ids = list(range(8))
        records.add(
            StepValues(step, ids, values, np.ones(8, dtype=int), [None] * 8, {"lr": 0.1, "loss_validation": 1.0})
        )
        if step % 50 == 0:
            records.flush()
        if step % 100 == 0:
            checkpoint = tmp_path / f"checkpoint-{step}"
            checkpoint.mkdir()
            records.save(checkpoint, {"0.0.0": torch.zeros(3)})
            written = [path for path in tmp_path.rglob("*") if path.is_file()]
            sizes.append(sum(path.stat().st_size for path in written))
    growth = np.diff(sizes)
    assert growth.max() <= 1.1 * growth.min()
    assert len(read_run(tmp_path)[0]) == 8000
