"""
Shared by all tests: one thread, no network, deprecations of transformers are errors, a local Hub.

Heavy libraries are imported where they are used: the process that hands tests to workers reads this file, too.
"""

import os


# Before torch: two threads on tiny matrices are twenty times slower than one, and nothing may reach the real Hub.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"

import gc
import logging
from pathlib import Path

import pytest

from tests import hub_server


class _DeprecationIsError(logging.Handler):
    """transformers announces many removals by its logger rather than by a warning."""

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecat" in message.lower() or "future" in message.lower():
            raise FutureWarning(message)


for _library in ("transformers", "peft", "trl", "diffusers"):
    logging.getLogger(_library).addHandler(_DeprecationIsError(level=logging.WARNING))


def pytest_collection_finish(session):
    """
    What the imports made stays until the end: no collection need look at it again. A Trainer collects with every
    training, and a million objects of the libraries take longer than a tiny model's steps.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def elsewhere(tmp_path_factory):
    """The current folder is a new one: what a library writes there is not left among the sources."""
    root = Path(__file__).parents[1]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(root)]))
    before = {path.name for path in root.iterdir()}
    os.chdir(tmp_path_factory.mktemp("here"))
    yield
    found = (path for path in root.glob("[!.]*") if path.suffix != ".egg-info")  # which an install leaves, too
    left = sorted(path.name for path in found if path.name not in before)
    assert not left, f"the tests left {left} in {root}: let them write under tmp_path"


@pytest.fixture(autouse=True, scope="module")
def nothing_old_is_collected():
    """As at the start, for what the tests of other files have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    import transformers

    transformers.set_seed(0)


@pytest.fixture(scope="session")
def served_hub(tmp_path_factory):
    with hub_server.serve(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(served_hub, monkeypatch):
    """A local Hub over HTTP, reached by `hub.run(snippet)` or, in this process, by `HfApi(hub.url, token=TOKEN)`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", served_hub.url)
    yield served_hub
    served_hub.reset()


@pytest.fixture(scope="session")
def word_tokenizer():
    """50 words w0 .. w49, split at spaces."""
    from hf_iclr.tiny_models import word_tokenizer

    return word_tokenizer("w0")


@pytest.fixture(scope="session")
def byte_tokenizer():
    """256 tokens, one a byte; unlike `word_tokenizer` it can tell where a string ends inside a token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!", padding_side="left")
