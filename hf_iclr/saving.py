"""Files that are whole or not there, and numbers that stay the same in them."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import save_file


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """
    A path to write to that becomes `path` once everything went well; a kill leaves the file that was there. Who may
    read it follows the umask, also where its writer (safetensors') lets nobody else.

    Args:
        path (`str` or `Path`):
            The file; its folder is made if need be.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        part.touch()
        mode = part.stat().st_mode
        part.unlink()
        yield part
        part.chmod(mode)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_writable(folder: str | Path, *files: str) -> Path:
    """
    The folder that results go to; raises `ValueError` where it can't be one, before any work.

    Args:
        folder (`str` or `Path`):
            Need not exist yet; it is not made.
        files (`str`, *optional*):
            Names of files that will be written to it.
    """
    if not str(folder):
        raise ValueError("Expected a folder to write to, got an empty name.")
    folder = Path(folder)
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    taken = [folder / name for name in files if (folder / name).is_dir()]
    if not parent.is_dir() or taken:
        what = f"{taken[0]} is a folder" if taken else f"{parent} is a {'file' if parent.exists() else 'dead link'}"
        raise ValueError(f"Expected a folder to write to, got {str(folder)!r}, but {what}.")
    try:
        with tempfile.TemporaryFile(dir=parent):  # permissions alone don't tell: disks may be full or read-only
            pass
    except OSError as error:
        raise ValueError(
            f"Expected a folder to write to, got {str(folder)!r}, but nothing can be written to {parent}: {error}"
        ) from error
    return folder


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """
    Write tensors so that a kill at any moment leaves the file that was there or the new one.

    Args:
        tensors (`dict[str, torch.Tensor]`):
            What to write.
        path (`Path`):
            Where to; its folder is made if need be.
        metadata (`dict[str, str]`, *optional*):
            Kept in the file's header.
    """
    with atomic_file(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata)


def contiguous_clone(tensor: torch.Tensor) -> torch.Tensor:
    """
    The same numbers row after row in new memory, as they are to be used both before they are saved and once loaded.

    Matrix products round by the strides and the alignment of their factors. What was computed may be a transpose, what
    was loaded begins wherever the file has it: with the same numbers results would differ in their last bits.
    """
    return tensor.clone(memory_format=torch.contiguous_format)


def cached_revision(name: str) -> str | None:
    """
    Commit of a repository's default branch in the local cache; models of transformers 5 do not keep theirs. Whether it
    is the model's, a hash of the weights says.

    Args:
        name (`str`):
            Repository or folder.

    Returns:
        `str`, *optional*: `None` for a folder and for what is not in the cache.
    """
    if not name or Path(name).exists():
        return None
    path = try_to_load_from_cache(name, "config.json")
    return Path(path).parent.name if isinstance(path, str) else None


def model_revision(model) -> str | None:
    """
    The commit that a model was loaded from: the one that a pipeline was asked for, else that of the default branch in
    the local cache, if the cache holds no other.

    Args:
        model (`PreTrainedModel`):
            The model.

    Returns:
        `str`, *optional*: `None` for a folder, and where it can't be known.
    """
    if (commit := getattr(model, "loaded_commit", None)) is not None:
        return commit
    name = model.config.name_or_path
    path = None if not name or Path(name).exists() else try_to_load_from_cache(name, "config.json")
    if not isinstance(path, str):
        return None
    snapshots = [folder for folder in Path(path).parents[1].iterdir() if folder.is_dir()]
    return Path(path).parent.name if len(snapshots) == 1 else None
