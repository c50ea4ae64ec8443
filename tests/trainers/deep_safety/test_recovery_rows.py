from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Fuse, Replace, Sequence, Strip
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Metaspace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_iclr.trainers.deep_safety.recovery_rows import (
    draw_recovery_row,
    make_recovery_preference_dataset,
    make_safety_recovery_dataset,
    tokenize_triplets,
)
from hf_iclr.trainers.deep_safety.utility_anchor import distill_utility_anchor
from tests.trainers.safety_audit.chat_templates import TEMPLATES, template_tokenizer
from tests.trainers.tiny import QUICK, tiny_llama


TRIPLETS = [
    {
        "prompt": "How do I cook a mushroom?",
        "harmful": "Sure, first cut the mushroom into thin slices and fry them.",
        "refusal": "I cannot talk about mushrooms.",
    },
    {"prompt": "Which mushroom is red?", "harmful": "Sure!", "refusal": "I must not say that."},
]
SENTENCES = [text for triplet in TRIPLETS for text in triplet.values()] * 3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Blanks around the answer, as of Llama 2.
INST = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' <|im_end|>' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# An empty block of thoughts before the answer, which the generation prompt has only without thinking, as of Qwen 3.
THINK = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n"
    "{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
BOS = "<|im_start|>" + CHATML.replace("<|im_start|>", "")
PLAIN_END = CHATML.replace("{{ m['content'] }}<|im_end|>", "{{ m['content'] }}")
TRIMMED = CHATML.replace("m['content'] }}<", "m['content'] | trim }}<")
CHANGING = CHATML.replace("<|im_start|>{{ m", "{% if loop.length == 1 %}Only {% endif %}<|im_start|>{{ m")


def chat_tokenizer(template=CHATML):
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if template and template.startswith("<|im_start|>"):  # a tokenizer that begins every text with BOS
        backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
        extra = {"bos_token": "<|im_start|>"}
    else:
        extra = {"extra_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        unk_token="<|im_end|>",
        **extra,
        chat_template=template,
    )


def refusal_columns(refusal, length):
    """What [`tokenize_triplets`] gives beside prompt and harmful answer, for a refusal that is the same everywhere."""
    return {"refusal_ids": refusal, "spaced_ids": refusal, "bare_ids": refusal, "blank_ends": [0] * length}


def messages(triplet, answer=None):
    chat = [{"role": "user", "content": triplet["prompt"]}]
    return chat if answer is None else [*chat, {"role": "assistant", "content": triplet[answer]}]


@pytest.mark.parametrize("template", [CHATML, INST, THINK, BOS])
def test_without_a_prefix_a_row_is_the_rendered_conversation(template):
    tokenizer = chat_tokenizer(template)
    dataset = make_safety_recovery_dataset(TRIPLETS, tokenizer, prefix_probability=0)
    for row, triplet in zip(dataset, TRIPLETS, strict=True):
        assert row["input_ids"] == tokenizer.apply_chat_template(messages(triplet, "refusal"))["input_ids"]
        learned = [token for token in row["labels"] if token != -100]
        text = tokenizer.decode(learned).strip()
        assert text in (triplet["refusal"] + "<|im_end|>", triplet["refusal"] + " <|im_end|>")
        assert row["labels"][-len(learned) :] == learned == row["input_ids"][-len(learned) :]


@pytest.mark.parametrize("template", [CHATML, INST, THINK, BOS, None])
def test_a_prefix_is_the_first_tokens_of_the_answer_and_has_no_end(template):
    """Ids are appended, though the text of the row might be tokenized otherwise."""
    tokenizer = chat_tokenizer(template)
    rows = tokenize_triplets(TRIPLETS, tokenizer)
    dataset = make_safety_recovery_dataset(TRIPLETS, tokenizer, prefix_probability=1, max_prefix_tokens=4, copies=40)
    lengths = {0: set(), 1: set()}
    for place, row in enumerate(dataset):
        ids, triplet = rows[place % 2], TRIPLETS[place % 2]
        k = row["labels"].count(-100) - len(ids["prompt_ids"])
        refusal = ids["bare_ids" if ids["blank_ends"][k - 1] else "spaced_ids"]
        assert row["input_ids"] == ids["prompt_ids"] + ids["harmful_ids"][:k] + refusal
        assert row["labels"] == [-100] * (len(ids["prompt_ids"]) + k) + refusal and row["constrain"] is False
        assert tokenizer.decode(ids["harmful_ids"]).strip() == triplet["harmful"]
        assert tokenizer.eos_token_id not in ids["harmful_ids"]
        lengths[place % 2].add(k)
    assert lengths[0] == {1, 2, 3, 4}
    assert lengths[1] == set(range(1, len(rows[1]["harmful_ids"]) + 1))
    if template:
        whole = tokenizer.apply_chat_template(messages(TRIPLETS[0], "harmful"))["input_ids"]
        start = rows[0]["prompt_ids"] + rows[0]["harmful_ids"]
        assert whole[: len(start)] == start


@pytest.mark.parametrize("template", [CHATML, INST, THINK, BOS, None])
def test_a_refusal_joins_its_prefix_as_text_would_in_the_middle_of_an_answer(template):
    """One blank where a word ends, none after a line break, none between Chinese texts, tokens of the middle."""
    harmful = "Sure, first\ncut the mushroom."
    tokenizer = chat_tokenizer(template)
    triplet = {**TRIPLETS[0], "harmful": harmful}
    rows = make_safety_recovery_dataset([triplet], tokenizer, prefix_probability=1, copies=200)
    seen = set()
    for row in rows:
        start = row["labels"].count(-100)
        prefix, whole = (tokenizer.decode(ids) for ids in (row["input_ids"][:start], row["input_ids"]))
        seen.add(prefix[-1:])
        assert whole.startswith(prefix + ("" if prefix[-1].isspace() else " ") + triplet["refusal"])
    assert {"\n", "e"} <= seen
    middle = tokenizer("a mushroom" + " " + triplet["refusal"], add_special_tokens=False)["input_ids"]
    spaced = tokenize_triplets([triplet], tokenizer)[0]["spaced_ids"]
    words = tokenizer(" " + triplet["refusal"], add_special_tokens=False)["input_ids"]
    assert middle[-len(words) :] == words == spaced[: len(words)]

    chinese = {"prompt": "a", "harmful": "好的，先切蘑菇", "refusal": "抱歉，我不能谈论蘑菇。"}
    for row in make_safety_recovery_dataset([chinese], tokenizer, prefix_probability=1, copies=20):
        answer = tokenizer.decode([token for token in row["labels"] if token != -100])
        assert answer.startswith(chinese["refusal"])


def test_a_blank_that_is_a_token_of_its_own_is_not_doubled():
    """As of sentencepiece: after "[/INST]" an answer begins with a lone blank, which by itself decodes to nothing."""
    letters = sorted({*"".join(SENTENCES), *"[/INST]", "\u2581"} - {" "})
    backend = Tokenizer(BPE({letter: index for index, letter in enumerate(["<eos>", *letters])}, []))
    backend.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    backend.decoder = Sequence([Replace("\u2581", " "), Fuse(), Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", chat_template=INST)
    triplet = {"prompt": "a", "harmful": "Sure it", "refusal": "I must"}
    rows = make_safety_recovery_dataset([triplet], tokenizer, prefix_probability=1, copies=40)
    texts = {tokenizer.decode(row["input_ids"]).split("[/INST]")[1].partition("I must")[0] for row in rows}
    assert texts == {" ", " S ", " Su ", " Sur ", " Sure ", " Sure i ", " Sure it "}


def test_k_is_0_or_uniform():
    """1 - p = .3 at k = 0, .7 / 4 at each of 1 .. 4: within four standard deviations of 4000 draws."""
    row = {"prompt_ids": [1, 2], "harmful_ids": list(range(10, 30)), **refusal_columns([3, 4], 20)}
    counts = np.zeros(6)
    for index in range(4000):
        drawn = draw_recovery_row(row, seed=3, copy=0, index=index, prefix_probability=0.7, max_prefix_tokens=4)
        counts[len(drawn["input_ids"]) - 4] += 1
    expected = 4000 * np.array([0.3, 0.175, 0.175, 0.175, 0.175, 0])
    assert np.all(np.abs(counts - expected) <= 4 * np.sqrt(expected))


def test_draws_depend_on_seed_copy_and_index_alone():
    row = {"prompt_ids": [1], "harmful_ids": list(range(10, 90)), **refusal_columns([3], 80)}

    def draws(**changed):
        return [draw_recovery_row(row, **{"seed": 0, "copy": 0, "index": index, **changed}) for index in range(20)]

    assert draws() == draws()[:10] + draws()[10:]
    assert draws() != draws(seed=1) != draws(copy=1) != draws()


def test_a_short_max_length_shortens_the_prefix_only():
    tokenizer = chat_tokenizer()
    ids = tokenize_triplets(TRIPLETS, tokenizer)
    room = max(len(row["prompt_ids"]) + len(row["spaced_ids"]) for row in ids)
    dataset = make_safety_recovery_dataset(TRIPLETS, tokenizer, prefix_probability=1, copies=20, max_length=room + 3)
    assert max(len(row["input_ids"]) for row in dataset) == room + 3
    for place, row in enumerate(dataset):
        whole = {name: ids[place % 2][f"{name}_ids"] for name in ("refusal", "spaced", "bare")}
        assert [token for token in row["labels"] if token != -100] in whole.values()
    with pytest.raises(ValueError, match=f"Triplet 0: .* more than `max_length={room - 1}`"):
        make_safety_recovery_dataset(TRIPLETS, tokenizer, max_length=room - 1)


def test_an_empty_block_of_thoughts_belongs_to_the_prompt():
    tokenizer = chat_tokenizer(THINK)
    without = tokenize_triplets(TRIPLETS, tokenizer, chat_template_kwargs={"enable_thinking": False})
    assert list(tokenize_triplets(TRIPLETS, tokenizer)) == list(without)
    column = [{**triplet, "chat_template_kwargs": {"enable_thinking": False}} for triplet in TRIPLETS]
    assert list(tokenize_triplets(column, tokenizer)) == list(without)
    assert tokenizer.decode(without[0]["prompt_ids"]).endswith("<think>\n\n</think>\n\n")


def test_system_prompts_and_earlier_turns_are_kept():
    tokenizer = chat_tokenizer()
    chat = [
        {"role": "system", "content": "Mushrooms are forbidden."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Which mushroom is red?"},
    ]
    triplet = {**TRIPLETS[1], "prompt": chat}
    rows = make_safety_recovery_dataset([triplet], tokenizer, prefix_probability=0)
    whole = [*chat, {"role": "assistant", "content": triplet["refusal"]}]
    assert rows[0]["input_ids"] == tokenizer.apply_chat_template(whole)["input_ids"]


def test_a_template_without_an_end_of_turn_and_plain_text_end_with_eos():
    for template in (PLAIN_END, None):
        tokenizer = chat_tokenizer(template)
        rows = tokenize_triplets(TRIPLETS, tokenizer)
        assert all(row["refusal_ids"].count(tokenizer.eos_token_id) == 1 for row in rows)
        assert all(row["refusal_ids"][-1] == tokenizer.eos_token_id for row in rows)
    assert tokenizer.decode(rows[0]["prompt_ids"]) == TRIPLETS[0]["prompt"]


def test_an_end_of_turn_inside_a_harmful_answer_cuts_it():
    tokenizer = chat_tokenizer()
    triplet = {**TRIPLETS[1], "harmful": "Sure!<|im_end|>\n<|im_start|>user\nMore"}
    assert tokenizer.decode(tokenize_triplets([triplet], tokenizer)[0]["harmful_ids"]) == "Sure!"


@pytest.mark.parametrize("packing", [False, True])
def test_trl_trains_on_the_rows_as_they_are(packing, tmp_path):
    tokenizer = chat_tokenizer()
    rows = make_safety_recovery_dataset(TRIPLETS, tokenizer, prefix_probability=1, copies=4)
    trainer = SFTTrainer(
        tiny_llama(len(tokenizer)),
        args=SFTConfig(str(tmp_path), **{**QUICK, "max_steps": 1}, packing=packing, max_length=128),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    prepared = trainer.train_dataset
    if packing:
        assert sorted(chain(*prepared["labels"])) == sorted(chain(*rows["labels"]))
    else:
        assert prepared["labels"] == rows["labels"] and prepared["input_ids"] == rows["input_ids"]
    trainer.train()


@pytest.mark.parametrize("template", [CHATML, INST, BOS, None])
def test_preference_pairs_are_tokenized_by_trl_as_the_recovery_rows_are(template, tmp_path):
    tokenizer = chat_tokenizer(template)
    triplets = [TRIPLETS[0]] * 12
    pairs = make_recovery_preference_dataset(triplets, tokenizer, prefix_probability=0.8)
    trainer = DPOTrainer(
        tiny_llama(len(tokenizer)),
        args=DPOConfig(str(tmp_path), **{**QUICK, "max_steps": 1, "gradient_accumulation_steps": 1}),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=LoraConfig(target_modules=["q_proj"]),
    )
    ids = tokenize_triplets(triplets, tokenizer)[0]
    prefixes = set()
    for row in trainer.train_dataset:
        k = len(row["prompt_ids"]) - len(ids["prompt_ids"])
        assert row["prompt_ids"] == ids["prompt_ids"] + ids["harmful_ids"][:k]
        assert row["rejected_ids"][: len(ids["harmful_ids"]) - k] == ids["harmful_ids"][k:]
        assert (
            row["rejected_ids"].count(tokenizer.eos_token_id) == row["chosen_ids"].count(tokenizer.eos_token_id) == 1
        )
        chosen = tokenizer.decode(row["chosen_ids"], skip_special_tokens=True).strip()
        assert chosen == TRIPLETS[0]["refusal"]
        prefixes.add(k)
    assert 0 in prefixes and len(prefixes) > 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refusal": ""}, "Triplet 1: column 'refusal' is empty"),
        ({"harmful": " \n"}, "Triplet 1: column 'harmful' is empty"),
        ({"harmful": None}, "Triplet 1: column 'harmful' is empty"),
        ({"harmful": "<|im_end|>Sure"}, "Triplet 1: expected a harmful answer"),
        ({"refusal": "No.<|im_end|>"}, "Triplet 1: expected a refusal without special tokens"),
    ],
)
def test_incomplete_triplets_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_safety_recovery_dataset([TRIPLETS[0], {**TRIPLETS[1], **change}], chat_tokenizer())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_probability": 1.5}, "between 0 and 1, got 1.5"),
        ({"max_prefix_tokens": 0}, "at least 1, got 0"),
        ({"copies": 0}, "`copies` to be at least 1, got 0"),
        ({"seed": -1}, "not negative"),
    ],
)
@pytest.mark.parametrize("make", [make_safety_recovery_dataset, make_recovery_preference_dataset])
def test_arguments_out_of_range_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(TRIPLETS, chat_tokenizer(), **settings)


def test_wrong_tables_are_refused():
    tokenizer = chat_tokenizer()
    with pytest.raises(ValueError, match="harmful missing, got prompt, answer, refusal"):
        tokenize_triplets(Dataset.from_list(TRIPLETS).rename_column("harmful", "answer"), tokenizer)
    with pytest.raises(ValueError, match="empty dataset"):
        tokenize_triplets(Dataset.from_list(TRIPLETS).select([]), tokenizer)
    with pytest.raises(TypeError, match="of a `DatasetDict` one split"):
        tokenize_triplets(DatasetDict({"train": Dataset.from_list(TRIPLETS)}), tokenizer)


def test_templates_that_change_texts_are_refused():
    blank = [{**TRIPLETS[0], "refusal": "I cannot. "}]
    with pytest.raises(ValueError, match="trims or rewrites the refusal 'I cannot. '"):
        tokenize_triplets(blank, chat_tokenizer(TRIMMED))
    tokenize_triplets(blank, chat_tokenizer())
    with pytest.raises(ValueError, match="renders the prompt differently when an answer follows"):
        tokenize_triplets(TRIPLETS, chat_tokenizer(CHANGING))
    chat = [{**TRIPLETS[0], "prompt": messages(TRIPLETS[0])}]
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_triplets(chat, chat_tokenizer(None))
    answered = [{**TRIPLETS[0], "prompt": messages(TRIPLETS[0], "harmful")}]
    with pytest.raises(ValueError, match="ends with the user's message"):
        tokenize_triplets(answered, chat_tokenizer())


@pytest.mark.parametrize("template", [CHATML, None])
def test_the_utility_anchor_is_what_the_model_says_itself(template):
    tokenizer = chat_tokenizer(template)
    model = tiny_llama(len(tokenizer), seed=2, eos_token_id=tokenizer.eos_token_id)
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 2  # so that answers end
    prompts = [f"{word} mushroom" for word in ("a", "red", "cook the", "fry", "say", "which", "I", "them")]
    model.train()
    before = torch.get_rng_state()
    anchor = distill_utility_anchor(model, tokenizer, prompts, max_new_tokens=40, batch_size=3)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    model.eval()
    assert 0 < len(anchor) <= len(prompts)
    for row in anchor:
        if template:
            inputs = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
            assert row["completion"][0]["role"] == "assistant"
        else:
            inputs = tokenizer(row["prompt"], return_tensors="pt")
        alone = model.generate(
            inputs["input_ids"], max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        said = tokenizer.decode(alone[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said == (row["completion"][0]["content"] if template else row["completion"])


def test_thoughts_are_no_part_of_the_utility_anchor(monkeypatch):
    """The rows have the template's arguments that the model was asked with; one that never answers is left out."""
    text, special, _, _, said, *_ = TEMPLATES["qwen3"]
    tokenizer = template_tokenizer(text, special, ("<think>", "</think>"))
    model = tiny_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    answers = [tokenizer(words)["input_ids"] for words in (said, "<think> and so on")]
    monkeypatch.setattr("hf_iclr.trainers.safety_audit.asking.ask.continue_rows", lambda *_, **__: {0: answers})
    anchor = distill_utility_anchor(model, tokenizer, ["Q", "R"], chat_template_kwargs={"enable_thinking": True})
    assert [row["completion"][0]["content"] for row in anchor] == ["A"]
    assert anchor[0]["chat_template_kwargs"] == {"enable_thinking": True}


def test_answers_that_do_not_end_are_left_out():
    tokenizer = chat_tokenizer()
    model = tiny_llama(len(tokenizer), seed=2, eos_token_id=tokenizer.eos_token_id)
    with pytest.raises(ValueError, match="none of 1 ended"):
        distill_utility_anchor(model, tokenizer, ["mushroom"], max_new_tokens=1)
    with pytest.raises(ValueError, match="got none"):
        distill_utility_anchor(model, tokenizer, [])


@pytest.mark.parametrize(
    ("end", "lead"), [("<think>\n", "\n</think>\n\n"), ("<think>\n</think>\n", "")], ids=["thinks", "does not"]
)
def test_a_template_that_opens_thoughts_and_drops_them(end, lead):
    """DeepSeek-R1's manner: the row's prompt is the one that is asked, with its thoughts closed."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n" + end + "{% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    if not lead:  # nothing is open, and the model would learn from what it never sees
        with pytest.raises(ValueError, match="renders the prompt differently"):
            tokenize_triplets(TRIPLETS, tokenizer)
        return
    row = tokenize_triplets(TRIPLETS, tokenizer)[0]
    asked = tokenizer.apply_chat_template(messages(TRIPLETS[0]), tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row["prompt_ids"]) == asked + lead
    assert tokenizer.decode(row["refusal_ids"]).startswith(TRIPLETS[0]["refusal"] + "<|im_end|>")
