"""The JSON example: every text through a cascade is JSON, in both loops, in batches, greedily and sampled."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from hf_iclr import enable_cascade
from tests.generation.toy import left_padded, perturbed_copy, tiny_llama


WORDS = [
    "</s>",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"a"',
    '"b',
    'c"',
    "1",
    "-",
    "0",
    "true",
    "fal",
    "se",
    '":',
    '{"',
    "{}",
    "]}",
]


def load_example():
    path = Path(__file__).parents[2] / "examples" / "structured_output.py"
    spec = importlib.util.spec_from_file_location("structured_output", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="</s>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="module")
def models():
    large = tiny_llama(3, layers=2, vocab_size=24)  # four ids more than there are tokens
    return large, perturbed_copy(large)


def is_json(tokenizer, ids) -> bool:
    """Whether new tokens are a whole object; otherwise they must be the beginning of one that ran out of tokens."""
    text = "".join(WORDS[i] for i in ids if i)
    if 0 in ids:
        return isinstance(json.loads(text), dict)
    assert example.steps(("value", ""), text) is not None and len(ids) == 30
    return False


@pytest.mark.parametrize(
    "text", ['{"a":[1,-20,true,null],"b":{}}', "[]", "-7", '"x\\n"', "[[],[0]]", '{"k":"v","l":false}']
)
def test_grammar_takes_every_beginning_of_json(text):
    json.loads(text)
    assert all(example.steps(("value", ""), text[:length]) for length in range(len(text) + 1))
    assert example.steps(("value", ""), text) in (("next", ""), ("digits", ""))


@pytest.mark.parametrize(
    "text", ["01", '{"a"}', "[1,]", "{,", "tru ", '{"a":1,}', "[1}", "--", '"\n', "}", "1}", '{"a":1]']
)
def test_grammar_refuses_what_json_does(text):
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)
    assert example.steps(("value", ""), text) is None


@pytest.fixture(scope="module")
def plain_texts(models, tokenizer):
    """What the large model writes after each prompt."""
    texts = {}
    for prompt in range(1, 13):
        processors = [example.JsonProcessor(tokenizer)]  # which has the state of one text
        texts[prompt] = models[0].generate(**left_padded([[prompt, 2]]), **CALL, logits_processor=processors)
    return texts


CALL = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": 0, "pad_token_id": 0}


@pytest.mark.parametrize("backend", ["batched", "assisted"])
@pytest.mark.parametrize("gamma", [1, 5])
def test_greedy_text_is_the_large_models(models, tokenizer, plain_texts, backend, gamma):
    cascade, whole, taken_back = enable_cascade(*models), 0, 0
    for prompt, plain in plain_texts.items():
        inputs = left_padded([[prompt, 2]])
        output = cascade.generate(
            **inputs, **CALL, logits_processor=[example.JsonProcessor(tokenizer)], cascade_rule="spec",
            cascade_backend=backend, num_assistant_tokens=gamma,
        )  # fmt: skip
        assert torch.equal(output, plain)
        whole += is_json(tokenizer, output[0, 2:].tolist())
        taken_back += sum(cascade.cascade_statistics.drafted) - sum(cascade.cascade_statistics.accepted)
    assert taken_back > 10


@pytest.mark.parametrize(("rule", "alpha"), [("spec", 0.0), ("token_v3", 0.9), ("chow", 0.5)])
def test_sampled_rows_are_json(models, tokenizer, rule, alpha):
    output = enable_cascade(*models).generate(
        **left_padded([[1, 2], [3], [4, 5, 6]]), do_sample=True, top_k=0, temperature=2.0, num_return_sequences=20,
        max_new_tokens=30, eos_token_id=0, pad_token_id=0, logits_processor=[example.JsonProcessor(tokenizer)],
        cascade_rule=rule, cascade_alpha=alpha,
    )  # fmt: skip
    assert sum(is_json(tokenizer, row) for row in output[:, 3:].tolist()) > 10
    assert len({tuple(row) for row in output.tolist()}) > 20


def test_xgrammar(models, tokenizer):
    """What the example says of xgrammar, where it is installed."""
    xgrammar = pytest.importorskip("xgrammar")
    pytest.importorskip("xgrammar.contrib.hf")

    class JsonProcessor(xgrammar.contrib.hf.LogitsProcessor):
        def clone(self):
            other = example.copy.copy(self)
            other.matchers = [matcher.fork() for matcher in self.matchers]
            return other

    info = xgrammar.TokenizerInfo(WORDS, vocab_size=24, stop_token_ids=[0])
    grammar = xgrammar.GrammarCompiler(info).compile_builtin_json_grammar()
    for backend in ("batched", "assisted"):
        for prompt in range(1, 9):
            inputs = left_padded([[prompt, 2]])
            plain = models[0].generate(**inputs, **CALL, logits_processor=[JsonProcessor(grammar)])
            output = enable_cascade(*models).generate(
                **inputs, **CALL, logits_processor=[JsonProcessor(grammar)], cascade_rule="spec",
                cascade_backend=backend,
            )  # fmt: skip
            assert torch.equal(output, plain)
