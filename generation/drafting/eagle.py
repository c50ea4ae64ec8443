"""Published EAGLE-3 draft heads (https://huggingface.co/papers/2503.01840) as the small model of a cascade."""

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from hf_iclr.generation.cache_argument import cache_inputs
from hf_iclr.generation.cached_decoder import CachedDecoder
from hf_iclr.generation.modeling_draft import MISSING_LOGIT


class _MidLayer(nn.Module):
    """A Llama layer whose attention reads the token's embedding beside the state."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = LlamaAttention(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            old = getattr(self.self_attn, name)
            new = nn.Linear(2 * config.hidden_size, old.out_features, bias=old.bias is not None)
            setattr(self.self_attn, name, new)
        self.mlp = LlamaMLP(config)
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            setattr(self, name, LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, inputs_embeds, states, **attention):
        inputs = torch.cat([self.input_layernorm(inputs_embeds), self.hidden_norm(states)], -1)
        states = states + self.self_attn(inputs, **attention)[0]
        return states + self.mlp(self.post_attention_layernorm(states))


class Eagle3ForCausalLM(PreTrainedModel, GenerationMixin):
    """
    An EAGLE-3 head, as its authors and SpecForge publish them: `config.json` of a Llama of one layer with a
    `draft_vocab_size`, and safetensors with `fc`, `midlayer`, `norm`, `lm_head` and `d2t`. It reads the newest token
    and, of the tokens before, three hidden states of the large model joined; later drafts of a round read its own
    states. It has the large model's embeddings, and serves in the batched cascade only.

    Args:
        config ([`~transformers.LlamaConfig`]):
            As published, with `draft_vocab_size`.

    Example:

    ```python
    >>> head = Eagle3ForCausalLM.from_pretrained("user/eagle3-head", dtype=torch.bfloat16)
    >>> enable_cascade(large, head).generate(**inputs)
    ```
    """

    config_class = LlamaConfig
    base_model_prefix = "model"
    reads_states = True
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = (r"^t2d$", r"^embed_tokens\.")  # the large model's own

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        if getattr(config, "draft_vocab_size", None) is None:
            raise ValueError(
                "Expected the config of an EAGLE-3 head, with a `draft_vocab_size`, got one of "
                f"{config.architectures or type(config).__name__}."
            )
        if config.num_hidden_layers != 1:
            raise ValueError(f"Expected an EAGLE-3 head of one layer, got {config.num_hidden_layers} layers.")
        self.fc = nn.Linear(3 * config.hidden_size, config.hidden_size, bias=getattr(config, "bias", False))
        self.midlayer = _MidLayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))  # token - its index
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.post_init()

    def get_input_embeddings(self):
        """None: it is given the large model's."""

    def forward(
        self, input_ids=None, inputs_embeds=None, states=None, position_ids=None, attention_mask=None,
        past_key_values=None, cache=None, logits_to_keep=0, **kwargs,
    ) -> CausalLMOutput:  # fmt: skip
        """
        Args:
            inputs_embeds (`torch.Tensor` of shape `(batch, length, hidden_size)`):
                The large model's input embeddings of tokens.
            states (`torch.Tensor` of shape `(batch, length, 3 hidden_size)` or `(batch, length, hidden_size)`):
                At the token before each: three joined states of the large model, or one that this head returned.
            position_ids, attention_mask, past_key_values, cache, logits_to_keep (*optional*):
                As those of a Llama.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutput`]: `logits` has the large model's vocabulary,
            `hidden_states` holds the head's state.
        """
        if inputs_embeds is None or states is None:
            raise ValueError(
                "An EAGLE-3 head reads the large model's hidden states, so it drafts only inside a cascade: "
                "`enable_cascade(large, head).generate(...)`."
            )
        if states.shape[-1] != self.config.hidden_size:
            states = self.fc(states.to(self.fc.weight))
        attention = cache_inputs(self.midlayer.self_attn, past_key_values if cache is None else cache)
        attention["position_embeddings"] = self.rotary_emb(states, position_ids)
        states = self.midlayer(inputs_embeds.to(states), states, attention_mask=attention_mask, **attention)
        logits = self.lm_head(self.norm(states[:, -logits_to_keep:]))
        filled = logits.new_full((*logits.shape[:-1], self.config.vocab_size), MISSING_LOGIT)
        tokens = torch.arange(len(self.d2t), device=logits.device) + self.d2t
        return CausalLMOutput(logits=filled.index_copy(-1, tokens, logits), hidden_states=(states,))

    @staticmethod
    def layers(model) -> tuple[int, int, int]:
        """Before which layers of a large model the states are taken, as when the heads were trained."""
        depth = model.config.get_text_config(decoder=True).num_hidden_layers
        return 2, depth // 2, depth - 3

    def drafter(self, large) -> "Eagle3Drafter":
        """What a cascade's loop drafts with; `large` is the large model's decoder, which keeps its states."""
        return Eagle3Drafter(self, large)


class Eagle3Drafter(CachedDecoder):
    """
    An EAGLE-3 head where the cascade's loop expects a decoder. Only tokens whose states the large model gave stay in
    its cache: what it read of its own states in a round is read anew after it.
    """

    rereads = True

    def __init__(self, model: Eagle3ForCausalLM, large: CachedDecoder):
        super().__init__(model, large.ids[:, :0], large.positions[:, :0])
        self.large = large
        self.unread: torch.Tensor | None = None  # states at the tokens before those that it has yet to read
        self.unknown, self.kept_slots = large.positions.shape[1] + 1, 0  # first tokens of which no state is known
        large.keep_layers = model.layers(large.model)

    @property
    def blind(self) -> bool:
        """Whether the large model has given no states yet."""
        return self.unread is None and not self.kept_slots

    def __call__(self, input_ids, positions, logits_to_keep, leaves=0, lengths=None):
        first, states = self.unread is not None, self.unread
        if first:
            positions = positions.masked_fill(positions == 0, -1)  # before the first token there is no state
            positions[:, : self.unknown] = -1
            self.unread, self.unknown = None, 0
        else:
            states = self.newest.hidden_states[0][:, -1:]
        embeddings = self.large.model.get_input_embeddings()(input_ids)
        self.extra_inputs = {"states": states, "inputs_embeds": embeddings}
        logits = super().__call__(input_ids, positions, logits_to_keep)
        if first:
            self.kept_slots = self.positions.shape[1]
        return logits

    def read(self, node: torch.Tensor, gamma: int, others: int) -> None:
        """Takes the large model's states at all tokens of the round, and forgets what followed of this head's own."""
        states, rows = self.large.states, torch.arange(len(node), device=node.device)
        newest = states.shape[1] - gamma - others - 1  # the column of the token before the drafts
        parts = [states[:, newest : newest + gamma], states[rows, newest + node][:, None]]
        if self.unread is not None:  # nothing was drafted with the head
            parts = [self.unread, *parts]
        elif not self.kept_slots:
            parts = [states.new_zeros(len(node), self.unknown, states.shape[2]), states[:, :newest], *parts]
        self.unread = torch.cat(parts, 1)
        own = self.positions.shape[1] - self.kept_slots
        self.keep(torch.zeros(len(node), own, dtype=torch.bool, device=node.device), 0)

    def compact(self, rows: torch.Tensor) -> None:
        """As of any decoder, and of the states that are not read yet."""
        super().compact(rows)
        assert self.unread is not None
        self.unread, self.kept_slots = self.unread[rows], self.positions.shape[1]
