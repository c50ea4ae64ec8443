import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_iclr.generation.calibration.sweep import mean_log_probability, pareto_front, sweep_cascade
from hf_iclr.generation.cascade_generation import enable_cascade


SAMPLING = {"do_sample": True, "top_k": 0}


def test_pareto_front_by_hand():
    """(quality, cost): b has more than a at the same cost, d less than c at more; e ties with c in both and stays."""
    quality, cost = [1.0, 2.0, 5.0, 4.0, 5.0, float("nan")], [1.0, 1.0, 3.0, 4.0, 3.0, 0.1]
    assert pareto_front(quality, cost).tolist() == [False, True, True, False, True, False]


def test_sweep(model, pair, tmp_path, word_tokenizer):
    prompts = ["w1 w2 w3", "w9"]
    rules = {"spec": [0.0], "token_v3": [0.0, 0.6, 1.0]}
    sweep = sweep_cascade(
        model, prompts, tokenizer=word_tokenizer, rules=rules, max_new_tokens=4, do_sample=False,
        cost="large_forwards_per_token",
    )  # fmt: skip
    table = sweep.table
    assert table["rule"].tolist() == ["large alone", "small alone", "spec", "token_v3", "token_v3", "token_v3"]
    large, small, ours = table.iloc[0], table.iloc[1], table.iloc[3:]
    assert large[["relative_latency", "relative_flops", "large_forwards_per_token"]].tolist() == [1, 1, 1]
    assert small["large_forwards_per_token"] == 0
    assert small["relative_flops"] == pytest.approx(1.0)  # a copy of the same size
    # in greedy decoding, exact methods and both ends of token_v3 write what the two models alone write
    assert table["quality"][2] == large["quality"] == ours["quality"].iloc[0]
    assert ours["quality"].iloc[2] == small["quality"] < large["quality"]
    assert sweep.texts[0] == sweep.texts[2] != sweep.texts[1]
    assert ours["deferral_rate"].is_monotonic_decreasing
    assert ours["drift"].iloc[0] == 0 < ours["drift"].iloc[2]
    assert sweep.pareto()["large_forwards_per_token"].iloc[0] == 0
    assert sweep.pareto()["quality"].is_monotonic_increasing

    sweep.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.csv", "sweep.json", "sweep.png"}


def test_quality_is_the_log_probability(pair):
    """Two tokens after one: -loss of the model itself."""
    large, _ = pair
    ids = torch.tensor([[4, 7, 9]])
    expected = -large(input_ids=ids, labels=torch.tensor([[-100, 7, 9]])).loss.item()
    assert mean_log_probability(large, [[4]], [ids[0, 1:]]) == pytest.approx(expected, rel=1e-5)


def test_a_small_model_padded_further_than_the_large_one(pair, word_tokenizer, tmp_path):
    """It is sure of an id that is no token of the large model: alone, too, it writes tokens only."""
    padded = copy.deepcopy(pair[1])
    padded.resize_token_embeddings(56)
    with torch.no_grad():
        padded.lm_head.weight[50:] = 1e3 * padded.lm_head.weight[3]
    models = []
    for name, model in (("large", pair[0]), ("small", padded)):
        model.save_pretrained(tmp_path / name)
        word_tokenizer.save_pretrained(tmp_path / name)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    sweep = sweep_cascade(
        enable_cascade(*models), ["w1", "w2 w3"], tokenizer=word_tokenizer, rules={"spec": [0.0]}, max_new_tokens=8
    )
    assert sweep.table["new_tokens"].tolist() == [16, 16, 16] and sweep.table["quality"].notna().all()


def test_sweep_with_a_metric(model, word_tokenizer):
    def length(texts, references):
        assert references == ["a", "b"]
        return float(len(texts))

    sweep = sweep_cascade(
        model, ["w1", "w2"], length, tokenizer=word_tokenizer, references=["a", "b"], rules={"diff": [0.0]},
        max_new_tokens=4, **SAMPLING,
    )  # fmt: skip
    assert sweep.table["quality"].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": []}, "at least one prompt"),
        ({"rules": {"opd": [0.1]}}, "Unknown cascade_rule"),
        ({"rules": {"token_v3": [2.0]}}, "must lie in"),
        ({"cost": "money"}, "a cost of relative_latency"),
        ({"references": ["a"]}, "one reference a prompt, got 1 and 2"),
    ],
)
def test_bad_sweep(model, word_tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        sweep_cascade(model, **{"prompts": ["w1", "w2"], "tokenizer": word_tokenizer, **change})
