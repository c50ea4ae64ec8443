"""What each extra of the package brings, and the sentence for what needs one that is not installed."""

TYPE_CHECKING = False  # type checkers take it for true; importing typing would slow down `import hf_iclr`
if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from matplotlib.figure import Figure

# The modules of each extra of pyproject.toml. Everything else the package imports comes with every installation.
EXTRAS = {
    "vision": ("aiohttp", "av", "contourpy", "evaluate", "PIL", "pycocotools", "scipy", "torchvision"),
    "diffusion": ("diffusers",),
    "cli": ("matplotlib", "rich", "typer"),
    "metrics": ("evaluate",),
}


class MissingExtraError(ModuleNotFoundError):
    """Raised where a part needs an extra that is not installed."""


def missing_modules(extra: str) -> list[str]:
    """The modules of an extra that are not installed; none of them is imported."""
    import sys
    from importlib.util import find_spec

    return [name for name in EXTRAS[extra] if sys.modules.get(name) is None and find_spec(name) is None]


def require(extra: str, part: str, *modules: str, instead: str = "") -> None:
    """
    Check that what a part needs is installed.

    Args:
        extra (`str`):
            The extra that brings it: `"vision"`, `"diffusion"`, `"cli"` or `"metrics"`.
        part (`str`):
            What needs it, as the user calls it.
        modules (`str`, *optional*):
            The modules of the extra that it needs. Left out: all of them.
        instead (`str`, *optional*):
            A sentence that tells how to do without.

    Raises:
        MissingExtraError: when a module is not installed. It is an `ImportError`.
    """
    missing = [name for name in missing_modules(extra) if not modules or name in modules]
    if missing:
        raise MissingExtraError(
            f"Expected {', '.join(missing)}, which `{part}` needs, got none installed. "
            f"Type `pip install 'hf_iclr[{extra}]'`. {instead}".rstrip(),
            name=missing[0],
        )


def new_figure(part: str, figsize: tuple[float, float]) -> "Figure":
    """
    A figure to draw on that opens no window.

    Args:
        part (`str`):
            What draws it, as the user calls it.
        figsize (`tuple[float, float]`):
            Width and height in inches.

    Returns:
        [`~matplotlib.figure.Figure`]

    Raises:
        MissingExtraError: without matplotlib.
    """
    require("cli", part, "matplotlib")
    from matplotlib.figure import Figure

    return Figure(figsize=figsize, layout="constrained")


def save_figure(plot: "Callable[[Path], object]", path: "Path") -> None:
    """
    Draw a figure beside results that are worth keeping without it: where matplotlib is missing, a warning says so.

    Args:
        plot (`Callable`):
            Draws to a file.
        path (`pathlib.Path`):
            The file.
    """
    try:
        plot(path)
    except MissingExtraError as error:
        import logging

        logging.getLogger(__name__).warning("%s is not drawn. %s", path, error)
