"""Target states of many requests at once equal those of the plain loop: one request, full forwards, all positions."""

import pytest
import torch

from hf_iclr.editors.alpha_edit.projections import find_down_projections
from hf_iclr.editors.alpha_edit.requests import EditRequest
from hf_iclr.editors.alpha_edit.rows import encode_request
from hf_iclr.editors.alpha_edit.targets import find_target_states
from tests.editors.tiny import EDITABLE, HYBRIDS, REQUESTS, quick_config, tiny_model


def reference_state(model, tokenizer, projection, request, config):
    """The paper's procedure as it is written: every step runs the whole model on every row and every position."""
    rows = [
        encode_request(tokenizer, request.prompt, request.subject, request.target_new, context)
        for context in config.context_templates
    ]
    kl_row = encode_request(tokenizer, "{} is a", request.subject)
    initial = None

    def run(row, delta):
        def add(_, __, output):
            nonlocal initial
            states = output[0] if isinstance(output, tuple) else output
            if initial is None:
                initial = states[0, row.subject].detach().clone()
            moved = states.clone()
            moved[0, row.subject] = moved[0, row.subject] + delta
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        hook = projection.target.register_forward_hook(add)
        logits = model(torch.tensor([row.ids]), use_cache=False).logits[0].log_softmax(-1)
        hook.remove()
        return logits

    delta = torch.zeros(projection.out_features, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=config.learning_rate)
    before = None
    for step in range(config.num_steps):
        losses = []
        for row in rows:
            log_probs = run(row, delta)
            places = range(row.start, len(row.ids))
            losses.append(-torch.stack([log_probs[i - 1, row.ids[i]] for i in places]).mean())
        now = run(kl_row, delta)[kl_row.subject]
        before = now.detach() if before is None else before
        loss = torch.stack(losses).mean() + config.kl_factor * (now.exp() * (now - before)).sum()
        if step:
            loss = loss + config.weight_decay * delta.norm() / initial.norm() ** 2
        if step == config.num_steps - 1 or loss < config.loss_threshold:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta *= (config.clamp_factor * initial.norm() / delta.norm()).clamp_max(1)
    return initial + delta.detach(), loss.detach()


@pytest.mark.parametrize("model_type", [*EDITABLE, *(pytest.param(name, marks=pytest.mark.slow) for name in HYBRIDS)])
def test_many_at_once_equal_one_at_a_time(model_type, word_tokenizer):
    model = tiny_model(model_type, attn_implementation="eager")
    projections = [p for p in find_down_projections(model) if p.index < 3]
    config = quick_config(kl_factor=0.5, num_steps=5)
    found = find_target_states(model, word_tokenizer, projections, REQUESTS, config, progress=False)
    for request, state, loss in zip(REQUESTS, found.states, found.losses, strict=True):
        expected, expected_loss = reference_state(model, word_tokenizer, projections[-1], request, config)
        torch.testing.assert_close(state, expected, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(loss, expected_loss, rtol=2e-4, atol=2e-4)


def test_finished_rows_leave_the_batch_and_stay_as_they_were(word_tokenizer):
    model = tiny_model("llama")
    projections = find_down_projections(model)[:3]
    config = quick_config(num_steps=12, clamp_factor=4.0, kl_factor=0.0, weight_decay=0.0, learning_rate=0.3)
    whole = find_target_states(model, word_tokenizer, projections, REQUESTS, config, progress=False)
    config.loss_threshold = whole.losses.sort().values[1].item() + 1e-3  # two of the four get there
    together = find_target_states(model, word_tokenizer, projections, REQUESTS, config, progress=False)
    assert 2 <= (together.losses < config.loss_threshold).sum() < 4
    assert together.steps.min() < 11 == together.steps.max()
    for index, request in enumerate(REQUESTS):
        alone = find_target_states(model, word_tokenizer, projections, [request], config, progress=False)
        torch.testing.assert_close(alone.states[0], together.states[index], rtol=1e-3, atol=1e-3)
        assert alone.steps[0] == together.steps[index]


def test_only_layers_above_and_tokens_from_the_subject_on_are_run(word_tokenizer):
    model = tiny_model("llama")
    projections = find_down_projections(model)[:3]
    seen = {0: [], 3: []}
    for layer, shapes in seen.items():
        mlp = model.model.layers[layer].mlp
        mlp.register_forward_hook(lambda _, inputs, __, shapes=shapes: shapes.append(inputs[0].shape))
    heads = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: heads.append(inputs[0].shape))
    config = quick_config(kl_factor=0.0, num_steps=4, loss_threshold=0.0)
    find_target_states(model, word_tokenizer, projections, REQUESTS, config, progress=False)
    # Two batches of two requests, whose rows are as wide. Of each the tokens before the subjects' ends and the others
    # once, above the others once a step.
    assert [shape[1] for shape in seen[0]] == [4, 2, 4, 3]
    assert [shape[1] for shape in seen[3]] == [4, *[2] * 4, 4, *[3] * 4]
    # Three contexts of three requests with one target token and one with two.
    assert heads == [(1, 3 * 2, 16)] * 4 + [(1, 3 * 3, 16)] * 4


def test_the_model_is_left_as_it_was(word_tokenizer):
    model = tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    find_target_states(
        model, word_tokenizer, find_down_projections(model)[:2], REQUESTS, quick_config(), progress=False
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_subject_that_ends_at_the_first_token_needs_no_prefix(word_tokenizer):
    model = tiny_model("llama")
    projections = find_down_projections(model)[:2]
    requests = [EditRequest("{} w2", "w3", "w4"), EditRequest("{} w6 w7", "w8", "w9")]
    config = quick_config(context_templates=["{}"], kl_factor=0.0)
    found = find_target_states(model, word_tokenizer, projections, requests, config, progress=False)
    assert found.states.isfinite().all()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])
def test_in_bfloat16_only_products_above_the_edited_layer_are_rounded(model_type, word_tokenizer):
    model = tiny_model(model_type)
    projections = find_down_projections(model)[:2]
    configs = {dtype: quick_config(optimization_dtype=dtype) for dtype in ("float32", "bfloat16", "auto")}
    found = {
        dtype: find_target_states(model, word_tokenizer, projections, REQUESTS, config, progress=False)
        for dtype, config in configs.items()
    }
    exact, rounded = found["float32"].states, found["bfloat16"].states
    assert rounded.dtype == torch.float32 and not torch.equal(exact, rounded)
    assert ((exact - rounded).norm(dim=1) < 0.1 * exact.norm(dim=1)).all()
    assert torch.equal(exact, found["auto"].states)  # so small matrices do not gain
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_likely_target_is_done_whatever_the_penalties(word_tokenizer):
    model = tiny_model("llama")
    projections = find_down_projections(model)[:3]
    settings = {"num_steps": 20, "clamp_factor": 4.0, "kl_factor": 1.0, "weight_decay": 0.0, "learning_rate": 0.3}
    config = quick_config(**settings, loss_threshold=0.0)
    whole = find_target_states(model, word_tokenizer, projections, REQUESTS, config, progress=False)
    assert (whole.steps == 19).all()
    config.nll_threshold = 3.25  # one gets there
    found = find_target_states(model, word_tokenizer, projections, REQUESTS, config, progress=False)
    assert (found.steps < 19).tolist() == [False, False, True, False]
    assert found.losses[2] > 3.25  # with KL
    config.num_steps, config.nll_threshold = int(found.steps[2]) + 1, 0.0
    same = find_target_states(model, word_tokenizer, projections, REQUESTS, config, progress=False)
    torch.testing.assert_close(same.states[2], found.states[2], rtol=1e-3, atol=1e-3)


def test_rows_much_wider_than_others_are_in_another_batch(word_tokenizer):
    model = tiny_model("llama")
    projections = find_down_projections(model)[:3]
    shapes = []
    model.model.layers[3].mlp.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    long = EditRequest("{} w1 w2 w3 w4 w5 w6 w7", "w8", "w9")
    config = quick_config(kl_factor=0.0, num_steps=1, context_templates=["{}"])
    short = EditRequest("w9 {} w1", "w8", "w9")
    find_target_states(model, word_tokenizer, projections, [long, short], config, progress=False)
    assert (1, 2, 16) in shapes and (1, 8, 16) in shapes and not any(shape[0] == 2 for shape in shapes)
