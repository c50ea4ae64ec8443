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
        following = [*args[1:], ""]
        rest = [a for a, value in zip(args, following, strict=True) if a != "--debug" or value in _TRANSFORMERS_DEBUG]
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
    if isinstance(error, KeyError):
        return f"Expected a column or key {text}, got none of that name."
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    asked = [str(frame.f_locals[name]) for frame in frames for name in _ASKED_FOR if frame.f_locals.get(name)]
    if asked and "Repo id must" in text:
        return f"Expected a folder or a repository, got {asked[-1]!r}, which is neither."
    if asked and asked[-1] not in text and not frames[-1].f_globals["__name__"].startswith("hf_iclr"):
        return f"Could not load {asked[-1]!r}: {text}"
    if isinstance(error, OSError | ValueError | TypeError | ImportError) or hasattr(error, "format_message"):
        return text
    why = f" {sentence(error.__cause__)}" if isinstance(error.__cause__, Exception) else ""
    return f"{type(error).__name__}: {text or 'no more is known'}.{why} (--debug shows where)"
