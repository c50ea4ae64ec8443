"""The step that the scores of pairs are to predict."""

import copy

import pytest
import torch

from benchmarks.common.squeeze_step import measure_chosen_change
from hf_iclr.trainers.squeeze.influence import influence_audit
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import tiny_llama


def test_the_step_on_each_pair(word_tokenizer):
    """As the influence audit has it, pair by pair, and the weights are put back."""
    model = tiny_llama().double()
    model.set_attn_implementation("eager")
    before = copy.deepcopy(model.state_dict())
    pairs = pair_rows(5).select(range(2))
    table = measure_chosen_change(model, word_tokenizer, pairs, step_size=1e-3)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    report = influence_audit(model, word_tokenizer, pairs, pairs, step_size=1e-3).table.query("pair == probe")
    chosen = report[report["kind"] == "chosen"]
    # float32 inside of Llama's norms
    assert table["chosen_change"].tolist() == pytest.approx(chosen["measured"].tolist(), abs=1e-5)
    assert table["push_on_chosen"].tolist() == pytest.approx(chosen["push_down"].tolist(), rel=1e-5)
    rejected = report[report["kind"] == "rejected"]
    assert table["rejected_change"].tolist() == pytest.approx(rejected["measured"].tolist(), abs=1e-5)
