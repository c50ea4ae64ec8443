"""Subject and target are found in any script, with tokens of bytes, of pieces and of words."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_iclr.editors.alpha_edit import AlphaEditor, EditRequest
from hf_iclr.editors.alpha_edit.rows import encode_answer, encode_request
from tests.architectures import tiny
from tests.editors.tiny import quick_config, tiny_statistics


FACTS = {  # prompt, subject, target, and whether a space stands between prompt and target
    "English": ("The capital of {} is", "New Zealand", "Kyoto", True),
    "Thai": ("เมืองหลวงของ{}คือ", "ประเทศไทย", "เชียงใหม่ และ กรุงเทพ", False),
    "Burmese": ("{}၏မြို့တော်သည်", "မြန်မာနိုင်ငံ", "မန္တလေး", False),
    "Japanese": ("{}の首都は", "日本", "京都です", False),
    "Japanese quoted": ("{}の首都は「", "日本", "京都」", False),
    "Chinese title": ("《{}》", "日本", "京都", False),
    "Khmer with a break": ("រដ្ឋធានីនៃ{}គឺ\u200b", "កម្ពុជា", "បាត់ដំបង", False),
    "quotation": ("{} said “", "Ann", "Kyoto”", False),
    "Chinese": ("{}的首都是：", "中华人民共和国", "上海", False),
    "Arabic": ("عاصمة {} هي", "المغرب", "الدار البيضاء", True),
    "Korean": ("{}의 수도는", "대한민국", "부산", True),
    "Hindi": ("{} की राजधानी", "भारत", "मुंबई", True),
    "emoji": ("👩‍🚀🚀 {} loves", "👨‍👩‍👧 Ann", "🍕🇮🇹", True),
    "combining marks": ("{} sono\u0302 e\u0301", "Jose\u0301", "cafe\u0301 e\u0302", True),
    "subject at the end": ("首都：{}", "日本", "京都", False),
}
TEXTS = [prompt.replace("{}", subject) + " " + target for prompt, subject, target, _ in FACTS.values()]
TEXTS = 4 * [*TEXTS, "Well. 昨日。"]


def byte_level(vocab_size):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False)
    )
    return backend


def llama_like():
    """SentencePiece's BPE as Llama has it: pieces with a mark for spaces, bytes for what is unknown, BOS and EOS."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *"▁abcdefghijklmnopqrstuvwxyzKNZ日は",
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


def unigram():
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False),
    )
    return backend


def words():
    """Words and marks, each a token."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.Fuse()
    backend.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<unk>"], show_progress=False))
    return backend


TOKENIZERS = {
    "bytes": lambda: byte_level(256),
    "byte-level": lambda: byte_level(380),
    "byte-level, long tokens": lambda: byte_level(900),
    "llama": llama_like,
    "unigram": unigram,
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return PreTrainedTokenizerFast(tokenizer_object=TOKENIZERS[request.param](), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("context", ["{}", "Well. {}", "昨日。{}"])
def test_the_parts_of_a_row_are_the_subject_and_the_whole_target(tokenizer, name, context):
    prompt, subject, target, spaced = FACTS[name]
    row = encode_request(tokenizer, prompt, subject, target, context)
    text = context.replace("{}", prompt.replace("{}", subject))
    read = lambda ids: tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    assert read(row.ids) == text + " " * spaced + target
    before = text[: text.index(subject) + len(subject)]
    # A token may hold the end of one part and the beginning of the next: then it counts to the later one.
    assert before.startswith(read(row.ids[: row.subject]).rstrip("�"))
    assert len(read(row.ids[: row.subject]).rstrip("�")) < len(before) <= len(read(row.ids[: row.subject + 1]))
    assert text.startswith(read(row.ids[: row.start]).rstrip("�"))
    assert target in read(row.ids[row.start :]) or read(row.ids[: row.start]) != text
    alone = encode_request(tokenizer, prompt, subject, "", context)
    assert alone.subject == row.subject and alone.ids[: row.subject + 1] == row.ids[: row.subject + 1]
    assert alone.start == len(alone.ids)


def test_words_without_spaces_between_them_are_tokenised_apart():
    """Where one token would span subject and target, each is tokenised by itself, as the model meets the prompt."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words(), unk_token="<unk>")
    row = encode_request(tokenizer, "{}", "日本", "京都")
    assert row.subject < row.start < len(row.ids)
    prompt, subject, target, _ = FACTS["Arabic"]
    row = encode_request(tokenizer, prompt, subject, target)
    assert tokenizer.convert_ids_to_tokens(row.ids) == ["عاصمة", "المغرب", "هي", "الدار", "البيضاء"]
    assert (row.subject, row.start) == (1, 3)


def test_a_token_over_the_end_of_the_prompt_counts_to_the_answer():
    backend = byte_level(256)
    merged = Tokenizer(models.BPE(backend.get_vocab() | {"ab": 256}, [("a", "b")]))
    merged.pre_tokenizer, merged.decoder = backend.pre_tokenizer, backend.decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merged)
    ids, start = encode_answer(tokenizer, "x a\n", "b")
    assert tokenizer.decode(ids[start:]) == "b"
    row = encode_request(tokenizer, "{}は", "x", "b")
    assert tokenizer.decode(row.ids[row.start :]) == "b"


@pytest.mark.parametrize("name", ["Thai", "Burmese", "Japanese", "emoji", "combining marks"])
def test_the_report_says_what_the_model_says(name):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(380))
    model = tiny("llama", 0, vocab_size=len(tokenizer), num_hidden_layers=4)
    prompt, subject, target, spaced = FACTS[name]

    def probability():
        text = prompt.replace("{}", subject) + " " * spaced
        ids, length = tokenizer(text + target)["input_ids"], len(tokenizer(text.rstrip())["input_ids"])
        assert tokenizer.decode(ids[length:]).strip() == target
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0, length - 1 : -1].log_softmax(-1)
        return log_probs.gather(1, torch.tensor(ids[length:])[:, None]).mean().exp().item()

    before = probability()
    config = quick_config(context_templates=["{}"], kl_factor=0.0, clamp_factor=5.0, l2=1e-3)
    statistics = tiny_statistics(model, tokenizer, layers=config.layers)
    (row,) = AlphaEditor(model, tokenizer, config, statistics).edit(
        [EditRequest(prompt, subject, target)], progress=False
    ).edits  # fmt: skip
    assert row["p_before"] == pytest.approx(before, rel=1e-3)
    assert row["p_after"] == pytest.approx(probability(), rel=1e-3)
