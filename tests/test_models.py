"""
What is asked of a model in batches equals the same asked of each row alone, without padding and cache: `generate` on
each prompt and prefix, the full logits of each answer, the chat template rendered by hand.
"""

import copy
import hashlib
from unittest.mock import patch

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_iclr import prefill as prefill_generation
from hf_iclr.models import (
    answer_logits,
    end_tokens,
    evaluation_mode,
    generate_rows,
    hash_weights,
    logits_at,
    pad_answers,
    pad_around,
    pad_rows,
    render_prompt,
    split_answer,
    to_answer_ids,
    to_prompt_ids,
)
from hf_iclr.prefill import generate_after_prefixes, generate_answers
from tests.architectures import tiny


PROMPTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10", "w11 w12"]
ANSWERS = ["w20 w21 w22 w23", "w24 w25", "w26 w27 w28 w29 w30 w31 w32", ""]
SIZES = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.4, "bos_token_id": None, "eos_token_id": [49, 7],
    "pad_token_id": None,
}  # fmt: skip


@pytest.fixture
def model():
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def ids(text):
    return [int(word[1:]) for word in text.split()]


def alone(model, prompt, answer, k, tokens=9):
    """What plain greedy `generate` gives for one prompt and prefix, up to the end of the sequence."""
    if len(ids(answer)) < k:
        return None
    row = torch.tensor([ids(prompt) + ids(answer)[:k]])
    new = model.generate(row, max_new_tokens=tokens, do_sample=False, pad_token_id=0)[0, row.shape[1] :].tolist()
    stop = next((index for index, token in enumerate(new) if token in (49, 7)), len(new))
    return new[:stop]


def check_equal_to_generate(model, tokenizer, ks, **options):
    found = generate_after_prefixes(
        model, tokenizer, PROMPTS, ANSWERS, ks, max_new_tokens=9, progress=False, **options
    )
    assert sorted(found) == sorted(ks)
    for k in ks:
        assert found[k] == [alone(model, prompt, answer, k) for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_generate(model, word_tokenizer, batch_size):
    found = check_equal_to_generate(model, word_tokenizer, (0, 1, 2, 4, 5, 7, 40), batch_size=batch_size)
    assert found[40] == [None] * 4  # no answer is that long
    assert found[5][0] is None and found[5][2] is not None
    assert any(len(new) < 9 for new in found[0] + found[1] if new is not None)  # some end early


def test_a_batch_is_bounded_by_its_tokens(model, word_tokenizer):
    """Every k is a row of its own, and what is generated counts; a prompt alone may be more."""
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    found, largest = {}, {}
    for limit in (None, 110, 1):
        sizes.clear()
        options = {"max_new_tokens": 9, "batch_size": 4, "max_batch_tokens": limit, "progress": False}
        found[limit] = generate_after_prefixes(model, word_tokenizer, PROMPTS, ANSWERS, (0, 1, 2), **options)
        largest[limit] = max(sizes)
    assert found[None] == found[110] == found[1]
    assert largest[None] > 110 >= largest[110] > largest[1]


@pytest.mark.parametrize("ks", [(0, 1, 4, 7), (7,)])
def test_one_prefill_for_all_k(model, word_tokenizer, ks):
    widths = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    generate_after_prefixes(model, word_tokenizer, PROMPTS, ANSWERS, ks, max_new_tokens=3, progress=False)
    assert [width for width in widths if width > 1] == [6 + 7]


@pytest.mark.parametrize("window", [4, 8, 64])
def test_sliding_windows(word_tokenizer, window):
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=window, head_dim=16)).eval()
    serves, said = prefill_generation._PrefixBatch._serves_every_k, []
    with patch.object(
        prefill_generation._PrefixBatch, "_serves_every_k", lambda *call: said.append(serves(*call)) or said[-1]
    ):
        check_equal_to_generate(model, word_tokenizer, (0, 2, 7))
    assert said == [window == 64]


def test_positions_that_are_not_given(word_tokenizer):
    """Bloom counts its positions from the mask alone."""
    sizes = {"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.4}
    config = BloomConfig(**sizes, eos_token_id=[49, 7])
    check_equal_to_generate(BloomForCausalLM(config).eval(), word_tokenizer, (0, 1, 4))


def test_rows_that_have_ended_leave_the_batch(model, word_tokenizer):
    sizes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    found = check_equal_to_generate(model, word_tokenizer, (0, 1, 2))
    lengths = [len(new) for k in found for new in found[k] if new is not None]
    decoding = sizes[1 : max(lengths) + 1]
    assert decoding[0] == len(lengths) and decoding == sorted(decoding, reverse=True)
    assert decoding[-1] < len(lengths) or min(lengths) == max(lengths)


def test_recurrent_layers(word_tokenizer):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = {**SIZES, "num_key_value_heads": 2}
    model = Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=["conv", "full_attention"], block_multiple_of=8)).eval()
    check_equal_to_generate(model, word_tokenizer, (0, 2, 4), batch_size=1)


def test_absolute_positions(word_tokenizer):
    config = GPT2Config(
        vocab_size=50, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4, bos_token_id=None, eos_token_id=[49, 7]
    )
    check_equal_to_generate(GPT2LMHeadModel(config).eval(), word_tokenizer, (0, 1, 4))


# PEFT 0.21 reads a property that transformers 5.23 has renamed
PEFT_READS_OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@PEFT_READS_OLD_NAME
def test_peft(model, word_tokenizer):
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    check_equal_to_generate(lora, word_tokenizer, (0, 2, 4))


def test_answers_as_ids_end_at_the_end_token(model, word_tokenizer):
    found = generate_after_prefixes(
        model, word_tokenizer, ["w1 w2"], [[20, 21, 49, 22]], (2, 3), max_new_tokens=5, progress=False
    )
    assert found[3] == [None] and found[2] == [alone(model, "w1 w2", "w20 w21", 2, 5)]


@pytest.fixture(scope="module")
def chat_tokenizer(word_tokenizer):
    """One that puts w48 before every text, which the text of its chat template holds already."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="w48 $A", special_tokens=[("w48", 48)])
    tokenizer.chat_template = (
        "w48 {% for m in messages %}{{ {'system': 'w42', 'user': 'w40', 'assistant': 'w43'}[m.role] }} {{ m.content }}"
        "{{ ' w49 ' if m.role == 'assistant' else ' ' }}{% endfor %}"
        "{{ ('w44 ' if brief else '') + 'w43' if add_generation_prompt }}"
    )
    return tokenizer


CHAT = [
    {"role": "user", "content": "w3 w4"},
    {"role": "assistant", "content": "w5"},
    {"role": "user", "content": "w6"},
]
SYSTEM = {"role": "system", "content": "w7"}


def test_prompts_are_rendered_as_by_hand(chat_tokenizer):
    def by_hand(messages, **options):
        return chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **options)

    assert to_prompt_ids(chat_tokenizer, "w3 w4") == [48, 40, 3, 4, 43] == by_hand(CHAT[:1])["input_ids"]
    assert to_prompt_ids(chat_tokenizer, CHAT) == [48, 40, 3, 4, 43, 5, 49, 40, 6, 43] == by_hand(CHAT)["input_ids"]
    found = to_prompt_ids(chat_tokenizer, "w3 w4", system="w7", chat_template_kwargs={"brief": True})
    assert found == [48, 42, 7, 40, 3, 4, 44, 43] == by_hand([SYSTEM, *CHAT[:1]], brief=True)["input_ids"]
    assert to_prompt_ids(chat_tokenizer, CHAT, system="w7") == by_hand([SYSTEM, *CHAT])["input_ids"]
    for answer in ("w5", CHAT[1:2]):
        text = render_prompt(chat_tokenizer, CHAT[:1], answer=answer, system="w7")
        assert text == chat_tokenizer.apply_chat_template([SYSTEM, *CHAT[:2]], tokenize=False)
    assert len(CHAT) == 3  # the caller's


def test_prompts_without_a_chat_template(chat_tokenizer, word_tokenizer):
    plain = copy.deepcopy(chat_tokenizer)
    plain.chat_template = None
    assert render_prompt(plain, "w3 w4") == "w3 w4" and render_prompt(plain, "w3", answer=" w4") == "w3 w4"
    assert to_prompt_ids(plain, "w3 w4") == [48, 3, 4] and to_prompt_ids(word_tokenizer, "w3 w4") == [3, 4]
    with pytest.raises(ValueError, match="got a chat"):
        render_prompt(plain, CHAT)
    with pytest.raises(ValueError, match="chat template for the system prompt"):
        to_prompt_ids(plain, "w3", system="w7")


def test_answers_are_cut_where_they_end_and_split_where_they_begin(word_tokenizer):
    assert to_answer_ids(word_tokenizer, "w3 w4 w49 w5", [49]) == [3, 4]
    assert to_answer_ids(word_tokenizer, [3, 4, 7], [49, 7]) == [3, 4] and to_answer_ids(word_tokenizer, [3], []) == [
        3
    ]
    assert split_answer([1, 2], [1, 2, 3, 4]) == ([1, 2], [3, 4])
    assert split_answer([1, 2, 5], [1, 2, 3]) == ([1, 2], [3])  # the prompt's last token is another in front of it
    assert split_answer([1, 2, 3], [1, 2]) == ([1, 2], [])


def test_end_tokens(model, word_tokenizer):
    assert end_tokens(model, word_tokenizer) == [49, 7]
    model.generation_config.eos_token_id = 5
    assert end_tokens(model, word_tokenizer) == [5]
    model.generation_config.eos_token_id = None
    assert end_tokens(model, word_tokenizer) == [49]


def test_padding():
    rows = [[1, 2, 3], [], [4]]
    right, left = pad_rows(rows), pad_rows(rows, "left", padding=9)
    assert right["input_ids"].tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 0, 0]]
    assert left["input_ids"].tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 4]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
    around = pad_around(rows, [[5], [6, 7], []])
    assert around["input_ids"].tolist() == [[1, 2, 3, 5, 0], [0, 0, 0, 6, 7], [0, 0, 4, 0, 0]]
    assert around["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    answers = pad_answers([([1, 2], [3]), ([4], [5, 6, 7]), ([8], [])])
    assert answers["input_ids"].tolist() == [[1, 2, 3, 0], [4, 5, 6, 7], [8, 0, 0, 0]]
    assert answers["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert answers["labels"].tolist() == [[-100, -100, 3, -100], [-100, 5, 6, 7], [-100] * 4]
    assert all(value.dtype == torch.int64 for batch in (right, around, answers) for value in batch.values())


def test_system_and_template_arguments_reach_generation(model, chat_tokenizer):
    options = {"max_new_tokens": 6, "progress": False}
    found = generate_answers(model, chat_tokenizer, ["w3 w4", CHAT[:1]], **options)
    assert found == [alone(model, "w48 w40 w3 w4 w43", "", 0, 6)] * 2
    found = generate_answers(
        model, chat_tokenizer, ["w3 w4"], system="w7", chat_template_kwargs={"brief": True}, **options
    )
    assert found == [alone(model, "w48 w42 w7 w40 w3 w4 w44 w43", "", 0, 6)]


def test_no_answer_as_long_as_the_prefix(model, word_tokenizer):
    found = generate_after_prefixes(model, word_tokenizer, PROMPTS, ANSWERS, (7, 9), batch_size=1, progress=False)
    assert found[9] == [None] * 4 and [new is None for new in found[7]] == [True, True, False, True]


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_rows_generated_by_the_model(model, batch_size):
    rows = [ids(prompt) for prompt in PROMPTS]
    options = {"max_new_tokens": 9, "do_sample": False}
    plain = [
        model.generate(torch.tensor([row]), eos_token_id=-1, pad_token_id=0, **options)[0, len(row) :].tolist()
        for row in rows
    ]
    stop = plain[0][3]
    found = list(generate_rows(model, rows, [stop], batch_size=batch_size, eos_token_id=stop, **options))
    assert found == [new[: (new + [stop]).index(stop) + 1] for new in plain]
    assert len(found[0]) <= 4 and any(len(new) == 9 for new in found)
    assert list(generate_rows(model, rows, (), batch_size=batch_size, eos_token_id=-1, **options)) == plain


def test_logits_of_some_columns_with_and_without_a_cache(model):
    from transformers import DynamicCache

    batch = pad_around([[1, 2, 3], [4]], [[5, 6], [7]])
    found = logits_at(model, batch["input_ids"], batch["attention_mask"], [1, 2, 4])
    for row, (tokens, first) in enumerate([([1, 2, 3, 5, 6], 0), ([4, 7], 2)]):
        expected = model(torch.tensor([tokens])).logits[0]
        for index, column in enumerate([1, 2, 4]):
            if 0 <= column - first < len(tokens):
                torch.testing.assert_close(found[row, index], expected[column - first], rtol=1e-4, atol=1e-5)
    cache = DynamicCache(config=model.config)
    logits_at(model, batch["input_ids"][:, :3], batch["attention_mask"][:, :3], [2], cache)
    assert cache.get_seq_length() == 3
    step = logits_at(model, batch["input_ids"][:, 3:], batch["attention_mask"], [1], cache)
    torch.testing.assert_close(step[0, 0], found[0, 2], rtol=1e-4, atol=1e-5)


def test_sampling_depends_on_seed_and_row_alone(model, word_tokenizer):
    def run(seed=0, batch_size=16, ks=(0, 1), **options):
        return generate_after_prefixes(
            model, word_tokenizer, PROMPTS, ANSWERS, ks, max_new_tokens=9, do_sample=True, seed=seed,
            batch_size=batch_size, progress=False, **options,
        )  # fmt: skip

    state = torch.get_rng_state()
    first = run()
    assert run(batch_size=1) == first and run(ks=(0,))[0] == first[0] and run(seed=1) != first
    assert torch.equal(torch.get_rng_state(), state)
    assert run(top_k=1) == generate_after_prefixes(
        model, word_tokenizer, PROMPTS, ANSWERS, (0, 1), max_new_tokens=9, progress=False
    )
    assert run(temperature=1e-4)[0] == run(top_p=1e-6)[0] == run(top_k=1)[0]


def test_samples_follow_the_model(model, word_tokenizer):
    """2000 first tokens against the softmax (Kolmogorov-Smirnov)."""
    new = generate_after_prefixes(
        model, word_tokenizer, ["w1 w2"] * 2000, max_new_tokens=1, do_sample=True, batch_size=500, progress=False
    )[0]
    first = torch.tensor([row[0] if row else -1 for row in new])
    probs = model(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
    probs[[49, 7]] = 0  # ended
    shares = torch.bincount(first[first >= 0], minlength=50) / 2000
    assert (shares.cumsum(0) - probs.cumsum(0)).abs().max() < 2 / 2000**0.5


def test_model_and_tokenizer_are_left_as_found(model, word_tokenizer):
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    side = word_tokenizer.padding_side
    generate_after_prefixes(model, word_tokenizer, PROMPTS, max_new_tokens=2, progress=False)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert word_tokenizer.padding_side == side
    with pytest.raises(KeyError), evaluation_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert {name: module.training for name, module in model.named_modules()} == before


def test_answer_logits(model):
    prompts, answers = [ids(prompt) for prompt in PROMPTS], [ids(answer) for answer in ANSWERS]
    seen = []
    for rows, logits in answer_logits(model, prompts, answers, batch_size=2):
        for index, row in enumerate(rows):
            expected = model(torch.tensor([prompts[row] + answers[row]])).logits[0, len(prompts[row]) - 1 : -1]
            torch.testing.assert_close(logits[index, : len(answers[row])], expected, rtol=1e-4, atol=1e-5)
        seen += rows
    assert sorted(seen) == [0, 1, 2]  # the empty answer is passed over


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ["w1"], "ks": (0, 3)}, r"up to 3 tokens, got none"),
        ({"prompts": ["w1"], "ks": (-1,)}, "0 or more"),
        ({"prompts": ["w1"], "ks": ()}, "0 or more"),
        ({"prompts": ["w1"], "answers": ["w2", "w3"]}, "one answer a prompt, got 2 and 1"),
        ({"prompts": [""]}, "'' has none"),
        ({"prompts": [[{"role": "user", "content": "w1"}]]}, "no chat template"),
        ({"prompts": ["w1"], "max_new_tokens": 0}, "max_new_tokens=0"),
    ],
)
def test_bad_input(model, word_tokenizer, arguments, words):
    with pytest.raises(ValueError, match=words):
        generate_after_prefixes(model, word_tokenizer, **arguments)


@PEFT_READS_OLD_NAME
def test_bad_models(model, word_tokenizer):
    with pytest.raises(TypeError, match="one string"):
        generate_after_prefixes(model, word_tokenizer, "w1")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8))
    with pytest.raises(ValueError, match="encoder-decoder"):
        generate_after_prefixes(t5, word_tokenizer, ["w1"])
    prompt_tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="virtual tokens"):
        generate_after_prefixes(prompt_tuned, word_tokenizer, ["w1"])


def test_a_name_for_weights_in_every_type():
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    name = hash_weights(model)
    assert name == hash_weights(copy.deepcopy(model).float())
    digest = hashlib.sha256()
    for key in ("bias", "weight"):
        numbers = model.get_parameter(key).detach()
        bits = numbers.view(torch.int16).numpy().astype(np.int64).reshape(-1, 3 if key == "weight" else 2)
        digest.update(f"{key}{tuple(numbers.shape)}".encode() + bits.sum(1).tobytes() + bits.sum(0).tobytes())
    assert name == digest.hexdigest()[:16]


def test_a_name_for_weights_changes_with_any_number_of_any_layer():
    model = torch.nn.Sequential(torch.nn.Linear(65, 70), torch.nn.Linear(70, 33))
    names = {hash_weights(model)}
    for changed in range(12):
        weight = model[changed % 2].weight
        with torch.no_grad():
            weight[changed * 5 % len(weight), changed * 7 % 65] += 0.1
        names.add(hash_weights(model))
    with torch.no_grad():
        model[0].weight[:] = model[0].weight.flip(0).clone()
    assert len(names | {hash_weights(model)}) == 14


def test_a_model_with_adapters_has_the_name_of_its_base():
    model = tiny("llama", 0)
    name = hash_weights(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"], modules_to_save=["lm_head"]))
    assert hash_weights(adapted) == name
    with torch.no_grad():
        adapted.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight[3, 4] += 1
    assert hash_weights(adapted) != name


def test_an_exact_hash_of_weights_sees_each_bit_and_type():
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    name = hash_weights(model, exact=True)
    assert name == hash_weights(copy.deepcopy(model), exact=True)
    assert name != hash_weights(copy.deepcopy(model).float(), exact=True)
    digest = hashlib.sha256()
    for key in ("bias", "weight"):
        digest.update(b"torch.bfloat16" + model.get_parameter(key).detach().view(torch.int16).numpy().tobytes())
    assert name == digest.hexdigest()
    with torch.no_grad():
        model.bias.view(torch.int16)[1] += 1  # the next number up
    assert hash_weights(model, exact=True) != name
