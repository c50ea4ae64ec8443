"""Anything at all as input: it is taken, or refused in a sentence of ours, never by a library's error from inside."""

import json
import os
import shutil
import tempfile
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_iclr import (
    AlphaEditConfig,
    DeepSafetyOptions,
    EditRequest,
    Sam2TrainingConfig,
    SqueezeDPOConfig,
    VideoPrompts,
)
from hf_iclr.editors.alpha_edit import edit_requests
from hf_iclr.generation.deferral_rules import DEFERRAL_RULES, check_rule
from hf_iclr.models import check_prompts
from hf_iclr.untrusted import parse_json
from hf_iclr.vision.session.config import VideoSessionConfig
from tests.hostile import KINDS, json_of, put_json


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
IN_JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANYTHING_IN_JSON = st.recursive(
    IN_JSON, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


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


KINDS_OF_CONFIG = [DeepSafetyOptions, SqueezeDPOConfig, VideoSessionConfig, Sam2TrainingConfig]
ELSEWHERE = {SqueezeDPOConfig: {"output_dir": "out", "use_cpu": True, "bf16": False}}
ELSEWHERE[Sam2TrainingConfig] = {"output_dir": "out", "use_cpu": True}


@FUZZ
@given(st.data())
@pytest.mark.parametrize("kind", KINDS_OF_CONFIG)
def test_a_configuration(kind, data):
    own = sorted(next(one for one in kind.__mro__ if one.__annotations__).__annotations__)
    fields = data.draw(st.dictionaries(st.sampled_from(own), ANYTHING, max_size=2))
    taken_or_refused(kind, **{**ELSEWHERE.get(kind, {}), **fields})


FILES = [(kind, name) for kind, about in KINDS.items() for name in about.files]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each kind of folder that is read, made once."""
    parent = tmp_path_factory.mktemp("folders")
    for kind, about in KINDS.items():
        about.make(parent / kind)
    return parent


@settings(FUZZ, max_examples=max(2, FUZZ.max_examples // len(FILES)))
@given(st.data())
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_bytes_of_a_file(folders, kind, name, data):
    """Some are changed, left out or put in."""
    path = folders / kind / name
    whole = path.read_bytes()
    place = data.draw(st.integers(0, len(whole)))
    length, new = data.draw(st.sampled_from([(1, 1), (4, 4), (1, 0), (0, 1)]))
    changed = whole[:place] + data.draw(st.binary(min_size=new, max_size=new)) + whole[place + length :]
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(folders / kind, Path(folder) / kind)
        (copy / name).write_bytes(changed)
        taken_or_refused(KINDS[kind].load, copy)


@settings(FUZZ, max_examples=max(2, FUZZ.max_examples // len(FILES)))
@given(st.data())
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in FILES if ".json" in name])
def test_a_value_in_a_file(folders, kind, name, data):
    """Anything stands in the place of one value of its JSON."""
    with tempfile.TemporaryDirectory() as folder:
        copy = shutil.copytree(folders / kind, Path(folder) / kind)
        written = json.loads(json_of(copy / name))
        place, key = None, None
        inside = written
        while isinstance(inside, dict | list) and inside and (place is None or data.draw(st.booleans())):
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            place, key = inside, data.draw(st.sampled_from(keys))
            inside = place[key]
        value = data.draw(ANYTHING_IN_JSON)
        if place is None:
            written = value
        else:
            place[key] = value
        put_json(copy / name, json.dumps(written))
        taken_or_refused(KINDS[kind].load, copy)
