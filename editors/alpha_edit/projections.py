"""Where a decoder keeps its facts: the MLP's down-projection of every layer, found by structure and checked by "
"numbers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_iclr.cache_argument import cache_argument


# Paths inside a layer: Llama, Mistral, Qwen, Gemma, Phi-3; GPT-2; Phi; GPT-J; OPT; GPT-NeoX, Falcon, BLOOM.
NAMES = ("mlp.down_proj", "mlp.c_proj", "mlp.fc2", "mlp.fc_out", "fc2", "mlp.dense_4h_to_h", "mixer.down_proj")
_WRITTEN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # float8 has a scale beside it

Update = tuple[torch.Tensor, torch.Tensor]  # residuals (o, r) and factor (r, d), float32
Updates = dict[int, Update]  # by layer


@dataclass(frozen=True)
class DownProjection:
    """The last linear layer of one decoder layer's MLP."""

    index: int  # of the decoder layer
    name: str  # path of the module in the model
    module: Any  # a linear layer, maybe quantised, or a Conv1D
    layer: nn.Module  # the decoder layer
    # Whether the layer's output moves by exactly what the projection's output moves by; not so when a norm or a factor
    # stands between, as in Gemma 2 and OLMo 2.
    adds_to_residual: bool
    layer_returns_tuple: bool  # as in GPT-J and Falcon

    @property
    def target(self) -> nn.Module:
        """The module at whose output a target state is sought."""
        return self.layer if self.adds_to_residual else self.module

    @property
    def is_conv1d(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def in_features(self) -> int:
        return self.module.nx if self.is_conv1d else self.module.in_features

    @property
    def out_features(self) -> int:
        return self.module.nf if self.is_conv1d else self.module.out_features

    def as_stored(self, delta: torch.Tensor) -> torch.Tensor:
        """An update of shape `(out_features, in_features)` as the weight is stored: `Conv1D` keeps it transposed."""
        return delta.T if self.is_conv1d else delta


class _State(NamedTuple):
    """A weight as an editor left it."""

    original: torch.Tensor  # what updates are added to
    inside: list[Update]  # those that are in it already: somebody else changed the weight behind them
    updates: list[Update]
    weight: torch.Tensor


class EditedWeight:
    """
    Adds low-rank updates to a down-projection. A floating-point weight is written: what it would be without them +
    their sum, added in float32 and rounded once. Any other (a quantised one) is left alone, and the updates are added
    to the module's output. What training or another editor does to the weight in between stays.
    """

    def __init__(self, projection: DownProjection) -> None:
        self.projection = projection
        weight: Any = getattr(projection.module, "weight", None)  # GPTQ and AWQ have none
        self._states: list[_State] = []  # the last, and the one before somebody else changed the weight
        if type(weight) in (torch.Tensor, nn.Parameter) and weight.dtype in _WRITTEN:
            original = weight.detach().clone()
            self._states = [_State(original, [], [], original)]
        self._hook: RemovableHandle | None = None

    @property
    def device(self) -> torch.device:
        return next(chain(self.projection.module.parameters(), self.projection.module.buffers())).device

    @property
    def original(self) -> torch.Tensor | None:
        """The weight without the updates; `None` for a quantised one."""
        return self._states[-1].original if self._states else None

    def _found(self) -> list[_State]:
        """The states, with what somebody else has done to the weight since."""
        weight, last = self.projection.module.weight, self._states[-1]
        for count in range(len(self._states), 0, -1):
            if torch.equal(weight, self._states[count - 1].weight.to(weight.device)):
                return self._states[:count]  # perhaps they took it back
        changed = weight.detach().clone()
        return [last, _State(changed, last.updates, last.updates, changed)]

    def check(self, updates: Sequence[Update]) -> None:
        """Raises `ValueError` when updates would have to be taken out of a weight that somebody else has changed."""
        inside = self._found()[-1].inside if self._states else []
        if not _same(inside, updates[: len(inside)]):
            raise ValueError(
                f"Expected the weight of {self.projection.name} as this editor left it, to take edits out of it, got "
                "one that was trained or edited by others since. Take back what they did first, last things first; or "
                "load the unedited model and give it to `AlphaEditor.from_pretrained` with the edits."
            )

    def set(self, updates: Sequence[Update]) -> None:
        """
        Make the weight the original one plus these updates, float32 residuals and factors, in their order; none
        restore it exactly.
        """
        self.check(updates)
        if self._states:
            found = self._found()
            if _same(updates, self._states[-1].updates) and not any(state is found[-1] for state in self._states):
                return  # there is nothing to do, and they may still take back what they did
            self._states = found
            original, inside, _, _ = self._states[-1]
            with torch.no_grad():
                self.projection.module.weight.copy_(self.total(updates) if updates[len(inside) :] else original)
            written = self.projection.module.weight.detach().clone() if updates[len(inside) :] else original
            self._states[-1] = _State(original, inside, list(updates), written)
            return
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        if updates:
            moved = [(residuals.to(self.device), factor.to(self.device)) for residuals, factor in updates]

            def add(_, inputs, output: torch.Tensor) -> torch.Tensor:
                keys = inputs[0].float()
                return output + sum(keys @ factor.T @ residuals.T for residuals, factor in moved).to(output)

            self._hook = self.projection.module.register_forward_hook(add)

    def total(self, updates: Sequence[Update]) -> torch.Tensor:
        """float32 weight as it is stored, before it is rounded to the model's type."""
        original, inside, _, _ = self._states[-1]
        total = original.to(self.device).float()
        for residuals, factor in updates[len(inside) :]:
            total = total + self.projection.as_stored(residuals.to(self.device) @ factor.to(self.device))
        return total


def _same(updates: Sequence[Update], others: Sequence[Update]) -> bool:
    return len(updates) == len(others) and all(a is b for (a, _), (b, _) in zip(updates, others, strict=True))


class _Stop(Exception):
    """Ends a forward once everything wanted was seen."""


def find_down_projections(model: PreTrainedModel) -> list[DownProjection]:
    """
    Find the down-projection of every layer of a decoder that has a dense MLP, in order.

    By the names that transformers uses; failing these, the last linear layer with as many outputs as the hidden size
    that is called in a layer. It is then checked by numbers: its output is moved at one token, and the layer's must
    move.

    Raises:
        ValueError: for encoder-decoders, models without a dense MLP, weights that are not all here (offloaded, or
            sharded by FSDP or DeepSpeed), and when the check fails.
        TypeError: when it is no model of transformers.
    """
    if not hasattr(model, "config"):
        raise TypeError(
            f"Expected a language model of transformers, got {type(model).__name__}. Load one: "
            "`AutoModelForCausalLM.from_pretrained(name)`."
        )
    check_weights(model)
    prefix, stack = decoder_layers(model)
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    dense = [
        (index, layer)
        for index, layer in enumerate(stack)
        if not any("expert" in name for name, _ in layer.named_modules())
    ]
    if not dense:
        raise ValueError(
            f"Expected a layer with a dense MLP, got mixture-of-experts layers only in {type(model).__name__}: a "
            "token's keys go through other weights for other routes, so one linear update cannot hold the fact. Edit "
            "a dense model."
        )
    named = [
        (index, layer, name)
        for index, layer in dense
        for name in [name for name in NAMES if _is_linear(layer, name, hidden_size)][:1]
    ]
    if not named:
        name = _last_linear_called(model, dense[0][1], hidden_size)
        named = [(index, layer, name) for index, layer in dense]
    _, first, name = named[0]
    probed = _probe(model, first, first.get_submodule(name))
    return [
        DownProjection(index, f"{prefix}.{index}.{name}", layer.get_submodule(name), layer, *probed)
        for index, layer, name in named
    ]


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Path and list of a decoder's layers; raises `ValueError` where there is none."""
    config = model.config.get_text_config(decoder=True)
    if config.is_encoder_decoder or model.get_output_embeddings() is None:
        raise ValueError(
            f"Expected a decoder with a language model's head, got {type(model).__name__}. Load one with "
            "`AutoModelForCausalLM`."
        )
    inside = set(model.get_decoder().modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers and module in inside:
            return name, module
    raise ValueError(
        f"Expected a decoder with a list of its {config.num_hidden_layers} layers, got {type(model).__name__}."
    )


def caches_by_token(model: PreTrainedModel) -> bool:
    """Whether what a model keeps of earlier tokens is keys and values of each: not so where layers are recurrent."""
    recurrent = any(isinstance(module, nn.Conv1d) for module in model.get_decoder().modules())
    return cache_argument(model) is not None and not recurrent


def choose_layers(projections: list[DownProjection], layers: str | Sequence[int]) -> list[DownProjection]:
    """
    The layers to look at or to edit, in order: by numbers, `"all"`, or `"auto"`, which is an eighth up and three
    twentieths long among the layers with a dense MLP, as the paper's layers 4 to 8 of 32, and only the last of them
    where layers normalise the projection's output, because a residual cannot be spread there.

    Raises:
        ValueError: when a number does not exist.
    """
    depth = len(projections)
    if layers == "all":
        return projections
    if layers == "auto":
        first, end = depth // 8, depth // 8 - (-3 * depth // 20)
        return projections[first if projections[0].adds_to_residual else end - 1 : end]
    found = {p.index: p for p in projections}
    if isinstance(layers, str) or not layers or not all(isinstance(i, int) and i in found for i in layers):
        raise ValueError(
            f"Expected layers among {sorted(found)}, those with a dense MLP, 'auto' or 'all', got {layers!r}."
        )
    return [found[index] for index in sorted(set(layers))]


def check_weights(model: PreTrainedModel) -> None:
    """Raises `ValueError` unless every weight is here and whole."""
    sharded = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"Expected weights in memory, got {name} without values: it is offloaded, or was never loaded. Load "
                "the model onto devices that hold it: `from_pretrained(..., device_map=None)`, or a smaller dtype."
            )
        if sharded or isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"Expected weights that this process holds whole, got {name} sharded by FSDP, tensor parallelism or "
                "DeepSpeed. Load the model in one process, `device_map='auto'` for several devices."
            )


def _is_linear(layer: nn.Module, name: str, hidden_size: int) -> bool:
    try:
        module = layer.get_submodule(name)
    except AttributeError:
        return False
    return getattr(module, "nf", getattr(module, "out_features", None)) == hidden_size


def _last_linear_called(model: PreTrainedModel, layer: nn.Module, hidden_size: int) -> str:
    """Name of the last linear layer with the right number of outputs that a forward of the layer calls."""
    mixers = ("attn", "attention", "mixer", "mamba", "conv", "temporal")
    called: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name, module in layer.named_modules()
        if _is_linear(layer, name, hidden_size) and not any(mixer in name for mixer in mixers)
    ]
    try:
        with torch.no_grad():
            model(_probe_ids(model)[:, :1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        raise ValueError(
            f"Expected an MLP that ends in a linear layer with {hidden_size} outputs in each layer of "
            f"{type(model).__name__}, got none among {[name for name, _ in layer.named_modules() if name]}. Edit a "
            "model with MLPs."
        )
    return called[-1]


def _probe_ids(model: PreTrainedModel) -> torch.Tensor:
    """Three tokens that a model reads something at: the padding token's embedding is zero in one made from scratch."""
    weight = model.get_input_embeddings().weight
    step = max(1, len(weight) // 1024)
    norms = weight[::step].float().norm(dim=1)
    tokens = step * (norms > 0.5 * norms[norms > 0].nanmedian()).nonzero()[:3, 0]
    if not len(tokens):
        raise ValueError(
            f"Expected embeddings that are not all zero in {type(model).__name__}, got none. Load weights."
        )
    return tokens.repeat(3)[None, :3].to(model.device)


def _probe(model: PreTrainedModel, layer: nn.Module, module: nn.Module) -> tuple[bool, bool]:
    """
    Move the projection's output at one token; the layer's output must move there alone. Is it the same move, and does
    the layer return a tuple?
    """
    returned: list[type] = []
    ids = _probe_ids(model)
    shift: torch.Tensor | None = None

    def move(_, __, output: torch.Tensor) -> torch.Tensor:
        nonlocal shift
        if shift is None:
            return output
        moved = output.clone().view(1, 3, -1)
        moved[0, 1] += shift.to(output)
        return moved.view_as(output)

    with torch.no_grad(), capture({"layer": (layer, "output")}) as seen:
        hooks = [
            module.register_forward_hook(move),
            layer.register_forward_hook(lambda _, __, output: returned.append(type(output))),
        ]
        try:
            run_until(model, layer, input_ids=ids)
            before = seen["layer"].float()
            shift = torch.linspace(-1, 1, before.shape[-1], device=before.device) * before.abs().mean()
            run_until(model, layer, input_ids=ids)
        finally:
            for hook in hooks:
                hook.remove()
    moved = seen["layer"].float() - before
    if moved[0, 0].any() or not moved[0, 1].any():
        raise ValueError(
            f"Expected {type(module).__name__} to be the MLP's last layer of {type(model).__name__}, but moving its "
            "output at one token did not move the layer's output at that token alone."
        )
    tolerance = 8 * torch.finfo(seen["layer"].dtype).eps * (before[0, 1].abs() + shift.abs())
    return bool(((moved[0, 1] - shift).abs() <= tolerance).all()), issubclass(returned[0], tuple)


@contextmanager
def capture(wanted: dict[Any, tuple[nn.Module, str]]) -> Iterator[dict[Any, torch.Tensor]]:
    """
    Keep what modules receive or return during the forwards in a `with` block: for each key of the result a module and
    `"input"` or `"output"`. A layer's tuple counts as its first tensor.
    """
    seen: dict[Any, torch.Tensor] = {}

    def keep(key: Any, side: str) -> Callable:
        def hook(_, inputs, output) -> None:
            value = inputs if side == "input" else output
            seen[key] = (value[0] if isinstance(value, tuple) else value).detach()

        return hook

    hooks = [module.register_forward_hook(keep(key, side)) for key, (module, side) in wanted.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def run_until(model: PreTrainedModel, module: nn.Module, **inputs: Any) -> None:
    """Run a model only as far as one of its modules: what stands above is not computed."""

    def stop(*_) -> None:
        raise _Stop

    hook = module.register_forward_hook(stop)
    try:
        model(**{"use_cache": False, **inputs})
    except _Stop:
        pass
    finally:
        hook.remove()
