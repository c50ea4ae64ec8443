"""A model gets its key-value cache under the name that it wants, whoever wrote it and for which release."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_iclr.cache_argument import UPSTREAM_NAME, cache_argument, cache_inputs, find_cache, forward_parameters
from tests.architectures import tiny


class OldName(torch.nn.Module):
    """Remote code from before the renaming."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        return self.model(input_ids, use_cache=use_cache, **cache_inputs(self.model, past_key_values))


class NewName(OldName):
    def forward(self, input_ids=None, cache=None, use_cache=None, **kwargs):
        return self.model(input_ids, use_cache=use_cache, **cache_inputs(self.model, cache))


class AnyName(OldName):
    """A wrapper that hands everything on."""

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class NoCache(OldName):
    def forward(self, input_ids=None, **kwargs):
        return self.model(input_ids)


def adapted(model):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def hooked(model):
    """As accelerate replaces a forward: on the object, the signature kept."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    return add_hook_to_module(model, ModelHook())


WRAPPERS = {
    "plain": (lambda model: model, UPSTREAM_NAME),
    "adapters": (adapted, UPSTREAM_NAME),
    "accelerate": (hooked, UPSTREAM_NAME),
    "old remote code": (OldName, "past_key_values"),
    "new remote code": (NewName, "cache"),
    "hands on": (AnyName, UPSTREAM_NAME),
}


@pytest.mark.parametrize("kind", WRAPPERS)
def test_the_cache_arrives(kind):
    wrap, name = WRAPPERS[kind]
    model = wrap(tiny("llama", 0))
    ids = torch.tensor([[5, 7, 11, 13]])
    cache = DynamicCache()
    assert cache_argument(model) == name
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 2:]
        first = model(input_ids=ids[:, :2], use_cache=True, **cache_inputs(model, cache))
        assert cache.get_seq_length() == 2 and find_cache(first) is cache
        again = model(input_ids=ids[:, 2:], use_cache=True, **cache_inputs(model, find_cache(first))).logits
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)  # other shapes, other kernels


def test_a_model_without_a_cache():
    model = NoCache(tiny("llama", 0))
    assert cache_argument(model) is None and cache_inputs(model, None) == {}
    with pytest.raises(ValueError, match="Expected a model that takes a key-value cache, got NoCache"):
        cache_inputs(model, DynamicCache())


def test_a_cache_among_arguments():
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    assert find_cache({"past_key_values": cache}) is cache and find_cache({"cache": cache}) is cache
    assert find_cache({"use_cache": True}) is None and find_cache(CausalLMOutputWithPast()) is None


def test_a_replaced_forward_is_read_anew():
    model = OldName(tiny("llama", 0))
    assert "past_key_values" in forward_parameters(model)
    model.forward = lambda input_ids, cache=None: None
    assert cache_argument(model) == "cache"
