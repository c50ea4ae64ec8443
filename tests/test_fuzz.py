"""Anything at all as input: it is taken, or refused in a sentence of ours, never by a library's error from inside."""

import os
import traceback
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_iclr import AlphaEditConfig, EditRequest, VideoPrompts
from hf_iclr.editors.alpha_edit import edit_requests
from hf_iclr.generation.deferral_rules import DEFERRAL_RULES, check_rule
from hf_iclr.models import check_prompts
from hf_iclr.untrusted import parse_json


ROOT = Path(__file__).parents[1]
# FUZZ=1000 asks for more than the default
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ", "60")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats()
PLAIN = NUMBERS | st.text(max_size=8) | st.binary(max_size=4)


def containers(inner):
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6) | st.integers(-2, 4), inner, max_size=4)


ANYTHING = st.recursive(PLAIN, containers, max_leaves=12)


def taken_or_refused(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        assert Path(frames[-1].filename).is_relative_to(ROOT) and frames[-1].filename != __file__, repr(error)
        assert frames[-1].line.startswith("raise "), repr(error)


KEYS = ["points", "labels", "box", "mask", "point", "boxes"]
OBJECTS = st.dictionaries(st.sampled_from(KEYS), ANYTHING, max_size=3)
FRAMES = st.dictionaries(st.integers(-1, 300) | PLAIN, OBJECTS, max_size=3)


@FUZZ
@given(ANYTHING | st.dictionaries(st.integers(-1, 5) | PLAIN, FRAMES, max_size=3))
def test_prompts_of_videos(prompts):
    taken_or_refused(VideoPrompts, prompts)


COLUMNS = [
    "prompt", "subject", "target_new", "case_id", "requested_rewrite", "src", "answers", "loc", "loc_ans", "rephrase",
    "alt", "ground_truth", "locality", "rephrase_prompt", "id", "neighborhood_prompts", "paraphrase_prompts",
    "target_true",
]  # fmt: skip
REQUIRED = ["prompt", "subject", "target_new"]
OPTIONAL = ["paraphrases", "neighborhood", "target_true", "id"]
ROWS = st.dictionaries(st.sampled_from(COLUMNS), ANYTHING, max_size=6)


@FUZZ
@given(ANYTHING | st.lists(ROWS | ANYTHING, max_size=3))
def test_rows_of_edits(rows):
    taken_or_refused(edit_requests, rows)


@FUZZ
@given(st.fixed_dictionaries(dict.fromkeys(REQUIRED, ANYTHING), optional=dict.fromkeys(OPTIONAL, ANYTHING)))
def test_an_edit(fields):
    taken_or_refused(EditRequest, **fields)


FIELDS = sorted(AlphaEditConfig.__dataclass_fields__)


@FUZZ
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING, max_size=3))
def test_a_configuration_of_edits(fields):
    taken_or_refused(AlphaEditConfig, **fields)


@FUZZ
@given(st.sampled_from(sorted(DEFERRAL_RULES)) | ANYTHING, ANYTHING)
def test_a_rule(rule, alpha):
    taken_or_refused(check_rule, rule, alpha)


CHATS = st.lists(st.dictionaries(st.sampled_from(["role", "content"]), ANYTHING, max_size=2), max_size=2)


@FUZZ
@given(ANYTHING | st.lists(CHATS, max_size=2))
def test_prompts_of_audits(prompts):
    taken_or_refused(check_prompts, prompts)


@FUZZ
@given(st.text(max_size=40) | st.binary(max_size=40))
def test_a_file_of_json(content):
    taken_or_refused(parse_json, content, "a file")
