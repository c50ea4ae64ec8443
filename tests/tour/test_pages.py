"""The frame of the tour: what is written, and that one failing section neither hides the others nor goes unnoticed."""

import json
import re
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from hf_iclr.tour import pages as tour
from hf_iclr.tour.pages import FailedSection, TourSection


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


def leaving_section(out_dir, quick, progress):
    raise SystemExit("off")


def lacking_section(out_dir, quick, progress):
    """Names a figure that it never drew beside one that it did."""
    section = fake_section(out_dir, quick, progress)
    section.figures.append(out_dir / "none.png")
    return section


def odd_section(out_dir, quick, progress):
    """Everything that JSON does not know, in `data` and in a table with two columns of one name."""
    table = pd.DataFrame([[out_dir, [1, 2]], [np.float32(0.25), pd.NA]], columns=["same", "same"])
    data = {
        "path": Path("a") / "b",
        "list": [Path("c"), {2, 1}],
        3: torch.tensor([0.5, float("nan")], requires_grad=True),
        "nan": float("nan"),
        "infinite": np.float64("inf"),
        "frame": pd.DataFrame({"x": [1, None]}),
        "when": pd.NaT,
        "object": re.compile("x+"),
    }
    return TourSection("Odd things", ["They are shown."], table, data=data)


def dict_section(out_dir, quick, progress):
    return {"title": "no section"}


def table_section(out_dir, quick, progress):
    return TourSection("A table of another kind", ["None."], [{"a": 1}])


def endless_section(out_dir, quick, progress):
    data = {}
    data["itself"] = data
    return TourSection("A loop", ["It has no end."], pd.DataFrame({"a": [1]}), data=data)


def killed_section(out_dir, quick, progress):
    raise KeyboardInterrupt


def test_page_and_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tour.time, "perf_counter", count(10, 2.5).__next__)
    (result,) = tour.run_tour(tmp_path / "out", quick=True, sections=[f"{__name__}:fake_section"])
    assert isinstance(result, TourSection) and result.seconds == 2.5

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


def run(folder, *names):
    """The sections of these names, the page and tour.json; NaN, which is no JSON, is refused."""
    results = tour.run_tour(folder, sections=[name if ":" in name else f"{__name__}:{name}" for name in names])
    return results, *written(folder)


def written(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((folder / "tour.json").read_text(), parse_constant=refuse)
    return (folder / "index.html").read_text(encoding="utf-8"), content


def test_a_failing_section_is_reported_and_the_others_run(tmp_path, capsys):
    results, page, content = run(
        tmp_path, "broken_section", "hf_iclr.no_such_module:section", "leaving_section", "fake_section"
    )
    *broken, fine = results
    assert all(isinstance(result, FailedSection) for result in broken) and isinstance(fine, TourSection)
    assert [tour.has_failed(result) for result in results] == [True, True, True, False]
    assert "no [weights] here" in broken[0].error and broken[2].error == "SystemExit: off"
    assert "3 of 4 sections failed" in page and "RuntimeError: no [weights] here" in page and "Squares" in page
    assert page.count("<details>") == 3 and "raise RuntimeError" in page
    assert content["sections"][0]["error"] == broken[0].error and content["finished"]
    assert "raise RuntimeError" in content["sections"][0]["details"]
    printed = capsys.readouterr().out
    assert "RuntimeError: no [weights] here" in printed and "raise RuntimeError" not in printed
    block = printed.split("no_such_module")[0].splitlines()
    assert len([line for line in block if line.strip() and "─" not in line]) == 3, "three lines a failure"


def test_debug_prints_the_traceback(tmp_path, capsys):
    tour.run_tour(tmp_path, sections=[f"{__name__}:broken_section"], debug=True)
    assert 'raise RuntimeError("no [weights] here")' in capsys.readouterr().out


def test_a_lost_figure_costs_only_itself(tmp_path, capsys):
    (lacking, fine), page, content = run(tmp_path, "lacking_section", "fake_section")
    assert tour.has_failed(lacking) and not tour.has_failed(fine)
    assert page.count("data:image/png;base64,") == 2 and "The figure none.png was not drawn." in page
    assert "1 of 2 sections failed" in page
    first, second = content["sections"]
    assert first["figures"] == ["squares.png"] and first["problems"] and first["table"] and not second["problems"]
    assert "none.png was not drawn" in capsys.readouterr().out


def test_anything_can_be_in_data_and_in_a_table(tmp_path):
    (odd,), page, content = run(tmp_path, "odd_section")
    assert not tour.has_failed(odd)
    assert content["sections"][0]["data"] == {
        "path": "a/b",
        "list": ["c", [1, 2]],
        "3": [0.5, None],
        "nan": None,
        "infinite": None,
        "frame": [{"x": 1.0}, {"x": None}],
        "when": None,
        "object": "re.compile('x+')",
    }
    assert str(tmp_path) in page and "[1, 2]" in page and "0.25" in page and "–" in page


def test_what_cannot_be_shown_is_a_failed_section(tmp_path):
    results, page, content = run(tmp_path, "dict_section", "table_section", "endless_section", "fake_section")
    errors = [result.error for result in results[:3]]
    assert errors[0] == "TypeError: Expected the section to return a TourSection, got dict."
    assert errors[1] == "TypeError: Expected `table` to be a DataFrame, got list."
    assert errors[2].startswith("RecursionError")
    assert "3 of 4 sections failed" in page and "Squares" in page and len(content["sections"]) == 4


def test_a_kill_keeps_what_was_done(tmp_path):
    """Both files are whole after every section, and say that there was more to come."""
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "fake_section", "killed_section", "fake_section")
    page, content = written(tmp_path)
    assert len(content["sections"]) == 1 and content["finished"] is None
    assert "Squares" in page and "not finished: 1 of 3 sections so far" in page
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "squares.png", "tour.json"]


@pytest.mark.parametrize(
    "value, text",
    [
        (3, "3"),
        (0.123456, "0.1235"),
        (np.float32(0.5), "0.5"),
        (1234567.8, "1,234,568"),
        (None, "–"),
        ("rule", "rule"),
        ([1, None], "[1, None]"),
    ],
)
def test_cells(value, text):
    assert tour._format(value) == text
