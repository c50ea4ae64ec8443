"""A decoder and its key-value cache, addressed by token positions, so that rejected drafts can stay as holes."""

import time
import weakref
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationMixin

from .cache_argument import cache_inputs, forward_parameters


_LAYER_TYPES = ("full_attention", "sliding_attention")
# What was found out of each model as it then was (attention, dtype), and of pairs of models and of tokenizers.
_checked_models: "weakref.WeakKeyDictionary[torch.nn.Module, dict]" = weakref.WeakKeyDictionary()
_checked_pairs: "weakref.WeakKeyDictionary[object, weakref.WeakKeyDictionary]" = weakref.WeakKeyDictionary()


class CachedDecoder:
    """
    Runs a decoder-only model on rows whose lengths differ. A cache slot belongs to the position of its token, or to
    none (-1): padding, or a draft that was rejected. Attention is masked by position, so rows need no realignment and
    sliding windows see true distances.
    """

    def __init__(
        self,
        model,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        cache=None,
        token_type_ids=None,
        keep_states=False,
    ):
        """
        `input_ids` and `positions`, of shape `(batch, slots)`, are what `cache` holds; without one they have no slots.
        `token_type_ids`, of shape `(batch, length)`, belong to the first tokens that are read; later ones are of the
        type of their row's last. With `keep_states` the last hidden states of the newest logits are kept as `states`.
        """
        self.model, self.keep_states = model, keep_states
        self.keep_layers: tuple[int, ...] | None = None  # the states before these layers instead, of all tokens read
        self.extra_inputs: dict[str, Any] = {}
        self.ids, self.positions = input_ids, positions  # -1 is a hole
        # built without a config: every layer keeps all slots, the mask applies windows
        self.cache = DynamicCache() if cache is None else cache
        self.layer_types, self.window = _attention_pattern(model.config.get_text_config(decoder=True))
        self.switch = RotarySwitch.of(model)
        self.is_long = (
            self.switch is not None and positions.shape[1] > 0 and bool(positions.max() >= self.switch.length)
        )
        self.token_types = token_type_ids if "token_type_ids" in forward_parameters(model) else None
        self.forwards = 0
        self.tokens = 0
        self.seconds = 0.0

    def __call__(
        self, input_ids: torch.Tensor, positions: torch.Tensor, logits_to_keep: int, leaves: int = 0, lengths=None
    ) -> torch.Tensor:
        """
        Appends tokens and returns their last logits.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`):
                Tokens to append.
            positions (`torch.LongTensor` of shape `(batch, length)`):
                Position of each token in its row, -1 for padding.
            logits_to_keep (`int`):
                How many trailing columns need logits.
            leaves (`int`, *optional*, defaults to 0):
                How many trailing columns are siblings of the first draft: nothing that is read with them follows them.
            lengths (`list[int]`, *optional*):
                How many tokens each row has before these, where it is known; it is a look at the device less.

        Returns:
            `torch.Tensor` of shape `(batch, logits_to_keep, vocab_size)`, float32.
        """
        start = time.perf_counter()
        self.ids, self.positions = torch.cat([self.ids, input_ids], 1), torch.cat([self.positions, positions], 1)
        if self.switch is not None and self.switch.rebuilds:
            is_long = bool(positions.max() >= self.switch.length)
            if is_long != self.is_long and self.cache.get_seq_length():
                # as in plain `generate` of these models: all is read again with the other rotation
                self.cache, input_ids, positions = DynamicCache(), self.ids, self.positions
            self.is_long = is_long
        inputs: dict[str, Any] = {}
        if self.token_types is not None:
            newest = self.token_types[:, -1:]
            missing = input_ids.shape[1] - self.token_types.shape[1]
            inputs["token_type_ids"] = torch.cat([self.token_types, newest.expand(-1, missing)], 1)
            self.token_types = newest
        inputs |= {
            "input_ids": input_ids,
            "position_ids": positions.clamp(min=0),
            "attention_mask": self._attention_mask(positions, leaves, lengths),
            "use_cache": True,
        }
        if self.keep_states:  # the two halves of the model's own forward, see `why_no_states`
            body = self.model.base_model
            more = {} if self.keep_layers is None else {"output_hidden_states": True, "return_dict": True}
            output = body(**inputs, **more, **cache_inputs(body, self.cache))
            self.states = output[0][:, -logits_to_keep:]
            logits = self.model.get_output_embeddings()(self.states)
            if self.keep_layers is not None:
                self.states = torch.cat([output.hidden_states[layer] for layer in self.keep_layers], -1)
        else:
            inputs |= {"logits_to_keep": logits_to_keep, **self.extra_inputs, **cache_inputs(self.model, self.cache)}
            self.newest = self.model(**inputs)
            logits = self.newest.logits[:, -logits_to_keep:]
        self.forwards += 1
        self.tokens += input_ids.numel()
        self.seconds += time.perf_counter() - start
        return logits.float()

    def _attention_mask(self, positions: torch.Tensor, leaves: int, lengths: list[int] | None):
        length, slots = positions.shape[1], self.positions.shape[1]
        if (self.window is None or slots <= self.window) and length in (1, slots) and not leaves:
            if length == 1 < slots and lengths is not None:
                whole = all(known == slots - 1 for known in lengths)
            else:
                whole = bool((self.positions >= 0).all())
            if whole:
                return None  # one token, or the whole prompt: plain causal attention, which the model can build faster
        queries, keys = positions[:, :, None], self.positions[:, None, :]
        allowed = (keys >= 0) & (keys <= queries)
        if leaves:
            allowed[:, :, slots - leaves :] = False
            allowed[:, length - leaves :] &= keys < queries[:, length - leaves :]
        # Padding attends to itself: a row of the mask without any entry would turn into NaN and spread.
        own_slot = torch.arange(slots - length, slots, device=positions.device)[:, None]
        own_slot = own_slot == torch.arange(slots, device=positions.device)
        masks = {"full_attention": allowed | own_slot}
        if self.window is not None:
            masks["sliding_attention"] = (allowed & (keys > queries - self.window)) | own_slot
        if self.model.config.get_text_config(decoder=True)._attn_implementation == "eager":  # it adds its mask
            least, dtype = torch.finfo(self.model.dtype).min, self.model.dtype
            masks = {
                name: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, least) for name, mask in masks.items()
            }
        masks = {name: mask[:, None] for name, mask in masks.items()}
        return masks if len(self.layer_types) > 1 else masks[self.layer_types[0]]

    def keep(self, kept: torch.Tensor, needed: int) -> None:
        """Turns the last slots into holes where `kept` (`(batch, n)`, boolean) is false; drops all but `needed`."""
        width = kept.shape[1]
        if width == 0:
            return
        self.positions[:, -width:] = torch.where(kept, self.positions[:, -width:], -1)
        unused = width - needed
        if unused:
            self.cache.crop(-unused)
            self.ids, self.positions = self.ids[:, :-unused], self.positions[:, :-unused]

    def hole_share(self, longest: int) -> float:
        """Share of slots that no token uses, beyond the `longest` row's tokens."""
        slots = self.positions.shape[1]
        return 1 - longest / slots if slots else 0.0

    def compact(self, rows: torch.Tensor) -> None:
        """Keeps only `rows` (indices) and gathers their used slots, order unchanged, to the right end."""
        positions = self.positions[rows]
        used = positions >= 0
        order = used.to(torch.int8).argsort(dim=1, stable=True)[:, -max(1, int(used.sum(1).max())) :]
        self.ids, self.positions = self.ids[rows].gather(1, order), positions.gather(1, order)
        if self.token_types is not None:
            self.token_types = self.token_types[rows]
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


class RotarySwitch(NamedTuple):
    """
    A rotary embedding whose rotation depends on the length of the text, beyond `length` tokens.

    "longrope" has two rotations; "dynamic" has another for every length. A forward takes that of its last position.
    """

    length: int
    dynamic: bool
    rebuilds: bool  # plain `generate` reads the whole text again at the switch (the Phi family)

    @classmethod
    def of(cls, model) -> "RotarySwitch | None":
        config = model.config.get_text_config(decoder=True)
        parameters = getattr(config, "rope_parameters", None) or {}
        entries = (
            [parameters] if "rope_type" in parameters else [e for e in parameters.values() if isinstance(e, dict)]
        )
        for entry in entries:
            kind = entry.get("rope_type", "default")
            if kind == "longrope":
                length = entry.get("original_max_position_embeddings") or config.original_max_position_embeddings
                own = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
                return cls(length, False, own)
            if "dynamic" in kind:
                return cls(config.max_position_embeddings, True, False)
        return None

    def drafts(self, length: int) -> int | None:
        """How many drafts after a text of `length` tokens share its rotation; `None`: any number."""
        if length > self.length:
            return 0 if self.dynamic else None
        return self.length - length

    def why_not(self, lengths: torch.Tensor, new_tokens: int, rows: int) -> str | None:
        """Why texts of these lengths that grow by `new_tokens` can't go on by `rows` at a time: one clause."""
        same = int(lengths.max()) + new_tokens <= self.length or (
            int(lengths.min()) > self.length and not self.dynamic
        )
        if same or rows == 1:
            return None
        return f"its rotary embedding changes at {self.length} tokens, which rows and drafts reach at different times"


def vocabulary_size(model) -> int:
    """How many token ids a model reads, which is also the width of its logits."""
    return model.config.get_text_config(decoder=True).vocab_size


def align_vocabulary(logits: torch.Tensor, size: int) -> torch.Tensor:
    """Logits `(..., size)`: where embeddings of one tokenizer are padded to two sizes, ids beyond either are none."""
    missing = size - logits.shape[-1]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing else logits


def same_vocabulary(large, small, tokenizers: tuple = (None, None), **kwargs) -> bool:
    """
    Whether token ids mean the same to both models: the sizes agree, or only the padding of the embeddings differs and
    both tokenizers hold the same words. Tokenizers that are not given are looked for beside the models.

    Args:
        large, small ([`~transformers.PreTrainedModel`]):
            The models.
        tokenizers (`tuple`, *optional*):
            Those of the large and of the small model.
        kwargs (*optional*):
            Passed to `AutoTokenizer.from_pretrained`.
    """
    if vocabulary_size(large) == vocabulary_size(small):
        return True
    if getattr(large, "_one_vocabulary", False) and large.cascade_pair[1] is small:
        return True  # the halves of a composite, compared when it was made
    known = _checked_pairs.setdefault(large, weakref.WeakKeyDictionary())
    if None not in tokenizers:
        return _same_words(*tokenizers)
    if small not in known:
        from transformers import AutoTokenizer  # at import it would load the registries, which load us

        try:
            tokenizers = tuple(AutoTokenizer.from_pretrained(m.name_or_path, **kwargs) for m in (large, small))
        except (OSError, ValueError, KeyError):  # neither has to come with one
            return False
        known[small] = _same_words(*tokenizers)
    return known[small]


def _same_words(one, other) -> bool:
    if one is other:
        return True
    known = _checked_pairs.setdefault(one, weakref.WeakKeyDictionary())
    lengths = len(one), len(other)
    if other not in known or known[other][0] != lengths:
        known[other] = lengths, one.get_vocab() == other.get_vocab()
    return known[other][1]


def position_limit(model) -> int | None:
    """How many tokens a model with a table of positions can read; `None` for others."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))
    if model.config.is_encoder_decoder or limit is None or getattr(config, "rope_parameters", None):
        return None
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    tables += [buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions")]  # GPT-J
    words = model.get_input_embeddings()
    # some keep two rows more than they have positions
    known = config.model_type in ("mpt", "ctrl")  # whose tables are no parameters
    known |= any(0 <= len(table) - limit <= 2 for table in tables if words is None or table is not words.weight)
    return limit if known else None


def reads_states(model) -> bool:
    """Whether a small model drafts from the large model's states; by name, as code from the Hub has other classes."""
    return getattr(model, "reads_states", False)


def why_no_states(model, draft) -> str | None:
    """Why the large model's states can't be read by a draft model: one clause, or `None` if they can."""
    size = model.config.get_text_config(decoder=True).hidden_size
    if draft.config.get_text_config().hidden_size != size:
        return (
            f"{type(model).__name__} has states of {size} values, the draft was made of a model with "
            f"{draft.config.get_text_config().hidden_size}"
        )
    known = _checked_models.setdefault(model, {})
    if "states" not in known:
        ids = (vocabulary_size(model) * torch.arange(1, 4, device=model.device) // 4)[None]
        with torch.no_grad():
            logits, states = model(input_ids=ids).logits, model.base_model(input_ids=ids)[0]
        head = model.get_output_embeddings()
        same = head is not None and states.shape[-1] == size and torch.equal(head(states), logits)
        known["states"] = None if same else f"{type(model).__name__} does more to its logits than apply its head"
    return known["states"]


def why_not_batched(model) -> str | None:
    """
    Why [`CachedDecoder`] can't serve a model: one clause, or `None` if it can. The structure is read first; then, once
    for each model, attention and dtype, six tokens are run with a hole in the cache and compared with a plain forward.
    """
    reason = _structural_reason(model)
    if reason is not None:
        return reason
    known = _checked_models.setdefault(model, {})
    setting = model.config.get_text_config(decoder=True)._attn_implementation, model.dtype
    if setting not in known:
        reason = _numerical_reason(model)
        if reason is not None and any(module.training for module in model.modules()):
            return (
                f"{type(model).__name__} is in train mode, so its dropout is on: type `model.eval()`"  # not for ever
            )
        known[setting] = reason
    return known[setting]


def _structural_reason(model) -> str | None:
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder"
    if model._is_stateful:
        return f"{name} keeps a recurrent state that can't be rolled back to an earlier token"
    other = [kind for kind in _attention_pattern(config)[0] if kind not in _LAYER_TYPES]
    if other:
        return f"{name} has {', '.join(other)} layers, whose cache can't hold rejected drafts"
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4
        return f"{name} scales its attention by the number of cached tokens, rejected drafts among them"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f'{name} uses attention "{config._attn_implementation}", which takes no 4-D mask'
    return None


@torch.no_grad()
def _numerical_reason(model) -> str | None:
    # Six tokens, the middle two drafted, rejected and masked: the last two must then see only the first two.
    ids = (vocabulary_size(model) * torch.arange(1, 7, device=model.device) // 7)[None]
    try:
        expected = model(input_ids=ids[:, [0, 1, 4, 5]]).logits[:, -2:].float()
        unmasked = model(input_ids=ids).logits[:, -2:].float()
        decoder = CachedDecoder(model, ids[:, :0], ids[:, :0])
        positions = torch.arange(4, device=model.device)[None]
        decoder(ids[:, :2], positions[:, :2], 1)
        decoder(ids[:, 2:4], positions[:, 2:], 1)
        decoder.positions[:, 2:] = -1
        actual = decoder(ids[:, 4:], positions[:, 2:], 2)
    except torch.OutOfMemoryError:  # says nothing of the model
        raise
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
