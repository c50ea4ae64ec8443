"""CounterFact, zsRE and plain rows become edit requests, and those token rows; other rows get a sentence."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict

from hf_iclr.editors.alpha_edit import AlphaEditConfig, EditRequest, edit_requests
from hf_iclr.editors.alpha_edit.rows import encode_request, reasons_against, sample_contexts
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
        ([{**ZSRE, "answers": []}], ValueError, "row 0 to have an answer"),
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
    reasons = reasons_against([first, again, other], word_tokenizer, AlphaEditConfig(), None, ())
    assert reasons == {
        1: "the same edit as request 0",
        2: "contradicts request 0, which sets 'w1 w3 w2' to 'w4'",
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
    ],
)
def test_a_request_that_cannot_be_meant_gets_a_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        EditRequest(*arguments)
    with pytest.raises(TypeError, match="subject to be text"):
        EditRequest("{} is", 3, "x")


def test_requests_survive_as_plain_values():
    request = EditRequest("w1 {} w2", "w3", "w4", paraphrases=["w5 w3"], source="counterfact")
    assert EditRequest.from_dict(request.to_dict()) == request
    with pytest.raises(ValueError, match="prompt, subject and target_new .* got \\['promt'\\]"):
        EditRequest.from_dict({"promt": "x"})
