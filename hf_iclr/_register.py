"""Registers our classes with transformers' registries once those are imported, so `import hf_iclr` stays quick."""

import importlib
import sys

from hf_iclr.extras import MissingExtraError


VIDEO_TASK = "promptable-video-segmentation"


def _register_config(upstream, config_class) -> None:
    upstream.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def _register_model(upstream, model_class) -> None:
    upstream.AutoModelForCausalLM.register(model_class.config_class, model_class, exist_ok=True)


def _register_cascade_pipeline(upstream, pipeline_class) -> None:
    from transformers import AutoModelForCausalLM

    task = "speculative-cascade"
    upstream.PIPELINE_REGISTRY.register_pipeline(task, pipeline_class, AutoModelForCausalLM, type="text")
    _expect_model(upstream, task, "a composite, or a large model with assistant_model=")


def _register_video_pipeline(upstream, pipeline_class) -> None:
    loader = pipeline_class.model_loader
    upstream.PIPELINE_REGISTRY.register_pipeline(VIDEO_TASK, pipeline_class, loader, type="video")
    # With it, a saved pipeline would ask for remote code, though this class is all it needs.
    del pipeline_class._registered_impl
    _expect_model(upstream, VIDEO_TASK, "for instance 'facebook/sam2.1-hiera-tiny'")


def _expect_model(upstream, task: str, which: str) -> None:
    tasks = upstream.PIPELINE_REGISTRY.supported_tasks
    tasks[task] = _Task(ValueError(f"Expected a model for {task!r}, got none. Pass model=: {which}."), tasks[task])


class _Task(dict):
    """What `pipeline()` reads of a task: what isn't known, such as a default model or all of it, raises a sentence."""

    def __init__(self, error: Exception, known: dict) -> None:
        super().__init__(known)
        self.error = error

    def __missing__(self, key: str) -> None:
        raise self.error.with_traceback(None)


# upstream module, our module, its class, how to register it
_TABLE = [
    (
        "transformers.models.auto.configuration_auto",
        "hf_iclr.generation.configuration_speculative_cascade",
        "DraftConfig",
        _register_config,
    ),
    (
        "transformers.models.auto.configuration_auto",
        "hf_iclr.generation.configuration_speculative_cascade",
        "FeatureDraftConfig",
        _register_config,
    ),
    (
        "transformers.models.auto.configuration_auto",
        "hf_iclr.generation.configuration_speculative_cascade",
        "SpeculativeCascadeConfig",
        _register_config,
    ),
    (
        "transformers.models.auto.modeling_auto",
        "hf_iclr.generation.modeling_draft",
        "DraftForCausalLM",
        _register_model,
    ),
    (
        "transformers.models.auto.modeling_auto",
        "hf_iclr.generation.modeling_draft",
        "FeatureDraftForCausalLM",
        _register_model,
    ),
    (
        "transformers.models.auto.modeling_auto",
        "hf_iclr.generation.modeling_speculative_cascade",
        "SpeculativeCascadeForCausalLM",
        _register_model,
    ),
    (
        "transformers.pipelines",
        "hf_iclr.generation.pipeline_speculative_cascade",
        "SpeculativeCascadePipeline",
        _register_cascade_pipeline,
    ),
    (
        "transformers.pipelines",
        "hf_iclr.vision.session.pipeline",
        "Sam2VideoPipeline",
        _register_video_pipeline,
    ),
]
_complete: set[str] = set()  # the modules of the table whose import has ended
_done: set[str] = set()  # the classes that are registered, or cannot be


def _register_ready(name: str) -> None:
    """Registers each class whose registry is imported; runs at the end of the import of each module of the table."""
    _complete.add(name)
    if any(ours in sys.modules and ours not in _complete for _, ours, _, _ in _TABLE):
        return  # one of ours is importing this registry: we come back when that one is complete
    for upstream, ours, class_name, register in _TABLE:
        if upstream not in _complete or class_name in _done:
            continue
        try:
            module = importlib.import_module(ours)
            # This import may have registered the class already. Or another thread is still at it, and comes back here.
            if ours in _complete and class_name not in _done:
                _done.add(class_name)
                register(sys.modules[upstream], getattr(module, class_name))
        except MissingExtraError as error:
            _done.add(class_name)
            sys.modules[upstream].PIPELINE_REGISTRY.supported_tasks[VIDEO_TASK] = _Task(error, {"type": "video"})
        except Exception:  # transformers must stay usable without us
            import logging

            _done.add(class_name)
            logging.getLogger(__name__).warning(
                "hf_iclr could not register %s with %s.", class_name, upstream, exc_info=True
            )


class _Loader:
    """Loads a module as its own loader does, then registers what is ready."""

    def __init__(self, loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str):
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # the wrapper is not left behind
        self._loader.exec_module(module)
        # A registry that is executed again, by `importlib.reload`, has forgotten us.
        _done.difference_update(name for upstream, _, name, _ in _TABLE if upstream == module.__name__)
        _register_ready(module.__name__)


class _Finder:
    """Finds the modules of the table as the finders after it do."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path=None, target=None):
        if fullname not in self._names:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


def install() -> None:
    """Registers with what is imported already, and arms the rest."""
    names = {name for upstream, ours, _, _ in _TABLE for name in (upstream, ours)}
    if all(type(finder).__module__ != __name__ for finder in sys.meta_path):  # `hf_iclr` may be reloaded
        sys.meta_path.insert(0, _Finder(names))
    for name in sorted(names & sys.modules.keys()):
        importlib.import_module(name)  # waits for a thread that is still importing it
        _register_ready(name)
