"""The command `hf-iclr`: one function a command, heavy imports inside it so that `hf-iclr --help` is quick."""

from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    help="The six ICLR 2025 award papers as drop-in parts of the Hugging Face stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def tour(
    out: Annotated[Path, typer.Option(help="Folder for index.html, tour.json and the figures.")] = Path("tour"),
    quick: Annotated[bool, typer.Option("--quick", help="Run each part in its shortest form.")] = False,
) -> None:
    """Run every part on real input and write one page about it."""
    from hf_iclr.tour import FailedSection, run_tour

    if any(isinstance(result, FailedSection) for result in run_tour(out, quick)):
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Show versions, devices and whether the upstream code we lean on still has its shape."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from hf_iclr.environment import machine, packages
    from hf_iclr.upstream import check_seams

    console = Console()
    table = Table("", "", title="Machine", title_justify="left", show_header=False)
    for name, value in machine().items():
        table.add_row(name, str(value))
    console.print(table)

    installed = packages()
    table = Table("package", "wanted", "installed", "", title="Packages", title_justify="left")
    for package in installed:
        table.add_row(package.name, package.wanted, package.installed or "none", _mark(package.ok))
    console.print(table)

    checks = check_seams()
    table = Table("upstream", "", title="Upstream code we lean on", title_justify="left")
    for check in checks:
        name = check.seam.partition(":")[2]
        change = f"expected {check.expected}\n   found {check.found or 'nothing of that name'}"
        table.add_row(name, _mark(True) if check.ok else f"[red]changed[/]\n{escape(change)}")
    console.print(table)

    if not (all(package.ok for package in installed) and all(check.ok for check in checks)):
        raise typer.Exit(1)


def _mark(ok: bool) -> str:
    return "[green]ok[/]" if ok else "[red]no[/]"
