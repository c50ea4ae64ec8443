"""
What is saved goes to the Hub with a card that says what it is, and comes back by its name. Linked into generation/,
whose files are copied to the Hub: it imports nothing of ours.
"""

import glob
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelCard, ModelCardData, RepoCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.utils import PushToHubMixin


HERE = "user/repository"  # in the card of a folder, which has no name on the Hub yet
_ATTEMPTS = 5  # to push, should others push at the same time
_PUSH = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


class HubMixin(PushToHubMixin):
    """
    transformers' mixin with a card of one's own instead of its blank form. Subclasses have `_card(repo_id)` and end
    their `save_pretrained` with `save_card(folder)`.
    """

    _repo_type = "model"

    def _card(self, repo_id: str) -> RepoCard:
        raise NotImplementedError

    def save_card(self, folder: str | Path, repo_id: str = HERE, tags: str | Sequence[str] | None = None) -> None:
        """
        Write the card alone.

        Args:
            folder (`str` or `Path`):
                Where `README.md` goes.
            repo_id (`str`, *optional*):
                Repository that its example loads.
            tags (`str` or `list[str]`, *optional*):
                Further tags.
        """
        card = self._card(repo_id)
        more = [*(getattr(self, "model_tags", None) or []), *([tags] if isinstance(tags, str) else tags or [])]
        data: Any = card.data  # whose fields depend on the kind of repository
        data.tags = list(dict.fromkeys([*data.tags, *more]))
        card.save(Path(folder, "README.md"))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        tags: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> CommitInfo:
        """
        Upload what `save_pretrained` writes, with a card that says what it is in place of the repository's.

        Args:
            repo_id (`str`):
                Repository, made if need be.
            commit_message (`str`, *optional*):
                First line of the commit; "Upload" and the class when left out.
            commit_description (`str`, *optional*):
                The rest of it.
            private (`bool`, *optional*):
                Whether a new repository is private.
            token (`str` or `bool`, *optional*):
                Token of the Hub.
            revision (`str`, *optional*):
                Branch to push to, made if need be.
            create_pr (`bool`, *optional*, defaults to `False`):
                Open a pull request instead.
            tags (`str` or `list[str]`, *optional*):
                Further tags for the card.
            kwargs (*optional*):
                Passed on to `save_pretrained`.

        Returns:
            `huggingface_hub.CommitInfo`
        """
        api, repo_id = self._repository(repo_id, token, private, revision)
        commit: dict[str, Any] = {"commit_description": commit_description, "create_pr": create_pr}
        attempts = 0
        while True:
            attempts += 1
            parent = self._parent_commit(api, repo_id, revision)
            with tempfile.TemporaryDirectory() as folder:
                self.save_pretrained(folder, **kwargs)
                self.save_card(folder, repo_id, tags)
                try:
                    commit |= {"revision": revision, "parent_commit": parent}
                    return self._upload(api, repo_id, folder, commit_message, **commit)
                except HfHubHTTPError as error:
                    if parent is None or error.response.status_code != 412 or attempts == _ATTEMPTS:
                        raise  # else somebody has pushed since

    def _repository(
        self, repo_id: str, token: str | bool | None = None, private: bool | None = None, revision: str | None = None
    ) -> tuple[HfApi, str]:
        """The Hub and the full name of a repository on it, which is made if need be, and its branch."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, repo_type=self._repo_type, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, repo_type=self._repo_type, branch=revision, exist_ok=True)
        return api, repo_id

    def _upload(
        self, api: HfApi, repo_id: str, folder: str | Path, commit_message: str | None = None, **kwargs: Any
    ) -> CommitInfo:
        message = commit_message or f"Upload {type(self).__name__}"
        kwargs |= {"repo_type": self._repo_type, "ignore_patterns": ".lock"}
        return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message, **kwargs)

    def _parent_commit(self, api: HfApi, repo_id: str, revision: str | None) -> str | None:
        """The commit that a push must follow, with what others pushed taken in; `None` where the last push counts."""
        return None


class PretrainedHubMixin(HubMixin):
    """[`HubMixin`] for models and pipelines, whose files their other parent writes."""

    def save_pretrained(
        self, save_directory: str | Path, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """
        The parent's `save_pretrained`, and a card.

        Args:
            save_directory (`str` or `Path`):
                Folder, made if need be.
            push_to_hub (`bool`, *optional*, defaults to `False`):
                Also push, to `repo_id` or else to the folder's name, with the arguments of
                [`~HubMixin.push_to_hub`].
            args, kwargs (*optional*):
                Passed on to the parent.
        """
        repo_id = kwargs.pop("repo_id", None) or Path(save_directory).name
        push = {name: kwargs.pop(name) for name in _PUSH if name in kwargs}
        if not push_to_hub:
            super().save_pretrained(save_directory, *args, **kwargs)
            if kwargs.get("is_main_process", True):
                self.save_card(save_directory)
            return
        folder, tags = Path(save_directory), push.pop("tags", None)
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # by the clock of the disk
        started = folder.stat().st_mtime_ns
        self.save_pretrained(folder, *args, **kwargs)  # once, and all that subclasses add
        if not kwargs.get("is_main_process", True):
            return
        place = {name: push.pop(name) for name in ("token", "private") if name in push}
        api, repo_id = self._repository(repo_id, revision=push.get("revision"), **place)
        self.save_card(folder, repo_id, tags)
        files = [path for path in folder.rglob("*") if path.is_file()]
        written = [glob.escape(str(p.relative_to(folder))) for p in files if p.stat().st_mtime_ns >= started]
        self._upload(api, repo_id, folder, allow_patterns=written, **push)


def model_card(title: str, text: str, usage: str, bases: Sequence[str | None] = (), **metadata: Any) -> ModelCard:
    """
    A card that says what a model is and how to use it.

    Args:
        title (`str`):
            Its heading.
        text (`str`):
            What it is: Markdown.
        usage (`str`):
            Python that loads and runs it.
        bases (`list[str]`, *optional*):
            Names of the models it was made of; those that are no repositories of the Hub are left out.
        metadata (*optional*):
            As in [`~huggingface_hub.ModelCardData`].

    Returns:
        `huggingface_hub.ModelCard`
    """
    names = [name for name in map(repository_name, bases) if name]
    data = ModelCardData(base_model=(names[0] if len(names) == 1 else names) or None, **metadata)
    usage = f"## How to use\n\n```python\n{usage.strip()}\n```"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text.strip()}\n\n{usage}\n")


def table_cell(text: str) -> str:
    """A text as a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def repository_name(name: str | None) -> str | None:
    """
    What a card may say of where a model came from: a folder's path is private.

    Args:
        name (`str`, *optional*):
            What the model was loaded by.

    Returns:
        `str`, *optional*: the name if it can be a repository of the Hub, else `None`.
    """
    try:
        validate_repo_id(name or "")
    except HFValidationError:
        return None
    return None if name is None or os.path.exists(name) else name


def pretrained_folder(name_or_path: str | Path, allow_patterns: list[str] | None = None, **kwargs: Any) -> Path:
    """
    Where the files of a `from_pretrained` are.

    Args:
        name_or_path (`str` or `Path`):
            Folder or repository.
        allow_patterns (`list[str]`, *optional*):
            The files of a repository to get; all of them when left out.
        kwargs (*optional*):
            Such as `revision`, `token` and `repo_type`, passed on to [`~huggingface_hub.snapshot_download`].

    Returns:
        `Path`: the folder, or the repository's in the local cache.

    Raises:
        FileNotFoundError: when it can only be a folder, and there is none.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    if folder.is_absolute() or len(folder.parts) > 2 or str(name_or_path).startswith((".", "~")):
        raise FileNotFoundError(
            f"Expected a folder {name_or_path}, or a repository such as 'me/name', found no such folder. Give the one "
            "that `save_pretrained` was given."
        )
    return Path(snapshot_download(str(name_or_path), allow_patterns=allow_patterns, **kwargs))
