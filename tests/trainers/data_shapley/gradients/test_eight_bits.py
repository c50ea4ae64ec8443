"""Adam's moments in 8 bits, as bitsandbytes keeps them, are read and used as those of 32 bits."""

import pytest
import torch

from hf_iclr.trainers.data_shapley.gradients.direction import precondition


class AdamW8bit(torch.optim.SGD):
    """Of bitsandbytes only the name."""


def quantised(values, size=256):
    """Blocks of a largest value each, in shares of it out of 256."""
    code = torch.linspace(0, 1, 256)
    blocks = torch.nn.functional.pad(values.flatten(), (0, -values.numel() % size)).view(-1, size)
    largest = blocks.amax(1)
    nearest = (blocks / largest[:, None] * 255).round().to(torch.uint8).flatten()[: values.numel()].view(values.shape)
    return nearest, code, largest


def test_the_second_moment_is_read_block_by_block():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(30, 20))
    optimizer, second = AdamW8bit([weight]), torch.rand(30, 20) + 0.5
    group = {**optimizer.param_groups[0], "betas": (0.9, 0.99), "eps": 1e-8, "lr": 0.1}
    state = {"step": 3, "state1": torch.zeros(30, 20), "state2": second}
    optimizer.state[weight] = state
    expected = 1 / (second / (1 - 0.99**3)).sqrt()
    torch.testing.assert_close(precondition(torch.ones_like(weight), optimizer, group, weight), expected)
    state["state2"], state["qmap2"], state["absmax2"] = quantised(second)
    torch.testing.assert_close(
        precondition(torch.ones_like(weight), optimizer, group, weight), expected, rtol=1e-2, atol=1e-4
    )
    state["absmax2"] = state["absmax2"][:2]
    with pytest.raises(ValueError, match="Expected the 8-bit moments of AdamW8bit in blocks"):
        precondition(torch.ones_like(weight), optimizer, group, weight)


def test_those_of_bitsandbytes_itself():
    optimizers = pytest.importorskip("bitsandbytes").optim
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 64))
    exact = torch.nn.Parameter(weight.detach().clone())
    eight = optimizers.AdamW8bit([weight], lr=1e-3)
    whole = torch.optim.AdamW([exact], lr=1e-3)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        exact.grad = weight.grad.clone()
        eight.step()
        whole.step()
    found = precondition(torch.ones_like(weight), eight, eight.param_groups[0], weight)
    expected = precondition(torch.ones_like(exact), whole, whole.param_groups[0], exact)
    assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.95
