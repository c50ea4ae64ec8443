from collections import Counter
from fractions import Fraction
from itertools import islice
from math import ceil, floor

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset

from hf_iclr.trainers.deep_safety.recovery_mixture import RecoveryMixture, RecoveryMixtureSampler
from hf_iclr.trainers.deep_safety.recovery_rows import draw_recovery_row


def mixture(num_utility=64, num_triplets=7, **settings):
    utility = Dataset.from_dict(
        {"input_ids": [[index, 1] for index in range(num_utility)], "labels": [[-100, 1]] * num_utility}
    )
    triplets = Dataset.from_dict(
        {
            "prompt_ids": [[100 + index] for index in range(num_triplets)],
            "harmful_ids": [list(range(10, 40))] * num_triplets,
            **{f"{name}_ids": [[2, 3]] * num_triplets for name in ("refusal", "spaced", "bare")},
            "blank_ends": [[0] * 30] * num_triplets,
        }
    )
    return RecoveryMixture(utility, triplets, **settings)


def epochs(sampler, count):
    for epoch in range(count):
        sampler.set_epoch(epoch)
        yield list(sampler)


@pytest.mark.parametrize("ratio", [0.2, 0.1, 0.3, 0.25, 0.5, 0.7, 1 / 3, 0.37, Fraction(3, 11)])
def test_every_step_holds_the_ratio(ratio):
    """floor((s + 1) T a) - floor(s T a) rows of step s are recovery rows: T a where that is a whole number."""
    sampler = RecoveryMixtureSampler(mixture(211), ratio=ratio)
    recovery = [index >= 211 for index in sampler]
    exact = Fraction(ratio).limit_denominator(100)
    assert len(recovery) == len(sampler)
    for size in (5, 8, 10, 16, 30, 80, 100):
        for start in range(0, len(recovery) - size + 1, size):
            assert floor(size * exact) <= sum(recovery[start : start + size]) <= ceil(size * exact)


def test_the_papers_step_has_16_of_80():
    order = list(RecoveryMixtureSampler(mixture(640, 256), ratio=0.2))
    assert len(order) == 800
    assert [sum(index >= 640 for index in order[start : start + 80]) for start in range(0, 800, 80)] == [16] * 10


def test_utility_rows_come_once_an_epoch_and_triplets_equally_often():
    sampler = RecoveryMixtureSampler(mixture())
    first, second, *_ = orders = list(epochs(sampler, 7))
    assert [sorted(index for index in order if index < 64) for order in orders] == [list(range(64))] * 7
    assert [index for index in first if index < 64] != [index for index in second if index < 64]
    recovery = [index - 64 for order in orders for index in order if index >= 64]
    assert recovery != sorted(recovery)
    # 7 epochs of 16 recovery rows are 16 passes over 7 triplets: each index, that is each (copy, triplet), comes once.
    assert sorted(recovery) == list(range(7 * 16))
    assert Counter(index % 7 for index in recovery) == dict.fromkeys(range(7), 16)


def test_prefixes_are_drawn_anew_in_every_copy():
    rows = mixture(prefix_probability=1, max_prefix_tokens=20, seed=5)
    drawn = [rows[64 + copy * 7 + 3] for copy in range(8)]
    assert len({len(row["input_ids"]) for row in drawn}) > 3
    for copy, row in enumerate(drawn):
        expected = draw_recovery_row(
            rows.triplets[3], seed=5, copy=copy, index=3, prefix_probability=1, max_prefix_tokens=20
        )
        assert row == {**expected, "constrain": False}


def test_utility_rows_keep_their_columns():
    rows = mixture()
    assert rows[3] == {"input_ids": [3, 1], "labels": [-100, 1], "constrain": True}
    rows.utility = rows.utility.add_column("constrain", [False] * 64).add_column("extra", [[0.5]] * 64)
    assert rows[3] == {"input_ids": [3, 1], "labels": [-100, 1], "constrain": False, "extra": [0.5]}


def test_the_order_depends_on_seed_and_epoch_alone():
    rows = mixture()
    assert list(epochs(RecoveryMixtureSampler(rows), 3)) == list(epochs(RecoveryMixtureSampler(mixture()), 3))
    sampler, other = RecoveryMixtureSampler(rows, seed=1), RecoveryMixtureSampler(rows, seed=2)
    rows.set_epoch(0)
    assert list(sampler) == list(sampler) != list(other)


def loader(process, num_processes, batch_size=5):
    rows = mixture(80)
    sampler = RecoveryMixtureSampler(rows)
    plain = torch.utils.data.DataLoader(
        rows, batch_size=batch_size, sampler=sampler, collate_fn=lambda batch: [row["input_ids"] for row in batch]
    )
    return prepare_data_loader(plain, num_processes=num_processes, process_index=process, put_on_device=False)


@pytest.mark.parametrize(("num_processes", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 3)])
def test_steps_of_several_processes_hold_one_in_five(num_processes, accumulation):
    shards = []
    for process in range(num_processes):
        shard = loader(process, num_processes)
        shard.set_epoch(1)
        shards.append(iter(shard))
    sampler = RecoveryMixtureSampler(mixture(80))
    sampler.set_epoch(1)
    size = 5 * num_processes * accumulation
    places = iter(sampler)
    for _ in range(100 // size):
        rows = [row for shard in shards for batch in islice(shard, accumulation) for row in batch]
        assert sum(row[0] >= 100 for row in rows) == size // 5
        expected = [sampler.mixture[index]["input_ids"] for index in islice(places, size)]
        assert sorted(rows) == sorted(expected)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_resuming_within_an_epoch_gives_the_rest_of_it(num_processes):
    """The trainer skips batches first and sets the epoch of the new loader then."""
    for process in range(num_processes):
        whole = loader(process, num_processes)
        whole.set_epoch(2)
        batches = list(whole)
        resumed = skip_first_batches(loader(process, num_processes), 3)
        resumed.set_epoch(2)
        assert list(resumed) == batches[3:]
        first = loader(process, num_processes)
        assert list(first) != batches


def test_wrong_arguments_are_refused():
    for ratio in (0, 1, 1e-9, -0.2):
        with pytest.raises(ValueError, match=f"between 0 and 1, both excluded, got {ratio}"):
            RecoveryMixtureSampler(mixture(), ratio=ratio)
    with pytest.raises(ValueError, match="at least 4 utility rows for a ratio of 1/5, got 3"):
        RecoveryMixtureSampler(mixture(3), ratio=0.2)
    assert sum(index >= 4 for index in RecoveryMixtureSampler(mixture(4), ratio=0.2)) == 1
