"""The decomposition against A, K and G written out in full, and against the step that is really taken."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.squeeze.influence import influence_audit
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import tiny_llama


SINGLE = 1e-5  # Llama's norms and softmaxes are in float32, whatever the weights are
PAIRS = pair_rows(2)
PROBES = pair_rows(3, seed=5).rename_column("rejected", "other_train")


@pytest.fixture
def model():
    return tiny_llama().double()


def logits_jacobian(model, ids, positions):
    """∂z/∂θ at some positions, of shape `(positions, vocab, parameters)`, and π there."""
    parameters = dict(model.named_parameters())

    def logits(values):
        return torch.func.functional_call(model, values, (), {"input_ids": ids, "use_cache": False}).logits[
            0, positions
        ]

    jacobian = torch.func.jacrev(logits)(parameters)
    return torch.cat([j.flatten(2) for j in jacobian.values()], -1), logits(parameters).softmax(-1)


def token_ids(tokenizer, row, kind):
    """As TRL's DPO has them: the answer ends with the end-of-text token."""
    start = len(tokenizer(row["prompt"])["input_ids"])
    ids = tokenizer(row["prompt"] + row[kind] + tokenizer.eos_token, return_tensors="pt")["input_ids"]
    return ids, range(start - 1, ids.shape[1] - 1)


def test_is_a_k_g_in_full(model, word_tokenizer):
    """Σ_l A_m K_ml G_l with A = I - 1πᵀ, K = ∂z_m ∂z_lᵀ and G = π - e_y, contracted over the vocabulary twice."""
    model.set_attn_implementation("eager")
    pair, probe = PAIRS[0], PROBES[1]
    report = influence_audit(model, word_tokenizer, [pair], [probe], step_size=1e-3, beta=0.3)
    ids, positions = token_ids(word_tokenizer, probe, "other_train")
    phi, pi = logits_jacobian(model, ids, positions)
    a = torch.eye(50) - pi[:, None, :].expand(-1, 50, -1)
    measured = report.tokens[report.tokens["kind"] == "other_train"]
    for side, column, sign in (("chosen", "pull_up", 1), ("rejected", "push_down", -1)):
        train_ids, train_positions = token_ids(word_tokenizer, pair, side)
        train_phi, train_pi = logits_jacobian(model, train_ids, train_positions)
        targets = train_ids[0, 1:][list(train_positions)]
        g = train_pi - torch.nn.functional.one_hot(targets, 50)
        k = torch.einsum("mvp,lwp->mlvw", phi, train_phi)
        change = -1e-3 * 0.15 * sign * torch.einsum("muv,mlvw,lw->mu", a.double(), k, g)
        y = ids[0, 1:][list(positions)]
        expected = change[range(len(y)), y]
        assert measured[column].tolist() == pytest.approx(expected.tolist(), rel=SINGLE)
    assert report.tokens["token"].iloc[-1] == word_tokenizer.eos_token


def test_predicts_the_step(model, word_tokenizer):
    before = copy.deepcopy(model.state_dict())
    model.train()
    small = influence_audit(model, word_tokenizer, PAIRS, PROBES, step_size=1e-4)
    assert model.training and model.config._attn_implementation == "sdpa"
    assert small.correlation >= 0.9999 and small.slope == pytest.approx(1, abs=1e-2)
    assert len(small.table) == 2 * 3 * 2 and set(small.table["kind"]) == {"chosen", "other_train"}
    large = influence_audit(model, word_tokenizer, PAIRS, PROBES, step_size=1e-1)
    assert large.correlation < small.correlation  # not linear any more: the measurement is one
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for report in (small, large):
        table = report.table
        assert table["predicted"].tolist() == pytest.approx((table["pull_up"] + table["push_down"]).tolist())
        by_tokens = report.tokens.groupby(["pair", "probe", "kind"])[["measured", "pull_up"]].sum().reset_index()
        assert by_tokens["measured"].tolist() == pytest.approx(table["measured"].tolist())
        factors = report.scale * table["A"] * table["K_up"] * table["G_up"]
        assert factors.tolist() == pytest.approx(table["pull_up"].tolist())


def test_the_trained_answers_themselves(model, word_tokenizer):
    """On y⁺ the pull is η β/2 ‖∇log π(y⁺)‖² > 0, on y⁻ the push is negative, and the cross terms are equal."""
    table = influence_audit(model, word_tokenizer, PAIRS, PAIRS, step_size=1e-3).table
    own = table[table["pair"] == table["probe"]].set_index(["pair", "kind"])
    rounding = SINGLE * own["pull_up"].abs().max()  # of sums whose terms are as large, and cancel in the cross terms
    for pair in range(2):
        assert own["pull_up"][pair, "chosen"] > 0 > own["push_down"][pair, "rejected"]
        assert own["push_down"][pair, "chosen"] == pytest.approx(-own["pull_up"][pair, "rejected"], abs=rounding)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_an_optimisers_own_step(model, word_tokenizer, name):
    """Weight decay moves rows of the embedding that have no gradient: `rest`."""
    settings = {"lr": 1e-4, "momentum": 0.9} if name == "SGD" else {"lr": 1e-6}
    optimizer = getattr(torch.optim, name)(model.parameters(), weight_decay=1e-2, **settings)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    report = influence_audit(model, word_tokenizer, PAIRS, PROBES, optimizer=optimizer)
    assert report.correlation >= 0.9999 and report.slope == pytest.approx(1, abs=1e-2)
    assert (report.table["rest"] != 0).any()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert optimizer.state_dict() == state and all(p.grad is None for p in model.parameters())
    # from the same state a second audit says the same
    assert influence_audit(model, word_tokenizer, PAIRS, PROBES, optimizer=optimizer).table.equals(report.table)


def test_sgd_is_the_plain_step(model, word_tokenizer):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    plain = influence_audit(model, word_tokenizer, PAIRS, PROBES, step_size=1e-3).table
    own = influence_audit(model, word_tokenizer, PAIRS, PROBES, optimizer=optimizer).table
    for column in ("pull_up", "push_down", "measured"):
        assert own[column].tolist() == pytest.approx(plain[column].tolist(), rel=1e-6, abs=1e-12)


def test_only_an_adapter_moves(word_tokenizer):
    """One matrix of an adapter moves the answers less than all weights do."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny_llama().double(), config).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.self_attn.q_proj.lora_A" in name)
    report = influence_audit(model, word_tokenizer, PAIRS, PROBES, step_size=1e-3)
    full = influence_audit(tiny_llama().double(), word_tokenizer, PAIRS, PROBES, step_size=1e-3)
    assert report.correlation >= 0.9999 and report.slope == pytest.approx(1, abs=1e-2)
    assert report.table["measured"].abs().mean() < full.table["measured"].abs().mean()


def test_batches_and_padding_change_nothing(model, word_tokenizer):
    one, all_at_once = (
        influence_audit(model, word_tokenizer, PAIRS, PROBES, step_size=1e-3, batch_size=size).table for size in (1, 6)
    )
    # Single precision rounds other shapes otherwise on each processor: a sum by its largest term, and a difference of
    # log-probabilities, each a sum of several nats, by some 1e-6.
    largest = all_at_once["predicted"].abs().max()
    assert one["predicted"].tolist() == pytest.approx(all_at_once["predicted"].tolist(), abs=1e-6 * largest)
    assert one["measured"].tolist() == pytest.approx(all_at_once["measured"].tolist(), abs=5e-6)


def test_heat_map(model, word_tokenizer):
    report = influence_audit(model, word_tokenizer, PAIRS, PROBES, step_size=1e-3)
    figure = report.plot_tokens(1, 2)
    chosen = report.tokens.query("pair == 1 and probe == 2 and kind == 'chosen'")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == chosen["token"].tolist()
    shown = figure.axes[0].images[0].get_array()
    assert shown[2].tolist() == pytest.approx(chosen["measured"].tolist())
    with pytest.raises(ValueError, match="Expected a pair and a probe of the report, got 0 and 9"):
        report.plot_tokens(0, 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_size": None}, "either step_size or optimizer"),
        ({"step_size": -1.0}, "step_size must be positive, got -1.0"),
        ({"beta": 0}, "beta must be positive, got 0"),
        (
            {"pairs": [{"prompt": "w1 ", "chosen": "w2 "}]},
            "pairs should hold .*, got prompt, chosen",
        ),
        ({"probes": [{"prompt": "w1 ", "chosen": ""}]}, "0 and|tokens of 'chosen' in row 0. Drop empty answers"),
        ({"max_length": 2}, "within max_length=2 tokens"),
        ({"probes": []}, "probes should hold the columns prompt and a row, got no column"),
    ],
)
def test_bad_input(model, word_tokenizer, change, message):
    settings = {"pairs": PAIRS, "probes": PROBES, "step_size": 1e-3, **change}
    with pytest.raises(ValueError, match=message):
        influence_audit(model, word_tokenizer, settings.pop("pairs"), settings.pop("probes"), **settings)


def test_half_precision_is_refused(word_tokenizer):
    with pytest.raises(ValueError, match="Expected a model in float32"):
        influence_audit(tiny_llama().bfloat16(), word_tokenizer, PAIRS, PROBES, step_size=1e-3)


@pytest.mark.slow
def test_smollm2():
    model, tokenizer = load_demo_model(torch.float32)
    pair = {
        "prompt": "User: How do I keep bread fresh?\nAssistant:",
        "chosen": " Keep it in a paper bag at room temperature.",
        "rejected": " Bread is bread, who cares about it anyway.",
    }
    probe = pair | {"other_train": " The train to the coast leaves at nine."}
    report = influence_audit(model, tokenizer, [pair], [probe], step_size=1e-4)
    assert report.correlation >= 0.999 and report.slope == pytest.approx(1, abs=0.05)
