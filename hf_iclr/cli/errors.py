"""What the user of a command reads when something is wrong: one sentence and exit code 2."""

import textwrap
import traceback
from typing import Any

import typer
from typer.core import TyperGroup


_TRANSFORMERS_DEBUG = ("underflow_overflow", "tpu_metrics_debug")  # values of the `--debug` of its TrainingArguments
_ASKED_FOR = ("repo_id", "path_or_repo_id", "pretrained_model_name_or_path")  # what Hub loaders call a repository


class Commands(TyperGroup):
    """
    The commands, with `--debug` before or after a command's name. Without it, an error is one sentence on stderr; with
    it, the traceback comes before. The exit code is 2, as 1 says that what was measured is not good enough.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        runs = args[:1] == ["run"] or args[:2] == ["--debug", "run"]
        ours = args[:2] if runs else args  # behind a script's name it is the script's
        pairs = zip(ours, [*args[1:], ""], strict=False)
        rest = [a for a, value in pairs if a != "--debug" or value in _TRANSFORMERS_DEBUG] + args[len(ours) :]
        return super().parse_args(ctx, ["--debug", *rest] if len(rest) < len(args) else rest)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            typer.echo("Interrupted.", err=True)
            raise typer.Exit(130) from None
        except Exception as error:  # noqa: BLE001  whatever a library throws at a wrong input
            if ctx.params["debug"]:
                traceback.print_exception(error)
            command = " ".join(["hf-iclr", *filter(None, [ctx.invoked_subcommand])])
            typer.echo(f"{command}: {sentence(error)}", err=True)
            raise typer.Exit(2) from None


def sentence(error: Exception) -> str:
    """
    An error in one line that names the model, data set or column it is about.

    Args:
        error (`Exception`):
            Of ours or of a library.

    Returns:
        `str`
    """
    said = error.format_message() if hasattr(error, "format_message") else str(error)  # of typer, or any other
    text = textwrap.shorten(said, 1000, placeholder=" ...")
    if type(error).__name__ == "ChildFailedError":  # of torchrun, with a page of its own
        return "Expected every process to end well, one failed: what it said stands above."
    if isinstance(error, FileNotFoundError) and isinstance(error.filename, str):  # Python's own has a number in front
        return f"Expected a file or folder at {error.filename}, found none."
    if isinstance(error, KeyError):
        return f"Expected a column or key {text}, got none of that name."
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    asked = [str(frame.f_locals[name]) for frame in frames for name in _ASKED_FOR if frame.f_locals.get(name)]
    data = [frame.f_locals for frame in frames if frame.f_code.co_name == "load_dataset"]
    asked += [str(names["data_files"] or names["path"]) for names in data[:1]]
    if asked and "Repo id must" in text:
        return f"Expected a folder or a repository, got {asked[-1]!r}, which is neither."
    if data and isinstance(error, StopIteration):
        return f"Expected rows in {asked[-1]!r}, got an empty file."
    why = f" {sentence(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
    if not isinstance(error, OSError | ValueError | TypeError | ImportError) and not hasattr(error, "format_message"):
        text = f"{type(error).__name__}: {text or 'no more is known'}.{why} (--debug shows where)"
    if asked and asked[-1] not in text and not frames[-1].f_globals["__name__"].startswith("hf_iclr"):
        return f"Could not load {asked[-1]!r}: {text}"
    return text
