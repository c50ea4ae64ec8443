"""Measuring leaves random states alone, and counts no row of an evaluation twice."""

from types import SimpleNamespace

import pytest
import torch

from hf_iclr.trainers.measuring import forked_random, rows_of_this_process


def test_random_states_are_put_back():
    state = torch.get_rng_state()
    with forked_random(torch.device("cpu")):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("training", "last", "remainder", "expected"), [
    (False, True, 5, [4, 1]), (False, True, 4, [4, 0]), (False, True, 0, [4, 4]), (False, False, 5, [4, 4]),
    (True, True, 5, [4, 4]),
])  # fmt: skip
def test_repeated_rows_are_not_counted(training, last, remainder, expected):
    """Two processes with 4 rows each in the last batch, of which the first `remainder` are new."""
    state = SimpleNamespace(end_of_dataloader=last, remainder=remainder)
    counted = [
        rows_of_this_process(
            SimpleNamespace(
                accelerator=SimpleNamespace(gradient_state=state, process_index=process),
                model=SimpleNamespace(training=training),
            ),
            4,
        )
        for process in range(2)
    ]
    assert counted == expected
