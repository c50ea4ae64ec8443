"""Shared by all tests: one thread, no network, deprecations of transformers are errors, a local Hub."""

import os


# Before torch: two threads on tiny matrices are twenty times slower than one, and nothing may reach the real Hub.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"

import logging

import huggingface_hub
import pytest
import torch
import transformers

from tests import hub_server


torch.set_num_threads(1)


class _DeprecationIsError(logging.Handler):
    """transformers announces many removals by its logger rather than by a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower() or "future" in message.lower():
            raise FutureWarning(message)


for _library in ("transformers", "peft", "trl", "diffusers"):
    logging.getLogger(_library).addHandler(_DeprecationIsError(level=logging.WARNING))


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    transformers.set_seed(0)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hub over HTTP, reached by `hub.run(snippet)` or, in this process, by `HfApi(hub.url, token=TOKEN)`."""
    with hub_server.serve(tmp_path) as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        yield server
