"""`hf-iclr tour`: every part runs on real input and leaves tables, figures, tour.json and one index.html."""

import base64
import json
import logging
import pkgutil
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

import hf_iclr
from hf_iclr.environment import machine, packages


logger = logging.getLogger(__name__)

# One function a part, `section(out_dir, quick, progress) -> TourSection`; imported when its turn comes.
SECTIONS = [
    "hf_iclr.generation.tour_cascade:section",
    "hf_iclr.trainers.tour_deep_safety:section",
    "hf_iclr.trainers.tour_squeeze:section",
    "hf_iclr.trainers.tour_data_shapley:section",
    "hf_iclr.editors.tour_alpha_edit:section",
    "hf_iclr.vision.tour_sam2:section",
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
        figures (`list[pathlib.Path]`, *optional*):
            PNG or GIF files written to `out_dir`.
        examples (`list[str]`, *optional*):
            Texts to show as they are.
        data (`dict`, *optional*):
            Anything else worth keeping in tour.json: plain values, arrays and tensors.
        seconds (`float`, *optional*, defaults to 0.0):
            Set by [`run_tour`].
    """

    title: str
    summary: list[str]
    table: pd.DataFrame
    figures: list[Path] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class FailedSection:
    """Stands in for a section that raised."""

    title: str
    error: str
    details: str
    seconds: float


def run_tour(out_dir: Path, quick: bool = False, sections: list[str] = SECTIONS) -> list[TourSection | FailedSection]:
    """
    Run the sections one after the other and write `index.html`, `tour.json` and the figures.

    Args:
        out_dir (`pathlib.Path`):
            Folder for the results, made if need be.
        quick (`bool`, *optional*, defaults to `False`):
            Ask each section for its shortest form.
        sections (`list[str]`, *optional*, defaults to `SECTIONS`):
            `"module:function"` of each section.

    Returns:
        `list`: a [`TourSection`] or, for a section that raised, a [`FailedSection`]; the others run all the same.
    """
    matplotlib.use("Agg")
    out_dir.mkdir(parents=True, exist_ok=True)
    console = Console()
    results = []
    for path in sections:
        console.rule(path.partition(":")[0])
        result = _run_section(path, out_dir, quick)
        _show(result, console)
        results.append(result)

    about = {
        "hf_iclr": hf_iclr.__version__,
        "quick": quick,
        "finished": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine(),
        "packages": {package.name: package.installed for package in packages()},
    }
    (out_dir / "tour.json").write_text(
        json.dumps(about | {"sections": [_as_json(result) for result in results]}, indent=2, default=_plain)
    )
    (out_dir / "index.html").write_text(_page(about, results), encoding="utf-8")
    console.print(f"Written to {out_dir / 'index.html'} and {out_dir / 'tour.json'}.")
    return results


def _run_section(path: str, out_dir: Path, quick: bool) -> TourSection | FailedSection:
    start = time.perf_counter()
    progress = partial(tqdm, leave=False, dynamic_ncols=True)
    try:
        section: Callable[..., TourSection] = pkgutil.resolve_name(path)
        result: TourSection | FailedSection = section(out_dir, quick, progress)
    except Exception as error:  # one broken part must not hide the others; the page and the exit code report it
        logger.debug("%s failed", path, exc_info=True)
        result = FailedSection(path, f"{type(error).__name__}: {error}", traceback.format_exc(), 0.0)
    result.seconds = time.perf_counter() - start
    return result


def _show(result: TourSection | FailedSection, console: Console) -> None:
    if isinstance(result, FailedSection):
        console.print(f"[bold red]{escape(result.title)} failed.[/] {escape(result.error)}")
        console.print(result.details, markup=False, highlight=False)
        return
    console.print(f"[bold]{escape(result.title)}[/] ({result.seconds:.0f} s)")
    for sentence in result.summary:
        console.print(sentence, markup=False)
    table = Table()
    for name in result.table.columns:
        table.add_column(str(name), justify="right" if _is_number(result.table[name]) else "left")
    for row in result.table.itertuples(index=False):
        table.add_row(*(escape(_format(value)) for value in row))
    console.print(table)


def _page(about: dict[str, Any], results: list[TourSection | FailedSection]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["cell"] = _format
    environment.filters["is_number"] = _is_number
    environment.filters["data_url"] = _data_url
    failed = sum(isinstance(result, FailedSection) for result in results)
    return environment.get_template("tour.html").render(about=about, sections=results, failed=failed)


def _data_url(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f"data:image/{path.suffix[1:]};base64,{encoded}"


def _as_json(result: TourSection | FailedSection) -> dict[str, Any]:
    if isinstance(result, FailedSection):
        return asdict(result)
    return {
        "title": result.title,
        "seconds": round(result.seconds, 2),
        "summary": result.summary,
        "table": json.loads(result.table.to_json(orient="records")),
        "figures": [path.name for path in result.figures],
        "examples": result.examples,
        "data": result.data,
    }


def _plain(value: Any) -> Any:
    """numpy and torch values as JSON's own types."""
    return value.tolist()


def _is_number(column: pd.Series) -> bool:
    return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)


def _format(value: Any) -> str:
    """A table cell: four significant digits, thousands set apart, a dash for nothing."""
    if pd.isna(value):
        return "–"
    if isinstance(value, Real) and not isinstance(value, bool):
        return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)
