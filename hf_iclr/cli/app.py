"""The command `hf-iclr`: one function a command, heavy imports inside it so that `hf-iclr --help` is quick."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from hf_iclr import __version__
from hf_iclr.cli import editors, generation, squeeze, trainers, vision
from hf_iclr.cli.errors import Commands


app = typer.Typer(
    cls=Commands,
    help="The six ICLR 2025 award papers as drop-in parts of the Hugging Face stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which takes [[x, y]] in a help text for markup
)


_UNREAD = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_iclr {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and leave.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; also after a command's name.")
    ] = False,
) -> None:
    pass


@app.command()
def tour(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for index.html, tour.json and the figures.")] = Path("out/tour"),
    quick: Annotated[bool, typer.Option("--quick", help="Run each part in its shortest form.")] = False,
) -> None:
    """Run every part on real input and write one page about it."""
    from hf_iclr.extras import require

    require("cli", "hf-iclr tour")
    from hf_iclr.tour.pages import has_failed, run_tour

    if any(has_failed(result) for result in run_tour(out, quick, debug=context.find_root().params["debug"])):
        raise typer.Exit(1)


@app.command()
def doctor(
    context: typer.Context,
    seams: Annotated[bool, typer.Option("--seams", help="List all upstream code we lean on.")] = False,
) -> None:
    """Run each part on tiny models and say what works here, what is broken by whom and what is not installed."""
    from rich.console import Console

    from hf_iclr.doctor.report import run_checks
    from hf_iclr.doctor.tables import is_healthy, machine_table, package_table, part_table, seam_table

    console = Console()
    with console.status("Each part runs on tiny models, which takes some 15 seconds."):
        findings = run_checks()
    tables = (machine_table(findings), package_table(), part_table(findings), seam_table(findings, seams))
    for table in tables:
        console.print(table)
    if context.find_root().params["debug"]:
        for finding in findings.values():
            if finding.details:
                console.rule(finding.title)
                console.print(finding.details, markup=False, highlight=False)
    if not is_healthy(findings):
        raise typer.Exit(1)


@app.command(context_settings=_UNREAD)
def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="A training script; its own arguments follow.")],
    with_parts: Annotated[
        list[str],
        typer.Option(
            "--with", help="shapley:val.jsonl, squeeze[:pairs.jsonl], safety:prompts.txt or null_space:FOLDER."
        ),
    ] = [],  # noqa: B006
) -> None:
    """Run a training script as it is, with our callbacks in whatever trainer it makes."""
    if str(script) == "--help":  # behind the script it is the script's
        typer.echo(context.get_help())
        return
    from hf_iclr.runs.parts import run_script

    run_script(script, context.args, with_parts)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="Output folder of a training, or of anything of ours.")],
    out: Annotated[Path | None, typer.Option(help="The page; by default run_report.html in that folder.")] = None,
    rows: Annotated[str | None, typer.Option(help="What was trained on, to show rows with their values.")] = None,
    source_column: Annotated[str | None, typer.Option(help="Its column to sum values by.")] = None,
) -> None:
    """Write one page about a run from what our parts, and any trainer, left in its folder."""
    from hf_iclr.runs.dataset_files import load_rows
    from hf_iclr.runs.report import write_run_report

    typer.echo(write_run_report(run_dir, out, None if rows is None else load_rows(rows), source_column))


_COMMANDS: list[Callable[..., None]] = [
    generation.cascade, trainers.audit, editors.edit, vision.segment, vision.vos, vision.annotate,
    vision.annotate_ui, vision.inpaint,
]  # fmt: skip
_PARSERS: list[Callable[..., None]] = [trainers.sft, trainers.dpo, vision.train_sam2]  # which read their arguments
for _command in _COMMANDS:
    app.command()(_command)
for _command in _PARSERS:
    app.command(context_settings=_UNREAD)(_command)
_SQUEEZE = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help=squeeze.__doc__.partition(": ")[2])
for _command in (squeeze.report, squeeze.replay, squeeze.audit, squeeze.influence):
    _SQUEEZE.command()(_command)
app.add_typer(_SQUEEZE, name="squeeze")
