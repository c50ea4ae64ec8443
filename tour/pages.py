"""`hf-iclr tour`: every part runs on real input and leaves tables, figures, tour.json and one index.html."""

import base64
import json
import logging
import math
import pkgutil
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

import hf_iclr
from hf_iclr.doctor.environment import machine, packages
from hf_iclr.saving import atomic_file


logger = logging.getLogger(__name__)

# One function a part, `section(out_dir, quick, progress) -> TourSection`; imported when its turn comes.
SECTIONS = [
    "hf_iclr.tour.cascade:section",
    "hf_iclr.tour.deep_safety:section",
    "hf_iclr.tour.squeeze:section",
    "hf_iclr.tour.data_shapley:section",
    "hf_iclr.tour.alpha_edit:section",
    "hf_iclr.tour.sam2:section",
]


@dataclass
class TourSection:
    """
    What one part of the tour shows.

    Args:
        title (`str`):
            Heading of the section.
        summary (`list[str]`):
            Sentences that say what was run and what came out.
        table (`pandas.DataFrame`):
            The figures in short; its index is not shown.
        headline (`str`, *optional*):
            The one figure to take away, in a few words.
        command (`str`, *optional*):
            What does the same for the reader's own model or data.
        figures (`list[pathlib.Path]`, *optional*):
            PNG or GIF files written to `out_dir`.
        examples (`list[str]`, *optional*):
            Texts to show as they are.
        data (`dict`, *optional*):
            Anything else worth keeping in tour.json: plain values, arrays, tensors; of other objects, their text.
        seconds (`float`, *optional*, defaults to 0.0):
            Set by [`run_tour`].
        problems (`list[str]`, *optional*):
            Set by [`run_tour`]: what is missing from an otherwise finished section.
    """

    title: str
    summary: list[str]
    table: pd.DataFrame
    headline: str = ""
    command: str = ""
    figures: list[Path] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class FailedSection:
    """Stands in for a section that raised, or whose result can't be shown."""

    title: str
    error: str
    details: str
    seconds: float


def run_tour(
    out_dir: Path, quick: bool = False, sections: list[str] = SECTIONS, debug: bool = False
) -> list[TourSection | FailedSection]:
    """
    Run the sections one after the other and write the figures, and after each section anew, `index.html` and
    `tour.json`: a kill keeps what was done.

    Args:
        out_dir (`pathlib.Path`):
            Folder for the results, made if need be.
        quick (`bool`, *optional*, defaults to `False`):
            Ask each section for its shortest form.
        sections (`list[str]`, *optional*, defaults to `SECTIONS`):
            `"module:function"` of each section.
        debug (`bool`, *optional*, defaults to `False`):
            Print the traceback of a section that raised; `tour.json` and the page have it in any case.

    Returns:
        `list`: a [`TourSection`] or, for a section that raised, a [`FailedSection`]; the others run all the same.
        [`has_failed`] tells which are not whole.
    """
    matplotlib.use("Agg")
    console = Console()
    about = {
        "hf_iclr": hf_iclr.__version__,
        "quick": quick,
        "num_sections": len(sections),
        "machine": machine(),
        "packages": {package.name: package.installed for package in packages()},
    }
    results: list[TourSection | FailedSection] = []
    _write(out_dir, about, results)
    for path in sections:
        console.rule(path.partition(":")[0])
        results.append(_run_section(path, out_dir, quick, about))
        _write(out_dir, about, results)
        _show(results[-1], console, debug)
    console.print(f"Written to {out_dir / 'index.html'} and {out_dir / 'tour.json'}.", soft_wrap=True)
    return results


def has_failed(result: TourSection | FailedSection) -> bool:
    """Whether a section raised or lacks something it promised."""
    return isinstance(result, FailedSection) or bool(result.problems)


def _run_section(path: str, out_dir: Path, quick: bool, about: dict[str, Any]) -> TourSection | FailedSection:
    start = time.perf_counter()
    progress = partial(tqdm, leave=False, dynamic_ncols=True)
    try:
        section: Callable[..., TourSection] = pkgutil.resolve_name(path)
        result: TourSection | FailedSection = _checked(section(out_dir, quick, progress))
        _texts(about, [result])  # what cannot be shown fails here, alone
    except (Exception, SystemExit) as error:  # one broken part must not hide the others; page and exit code report it
        logger.debug("%s failed", path, exc_info=True)
        result = FailedSection(path, f"{type(error).__name__}: {error}", traceback.format_exc(), 0.0)
    result.seconds = time.perf_counter() - start
    return result


def _checked(result: TourSection) -> TourSection:
    """What a section returned, if it can be shown; a figure that is not there becomes a problem of the section."""
    if not isinstance(result, TourSection):
        raise TypeError(f"Expected the section to return a TourSection, got {type(result).__name__}.")
    kinds = {
        "title": str,
        "headline": str,
        "command": str,
        "summary": list,
        "table": pd.DataFrame,
        "figures": list,
        "examples": list,
    }
    for name, kind in kinds.items():
        if not isinstance(value := getattr(result, name), kind):
            raise TypeError(f"Expected `{name}` to be a {kind.__name__}, got {type(value).__name__}.")
    figures = [Path(path) for path in result.figures]
    result.figures = [path for path in figures if path.is_file()]
    result.problems = [f"The figure {path.name} was not drawn." for path in figures if path not in result.figures]
    return result


def _write(out_dir: Path, about: dict[str, Any], results: list[TourSection | FailedSection]) -> None:
    for name, text in _texts(about, results).items():
        with atomic_file(out_dir / name) as part:
            part.write_text(text, encoding="utf-8", errors="replace")


def _texts(about: dict[str, Any], results: list[TourSection | FailedSection]) -> dict[str, str]:
    """The two files' contents; `finished` is empty for as long as sections are still to come."""
    done = len(results) == about["num_sections"]
    about = about | {"finished": time.strftime("%Y-%m-%d %H:%M") if done else None}
    content = about | {"sections": [_as_json(result) for result in results]}
    return {"tour.json": json.dumps(content, indent=2, allow_nan=False), "index.html": _page(about, results)}


def _show(result: TourSection | FailedSection, console: Console, debug: bool) -> None:
    if isinstance(result, FailedSection):
        console.print(f"[bold red]{escape(result.title)} failed[/] after {result.seconds:.0f} s.")
        console.print(_shortened(result.error), markup=False, highlight=False, soft_wrap=True)
        if debug:
            console.print(result.details, markup=False, highlight=False)
        else:
            console.print("The traceback is in tour.json and on the page; --debug prints it here.")
        return
    console.print(f"[bold]{escape(result.title)}[/] ({result.seconds:.0f} s)")
    for sentence in [*filter(None, [result.headline]), *result.summary]:
        console.print(sentence, markup=False)
    table = Table()
    for name, number in zip(result.table.columns, _numbers(result.table), strict=True):
        table.add_column(escape(str(name)), justify="right" if number else "left")
    for row in result.table.itertuples(index=False):
        table.add_row(*(escape(_format(value)) for value in row))
    console.print(table)
    for problem in result.problems:
        console.print(f"[bold red]{escape(problem)}[/]")


def _shortened(error: str, length: int = 240) -> str:
    """An error in one line."""
    line = " ".join(error.split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def _page(about: dict[str, Any], results: list[TourSection | FailedSection]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _format
    environment.filters["numbers"] = _numbers
    environment.filters["data_url"] = _data_url
    environment.filters["has_failed"] = has_failed
    failed = sum(has_failed(result) for result in results)
    return environment.get_template("page.html").render(about=about, sections=results, failed=failed)


def _data_url(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f"data:image/{path.suffix[1:]};base64,{encoded}"


def _as_json(result: TourSection | FailedSection) -> dict[str, Any]:
    if isinstance(result, FailedSection):
        return asdict(result)
    columns = [str(name) for name in result.table.columns]
    return {
        "title": result.title,
        "seconds": round(result.seconds, 2),
        "headline": result.headline,
        "command": result.command,
        "summary": _plain(result.summary),
        "table": [dict(zip(columns, _plain(row), strict=True)) for row in result.table.itertuples(index=False)],
        "figures": [path.name for path in result.figures],
        "examples": _plain(result.examples),
        "data": _plain(result.data),
        "problems": result.problems,
    }


def _plain(value: Any) -> Any:
    """Any value as JSON's own: numpy and torch as numbers, no number as nothing, other objects as their text."""
    if isinstance(value, str | bool | int):
        return value
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return [_plain(item) for item in sorted(value, key=str)]
    if isinstance(value, pd.DataFrame):
        return _plain(value.to_dict("records"))
    if isinstance(value, np.ndarray | np.generic | torch.Tensor | pd.Series | pd.Index):
        return _plain(value.tolist())
    return str(value)


def _numbers(table: pd.DataFrame) -> list[bool]:
    """Which columns hold numbers."""
    types = pd.api.types
    return [types.is_numeric_dtype(dtype) and not types.is_bool_dtype(dtype) for dtype in table.dtypes]


def _format(value: Any) -> str:
    """A table cell: four significant digits, thousands set apart, a dash for nothing."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{value:,.0f}" if isinstance(value, Integral) or abs(float(value)) >= 1e4 else f"{value:.4g}"
    return str(value)
