"""Cascades beside what the doctor runs: prompts of several lengths, adapters, remote code of any age, no hf_iclr."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import LlamaForCausalLM

from hf_iclr import SpeculativeCascadeForCausalLM, enable_cascade
from hf_iclr.cache_argument import UPSTREAM_NAME
from hf_iclr.doctor.self_check import GREEDY
from hf_iclr.tiny_models import tiny_llama, word_tokenizer


class OldRemoteCode(LlamaForCausalLM):
    """A model whose forward names its cache as before transformers 5.24."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        kwargs[UPSTREAM_NAME] = past_key_values
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


class NewRemoteCode(LlamaForCausalLM):
    """The same with the name of 5.24."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, **kwargs):
        kwargs[UPSTREAM_NAME] = cache
        return super().forward(input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)


def remote(model_class: type) -> LlamaForCausalLM:
    llama = tiny_llama()
    model = model_class(llama.config).eval()
    model.load_state_dict(llama.state_dict())
    return model


def adapted() -> LlamaForCausalLM:
    torch.manual_seed(1)
    # Not `model.add_adapter`: transformers 5.24 asks there for a PEFT that is newer than any we support.
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), tiny_llama())


NOT_PLAIN = {
    "old remote code": lambda: remote(OldRemoteCode),
    "new remote code": lambda: remote(NewRemoteCode),
    "adapters": adapted,
}


def test_prompts_of_several_lengths():
    large = tiny_llama()
    inputs = word_tokenizer()(["w1 w2 w3", "w4", "w5 w6 w7 w8 w9"], return_tensors="pt", padding=True)
    cascade = enable_cascade(large, tiny_llama(noise=0.05))
    decoded = cascade.generate(**inputs, **GREEDY, cascade_rule="spec")
    assert torch.equal(decoded, large.generate(**inputs, **GREEDY))
    assert cascade.cascade_statistics.backend == "batched"


@pytest.mark.parametrize(("rule", "alpha"), [("token_v3", 1.0), ("opt", float("inf"))])
def test_a_rule_that_leaves_all_to_the_small_model(rule, alpha):
    large, small = tiny_llama(), tiny_llama(noise=0.3)
    inputs = word_tokenizer()(["w1 w2 w3"], return_tensors="pt")
    decoded = enable_cascade(large, small).generate(**inputs, **GREEDY, cascade_rule=rule, cascade_alpha=alpha)
    assert torch.equal(decoded, small.generate(**inputs, **GREEDY))
    assert not torch.equal(decoded, large.generate(**inputs, **GREEDY))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("old remote code", "batched"),  # transformers' own loop gives it no cache from 5.24 on
        ("new remote code", "batched"),
        ("adapters", "batched"),
        ("adapters", "assisted"),
    ],
)
def test_models_that_are_not_plain(kind, backend):
    large = NOT_PLAIN[kind]()
    inputs = word_tokenizer()(["w1 w2 w3"], return_tensors="pt")
    uncached = large.generate(**inputs, **GREEDY, use_cache=False)
    cascade = enable_cascade(large, tiny_llama(noise=0.05))
    assert torch.equal(cascade.generate(**inputs, **GREEDY, cascade_rule="spec", cascade_backend=backend), uncached)
    drafted, accepted = sum(cascade.cascade_statistics.drafted), sum(cascade.cascade_statistics.accepted)
    assert drafted and (accepted or kind == "adapters")  # which are random: the draft is of the model without them


def test_a_composite_runs_where_hf_iclr_cannot_be_imported(hub, tmp_path):
    large, tokenizer = tiny_llama(), word_tokenizer()
    SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, tiny_llama(noise=0.05)).save_pretrained(tmp_path)
    ids = tokenizer(["w1 w2 w3"], return_tensors="pt")["input_ids"]
    expected = large.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0].tolist()
    code = f"""
import sys
assert "hf_iclr" not in sys.modules
sys.modules["hf_iclr"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
ids = torch.tensor({ids.tolist()})
for backend in ("batched", "assisted"):
    decoded = model.generate(ids, do_sample=False, max_new_tokens=12, cascade_rule="spec", cascade_backend=backend)
    print(decoded[0].tolist(), model.cascade_statistics.backend)
"""
    assert hub.run(code).splitlines() == [f"{expected} batched", f"{expected} assisted"]
