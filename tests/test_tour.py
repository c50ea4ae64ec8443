"""The frame of the tour: what is written, and that one failing section neither hides the others nor goes unnoticed."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from hf_iclr import tour
from hf_iclr.tour import FailedSection, TourSection


def fake_section(out_dir, quick, progress):
    values = [step**2 for step in progress(range(3), desc="squares")]
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot(values)
    figure.savefig(out_dir / "squares.png")
    plt.close(figure)
    return TourSection(
        title="Squares <of numbers>",
        summary=["Three numbers were squared."],
        table=pd.DataFrame({"rule": ["a", "b"], "value": [1.23456, np.nan], "tokens": [12, 34567]}),
        figures=[out_dir / "squares.png"],
        examples=["some\ntext & more"],
        data={"array": np.arange(2), "scalar": np.float32(0.5), "quick": quick},
    )


def broken_section(out_dir, quick, progress):
    raise RuntimeError("no [weights] here")


def test_page_and_json(tmp_path, capsys):
    (result,) = tour.run_tour(tmp_path / "out", quick=True, sections=[f"{__name__}:fake_section"])
    assert isinstance(result, TourSection) and result.seconds > 0

    content = json.loads((tmp_path / "out" / "tour.json").read_text())
    (section,) = content["sections"]
    assert section["table"][1] == {"rule": "b", "value": None, "tokens": 34567}
    assert section["data"] == {"array": [0, 1], "scalar": 0.5, "quick": True}
    assert section["figures"] == ["squares.png"]
    assert {"hf_iclr", "machine", "packages", "quick", "finished"} <= set(content)

    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "Squares &lt;of numbers&gt;" in page and "some\ntext &amp; more" in page
    assert "1.235" in page and "–" in page
    assert "data:image/png;base64," in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "the page must not ask for anything outside of itself"
    assert "Three numbers were squared." in capsys.readouterr().out


def test_a_failing_section_is_reported_and_the_others_run(tmp_path):
    sections = [f"{__name__}:broken_section", "hf_iclr.no_such_module:section", f"{__name__}:fake_section"]
    broken, missing, fine = tour.run_tour(tmp_path, sections=sections)
    assert isinstance(broken, FailedSection) and "no [weights] here" in broken.error
    assert isinstance(missing, FailedSection) and isinstance(fine, TourSection)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "2 of 3 sections failed" in page and "RuntimeError: no [weights] here" in page and "Squares" in page
    assert json.loads((tmp_path / "tour.json").read_text())["sections"][0]["error"] == broken.error


@pytest.mark.parametrize(
    "value, text", [(3, "3"), (0.123456, "0.1235"), (1234567.8, "1,234,568"), (None, "–"), ("rule", "rule")]
)
def test_cells(value, text):
    assert tour._format(value) == text
