import copy

import pytest
import torch

from hf_iclr.generation.cascade_generation import enable_cascade
from tests.generation.toy import tiny_llama


def noisy_copy(model, noise: float):
    """A small model that agrees with the large one about as often as a trained pair does."""
    generator = torch.Generator().manual_seed(1)
    small = copy.deepcopy(model)
    for parameter in small.parameters():
        parameter.data += noise * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return small


@pytest.fixture(scope="module")
def pair():
    large = tiny_llama(0, layers=2, vocab_size=50)
    large.lm_head.weight.data *= 2  # so that it is sure of some tokens
    return large, noisy_copy(large, 0.3)


@pytest.fixture
def model(pair):
    return enable_cascade(*pair, cascade_rule="token_v3")
