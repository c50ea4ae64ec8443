"""A decoder and its key-value cache, addressed by token positions, so that rejected drafts can stay as holes."""

import time
import weakref

import torch
from transformers import DynamicCache

from .cache_argument import cache_inputs


_LAYER_TYPES = ("full_attention", "sliding_attention")
_checked_models: "weakref.WeakKeyDictionary[torch.nn.Module, str | None]" = weakref.WeakKeyDictionary()


class CachedDecoder:
    """
    Runs a decoder-only model on rows whose lengths differ. A cache slot belongs to the position of its token, or to
    none (-1): padding, or a draft that was rejected. Attention is masked by position, so rows need no realignment and
    sliding windows see true distances.
    """

    def __init__(self, model, batch_size: int):
        self.model = model
        self.cache = DynamicCache()  # built without a config: every layer keeps all slots, the mask applies windows
        self.cache_inputs = cache_inputs(model, self.cache)
        self.positions = torch.empty(batch_size, 0, dtype=torch.long, device=model.device)  # (batch, slots), -1 = hole
        self.layer_types, self.window = _attention_pattern(model.config.get_text_config(decoder=True))
        self.forwards = 0
        self.tokens = 0
        self.seconds = 0.0

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        """
        Appends tokens and returns their last logits.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Tokens to append.
            positions (`torch.LongTensor` of shape `(batch, length)`):
                Position of each token in its row, -1 for padding.
            logits_to_keep (`int`):
                How many trailing columns need logits.

        Returns:
            `torch.Tensor` of shape `(batch, logits_to_keep, vocab_size)`, float32.
        """
        start = time.perf_counter()
        self.positions = torch.cat([self.positions, positions], dim=1)
        logits = self.model(
            input_ids=input_ids,
            position_ids=positions.clamp(min=0),
            attention_mask=self._attention_mask(positions),
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **self.cache_inputs,
        ).logits[:, -logits_to_keep:]
        self.forwards += 1
        self.tokens += input_ids.numel()
        self.seconds += time.perf_counter() - start
        return logits.float()

    def _attention_mask(self, positions: torch.Tensor):
        length, slots = positions.shape[1], self.positions.shape[1]
        within_window = self.window is None or slots <= self.window
        if within_window and length in (1, slots) and bool((self.positions >= 0).all()):
            return None  # one token, or the whole prompt: plain causal attention, which the model can build faster
        queries, keys = positions[:, :, None], self.positions[:, None, :]
        allowed = (keys >= 0) & (keys <= queries)
        # Padding attends to itself: a row of the mask without any entry would turn into NaN and spread.
        own_slot = torch.arange(slots - length, slots, device=positions.device)[:, None]
        own_slot = own_slot == torch.arange(slots, device=positions.device)
        masks = {"full_attention": allowed | own_slot}
        if self.window is not None:
            masks["sliding_attention"] = (allowed & (keys > queries - self.window)) | own_slot
        masks = {name: self._for_kernel(mask[:, None]) for name, mask in masks.items()}
        return masks if len(self.layer_types) > 1 else masks[self.layer_types[0]]

    def _for_kernel(self, mask: torch.Tensor) -> torch.Tensor:
        if self.model.config.get_text_config(decoder=True)._attn_implementation != "eager":
            return mask
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(self.model.dtype).min
        )

    def keep(self, kept: torch.Tensor) -> None:
        """Turns the last slots into holes where `kept` (`(batch, n)`, boolean) is false; drops what no row needs."""
        width = kept.shape[1]
        self.positions[:, -width:] = torch.where(kept, self.positions[:, -width:], -1)
        unused = width - int((kept.any(0) * torch.arange(1, width + 1, device=kept.device)).max())
        if unused:
            self.cache.crop(-unused)
            self.positions = self.positions[:, :-unused]

    def hole_share(self) -> float:
        """Share of slots that no token uses, beyond what the longest row needs."""
        slots = self.positions.shape[1]
        return 1 - int((self.positions >= 0).sum(1).max()) / slots if slots else 0.0

    def compact(self, rows: torch.Tensor) -> None:
        """Keeps only `rows` (indices) and gathers their used slots, order unchanged, to the right end."""
        positions = self.positions[rows]
        used = positions >= 0
        order = used.to(torch.int8).argsort(dim=1, stable=True)[:, -max(1, int(used.sum(1).max())) :]
        self.positions = positions.gather(1, order)
        for layer in self.cache.layers:
            if not layer.is_initialized:  # shares another layer's states
                continue
            index = order.to(layer.keys.device)[:, None, :, None]
            select = rows.to(layer.keys.device)
            layer.keys = _gather_slots(layer.keys[select], index)
            layer.values = _gather_slots(layer.values[select], index)


def _gather_slots(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))


def _attention_pattern(config) -> tuple[list[str], int | None]:
    """The distinct layer types of a decoder and its sliding window in tokens (`None`: no windowed layer)."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        layer_types = ["full_attention" if window is None else "sliding_attention"]
    distinct = sorted(set(layer_types))
    return distinct, window if "sliding_attention" in distinct else None


def why_not_batched(model) -> str | None:
    """
    Why [`CachedDecoder`] can't serve a model: one clause, or `None` if it can. The structure is read first; then six
    tokens are run with a hole in the cache and compared with a plain forward, once for each model object.
    """
    if model in _checked_models:
        return _checked_models[model]
    _checked_models[model] = reason = _structural_reason(model) or _numerical_reason(model)
    return reason


def _structural_reason(model) -> str | None:
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if model._is_stateful:
        return f"{name} keeps a recurrent state that can't be rolled back to an earlier token"
    other = [kind for kind in _attention_pattern(config)[0] if kind not in _LAYER_TYPES]
    if other:
        return f"{name} has {', '.join(other)} layers, whose cache can't hold rejected drafts"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f'{name} uses attention "{config._attn_implementation}", which takes no 4-D mask'
    return None


@torch.no_grad()
def _numerical_reason(model) -> str | None:
    # Six tokens, the middle two drafted, rejected and masked: the last two must then see only the first two.
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids = (vocab_size * torch.arange(1, 7, device=model.device) // 7)[None]
    try:
        expected = model(input_ids=ids[:, [0, 1, 4, 5]]).logits[:, -2:].float()
        unmasked = model(input_ids=ids).logits[:, -2:].float()
        decoder = CachedDecoder(model, 1)
        positions = torch.arange(4, device=model.device)[None]
        decoder(ids[:, :2], positions[:, :2], 1)
        decoder(ids[:, 2:4], positions[:, 2:], 1)
        decoder.positions[:, 2:] = -1
        actual = decoder(ids[:, 4:], positions[:, 2:], 2)
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        return f"{type(model).__name__} can't run with explicit positions and a 4-D mask ({error})"
    difference = (actual - expected).abs().mean()
    if model.dtype == torch.float32:
        tolerance = 1e-3 * expected.abs().mean()
    else:  # 16 bits are noisy: what counts is that the mask does its work
        tolerance = 0.5 * (unmasked - expected).abs().mean()
    if difference > tolerance:  # false for NaN logits, which are reported when they are generated from
        return f"{type(model).__name__} doesn't respect explicit positions and a 4-D mask"
    return None
