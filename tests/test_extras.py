"""Each extra absent: the rest of the package imports and works, and who asks for what is missing gets a sentence."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_iclr.extras import EXTRAS, MissingExtraError, require
from tests.without_extras import normal, project


# Which extra answers each question of tests/without_extras.py.
NEEDS = {
    "from hf_iclr import Sam2VideoPipeline": "vision",
    "import hf_iclr.vision.session.session": "vision",
    "pipeline(task)": "vision",
    "pipeline(task, model)": "vision",
    "ConceptEditor": "diffusion",
    "load_metric": "metrics",
    "write_squeeze_report": "cli",
    "hf-iclr": "cli",
}
ALSO_IN = {"load_metric": "vision"}  # evaluate is in both
# Modules that only the command and `load_metric` import, after they have asked for the extra.
BEHIND_A_QUESTION = {
    "cli": r"hf_iclr\.(cli|tour)(\..*)?|hf_iclr\.doctor\.tables",
    "metrics": r"hf_iclr\.editors\.evaluate_modules",
    "vision": r"hf_iclr\.vision\..*|hf_iclr\.tour\.(sam2|demo\.segmenter)|hf_iclr\.cli\.(segment|train)_command",
}


# Each extra is absent once with others present and once without; imports take a process of its own each time.
HALVES = [pytest.param(names, marks=pytest.mark.slow) for names in (["cli", "metrics"], ["diffusion", "vision"])]


@pytest.fixture(params=[*HALVES, list(EXTRAS)], ids=" ".join)
def run(request):
    return request.param, found_without(*request.param)


@functools.cache
def found_without(*absent):
    command = [sys.executable, "-m", "tests.without_extras", *absent]
    root = Path(__file__).parents[1]
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(root)])
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_what_is_missing_is_said(run):
    absent, found = run
    for question, sentence in found["sentences"].items():
        extra = NEEDS[question]
        if not {extra, ALSO_IN.get(question, extra)} <= set(absent):
            assert sentence == "", question
            continue
        assert re.match(rf"Expected .+ needs, got none installed. Type `pip install 'hf_iclr\[{extra}\]'`\.", sentence)
    assert ("exit code 2" in found["sentences"]["hf-iclr"]) == ("cli" in absent)


def test_the_rest_imports(run):
    absent, found = run
    vision = {name for name, sentence in found["names"].items() if "hf_iclr[vision]" in sentence}
    assert vision == {name for name, sentence in found["names"].items() if sentence}
    assert ("VideoSession" in vision) == ("vision" in absent)
    allowed = re.compile("|".join(BEHIND_A_QUESTION.get(extra, "$^") for extra in absent))
    assert [name for name in found["modules"] if not allowed.fullmatch(name)] == []


def test_transformers_is_told_of_the_rest(run):
    _, found = run
    assert found["registering"] == ""
    assert {"speculative-cascade", "promptable-video-segmentation"} <= set(found["tasks"])


def test_one_can_train_edit_and_cascade_with_no_extra(run):
    absent, found = run
    if len(absent) < len(EXTRAS):
        pytest.skip("asked with no extra at all")
    used = found["used"]
    assert 0 < used["sft"] < 100 and 0 < used["dpo"] < 100
    assert used["shapley"] == 8 and used["edits"] == 4 and used["cascaded"] > 0
    assert used["audited"] > 1000 and not used["figure"]
    assert "prefill_curve.png is not drawn. Expected matplotlib" in found["said"]


def test_extras_are_those_of_the_project():
    declared = project()["optional-dependencies"]
    names = {"PIL": "pillow"}
    for extra, modules in EXTRAS.items():
        packages = {normal(re.match(r"[\w.-]+", line)[0]) for line in declared[extra]}
        assert packages == {names.get(module, module) for module in modules}
    assert set(re.findall(r"\w+", declared["all"][0].partition("[")[2])) == set(EXTRAS)


def test_only_what_is_missing_is_named(monkeypatch):
    require("cli", "a part")
    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(MissingExtraError, match="Expected typer, which `a part` needs") as caught:
        require("cli", "a part")
    assert caught.value.name == "typer" and isinstance(caught.value, ImportError)
    require("cli", "a part", "rich")
