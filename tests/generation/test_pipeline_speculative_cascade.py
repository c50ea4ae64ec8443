"""`pipeline("speculative-cascade")` and everything a user of a text-generation pipeline expects."""

import copy
from threading import Thread

import pytest
import torch
from datasets import Dataset
from transformers import TextGenerationPipeline, TextIteratorStreamer, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import hf_iclr
from hf_iclr import SpeculativeCascadeForCausalLM, SpeculativeCascadePipeline, build_draft_model
from tests.generation.drafting.test_draft_model import make_texts
from tests.generation.toy import tiny_llama


GREEDY = {"do_sample": False, "max_new_tokens": 10}
CHAT = [{"role": "user", "content": "w5 w6 w7"}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ 'w1 ' + message['content'] + ' w2 ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'w3' }}{% endif %}"
    )
    root = tmp_path_factory.mktemp("models")
    for name, seed in (("large", 1), ("small", 2)):
        tiny_llama(seed, layers=3 - seed, vocab_size=50).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def pipe(folders):
    return pipeline("speculative-cascade", model=str(folders / "large"), assistant_model=str(folders / "small"))


@pytest.fixture
def plain(folders):
    return pipeline("text-generation", model=str(folders / "large"))


def texts(records):
    return [record["generated_text"] for record in records]


def test_two_models(pipe, plain):
    assert type(pipe) is SpeculativeCascadePipeline and hf_iclr.SpeculativeCascadePipeline is type(pipe)
    out = pipe("w1 w2 w3", cascade_rule="spec", **GREEDY)
    assert texts(out) == texts(plain("w1 w2 w3", **GREEDY))
    statistics = out[0]["cascade"]
    assert statistics["new_tokens"] == 10 and statistics["call"]["backend"] == "batched"


def test_a_saved_draft_of_ours_may_be_named(folders, plain, word_tokenizer, tmp_path):
    draft = build_draft_model(plain.model, word_tokenizer, make_texts(), num_layers=1, draft_vocab_size=50)
    draft.save_pretrained(tmp_path)
    pipe = pipeline("speculative-cascade", model=str(folders / "large"), assistant_model=str(tmp_path))
    assert type(pipe.assistant_model) is type(draft) and pipe.assistant_model.dtype == pipe.model.dtype
    assert texts(pipe("w1 w2 w3", cascade_rule="spec", **GREEDY)) == texts(plain("w1 w2 w3", **GREEDY))


def test_fixed_use_of_the_readme(pipe):
    out = pipe(
        ["w1 w2 w3 w4", CHAT],
        cascade_rule="token_v3",
        cascade_alpha=0.3,
        num_assistant_tokens=4,
        max_new_tokens=64,
        batch_size=2,
    )
    assert out[0]["generated_text"].startswith("w1 w2 w3 w4")
    assert out[1]["generated_text"][:-1] == CHAT and out[1]["generated_text"][-1]["role"] == "assistant"
    for records in out:
        assert records["cascade"] is records[0]["cascade"]
        statistics = records["cascade"]
        assert statistics["call"]["rule"] == "token_v3" and statistics["call"]["rows"] == 2
        assert 0 < statistics["new_tokens"] <= 64


def test_one_composite(folders, tmp_path, plain, word_tokenizer):
    model = SpeculativeCascadeForCausalLM.from_cascade_pretrained(str(folders / "large"), str(folders / "small"))
    model.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    pipe = pipeline("speculative-cascade", model=str(tmp_path))
    assert texts(pipe("w1 w2 w3", cascade_rule="spec", **GREEDY)) == texts(plain("w1 w2 w3", **GREEDY))
    # the composite is an ordinary model for the ordinary pipeline too
    ordinary = pipeline("text-generation", model=str(tmp_path))
    assert type(ordinary) is TextGenerationPipeline
    ordinary("w1 w2 w3", cascade_rule="spec", **GREEDY)
    assert ordinary.model.cascade_statistics.rule == "spec"


def test_no_small_model(folders, plain, tmp_path):
    """Drafts are copied, the text is the model's own, and a card of the pipeline names one model."""
    pipe = pipeline("speculative-cascade", model=str(folders / "large"))
    assert texts(pipe("w1 w2 w3", **GREEDY)) == texts(plain("w1 w2 w3", **GREEDY))
    assert pipe("w1 w2 w3", **GREEDY)["cascade"]["call"]["rule"] == "spec"
    assert "assistant_model" not in str(pipe._card("user/one"))


def test_ragged_batch_equals_one_by_one(pipe, plain):
    prompts = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9", "w10 w11"]
    batch = pipe(prompts, batch_size=4, cascade_rule="spec", **GREEDY)
    assert [texts(records) for records in batch] == [texts(plain(prompt, **GREEDY)) for prompt in prompts]
    assert [records[0]["cascade"]["call"]["rows"] for records in batch] == [4] * 4


def test_return_full_text_and_tensors(pipe, plain):
    for kwargs in ({"return_full_text": False}, {"return_tensors": True}):
        ours = pipe("w1 w2 w3", cascade_rule="spec", **kwargs, **GREEDY)
        theirs = plain("w1 w2 w3", **kwargs, **GREEDY)
        ours[0].pop("cascade")
        assert ours == theirs


def test_stop_sequence(folders, byte_tokenizer):
    """Text ends with the stop string, also where it ends inside an accepted draft."""
    large = tiny_llama(1, layers=2, vocab_size=256)
    ours = pipeline("speculative-cascade", model=large, assistant_model=large, tokenizer=byte_tokenizer)
    theirs = pipeline("text-generation", model=large, tokenizer=byte_tokenizer)
    readable = {"suppress_tokens": list(range(94, 256))}  # the first 94 tokens are ASCII characters
    kwargs = {"return_full_text": False, "do_sample": False, "max_new_tokens": 24, **readable}
    stop = theirs("hello", **kwargs)[0]["generated_text"][7:9]
    out = ours("hello", stop_sequence=stop, cascade_rule="spec", num_assistant_tokens=7, **kwargs)
    assert texts(out) == texts(theirs("hello", stop_sequence=stop, **kwargs))
    assert out[0]["generated_text"].endswith(stop) and out[0]["cascade"]["new_tokens"] < 24


def test_streamer(pipe):
    streamer = TextIteratorStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    thread = Thread(target=pipe, args=("w1 w2 w3",), kwargs={"streamer": streamer, "cascade_rule": "spec", **GREEDY})
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    expected = pipe("w1 w2 w3", return_full_text=False, cascade_rule="spec", **GREEDY)
    assert streamed.split() == expected[0]["generated_text"].split()


def test_several_sequences_have_statistics_each(pipe):
    out = pipe(["w1 w2", "w3"], batch_size=2, num_return_sequences=3, do_sample=True, max_new_tokens=6)
    assert [len(records) for records in out] == [3, 3]
    assert all(record["cascade"]["call"]["rows"] == 6 for records in out for record in records)


def test_datasets_and_defaults_at_construction(folders):
    pipe = pipeline(
        "speculative-cascade",
        model=str(folders / "large"),
        assistant_model=str(folders / "small"),
        cascade_rule="opt",
        cascade_alpha=0.1,
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    rows = Dataset.from_dict({"text": ["w1 w2", "w3 w4 w5"]})
    out = list(pipe(KeyDataset(rows, "text"), batch_size=2, max_new_tokens=4))
    assert len(out) == 2 and out[0][0]["cascade"]["call"]["rule"] == "opt"
    assert pipe.model.dtype == pipe.assistant_model.dtype == torch.bfloat16


def test_saved_pipeline_runs_without_us(pipe, hub, tmp_path):
    """`save_pretrained` of a pipeline with a composite holds all code it needs."""
    model = SpeculativeCascadeForCausalLM.from_cascade_pretrained(pipe.model, pipe.assistant_model)
    SpeculativeCascadePipeline(model=model, tokenizer=pipe.tokenizer).save_pretrained(tmp_path)
    printed = hub.run(f"""
        import sys
        sys.modules["hf_iclr"] = None  # any import of it fails
        from transformers import pipeline
        pipe = pipeline("speculative-cascade", model={str(tmp_path)!r}, trust_remote_code=True)
        out = pipe("w1 w2 w3", cascade_rule="spec", do_sample=False, max_new_tokens=10)
        print(out[0]["generated_text"], out[0]["cascade"]["new_tokens"])
    """)
    expected = pipe("w1 w2 w3", cascade_rule="spec", **GREEDY)
    assert f"{expected[0]['generated_text']} 10" in printed


def test_bad_input(folders, pipe):
    with pytest.raises(ValueError, match="mixes in a small model, got none. Pass `assistant_model="):
        pipeline("speculative-cascade", model=str(folders / "large"))("w1", cascade_rule="opt")
    with pytest.raises(ValueError, match="at least one token"):
        pipe("")
    for prompts in (None, ["w1", None], {"text": "w1"}, 5, ["w1", 5], [{"prompt": "w1"}], [["w1"]]):
        with pytest.raises(ValueError, match="a string, or a chat of messages|'role' and 'content'"):
            pipe(prompts)
    with pytest.raises(ValueError, match="at least one prompt, got none"):
        pipe([])
    with pytest.raises(ValueError, match="Choose one of spec"):
        pipe("w1", cascade_rule="nope")
