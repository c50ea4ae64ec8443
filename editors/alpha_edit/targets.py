"""Target states: what the edited layer should put out at a subject's last token so that the target follows."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hf_iclr.cache_argument import cache_inputs
from hf_iclr.models import pad_around

from .config import AlphaEditConfig
from .projections import DownProjection, caches_by_token, capture, decoder_layers, run_until
from .requests import EditRequest
from .rows import EditRow, encode_in_contexts, encode_request


_WIDER = 1.25  # times as wide as the narrowest row of a batch
_WORTH_HALVING = 2**16  # entries of a matrix


@dataclass
class TargetStates:
    """Target states of n requests."""

    # (n, hidden_size), float32; (n, places, hidden_size) where a target is in several chunks, zero beyond a request's
    states: torch.Tensor
    losses: torch.Tensor  # (n,): the last loss, in nats per target token
    steps: torch.Tensor  # (n,): steps taken


def find_target_states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    projections: Sequence[DownProjection],
    requests: Sequence[EditRequest],
    config: AlphaEditConfig,
    progress: bool = True,
) -> TargetStates:
    """
    Optimise a move of the last edited layer's output for many requests at once (section 3.1 and appendix of
    https://huggingface.co/papers/2210.07229, as AlphaEdit takes it over).

    Tokens before the subject's last one never see the move, nor do layers up to the edited one: both are computed
    once. A step runs the layers above on the tokens from there on, with logits at the target's positions only, and
    requests that are done leave the batch.

    A target of more than `config.chunk_length` tokens has a move for each chunk, at the token before it, and all of
    them are sought together (https://huggingface.co/papers/2502.05628 seeks them one after the other).

    The model is in evaluation mode, `projections` are those that are edited, and the result is in the order of the
    requests.
    """
    rows = [encode_in_contexts(tokenizer, request, config) for request in requests]
    for request, own in zip(requests, rows, strict=True):
        if config.kl_factor:  # without a subject there is no such row: the prompt stands for it and counts nothing
            own.append(encode_request(tokenizer, "{} is a", request.subject or request.prompt))
    parts: dict[int, tuple[torch.Tensor, ...]] = {}
    with (
        _linear_in_bfloat16(model, projections[-1], config),
        tqdm(total=len(requests), unit="edit", desc="target states", disable=not progress) as bar,
    ):
        for chosen in _of_like_width(rows, config.optimization_batch_size, model.device):
            kl_factors = [config.kl_factor * (requests[i].subject is not None) for i in chosen]
            result = _Search(model, projections, [rows[i] for i in chosen], kl_factors, config).run(bar)
            parts |= {i: tuple(value[k] for value in result) for k, i in enumerate(chosen)}
    states, *others = zip(*(parts[i] for i in range(len(requests))), strict=True)
    padded = pad_sequence(list(states), batch_first=True)
    return TargetStates(padded[:, 0] if padded.shape[1] == 1 else padded, *(torch.stack(other) for other in others))


def _of_like_width(rows: list[list[EditRow]], most: int, device: torch.device) -> Iterator[list[int]]:
    """
    Indices of requests that share a batch: rows are padded to the widest, so on a CPU none is much wider than others.
    Elsewhere few large batches are faster than many.
    """
    wider = _WIDER if device.type == "cpu" else float("inf")
    widths = [max(len(row.ids) - row.subject for row in request) for request in rows]
    group: list[int] = []
    for i in sorted(range(len(rows)), key=widths.__getitem__):
        if group and (len(group) == most or widths[i] > wider * widths[group[0]]):
            yield group
            group = []
        group.append(i)
    yield group


def _has_fast_bfloat16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 by instructions of its own; emulated it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.10 on
    return any(bool(there) for name, there in capabilities.items() if name.endswith("bf16"))


@contextmanager
def _linear_in_bfloat16(model: PreTrainedModel, projection: DownProjection, config: AlphaEditConfig) -> Iterator[None]:
    """
    In a `with` block the linear layers above the edited one multiply in bfloat16, where steps are run in it. All else,
    attention too, stays in float32: its gradient in bfloat16 is slow on CPUs, and rounded logits are further from the
    right ones than the losses at which a request is done.
    """
    chosen = config.optimization_dtype
    halved = chosen == "bfloat16" or (chosen == "auto" and _has_fast_bfloat16(model.device))
    above: Any = decoder_layers(model)[1][projection.index + 1 :] if halved else []
    modules: list[Any] = [module for layer in above for module in layer.modules()]
    replaced = [
        module
        for module in modules
        if type(module) in (nn.Linear, Conv1D)
        and module.weight.dtype == torch.float32
        and (chosen != "auto" or module.weight.numel() >= _WORTH_HALVING)
        and "forward" not in vars(module)  # accelerate's, which loads the weight
    ]
    for module in replaced:
        weight = module.weight.detach().to(torch.bfloat16)
        vars(module)["forward"] = partial(_linear, weight.T if isinstance(module, Conv1D) else weight, module.bias)
    try:
        yield
    finally:
        for module in replaced:
            del module.forward


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    output = nn.functional.linear(states.to(weight.dtype), weight).to(states.dtype)
    return output if bias is None else output + bias


class _Search:
    """
    One batch of requests. Subjects end in one column of all rows: a prefix before it, a suffix from there on. Where
    earlier tokens cannot be kept as keys and values, all of a row is suffix.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        projections: Sequence[DownProjection],
        rows: list[list[EditRow]],
        kl_factors: list[float],
        config: AlphaEditConfig,
    ) -> None:
        self.kl_factors = torch.tensor(kl_factors, device=model.device)
        self.model, self.projection, self.config = model, projections[-1], config
        self.below = list(decoder_layers(model)[1][: self.projection.index])
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.num_requests, self.rows_each = len(rows), len(rows[0])
        flat = [row for request in rows for row in request]
        device = model.device
        # a target's last token predicts nothing
        read = [row.ids[:-1] if row.start < len(row.ids) else row.ids for row in flat]
        first = [row.subject if caches_by_token(model) else 0 for row in flat]
        batch = pad_around(
            [ids[:begin] for ids, begin in zip(read, first, strict=True)],
            [ids[begin:] for ids, begin in zip(read, first, strict=True)],
            device,
        )
        self.before = max(first)
        self.ids, self.mask = batch["input_ids"], batch["attention_mask"]
        self.positions = (self.mask.cumsum(1) - 1).clamp_min(0)
        # Every target token: row, column of the suffix whose logits predict it, token, weight in the request's mean.
        texts = self.rows_each - (1 if config.kl_factor else 0)
        places = [
            (line, place - 1 - begin, row.ids[place], 1 / (len(row.ids) - row.start) / texts)
            for line, (row, begin) in enumerate(zip(flat, first, strict=True))
            for place in range(row.start, len(row.ids))
        ]
        self.row, self.column, self.token = (
            torch.tensor(x, device=device) for x in list(zip(*places, strict=True))[:3]
        )
        self.weight = torch.tensor([place[3] for place in places], device=device)
        # Every place that is moved: row, column of the suffix, and which of its request's moves it is.
        moved = [
            (line, place - begin, number)
            for line, (row, begin) in enumerate(zip(flat, first, strict=True))
            for number, place in enumerate(row.places)
        ]
        self.moved = torch.tensor(moved, device=device)

    def inputs(self, start: int, end: int, cache: DynamicCache | None, lines: Any = slice(None)) -> dict[str, Any]:
        """Arguments of a forward over columns `start` to `end`, those before them in the cache."""
        inputs = {
            "input_ids": self.ids[lines, start:end],
            "attention_mask": self.mask[lines, :end],
            "use_cache": False,
        }
        if self.takes_positions:
            inputs["position_ids"] = self.positions[lines, start:end]
        if cache is not None:
            inputs |= cache_inputs(self.model, _shallow(cache)) | {"use_cache": True}
        return inputs

    @torch.no_grad()
    def _prefix(self) -> tuple[DynamicCache | None, torch.Tensor, torch.Tensor]:
        """
        Cache of the tokens before the subjects' last; on the others the last edited layer's input and the output that
        is to be moved.
        """
        cache = None
        if self.before:
            cache = DynamicCache()
            inputs = self.inputs(0, self.before, None)
            decoder = self.model.get_decoder()
            decoder(**inputs | cache_inputs(decoder, cache) | {"use_cache": True})
        target, layer = self.projection.target, self.projection.layer
        with capture({"in": (layer, "input"), "out": (target, "output")}) as seen:
            run_until(self.model, layer, **self.inputs(self.before, self.ids.shape[1], cache))
        shape = (*self.ids[:, self.before :].shape, -1)
        return cache, seen["in"].reshape(shape), seen["out"].reshape(shape)

    def run(self, bar: tqdm) -> tuple[torch.Tensor, ...]:
        config, each, device = self.config, self.rows_each, self.model.device
        cache, entering, output = self._prefix()
        line, column, number = self.moved[self.moved[:, 0] % each == 0].T  # in the plain prompt's row of every request
        initial = output.new_zeros(self.num_requests, int(number.max()) + 1, output.shape[-1], dtype=torch.float32)
        initial[line // each, number] = output[line, column].float()
        size = initial.norm(dim=2)
        delta = torch.zeros_like(initial)
        first, second = torch.zeros_like(delta), torch.zeros_like(delta)
        losses, steps = (torch.zeros(self.num_requests, device=device) for _ in range(2))
        active = torch.arange(self.num_requests, device=device)  # requests in the batch
        batch = _Batch(self, active, cache, entering, output)
        before: torch.Tensor | None = None  # next token's log-probabilities of the KL rows, of all requests
        for step in range(config.num_steps):
            move = delta[active].requires_grad_()
            token_log_probs, kl_log_probs = batch.log_probs(move)
            nll = torch.zeros(len(active), device=device).index_add(0, batch.owner, -token_log_probs * batch.weight)
            loss = nll
            if step:
                # Sizes are zero beyond a request's last place, where nothing is moved.
                loss = nll + config.weight_decay * (move.norm(dim=2) / (size[active] ** 2).clamp_min(1e-30)).sum(1)
            if kl_log_probs is not None:
                if before is None:
                    before = kl_log_probs.detach()
                kl = (kl_log_probs.exp() * (kl_log_probs - before[active])).sum(1)
                loss = loss + self.kl_factors[active] * kl
            losses[active] = loss.detach()
            done = (loss < config.loss_threshold) | (nll < config.nll_threshold) | ~loss.isfinite()
            if step == config.num_steps - 1 or done.all():
                bar.update(len(active))
                break
            gradient = torch.autograd.grad(loss[~done].sum(), move)[0][~done].float()
            bar.update(int(done.sum()))
            rest = active[~done]
            steps[rest] += 1
            first[rest] = 0.9 * first[rest] + 0.1 * gradient
            second[rest] = 0.999 * second[rest] + 0.001 * gradient**2
            ratio = (first[rest] / (1 - 0.9 ** (step + 1))) / (
                (second[rest] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            )
            moved = delta[rest] - config.learning_rate * ratio
            limit = config.clamp_factor * size[rest]
            delta[rest] = moved * (limit / moved.norm(dim=2).clamp_min(1e-30)).clamp_max(1)[..., None]
            if done.any():
                active = rest
                batch = _Batch(self, active, cache, entering, output)
        return initial + delta, losses, steps


class _Batch:
    """The rows of the requests still searched, ready for a step."""

    def __init__(
        self,
        search: _Search,
        active: torch.Tensor,
        cache: DynamicCache | None,
        entering: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        self.search = search
        each, start = search.rows_each, search.before
        lines = (active[:, None] * each + torch.arange(each, device=active.device)).flatten()
        kept = torch.isin(search.row, lines)
        new_line = torch.zeros(len(search.ids), dtype=torch.long, device=active.device)
        new_line[lines] = torch.arange(len(lines), device=active.device)
        self.line, self.column = new_line[search.row[kept]], search.column[kept]
        self.token, self.weight = search.token[kept], search.weight[kept]
        self.owner = self.line // each
        width = int(search.mask[lines, start:].sum(1).max())  # of the longest row left
        self.entering, self.output = entering[lines, :width], output[lines, :width]
        self.cache = _shallow(cache)
        for layer in self.cache.layers if self.cache is not None else []:
            layer.keys, layer.values = layer.keys[lines], layer.values[lines]
        self.inputs = partial(search.inputs, start, start + width, self.cache, lines)
        # The KL rows are the last of each request and are looked at where the subject ends.
        last = torch.arange(len(lines) if search.config.kl_factor else 0, device=active.device)[each - 1 :: each]
        line, column, number = search.moved[torch.isin(search.moved[:, 0], lines)].T
        self.moved = (new_line[line], column), (new_line[line] // each, number)
        subject = column[number == 0]  # of every row, in their order
        self.looked_at = torch.cat([self.line, last]), torch.cat([self.column, subject[last]])

    def log_probs(self, move: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Of the target tokens, and of every next token at the KL rows' subjects."""
        search = self.search
        places, moves = self.moved
        moved = self.output.index_put(places, move[moves].to(self.output), accumulate=True)
        with _replay(search.below, search.projection, self.entering, moved), _head_at(search.model, *self.looked_at):
            logits = search.model(**self.inputs()).logits
        log_probs, count = logits[0].float().log_softmax(-1), len(self.token)
        targets = log_probs[:count].gather(1, self.token[:, None])[:, 0]
        return targets, log_probs[count:] if len(log_probs) > count else None


@contextmanager
def _replay(
    below: list[nn.Module], projection: DownProjection, entering: torch.Tensor, moved: torch.Tensor
) -> Iterator[None]:
    """In a `with` block the edited module puts out `moved` and what stands before it is not computed."""

    # A stack of layers passes on what the last replaced one returns; those before it may return anything.
    outputs = dict.fromkeys(below, entering)
    hook = None
    if projection.adds_to_residual:
        outputs[projection.layer] = moved
    else:
        hook = projection.module.register_forward_hook(lambda _, __, output: moved.reshape(output.shape))
    try:
        with replaced_layers(outputs, projection):
            yield
    finally:
        if hook is not None:
            hook.remove()


@contextmanager
def replaced_layers(outputs: dict[nn.Module, torch.Tensor], projection: DownProjection) -> Iterator[None]:
    """In a `with` block these decoder layers compute nothing and return these states, in the way of `projection`'s."""

    def returning(states: torch.Tensor) -> Callable:
        return lambda *_, **__: (states, None) if projection.layer_returns_tuple else states

    before = {layer: vars(layer).get("forward") for layer in outputs}
    for layer, states in outputs.items():
        vars(layer)["forward"] = returning(states)
    try:
        yield
    finally:
        for layer, earlier in before.items():
            if earlier is None:
                del layer.forward
            else:
                vars(layer)["forward"] = earlier  # what accelerate put there


@contextmanager
def _head_at(model: PreTrainedModel, rows: torch.Tensor, columns: torch.Tensor) -> Iterator[None]:
    """In a `with` block the model computes the logits of these places only, as a batch of one row."""
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: (inputs[0][rows, columns][None], *inputs[1:])
    )
    try:
        yield
    finally:
        hook.remove()


def _shallow(cache: DynamicCache | None) -> DynamicCache | None:
    """The same keys and values in a cache of its own: more can be appended to either."""
    if cache is None:
        return None
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    return copied
