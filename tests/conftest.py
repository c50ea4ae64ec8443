"""Shared by all tests: one thread, no network, deprecations of transformers are errors, a local Hub."""

import os


# Before torch: two threads on tiny matrices are twenty times slower than one, and nothing may reach the real Hub.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"

import gc
import logging

import huggingface_hub
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

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


def pytest_collection_finish(session):
    """
    What the imports made stays until the end: no collection need look at it again. A Trainer collects with every
    training, and a million objects of the libraries take longer than a tiny model's steps.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random state."""
    transformers.set_seed(0)


@pytest.fixture(scope="session")
def served_hub(tmp_path_factory):
    with hub_server.serve(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(served_hub, monkeypatch):
    """A local Hub over HTTP, reached by `hub.run(snippet)` or, in this process, by `HfApi(hub.url, token=TOKEN)`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served_hub.url)
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
    alphabet = sorted(ByteLevel.alphabet())
    backend = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!", padding_side="left")
