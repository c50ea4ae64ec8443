"""Edits against the dense reference, exact undo, removal, what is refused, and every solver."""

import copy
import logging
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_iclr.editors.alpha_edit import (
    AlphaEditor,
    EditRequest,
    KeyStatistics,
    continue_texts,
    perplexity,
    score_edits,
)
from hf_iclr.editors.alpha_edit.projections import find_down_projections
from tests.editors.tiny import CONTEXTS, ENDING, REQUESTS, quick_config, text_rows, tiny_model, tiny_statistics


IDS = torch.tensor([[1, 3, 4, 2, 20, 21]])
# Random weights answer nothing easily: near the output, with long moves and little ridge, they do.
STRONG = {"layers": [2, 3], "num_steps": 60, "clamp_factor": 20.0, "kl_factor": 0.0, "weight_decay": 0.0, "l2": 1e-4}


def make_editor(tokenizer, model_type="llama", model=None, folder=None, **kwargs):
    model = tiny_model(model_type) if model is None else model
    config = quick_config(**kwargs)
    statistics = tiny_statistics(model, tokenizer, layers=config.layers)
    return AlphaEditor(model, tokenizer, config, statistics, folder)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def weights_of(editor):
    return {p.index: p.module.weight.detach().clone() for p in editor.setup.projections}


def dense_reference(model, tokenizer, statistics, batches, layers, rank, l2):
    """
    AlphaEdit as its code runs it, dense and in float64: P from the preserved directions, the keys of every context by
    forwards of one row, [P (K K^T + C) + l2 I] X = P K R^T, C += K K^T.
    """
    model = copy.deepcopy(model)
    found = find_down_projections(model)
    cache = {layer: torch.zeros(found[layer].in_features, found[layer].in_features).double() for layer in layers}
    seen = {}

    def keep(name, output):
        def hook(_, inputs, out):
            value = (out[0] if isinstance(out, tuple) else out) if output else inputs[0]
            seen[name] = value.reshape(-1, value.shape[-1])[-1].double()  # OPT's MLP has no batch dimension

        return hook

    for layer in layers:
        found[layer].module.register_forward_hook(keep(layer, output=False))
    found[layers[-1]].layer.register_forward_hook(keep("out", output=True))
    for requests, states in batches:
        for number, layer in enumerate(layers):
            keys, outputs = [], []
            for request in requests:
                own = []
                for context in CONTEXTS:
                    text = context.replace("{}", request.prompt[: request.prompt.index("{}")] + request.subject)
                    with torch.no_grad():
                        model(torch.tensor([tokenizer(text)["input_ids"]]))
                    own.append(seen[layer])
                    if context == "{}":
                        outputs.append(seen["out"])
                keys.append(own[0] / 2 + sum(own[1:]) / (2 * (len(CONTEXTS) - 1)))
            keys = torch.stack(keys, 1)
            residuals = (states.double() - torch.stack(outputs)).T / (len(layers) - number)
            basis = statistics.preserved(layer, rank=rank)
            eye = torch.eye(len(keys)).double()
            projector = eye - basis @ basis.T
            left = projector @ (keys @ keys.T + cache[layer]) + l2 * eye
            delta = torch.linalg.solve(left, projector @ keys @ residuals.T).T
            found[layer].module.weight.data += found[layer].as_stored(delta).float()
            cache[layer] += keys @ keys.T
    return {layer: found[layer].module.weight.detach() for layer in layers}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma", "gptj", "opt", "falcon", "gpt_neox", "phi"])
def test_sequential_batches_equal_the_dense_official_system(model_type, word_tokenizer):
    model = tiny_model(model_type)
    before = copy.deepcopy(model)
    editor = make_editor(word_tokenizer, model=model)
    statistics = tiny_statistics(before, word_tokenizer, layers=[1, 2])
    report = editor.edit(REQUESTS, batch_size=2, progress=False)
    assert len(report.edits) == 4 and not report.rejected
    made = [(batch.requests, batch.states) for batch in editor.batches]
    expected = dense_reference(before, word_tokenizer, statistics, made, [1, 2], 8, 0.1)
    for layer, weight in weights_of(editor).items():
        original = before.get_submodule(editor.setup.projections[0].name.replace(".1.", f".{layer}.")).weight
        change = expected[layer] - original
        assert change.norm() > 1e-3
        assert (weight - expected[layer]).norm() < 1e-5 * change.norm() + 1e-6 * original.norm()


def test_the_update_has_the_rank_of_the_batch_and_leaves_preserved_directions(word_tokenizer):
    editor = make_editor(word_tokenizer)
    before = weights_of(editor)
    editor.edit(REQUESTS[:3], progress=False)
    for layer, weight in weights_of(editor).items():
        delta = (weight - before[layer]).double()
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 3
        assert (delta @ editor.setup.preserved[layer]).norm() < 1e-5 * delta.norm()


def test_without_the_projector_other_text_gets_less_likely(word_tokenizer):
    """Text that the model says itself, and that the statistics have read: whatever is changed makes it less likely."""
    model = tiny_model("llama")
    texts = continue_texts(model, word_tokenizer, [f"w{i}" for i in range(1, 50)], max_new_tokens=20, top_k=50)
    rows = [{"text": text} for text in texts]
    statistics = KeyStatistics.from_dataset(model, word_tokenizer, rows, layers=[1, 2], progress=False)
    before, worse = perplexity(model, word_tokenizer, texts, progress=False), {}
    for solver in ("alphaedit", "ridge"):
        config = quick_config(solver=solver, project=None, nullspace_rank=24, l2=1.0)
        editor = AlphaEditor(model, word_tokenizer, config, statistics)
        editor.edit(ENDING, progress=False)
        worse[solver] = perplexity(model, word_tokenizer, texts, progress=False) / before - 1
        editor.undo()
    assert 0 < 2 * worse["alphaedit"] < worse["ridge"]


def test_edits_take_and_the_report_says_how_well(word_tokenizer):
    editor = make_editor(word_tokenizer, **STRONG)
    table = editor.edit(ENDING, progress=False).to_pandas().set_index("id")
    assert table.p_after.gt(3 * table.p_before).all() and table.p_after.mean() > 10 * table.p_before.mean()
    for request in ENDING:
        prompt, target = word_tokenizer(request.text)["input_ids"], word_tokenizer(request.target_new)["input_ids"]
        with torch.no_grad():
            log_probs = editor.model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        own = torch.stack([log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(target)])
        assert table.p_after[request.id] == pytest.approx(own.mean().exp().item(), rel=1e-4)


def test_a_batch_is_made_the_same_way_twice(word_tokenizer):
    first = make_editor(word_tokenizer, context_templates=None, num_contexts=2)
    second = make_editor(word_tokenizer, context_templates=None, num_contexts=2)
    assert str(first.edit(REQUESTS, progress=False)) == str(second.edit(REQUESTS, progress=False))
    assert first.config.context_templates == second.config.context_templates
    assert torch.equal(logits(first.model), logits(second.model))


def test_undo_is_exact_batch_by_batch(word_tokenizer):
    editor = make_editor(word_tokenizer)
    states = [logits(editor.model)]
    for request in REQUESTS[:3]:
        editor.edit([request], progress=False)
        states.append(logits(editor.model))
    assert not torch.equal(states[0], states[1])
    assert editor.undo() == [REQUESTS[2].id]
    assert torch.equal(logits(editor.model), states[2])
    assert editor.undo(2) == [REQUESTS[0].id, REQUESTS[1].id]
    assert torch.equal(logits(editor.model), states[0]) and editor.edits == []
    with pytest.raises(ValueError, match="between 1 and 0 batches"):
        editor.undo()


def test_bfloat16_weights_are_rounded_once_and_come_back_exactly(word_tokenizer):
    model = tiny_model("llama").bfloat16()
    editor = make_editor(word_tokenizer, model=model)
    before = weights_of(editor)
    editor.edit(REQUESTS[:2], batch_size=1, progress=False)
    for p in editor.setup.projections:
        exact = before[p.index].float()
        for batch in editor.batches:
            assert batch.factors[p.index].dtype == batch.residuals[p.index].dtype == torch.float32
            exact = exact + batch.residuals[p.index] @ batch.factors[p.index]
        assert torch.equal(p.module.weight, exact.bfloat16())
    editor.undo(2)
    assert all(torch.equal(weight, before[layer]) for layer, weight in weights_of(editor).items())


def test_a_removed_edit_was_never_made(word_tokenizer):
    """With the same target states, the other edits are what they would be without it."""
    editor = make_editor(word_tokenizer)
    editor.edit(REQUESTS, batch_size=2, progress=False)
    states = {r.id: state for batch in editor.batches for r, state in zip(batch.requests, batch.states, strict=True)}
    editor.remove(REQUESTS[1].id)
    assert [edit.id for edit in editor.edits] == [REQUESTS[i].id for i in (0, 2, 3)]
    fresh = make_editor(word_tokenizer)
    for name, kept in (("a", [REQUESTS[0]]), ("b", REQUESTS[2:])):
        wanted = torch.stack([states[request.id] for request in kept])
        fresh.batches.append(fresh._solver.solve(name, kept, wanted, fresh.batches))
    assert torch.equal(logits(editor.model), logits(fresh.model))
    editor.undo(2)
    assert torch.equal(logits(editor.model), logits(tiny_model("llama")))
    with pytest.raises(ValueError, match="id of an edit in force, got 'none'"):
        editor.remove("none")


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2"])
def test_post_norm_models_are_edited_in_one_layer_at_the_projection(model_type, word_tokenizer):
    model = tiny_model(model_type)
    with pytest.raises(ValueError, match="one layer to edit .* normalise"):
        AlphaEditor(model, word_tokenizer, quick_config(layers=[0, 1]), tiny_statistics(model, word_tokenizer))
    editor = make_editor(word_tokenizer, model=model, **STRONG | {"layers": [2], "nullspace_rank": 2})
    before = logits(model)
    report = editor.edit(ENDING, progress=False).to_pandas()
    assert report.p_after.gt(report.p_before).all()
    editor.undo()
    assert torch.equal(logits(model), before)


SOLVERS = [
    {"solver": "memit", "moment_weight": 1e-3},
    {"solver": "memit_seq", "moment_weight": 1e-3},
    {"solver": "ridge"},
    {"solver": "memit", "moment_weight": 1e-3, "project": True},
    {"solver": "ridge", "project": True},
    {"solver": "memit", "moment_weight": 1e-3, "post_processing": "rect"},
]


@pytest.mark.parametrize("settings", SOLVERS, ids=lambda s: " ".join(map(str, s.values())))
def test_every_solver_edits_and_undoes(settings, word_tokenizer):
    editor = make_editor(word_tokenizer, **settings)
    before, weights = logits(editor.model), weights_of(editor)
    report = editor.edit(REQUESTS, batch_size=2, progress=False).to_pandas()
    assert report.p_after.mean() > report.p_before.mean()
    for p in editor.setup.projections:
        delta = (p.module.weight - weights[p.index]).double()
        moved = (delta @ _basis(editor, p.index)).norm() / delta.norm()
        projected = settings.get("project", False)
        assert (moved < 1e-5) if projected else (moved > 1e-3)
        kept = (delta.abs() > 1e-7).float().mean()
        if settings.get("post_processing") == "rect":
            assert kept < 0.7  # two batches of 40 %
    editor.undo(2)
    assert torch.equal(logits(editor.model), before)


def _basis(editor, layer):
    return tiny_statistics(tiny_model("llama"), editor.tokenizer, layers=[layer]).preserved(layer, rank=8)


def test_projection_is_the_one_line_for_other_methods(word_tokenizer):
    """With no previous keys, ridge then projected differs from alphaedit, which projects inside its system."""
    plain = make_editor(word_tokenizer, solver="ridge", project=True)
    inside = make_editor(word_tokenizer)
    for editor in (plain, inside):
        editor.edit(REQUESTS[:1], progress=False)
    assert not torch.equal(weights_of(plain)[1], weights_of(inside)[1])


class Int8Linear(nn.Module):
    """A quantised layer as others have it: integer weights, a scale, no floating-point `weight`."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(linear.weight.abs().amax() / 127, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x) * self.scale)


class Float8Linear(Int8Linear):
    """Its weight is a floating-point number, and no use without the scale."""

    def __init__(self, linear):
        super().__init__(linear)
        self.scale = nn.Parameter(linear.weight.abs().amax() / 448, requires_grad=False)
        self.weight = nn.Parameter((linear.weight / self.scale).to(torch.float8_e4m3fn), requires_grad=False)


class PackedLinear(Int8Linear):
    """As GPTQ and AWQ have it: buffers of other names, no weight at all."""

    def __init__(self, linear):
        super().__init__(linear)
        self.register_buffer("qweight", self.weight.data.t().contiguous())
        del self.weight

    def forward(self, x):
        return nn.functional.linear(x, self.qweight.t().to(x) * self.scale)


@pytest.mark.parametrize("kind", [Int8Linear, Float8Linear, PackedLinear])
def test_a_quantised_base_is_edited_beside_its_weights(kind, word_tokenizer):
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj = kind(layer.mlp.down_proj)
    editor = make_editor(word_tokenizer, model=model, **STRONG)
    before, stored = logits(model), copy.deepcopy(model.model.layers[2].mlp.down_proj.state_dict())
    report = editor.edit(ENDING, batch_size=2, progress=False).to_pandas()
    assert report.p_after.gt(3 * report.p_before).all()
    for name, value in model.model.layers[2].mlp.down_proj.state_dict().items():
        assert torch.equal(value.flatten().view(torch.uint8), stored[name].flatten().view(torch.uint8))
    editor.undo(2)
    assert torch.equal(logits(model), before)


def test_requests_that_cannot_be_made_stand_in_the_report(word_tokenizer):
    editor = make_editor(word_tokenizer)
    limit = editor.model.config.max_position_embeddings
    editor.model.config.max_position_embeddings = 12
    long = EditRequest("w1 {}", "w2", " ".join(["w3"] * 20))
    report = editor.edit(
        [*REQUESTS[:2], EditRequest(REQUESTS[0].prompt, REQUESTS[0].subject, "w30"), long], progress=False
    )
    assert [edit["id"] for edit in report.edits] == [request.id for request in REQUESTS[:2]]
    assert [row["reason"][:12] for row in report.rejected] == ["contradicts ", "24 tokens wi"]
    assert "2 edits made, 2 rejected" in str(report)
    editor.model.config.max_position_embeddings = limit
    again = editor.edit([REQUESTS[0]], progress=False)
    assert again.rejected[0]["reason"] == "this edit is in force already" and len(editor.batches) == 1
    with pytest.raises(TypeError, match="list of EditRequest, got dict"):
        editor.edit([{"prompt": "w1"}])
    with pytest.raises(ValueError, match=r"at least one request, got none. Type `editor.edit\("):
        editor.edit([])
    with pytest.raises(ValueError, match="batch_size to be a whole number from 1 .* got 0"):
        editor.edit(REQUESTS, batch_size=0)


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_target_state_that_is_zero_or_not_finite_rejects_its_request_alone(value, word_tokenizer, monkeypatch):
    from hf_iclr.editors.alpha_edit import editor as alpha_editor

    find = alpha_editor.find_target_states

    def broken(*args, **kwargs):
        found = find(*args, **kwargs)
        if len(found.states) == 4:
            found.states[1] = value
        return found

    monkeypatch.setattr(alpha_editor, "find_target_states", broken)
    editor = make_editor(word_tokenizer)
    report = editor.edit(REQUESTS, progress=False)
    assert len(report.edits) == 3 and report.rejected[0]["id"] == REQUESTS[1].id
    assert "not finite" in report.rejected[0]["reason"]


def test_a_batch_that_fails_half_way_leaves_nothing(word_tokenizer, monkeypatch):
    editor = make_editor(word_tokenizer)
    editor.edit(REQUESTS[:1], progress=False)
    before, factor, calls = logits(editor.model), editor._solver._factor, []

    def fails_in_the_second_layer(*args):
        calls.append(args)
        if len(calls) == 2:
            raise ValueError("singular")
        return factor(*args)

    monkeypatch.setattr(editor._solver, "_factor", fails_in_the_second_layer)
    with pytest.raises(ValueError, match="singular"):
        editor.edit(REQUESTS[1:3], progress=False)
    assert torch.equal(logits(editor.model), before) and len(editor.batches) == 1
    monkeypatch.undo()
    editor.remove(REQUESTS[0].id)
    assert torch.equal(logits(editor.model), logits(tiny_model("llama")))


def test_what_does_not_fit_together_is_refused_before_any_work(word_tokenizer):
    model = tiny_model("llama")
    statistics = tiny_statistics(model, word_tokenizer, layers=[1, 2])
    with pytest.raises(ValueError, match="statistics of this model, got(?s:.*) weights differ"):
        AlphaEditor(tiny_model("qwen2"), word_tokenizer, quick_config(), statistics)
    with pytest.raises(ValueError, match="statistics of layer 3"):
        AlphaEditor(model, word_tokenizer, quick_config(layers=[3]), statistics)
    with pytest.raises(ValueError, match="Expected statistics for the solver 'alphaedit'"):
        AlphaEditor(model, word_tokenizer, quick_config())
    AlphaEditor(model, word_tokenizer, quick_config(solver="ridge"))
    with pytest.raises(TypeError, match="merge_and_unload"):
        AlphaEditor(get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"])), word_tokenizer)
    for arguments, words in (
        ((None, quick_config(), statistics), "PreTrainedTokenizerBase, got NoneType"),
        ((word_tokenizer, {"l2": 1.0}, statistics), "AlphaEditConfig, got dict"),
        ((word_tokenizer, quick_config(), "statistics"), "KeyStatistics, got str: 'statistics'"),
    ):
        with pytest.raises(TypeError, match=words):
            AlphaEditor(model, *arguments)
    broken = KeyStatistics(
        **{**vars(statistics), "sums": {1: statistics.sums[1] * float("nan"), 2: statistics.sums[2]}}
    )
    with pytest.raises(ValueError, match="finite statistics, got NaN or infinity in layer 1"):
        AlphaEditor(model, word_tokenizer, quick_config(), broken)
    empty = KeyStatistics(**{**vars(statistics), "sums": {1: 0 * statistics.sums[1], 2: statistics.sums[2]}})
    with pytest.raises(ValueError, match="full rank .* from more tokens"):
        AlphaEditor(model, word_tokenizer, quick_config(solver="memit"), empty).edit(REQUESTS[:1], progress=False)


def test_a_vacuous_null_space_and_keys_without_room_are_warned_of(word_tokenizer, caplog):
    model = tiny_model("llama")
    statistics = KeyStatistics.from_dataset(model, word_tokenizer, text_rows(), layers=[1], progress=False)
    with caplog.at_level(logging.WARNING, logger="hf_iclr.editors"):
        AlphaEditor(model, word_tokenizer, quick_config(layers=[1], nullspace_rank=0), statistics)
        assert "constrains next to nothing" in caplog.text
        editor = AlphaEditor(model, word_tokenizer, quick_config(layers=[1], nullspace_rank=31), statistics)
        report = editor.edit(REQUESTS[:2], progress=False)
    assert "norm is editable" in caplog.text
    assert report.layers[0]["preserved"] == 31 and report.layers[0]["editable"] < 0.3


def test_same_subject_twice_is_seen_as_a_collision(word_tokenizer):
    editor = make_editor(word_tokenizer)
    editor.edit(REQUESTS[:1], progress=False)
    again = EditRequest("w1 {} w40", REQUESTS[0].subject, "w41")  # read alike up to the subject
    report = editor.edit([again, REQUESTS[1]], progress=False)
    assert report.edits[0]["collision"] > 0.99 > report.edits[1]["collision"]


def test_layers_spread_over_devices_are_edited_alike(word_tokenizer):
    """`device_map` puts hooks of accelerate's around every layer's forward."""
    from accelerate import dispatch_model

    plain, spread = tiny_model("llama"), tiny_model("llama")
    editor = make_editor(word_tokenizer, model=plain)
    statistics = tiny_statistics(plain, word_tokenizer, layers=[1, 2])
    parts = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    parts |= {f"model.layers.{layer}": "cpu" for layer in range(4)}
    spread = dispatch_model(spread, parts, main_device="cpu", force_hooks=True)
    assert hasattr(spread.model.layers[1], "_hf_hook")
    other = AlphaEditor(spread, word_tokenizer, quick_config(), statistics)
    for each in (editor, other):
        each.edit(REQUESTS, batch_size=2, progress=False)
    assert torch.equal(logits(plain), logits(spread))
    assert hasattr(spread.model.layers[1], "_hf_hook")


def target_probability(model, ids, start):
    """Geometric mean of the tokens from `start` on."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0, start - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(ids[start:])[:, None]).mean().exp().item()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3_5_text"])
def test_a_long_target_is_said_with_a_state_for_each_part_of_it(model_type, word_tokenizer):
    """Twelve tokens, eight states in all; a short target beside it; what stays is made anew when one is removed."""
    long = EditRequest("w1 w2 {}", "w3 w4", " ".join(f"w{i}" for i in range(20, 32)))
    layers = [2] if model_type == "gemma2" else [2, 3]
    settings = STRONG | {"layers": layers, "num_steps": 30, "context_templates": ["{}", "w9 {}"]}
    reached = {}
    for chunk in (12, 2):
        editor = make_editor(word_tokenizer, model_type, chunk_length=chunk, **settings)
        report = editor.edit([long, ENDING[1]], progress=False)
        ids = word_tokenizer(f"{long.text} {long.target_new}")["input_ids"]
        assert report.edits[0]["p_after"] == pytest.approx(target_probability(editor.model, ids, 4), rel=1e-3)
        reached[chunk] = report.edits[0]["p_after"]
        assert all(keys.shape[1] == 12 // chunk + 1 for keys in editor.batches[0].keys.values())
    assert reached[2] > 1.5 * reached[12]
    with_both = weights_of(editor)
    editor.remove(ENDING[1].id)
    alone = weights_of(editor)
    assert any(not torch.equal(with_both[layer], alone[layer]) for layer in layers)
    editor.undo()
    assert editor.edits == []


def test_a_prompt_without_a_subject_is_edited_though_its_key_is_small(tmp_path, word_tokenizer):
    """However large the ridge is beside its key, as that of ten is beside those of a real model."""
    reached = {}
    for request in (ENDING[0], EditRequest(ENDING[0].text, None, ENDING[0].target_new)):
        editor = make_editor(word_tokenizer, **STRONG | {"l2": 1e4})
        (row,) = editor.edit([request], progress=False).edits
        reached[request.subject] = row["p_after"]
        alone = make_editor(word_tokenizer, **STRONG | {"l2": 1e4, "context_templates": ["{}"]})
        alone.edit([request], progress=False)
        keys = [each.batches[0].keys[2] for each in (editor, alone)]
        assert torch.allclose(*keys, rtol=1e-4, atol=1e-6) == (request.subject is None)  # contexts leave it alone
    assert reached[None] > 0.3 > 5 * reached["w3 w4"], reached
    editor.save_pretrained(tmp_path)
    again = AlphaEditor.from_pretrained(tmp_path, model=tiny_model("llama"), tokenizer=word_tokenizer)
    for each in (editor, again):
        each.edit([EditRequest("w11 w12 w13", None, "w15")], progress=False)
    for layer, weight in weights_of(editor).items():
        torch.testing.assert_close(weights_of(again)[layer], weight)


def test_chat_turns_are_edited_and_reported_as_they_are_asked(word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = "w40 {% for m in messages %}{{ m.content }} w41 w42{{ ' ' }}{% endfor %}"
    settings = {"context_templates": None, "num_contexts": 1, "context_length": 3, "chat_template": True}
    editor = make_editor(tokenizer, **STRONG | settings)
    (row,) = editor.edit([REQUESTS[0]], progress=False).edits
    assert editor.config.context_templates[0] == "w40 {} w41 w42 " and len(editor.config.context_templates) == 2
    ids = tokenizer("w40 w1 w3 w4 w2 w41 w42 w5")["input_ids"]
    assert row["p_after"] == pytest.approx(target_probability(editor.model, ids, 7), rel=1e-3)
    scores = score_edits(editor.model, tokenizer, [REQUESTS[0]], chat_template=True, progress=False)
    assert math.exp(-scores.nll_new[0]) == pytest.approx(row["p_after"], rel=1e-5)


def test_a_generator_of_requests_is_read_and_other_things_get_a_sentence(word_tokenizer):
    editor = make_editor(word_tokenizer)
    assert len(editor.edit((request for request in REQUESTS[:2]), progress=False).edits) == 2
    assert len(editor.edit(REQUESTS[2], progress=False).edits) == 1
    for wrong in ("w1", None, 3, {"prompt": "w1"}, [None]):
        with pytest.raises(TypeError, match=r"list of EditRequest, got \w+: .* Type `editor.edit\("):
            editor.edit(wrong, progress=False)
    with pytest.raises(ValueError, match="Expected at least one request"):
        editor.edit((request for request in ()), progress=False)
    with pytest.raises(ValueError, match=r"got an empty list. Type \['{}'\]"):
        quick_config(context_templates=[])


def test_a_correction_takes_the_place_of_the_earlier_edit(word_tokenizer):
    """The model is the one that the other edits and the correction alone would have given."""
    editor = make_editor(word_tokenizer, **STRONG)
    editor.edit(ENDING, batch_size=2, progress=False)
    wrong = ENDING[0]
    right = EditRequest(wrong.prompt, wrong.subject, "w30")
    (row,) = editor.edit([right], progress=False).edits
    assert [edit.target_new for edit in editor.edits] == ["w15", "w19", "w25", "w30"]
    ids = word_tokenizer(f"{right.text} w30")["input_ids"]
    assert row["p_after"] == pytest.approx(target_probability(editor.model, ids, len(ids) - 1), rel=1e-3)
    assert row["p_after"] > 0.5 and row["p_before"] < 0.1
    again = make_editor(word_tokenizer, **STRONG)
    again.edit(ENDING, batch_size=2, progress=False)
    again.remove(wrong.id)
    again.edit([right], progress=False)
    for layer, weight in weights_of(again).items():
        torch.testing.assert_close(weights_of(editor)[layer], weight)
    report = editor.edit([right, EditRequest(right.prompt, right.subject, "w31", id=right.id)], progress=False)
    assert report.rejected[0]["reason"] == "this edit is in force already"
    named = editor.edit([EditRequest("w9 {}", "w8", "w31", id=right.id)], progress=False)
    assert f"with its id {right.id} is in force" in named.rejected[0]["reason"]
    editor.edit([EditRequest(right.text, None, "w31")], progress=False)  # the same text, without a subject
    assert [edit.target_new for edit in editor.edits] == ["w15", "w19", "w25", "w31"]


def test_two_threads_of_one_editor_wait_for_each_other(word_tokenizer):
    editor = make_editor(word_tokenizer)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda request: editor.edit([request], progress=False).edits, REQUESTS[:3]))
    assert [len(edits) for edits in done] == [1, 1, 1] and len(editor.edits) == 3
    alone = make_editor(word_tokenizer)
    for request in editor.edits:
        alone.edit([request], progress=False)
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(editor.model.state_dict()[name], value)
