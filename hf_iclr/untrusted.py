"""What somebody else may have made: names that must stay in their folder, and files that may be damaged or hostile."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints


if TYPE_CHECKING:
    import torch


def inside(folder: str | Path, name: str) -> Path:
    """
    The one way to join a folder and a name that was read from a file, a request or a dataset.

    Args:
        folder (`str` or `Path`):
            Where the file must be.
        name (`str`):
            A relative path with `/` between its parts.

    Returns:
        `Path`: it may not exist; if it does, it is in the folder, links followed.

    Raises:
        ValueError: when the name is absolute or empty, has `..`, a backslash, a drive or NUL in it, or is a link that
            leads out of the folder.
    """
    if not _is_contained(name):
        raise ValueError(
            f"Expected a file name without '..', a backslash or a drive for {folder}, got {name!r:.80}, which could "
            "lead out of that folder. Whoever made the name has to give another, such as 'clip_1'."
        )
    path = Path(folder, name)
    _refuse_link_out(path, folder)
    return path


def _is_contained(name: str) -> bool:
    if not isinstance(name, str) or "\\" in name or "\0" in name or re.match("[A-Za-z]:", name):
        return False
    try:
        lengths = [len(os.fsencode(part)) for part in name.split("/")]
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and no file name
        return False
    return max(lengths) <= 255 and not {"", ".", ".."} & {*name.split("/")}


def check_links(folder: str | Path) -> Path:
    """
    Make sure that no link in a folder leads out of it, before anything in it is read, written or removed.

    Args:
        folder (`str` or `Path`):
            The folder; none is fine.

    Returns:
        `Path`: the folder.

    Raises:
        ValueError: when one does.
    """
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            _refuse_link_out(Path(parent, name), folder)
    return Path(folder)


def _refuse_link_out(path: Path, folder: str | Path) -> None:
    target, roots = Path(os.path.realpath(path)), [Path(os.path.realpath(folder))]
    # The Hub's cache keeps the files of models--a--b/snapshots/COMMIT in models--a--b/blobs.
    roots += [p.parents[1] / "blobs" for p in (roots[0], *roots[0].parents) if p.parent.name == "snapshots"]
    if not any(target.is_relative_to(root) for root in roots):
        raise ValueError(
            f"Expected the files of {folder} to be in it, got {path}, a link to {target}. Put a copy of that file in "
            "the link's place if you made it; else do not use this folder."
        )


def regular_file(path: str | Path) -> Path:
    """
    A file that can be read to its end, unlike a pipe or a device.

    Raises:
        ValueError: when it is none.
    """
    if not Path(path).is_file():
        what = "no regular file" if os.path.lexists(path) else "none: give the folder or file that was written"
        raise ValueError(f"Expected a file {path}, got {what}.")
    return Path(path)


def parse_json(text: str | bytes, where: str | Path, nan: bool = False) -> Any:
    """
    JSON in which every name stands once.

    Args:
        text (`str` or `bytes`):
            The JSON.
        where (`str` or `Path`):
            For the error: where it came from.
        nan (`bool`, *optional*, defaults to `False`):
            Whether there may be NaN and infinity, which are no JSON but which Python writes.

    Raises:
        ValueError: when it is something else, or too deep to read.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        ((name, count),) = Counter(name for name, _ in pairs).most_common(1) or [("", 1)]
        if count > 1:
            raise ValueError(f"{name!r:.80} stands in it twice")
        return dict(pairs)

    def constant(name: str) -> float:
        if nan:
            return float(name)
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected JSON in {where}, got something else: {where} is no JSON ({error}).") from error


def read_json(path: str | Path, nan: bool = False) -> Any:
    """[`parse_json`] of a file."""
    return parse_json(regular_file(path).read_bytes(), path, nan)


def read_safetensors(path: str | Path) -> tuple[dict[str, "torch.Tensor"], dict[str, str]]:
    """
    The tensors of a safetensors file, and its metadata. A header that promises more than the file has is refused
    before anything else is read.

    Args:
        path (`str` or `Path`):
            The file.

    Raises:
        ValueError: when it is no whole safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular_file(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"Expected a whole safetensors file, got {path}, which is no safetensors file ({error})."
        ) from None


@contextmanager
def as_written_by(writer: str, path: str | Path) -> Iterator[None]:
    """
    While it lasts, contents of another form than expected are a `ValueError` with a sentence.

    Args:
        writer (`str`):
            What writes such files, such as `"SafetyReport.save"`.
        path (`str` or `Path`):
            What is read.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(
            f"Expected {path} as {writer} writes it, got other contents ({type(error).__name__}: {error}). Get it "
            "again from where it came, or write it anew."
        ) from error


def whole_number(value: Any, name: str, least: int = 0, most: int = 2**53) -> int:
    """
    A count that was read.

    Args:
        value (`Any`):
            What stood there.
        name (`str`):
            What it counts, for the error.
        least, most (`int`, *optional*, default to 0 and 2^53):
            Its range.

    Raises:
        ValueError: when it is no whole number, or out of range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"Expected {name} to be a whole number from {least} to {most}, got {value!r:.80}.")
    return value


def check_field_types(config: Any, kind: type) -> None:
    """
    A configuration's own fields that are text, numbers or booleans.

    Args:
        config (`Any`):
            What was made.
        kind (`type`):
            The class whose annotations are held against it; those of its parents are theirs.

    Raises:
        TypeError: when a value is of another type, or no number.
    """
    plain: dict[Any, type] = {float: Real, int: Integral, str: str, bool: bool, type(None): type(None)}
    hints = get_type_hints(kind)
    for name in kind.__annotations__:
        options = get_args(hints[name]) or (hints[name],)
        if not set(options) <= plain.keys():
            continue
        value = getattr(config, name)
        known = tuple(plain[option] for option in options)
        is_nan = isinstance(value, float) and math.isnan(value)
        if not isinstance(value, known) or is_nan or (isinstance(value, bool) and bool not in options):
            wanted = " or ".join(option.__name__.replace("NoneType", "None") for option in options)
            raise TypeError(f"Expected {name} to be {wanted}, got {value!r:.80}.")
