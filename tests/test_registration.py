"""The import hook on toy modules: any order, circles, reloads, threads, and a library that stays usable without us."""

import importlib
import logging
import sys
import threading

import pytest

from hf_iclr import _register
from hf_iclr.extras import MissingExtraError


LIBRARY = "toy_library"
OURS = "toy_ours"


@pytest.fixture
def toys(tmp_path, monkeypatch):
    """Writes toy modules and arms the hook for them: `toys(library=SOURCE, ours=SOURCE)`, then import as you like."""
    monkeypatch.syspath_prepend(tmp_path)
    names = (LIBRARY, f"{LIBRARY}.registry", OURS)
    others = [finder for finder in sys.meta_path if type(finder) is not _register._Finder]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.setattr(_register, "_complete", set())
    monkeypatch.setattr(_register, "_done", set())
    row = (f"{LIBRARY}.registry", OURS, "Model", lambda registry, model: registry.known.append(model.__name__))
    monkeypatch.setattr(_register, "_TABLE", [row])

    def write(registry="known = []", ours="class Model: pass"):
        (tmp_path / LIBRARY).mkdir()
        (tmp_path / LIBRARY / "__init__.py").write_text("")
        (tmp_path / LIBRARY / "registry.py").write_text(registry)
        (tmp_path / f"{OURS}.py").write_text(ours)
        importlib.invalidate_caches()

    yield write
    for name in names:
        sys.modules.pop(name, None)


def registry():
    return importlib.import_module(f"{LIBRARY}.registry")


def test_library_after_us(toys):
    toys()
    _register.install()
    assert OURS not in sys.modules
    assert registry().known == ["Model"]


def test_library_before_us(toys):
    toys()
    found = registry()
    assert found.known == []
    _register.install()
    assert found.known == ["Model"]


def test_our_module_first_which_imports_the_library(toys):
    toys(ours=f"import {LIBRARY}.registry\nassert {LIBRARY}.registry.known == []\nclass Model: pass")
    _register.install()
    importlib.import_module(OURS)
    assert registry().known == ["Model"]


def test_library_first_whose_import_of_us_imports_it(toys):
    toys(ours=f"from {LIBRARY}.registry import known\nclass Model: pass")
    _register.install()
    assert registry().known == ["Model"]


def test_our_loader_is_not_left_behind(toys):
    toys()
    _register.install()
    module = registry()
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert importlib.util.find_spec(f"{LIBRARY}.registry").loader is module.__loader__


def test_reloads(toys):
    """A reloaded registry has forgotten us and is told again; reloading ourselves arms nothing twice."""
    toys()
    _register.install()
    module = registry()
    assert importlib.reload(module).known == ["Model"]
    _register.install()
    assert module.known == ["Model"]
    assert sum(type(finder) is _register._Finder for finder in sys.meta_path) == 1


def test_library_stays_usable_when_we_fail(toys, caplog):
    toys(ours="raise RuntimeError('broken')")
    _register.install()
    with caplog.at_level(logging.WARNING):
        assert registry().known == []
    assert ["could not register Model" in record.message for record in caplog.records] == [True]


def test_a_failed_import_of_the_library_is_its_own(toys):
    toys(registry="import a_module_that_is_nowhere")
    _register.install()
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="a_module_that_is_nowhere"):
            registry()
    assert OURS not in sys.modules


def test_a_task_whose_extra_is_missing_says_so(toys, caplog):
    sentence = "Expected av, got none installed."
    error = "from hf_iclr.extras import MissingExtraError"
    toys(
        registry="class PIPELINE_REGISTRY: supported_tasks = {}",
        ours=f"{error}\nraise MissingExtraError({sentence!r})",
    )
    _register.install()
    task = registry().PIPELINE_REGISTRY.supported_tasks[_register.VIDEO_TASK]
    with pytest.raises(MissingExtraError, match=sentence):
        task["impl"]
    assert task["type"] == "video" and not caplog.records


def test_threads(toys):
    """Two threads, each in the middle of importing what the other one needs; afterwards all is registered once."""
    wait = "import time; time.sleep(0.05)"
    toys(registry=f"{wait}\nknown = []", ours=f"{wait}\nimport {LIBRARY}.registry\n{wait}\nclass Model: pass")
    _register.install()
    threads = [
        threading.Thread(target=importlib.import_module, args=[name]) for name in (OURS, f"{LIBRARY}.registry", OURS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry().known == ["Model"]


@pytest.mark.parametrize("task", ["speculative-cascade", "promptable-video-segmentation"])
def test_a_pipeline_without_a_model_says_which_to_pass(task):
    from transformers import pipeline

    with pytest.raises(ValueError, match=f"Expected a model for '{task}', got none. Pass model="):
        pipeline(task)
