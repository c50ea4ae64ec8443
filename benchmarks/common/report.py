"""How reports say things: a Markdown table, and how sure a mean is."""

from collections.abc import Sequence
from typing import Any

from scipy import stats


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """In Markdown, floats with three digits after the point."""
    print()
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")
    print()


def print_frame(frame: Any, digits: int = 3) -> None:
    """A data frame's columns as such a table, without its index; floats with so many digits, nothing for `NaN`."""
    cells = frame.astype(object).where(frame.notna(), "").to_numpy()
    rows = [[f"{cell:.{digits}f}" if isinstance(cell, float) else cell for cell in row] for row in cells]
    print_table(list(frame.columns), rows)


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the mean's 95 % t interval; infinite for one value."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if len(values) > 1 else float("inf")
