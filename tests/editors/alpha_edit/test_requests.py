"""CounterFact, zsRE and plain rows become edit requests; other rows get a sentence."""

import pytest
from datasets import Dataset, DatasetDict

from hf_iclr.editors.alpha_edit.requests import EditRequest, edit_requests


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
