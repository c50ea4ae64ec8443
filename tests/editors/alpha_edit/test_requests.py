"""CounterFact, zsRE and plain rows become edit requests, and those token rows; other rows get a sentence."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_iclr.editors.alpha_edit import AlphaEditConfig, EditRequest, edit_requests
from hf_iclr.editors.alpha_edit.rows import (
    chat_context,
    encode_in_contexts,
    encode_request,
    reasons_against,
    sample_contexts,
)  # fmt: skip
from tests.editors.tiny import tiny_model


COUNTERFACT = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "The harbour of {} lies in",
        "relation_id": "P1",
        "target_new": {"str": "Norway"},
        "target_true": {"str": "Chile"},
        "subject": "Port Ellen",
    },
    "paraphrase_prompts": ["Ships reach Port Ellen in", "Port Ellen is in"],
    "neighborhood_prompts": ["The harbour of Arica lies in"],
    "generation_prompts": ["Port Ellen is"],
}
ZSRE = {
    "subject": "Blue Lamp",
    "src": "Who wrote Blue Lamp and when was Blue Lamp printed?",
    "pred": "Ann",
    "rephrase": "Blue Lamp was written by whom?",
    "alt": "Ann",
    "answers": ["Edgar Moss", "Moss"],
    "loc": "nq question: who paints the bridge",
    "loc_ans": "the city",
    "cond": "Ann >> Edgar Moss || Who wrote Blue Lamp?",
}


def test_counterfact_rows_are_read_alike_from_a_list_and_from_a_dataset():
    expected = EditRequest(
        prompt="The harbour of {} lies in",
        subject="Port Ellen",
        target_new="Norway",
        target_true="Chile",
        paraphrases=("Ships reach Port Ellen in", "Port Ellen is in"),
        neighborhood=("The harbour of Arica lies in",),
        id="counterfact-7",
        source="CounterFact",
    )
    assert edit_requests([COUNTERFACT]) == edit_requests(Dataset.from_list([COUNTERFACT])) == [expected]


def test_the_first_answer_of_zsre_is_the_target_and_its_neighbour_keeps_its_own_answer():
    (request,) = edit_requests(Dataset.from_list([ZSRE]))
    assert request.prompt == "Who wrote {} and when was Blue Lamp printed?" and request.text == ZSRE["src"]
    assert (request.target_new, request.target_true) == ("Edgar Moss", None)
    assert request.paraphrases == ("Blue Lamp was written by whom?",)
    assert request.neighborhood == (("nq question: who paints the bridge?", "the city"),)


EASY_EDIT = {
    "case_id": 3,
    "prompt": "What university did Watts Humphrey attend?",
    "subject": "Watts Humphrey",
    "target_new": "University of Michigan",
    "ground_truth": ["Illinois Institute of Technology"],
    "rephrase_prompt": "Which university was Watts Humphrey's?",
    "locality": {"neighborhood": {"prompt": ["who played desmond"], "ground_truth": ["Henry Ian Cusick"]}},
    "portability": {"one_hop": {"prompt": "Where is it?", "ground_truth": "Ann Arbor"}},
}
KNOW_EDIT = {
    "subject": "Leo Arons",
    "prompt": "The place of death of Leo Arons is",
    "target_new": "Berlin",
    "ground_truth": "Bern",
    "portability": {"Reasoning": [{"prompt": "The mayor of it is", "ground_truth": [["x"]]}]},
    "locality": {"Relation_Specificity": [
        {"prompt": "The father of Leo Arons is", "ground_truth": [["Albert Arons", "A. Arons"]]},
        {"prompt": "Nobody knows", "ground_truth": []},
    ]},
}  # fmt: skip


def test_rows_of_easy_edit_and_know_edit_are_read():
    (request,) = edit_requests([EASY_EDIT])
    assert request == EditRequest(
        "What university did {} attend?", "Watts Humphrey", "University of Michigan",
        "Illinois Institute of Technology", ("Which university was Watts Humphrey's?",),
        (("who played desmond", "Henry Ian Cusick"),),
    )  # fmt: skip
    (request,) = edit_requests([KNOW_EDIT])
    assert (request.prompt, request.target_true) == ("The place of death of {} is", "Bern")
    assert request.neighborhood == (("The father of Leo Arons is", "Albert Arons"),)
    flat = {"locality_prompt": "who played desmond", "locality_ground_truth": "Henry Ian Cusick", "locality": None}
    assert edit_requests([EASY_EDIT | flat])[0].neighborhood == (("who played desmond", "Henry Ian Cusick"),)
    (request,) = edit_requests([EASY_EDIT | {"prompt": "Where did the father of CMM study?"}])
    assert request.subject is None and request.text == "Where did the father of CMM study?"
    with pytest.raises(TypeError, match="answer of row 0 to be text, got 5"):
        edit_requests([EASY_EDIT | {"target_new": 5}])


def test_answers_and_wordings_may_be_one_text_or_a_list_of_them():
    """Copies of these data sets differ in that."""
    one = {**ZSRE, "answers": "Chicago", "rephrase": None, "loc": "who paints?", "loc_ans": [["the city", "it"]]}
    (request,) = edit_requests([one])
    assert (request.target_new, request.paraphrases) == ("Chicago", ())
    assert request.neighborhood == (("who paints?", "the city"),)
    assert edit_requests([{**ZSRE, "rephrase": ["a", "b"]}])[0].paraphrases == ("a", "b")
    plain = {"prompt": "{} is in", "subject": "Oslo", "target_new": "Peru", "target_true": None}
    (request,) = edit_requests([{"requested_rewrite": plain, "neighborhood_prompts": ["Bergen is in"]}])
    assert (request.target_new, request.target_true, request.neighborhood) == ("Peru", None, ("Bergen is in",))
    flat = {"prompt": "Oslo is in", "subject": "Oslo", "target_new": "Peru", "paraphrase_prompts": ["Where is Oslo?"]}
    (request,) = edit_requests([flat | {"target_true": "Norway", "neighborhood_prompts": ["Bergen is in"]}])
    assert (request.prompt, request.paraphrases) == ("{} is in", ("Where is Oslo?",))
    assert (request.target_true, request.neighborhood) == ("Norway", ("Bergen is in",))
    locality = [{"prompt": "who paints", "ground_truth": "the city"}, {"prompt": "Nobody knows", "ground_truth": [[]]}]
    assert edit_requests([EASY_EDIT | {"locality": locality}])[0].neighborhood == (("who paints", "the city"),)
    biography = {
        "text": "This is about john reynolds.",
        "concept": "john reynolds",
        "labels": "He was",
        "locality": {},
    }
    assert edit_requests([biography]) == [EditRequest("This is about {}.", "john reynolds", "He was")]


def test_a_subject_is_found_as_a_word_before_it_is_found_in_one():
    (request,) = edit_requests([{**ZSRE, "subject": "Iran", "src": "Which Iranian town is the capital of Iran?"}])
    assert request.prompt == "Which Iranian town is the capital of {}?"
    (request,) = edit_requests([{"prompt": "日本の首都は", "subject": "日本", "target_new": "京都"}])
    assert request.prompt == "{}の首都は"


def test_each_rewrite_of_a_row_is_a_request():
    """As in MQuAKE, whose rewrites have a question each."""
    rewrites = [
        {"prompt": f"{{}} is in {place}", "subject": place, "question": f"Where is {place}?",
         "target_new": {"str": "Peru", "id": "Q419"}, "target_true": {"str": "Oman", "id": "Q842"}}
        for place in ("w1", "w2")
    ]  # fmt: skip
    first, second = edit_requests([{"case_id": 3, "requested_rewrite": rewrites, "questions": ["Who?"]}])
    assert (first.text, second.text, second.paraphrases) == ("w1 is in w1", "w2 is in w2", ("Where is w2?",))
    assert first.id != second.id and (first.target_new, first.target_true) == ("Peru", "Oman")
    (one,) = edit_requests([{"case_id": 3, "requested_rewrite": rewrites[0]}])
    assert one.id == "counterfact-3"


def test_the_name_of_a_row_is_that_of_its_content():
    """Two shards of a data set have a first row each."""
    other = {**ZSRE, "answers": ["Ann Moss"]}
    ids = [edit_requests(rows)[0].id for rows in ([ZSRE], [other], [ZSRE, other])]
    assert ids[0] == ids[2] != ids[1]
    numbered = [edit_requests([{**row, "id": 0}])[0].id for row in (EASY_EDIT, KNOW_EDIT)]
    assert numbered[0] != numbered[1] and edit_requests([{**EASY_EDIT, "id": "Watts"}])[0].id == "Watts"
    nameless = {name: value for name, value in COUNTERFACT.items() if name != "case_id"}
    again = {**nameless, "requested_rewrite": {**COUNTERFACT["requested_rewrite"], "subject": "Port Askaig"}}
    assert edit_requests([nameless])[0].id != edit_requests([again])[0].id


def test_a_prompt_without_a_subject_is_edited_at_its_last_token(byte_tokenizer):
    request = EditRequest("Where does the ferry land? ", None, "Oslo")
    row = encode_request(byte_tokenizer, request.prompt, request.subject, request.target_new)
    assert byte_tokenizer.decode(row.ids[: row.subject + 1]) == "Where does the ferry land?"
    assert byte_tokenizer.decode(row.ids[row.start :]) == "Oslo"
    assert EditRequest.from_dict(request.to_dict()) == request and "subject" not in request.to_dict()
    row = encode_request(byte_tokenizer, "a {b} {}", None, "Oslo", "[{}]\n")
    assert byte_tokenizer.decode(row.ids[: row.subject + 1]) == "[a {b} {}"


def test_a_chat_is_one_rendered_turn_with_the_answer_behind_it(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    with pytest.raises(ValueError, match="a tokenizer with a chat template for chat_template=True"):
        chat_context(tokenizer)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ '\\n' }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    assert chat_context(tokenizer) == "<user>{}\n<assistant>"
    config = AlphaEditConfig(chat_template=True, context_templates=[chat_context(tokenizer), "<x>{}</x>"])
    rows = encode_in_contexts(tokenizer, EditRequest("Where is {} now?", "Ann", "Oslo"), config)
    assert tokenizer.decode(rows[0].ids) == "<user>Where is Ann now?\n<assistant>Oslo"
    assert tokenizer.decode(rows[0].ids[: rows[0].subject + 1]) == "<user>Where is Ann"
    assert tokenizer.decode(rows[1].ids) == "<x>Where is Ann now?</x>Oslo"
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert chat_context(tokenizer, "Well. {}") == "[user] Well. {}[assistant] "
    tokenizer.chat_template = "{{ messages[0].content * 2 }}"
    with pytest.raises(ValueError, match="shows a turn's text once"):
        chat_context(tokenizer)


@pytest.mark.parametrize("trim", ["", " | trim"])
def test_white_space_around_a_turn_is_what_the_chat_template_makes_of_it(trim, byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content" + trim + " }} {% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    config = AlphaEditConfig(chat_template=True, context_templates=[chat_context(tokenizer)])
    for request in (EditRequest(" {} is in\n", "Ann", "Oslo"), EditRequest("Where is she? ", None, "Oslo")):
        (row,) = encode_in_contexts(tokenizer, request, config)
        messages = [{"role": "user", "content": request.text}, {"role": "assistant", "content": request.target_new}]
        assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
        assert tokenizer.decode(row.ids[: row.subject + 1]).endswith(request.subject or "she?")


def test_a_long_target_is_cut_into_parts_of_like_length(word_tokenizer):
    request = EditRequest("w1 {} w2", "w3", " ".join(f"w{i}" for i in range(10, 21)))
    rows = encode_in_contexts(
        word_tokenizer, request, AlphaEditConfig(context_templates=["{}", "w9 {}"], chunk_length=4)
    )
    assert [row.places for row in rows] == [(1, 5, 9), (2, 6, 10)] and [row.start for row in rows] == [3, 4]
    short = encode_in_contexts(
        word_tokenizer, EditRequest("w1 {} w2", "w3", "w4 w5 w6 w7"), AlphaEditConfig(chunk_length=4)
    )
    assert [row.places for row in short] == [(1,)]


def test_plain_rows_may_lack_the_optional_columns():
    rows = [
        {"prompt": "{} is in", "subject": "Bergen", "target_new": "Peru", "target_true": "Norway", "id": "b"},
        {"prompt": "{} is in", "subject": "Arica", "target_new": "Peru"},
    ]
    requests = edit_requests(Dataset.from_list(rows))
    assert requests == [EditRequest(**row) for row in rows] and requests[0].id == "b"


def test_limit_takes_the_first_rows_in_order():
    rows = ({**COUNTERFACT, "case_id": case} for case in range(100))
    assert [request.id for request in edit_requests(rows, limit=3)] == [f"counterfact-{case}" for case in range(3)]
    assert next(rows)["case_id"] == 3  # no more is read


@pytest.mark.parametrize(
    ("rows", "error", "words"),
    [
        ("facts.json", TypeError, "Load them first: `load_dataset"),
        (3, TypeError, "Expected rows, got 3"),
        (DatasetDict(train=Dataset.from_list([COUNTERFACT])), TypeError, "dataset\\['train'\\]"),
        ([], ValueError, "at least one row"),
        ([COUNTERFACT, {"question": "why?"}], ValueError, "row 1 .*got \\['question'\\]"),
        ([{**ZSRE, "src": "Who wrote it?"}], ValueError, "row 0 to name its subject 'Blue Lamp'"),
        ([{**ZSRE, "answers": []}], TypeError, "an answer of row 0 to be text"),
    ],
)
def test_other_rows_are_refused_in_a_sentence(rows, error, words):
    with pytest.raises(error, match=words):
        edit_requests(rows)


def test_subject_and_target_are_found_by_characters(byte_tokenizer):
    row = encode_request(byte_tokenizer, "He saw {}'s dog in Rome, and {}".replace(", and {}", ""), "Rome", "grey")
    assert byte_tokenizer.decode(row.ids[: row.subject + 1]) == "He saw Rome"
    assert byte_tokenizer.decode(row.ids[row.start :]) == " grey"
    row = encode_request(byte_tokenizer, "In {} ", "Ro{me", " x", "A {b. {}")
    assert byte_tokenizer.decode(row.ids) == "A {b. In Ro{me  x"
    assert byte_tokenizer.decode(row.ids[: row.subject + 1]) == "A {b. In Ro{me"


def test_conflicts_within_a_batch_have_their_reasons(word_tokenizer):
    first = EditRequest("w1 {} w2", "w3", "w4")
    again = EditRequest("w1 {} w2", "w3", "w4", id="again")
    other = EditRequest("w1 {} w2", "w3", "w5")
    named = EditRequest("w1 {} w2", "w9", "w5", id=first.id)
    reasons = reasons_against([first, again, other, named], word_tokenizer, AlphaEditConfig(), None, {})
    assert reasons == {
        1: "the same edit as request 0",
        2: "contradicts request 0, which sets 'w1 w3 w2' to 'w4'",
        3: "has the id of request 0",
    }


def test_contexts_are_the_models_own_and_of_one_seed(word_tokenizer):
    model = tiny_model("llama")
    state = torch.get_rng_state()
    config = AlphaEditConfig(num_contexts=3, context_length=6, seed=1)
    first = sample_contexts(model, word_tokenizer, config)
    assert torch.equal(state, torch.get_rng_state())
    assert first == sample_contexts(model, word_tokenizer, config)
    assert first != sample_contexts(model, word_tokenizer, replace(config, seed=2))
    assert first[0] == "{}" and len(first) == 4
    assert all(text.endswith(". {}") and text.count("{") == 1 for text in first[1:])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("no place", "Rome", "x"), "with {} once"),
        (("Rome is in", "Rome", "x"), r"Write the subject's place as {}: '{} is in'"),
        (("{} and {}", "Rome", "x"), "with {} once"),
        (("{} is", " ", "x"), "subject of an edit to say something"),
        (("{} is", "Rome", ""), "target_new of an edit"),
        (("{} is", "Rome", "x", None, (), [("only one",)]), "each of neighborhood to be a prompt, or a neighbour's"),
    ],
)
def test_a_request_that_cannot_be_meant_gets_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        EditRequest(*arguments)
    with pytest.raises(TypeError, match="subject to be str or None"):
        EditRequest("{} is", 3, "x")
    with pytest.raises(TypeError, match=r"Type `paraphrases=\['Rome is'\]`"):
        EditRequest("{} is", "Rome", "x", paraphrases="Rome is")
    with pytest.raises(ValueError, match="target_new of an edit to say something, in Unicode"):
        EditRequest("{} is", "Rome", "x\ud800")
    with pytest.raises(ValueError, match="source of an edit to say something, in Unicode"):
        EditRequest("{} is", "Rome", "x", source="\udfff")


def test_requests_survive_as_plain_values():
    request = EditRequest("w1 {} w2", "w3", "w4", paraphrases=["w5 w3"], neighborhood=[("w6", "w7")], source="mine")
    assert EditRequest.from_dict(json.loads(json.dumps(request.to_dict()))) == request
    assert json.loads(json.dumps(request.to_dict())) == request.to_dict()
    with pytest.raises(ValueError, match="prompt, subject and target_new .* got \\['promt'\\]"):
        EditRequest.from_dict({"promt": "x"})
