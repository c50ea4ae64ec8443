"""The quick reading of a model against one forward a row."""

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import FalconConfig, FalconForCausalLM, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from hf_iclr.editors.alpha_edit.requests import EditRequest
from hf_iclr.editors.alpha_edit.scoring import (
    continue_texts,
    evaluate_edits,
    perplexity,
    score_edits,
)
from hf_iclr.metrics import load_metric
from tests.trainers.tiny import tiny_llama


NAN = float("nan")


REQUESTS = [
    EditRequest(
        prompt="{} is in",
        subject="Arica",
        target_new="Peru",
        target_true="Chile",
        paraphrases=("Where is Arica? In", "Arica is in"),
        neighborhood=("Lima is in", "Cusco is in"),
    ),
    EditRequest(
        prompt="who wrote {}?", subject="Emma", target_new="Ann", neighborhood=(("who runs?", "a fox"),), id="z"
    ),
    EditRequest(prompt="{} is", subject="Bergen", target_new="a", target_true="b", neighborhood=("Oslo is",)),
]


BYTE_MODEL = {"vocab_size": 256, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}


MODELS = {
    "llama": lambda: tiny_llama(256),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=16, n_head=2, n_layer=2, initializer_range=0.4)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(**BYTE_MODEL, alibi=True, initializer_range=0.4)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**BYTE_MODEL, ffn_dim=32, word_embed_proj_dim=16, init_std=0.4)),
    "lora": lambda: get_peft_model(
        tiny_llama(256), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["down_proj"])
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_one_forward_a_row(kind, byte_tokenizer):
    model = MODELS[kind]().train()
    table = score_edits(model, byte_tokenizer, REQUESTS, batch_tokens=40, progress=False)
    assert all(module.training for module in model.modules())
    model.eval()
    assert table["kind"].tolist() == [
        *("rewrite", "paraphrase", "paraphrase", "neighborhood", "neighborhood"),
        *("rewrite", "neighborhood", "rewrite", "neighborhood"),
    ]
    for row in table.itertuples():
        request = next(request for request in REQUESTS if request.id == row.request)
        answers = {"new": request.target_new, "true": request.target_true}
        if row.kind == "neighborhood" and row.request == "z":
            answers = {"new": None, "true": "a fox"}
        wanted = "true" if row.kind == "neighborhood" else "new"
        for name, answer in answers.items():
            nll = getattr(row, f"nll_{name}")
            if answer is None:
                assert math.isnan(nll)
                continue
            ids = byte_tokenizer(f"{row.prompt} {answer}", return_tensors="pt")["input_ids"]
            width = len(answer) + 1
            with torch.no_grad():
                logits = model(ids).logits[0, -width - 1 : -1]
            target = ids[0, -width:]
            assert nll == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), abs=1e-5)
            if name == wanted:
                assert row.accuracy == (logits.argmax(-1) == target).float().mean().item()


def test_a_prompt_is_read_once_and_an_answer_of_one_token_costs_nothing(word_tokenizer):
    """Three prompts, the second twice; of the four answers one has two tokens, so one more token is read."""
    model = tiny_llama().eval()
    read = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    requests = [
        EditRequest(
            prompt="{} w2", subject="w1", target_new="w5", target_true="w6", neighborhood=("w3 w4 w9", "w3 w4 w9")
        ),
        EditRequest(prompt="{} w4 w9", subject="w3", target_new="w7 w8"),
    ]
    score_edits(model, word_tokenizer, requests, progress=False)
    assert [tuple(shape) for shape in read] == [(1, 3), (1, 1), (1, 2)]


def test_a_model_that_learnt_the_edits_scores_one(word_tokenizer):
    request = EditRequest(
        prompt="{} w2", subject="w1", target_new="w5 w6", target_true="w7", paraphrases=("w9 w1 w2",),
        neighborhood=("w3 w2",),
    )  # fmt: skip
    model = tiny_llama()
    rows = torch.tensor([[9, 1, 2, 5, 6], [1, 2, 5, 6, 0], [3, 2, 7, 0, 0]])
    before = evaluate_edits(model, word_tokenizer, [request], progress=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        model(rows, labels=rows.masked_fill(rows == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = evaluate_edits(model, word_tokenizer, [request], fluency_prompts=["w1", "w2 w3"], progress=False)
    assert all(after[name] == 1 for name in after if name != "fluency")
    assert before["score_argmax"] == 0 and after["fluency"] > 1


def test_perplexity_is_that_of_all_tokens_together(byte_tokenizer):
    model = tiny_llama(256)
    texts = ["A harbour.", "x", "The longest of all the texts stands here.", "Two ships"]
    total = count = 0
    for text in texts:
        ids = byte_tokenizer(text, return_tensors="pt")["input_ids"]
        if ids.shape[1] > 1:
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    options = {"batch_tokens": 60, "progress": False}
    assert perplexity(model, byte_tokenizer, texts, **options) == pytest.approx(math.exp(total / count), rel=1e-5)
    got = load_metric("perplexity").compute(predictions=texts, model=model, tokenizer=byte_tokenizer, **options)
    assert got == {"perplexity": pytest.approx(math.exp(total / count), rel=1e-5)}
    cut = perplexity(model, byte_tokenizer, texts, max_length=5, **options)
    assert cut == pytest.approx(perplexity(model, byte_tokenizer, [text[:5] for text in texts], **options))


def test_continuations_are_seeded_and_disturb_nothing(word_tokenizer):
    model, prompts = tiny_llama(), ["w1 w2 w3", "w4", "w5 w6"]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    texts = continue_texts(model, word_tokenizer, prompts, max_new_tokens=12, batch_size=2)
    assert torch.equal(torch.rand(1), expected)
    assert texts == continue_texts(model, word_tokenizer, prompts, max_new_tokens=12, batch_size=2)
    assert texts != continue_texts(model, word_tokenizer, prompts, max_new_tokens=12, batch_size=2, seed=1)
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))
    greedy = continue_texts(model, word_tokenizer, prompts, max_new_tokens=3, top_k=1)
    for text, prompt in zip(greedy, prompts, strict=True):
        ids = word_tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(3):
            ids = torch.cat([ids, model(ids).logits[:, -1:, :-1].argmax(-1)], 1)  # the end of a text is not drawn
        assert text == prompt + word_tokenizer.decode(ids[0, -3:], skip_special_tokens=True)


def test_bad_input_gets_a_sentence(word_tokenizer):
    model = tiny_llama()
    with pytest.raises(ValueError, match="at least one request"):
        score_edits(model, word_tokenizer, [])
    lacks = EditRequest(prompt="{} w2", subject="w1", target_new="w5", neighborhood=("w3",), id="n")
    with pytest.raises(ValueError, match="target_true of request 'n'"):
        score_edits(model, word_tokenizer, [lacks])
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(model, word_tokenizer, ["w1"])
    with pytest.raises(TypeError, match="got one string"):
        perplexity(model, word_tokenizer, "w1 w2")
