"""The modules of a model whose parameters are trained, and how each is scored."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from .scores import TappedModule


def find_tapped(model: nn.Module) -> list[TappedModule]:
    """Modules that own trainable parameters; those of lists, dicts and parametrisations are their parent's."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    seen: set[tuple[int, str]] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        owner, _, local = name.rpartition(".")
        while isinstance(modules[owner], (nn.ParameterDict, nn.ParameterList, ParametrizationList)):
            owner, _, last = owner.rpartition(".")
            local = f"{last}.{local}"
            if isinstance(modules[owner], nn.ModuleDict):  # of parametrisations
                owner, _, last = owner.rpartition(".")
                local = f"{last}.{local}"
        if (id(modules[owner]), local) not in seen:
            seen.add((id(modules[owner]), local))
            found.setdefault(owner, {})[local] = parameter
    return [
        TappedModule(name, modules[name], parameters, index, _kind(modules[name], parameters))
        for index, (name, parameters) in enumerate(found.items())
    ]


def split_by_rate(modules: Sequence[TappedModule], groups: dict[int, dict[str, Any]]) -> list[TappedModule]:
    """
    Modules with those of their parameters that are trained, once for each learning rate among them, numbered anew;
    `groups` has the optimizer's group of a parameter, by its `id`.
    """
    found: list[TappedModule] = []
    for tapped in modules:
        by_rate: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in tapped.parameters.items():
            if id(parameter) in groups:
                group = groups[id(parameter)]
                by_rate.setdefault(float(group.get("initial_lr", group["lr"])), {})[name] = parameter
        for parameters in by_rate.values():
            found.append(replace(tapped, parameters=parameters, index=len(found), directions=[]))
    return found


def _kind(module: nn.Module, parameters: dict[str, nn.Parameter]) -> str:
    plain = set(parameters) <= {"weight", "bias"}
    forward = type(module).forward
    if plain and forward is nn.Linear.forward:
        return "linear"
    if plain and forward is Conv1D.forward:
        return "conv1d"
    if plain and forward is nn.Embedding.forward and module.max_norm is None and not module.scale_grad_by_freq:
        return "embedding"
    if plain and forward in (nn.LayerNorm.forward, nn.RMSNorm.forward, nn.modules.batchnorm._BatchNorm.forward):
        return "norm"
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    if has_eps and set(parameters) == {"weight"} and parameters["weight"].dim() == 1:  # an RMSNorm, as it seems
        return "scale"
    return "other"
