"""Draft models made of their large model: of its first layers, or of the last states that it computes anyway."""

import time

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput, CausalLMOutputWithPast

from .cache_argument import UPSTREAM_NAME, cache_inputs, find_cache
from .configuration_speculative_cascade import DraftConfig, FeatureDraftConfig
from .hub import PretrainedHubMixin, model_card, repository_name


MISSING_LOGIT = -1e4  # finite, so no warper makes it NaN, and its probability is exactly 0 in float32


class _TrimmedHead:
    """What drafts have in common: a head over the frequent tokens alone, and a card."""

    config: DraftConfig
    draft_vocab_ids: torch.Tensor

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, new_embeddings):
        self.head = new_embeddings

    def _all_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(..., vocab_size)`: of the draft's tokens by its head, of all others `MISSING_LOGIT`."""
        logits = self.head(states)
        filled = logits.new_full((*logits.shape[:-1], self.config.vocab_size), MISSING_LOGIT)
        return filled.index_copy(-1, self.draft_vocab_ids, logits)

    @staticmethod
    def _draft_card(title: str, text: str, usage: str, large: str | None):
        tags = ["draft-model", "speculative-decoding"]
        return model_card(
            title, text, usage, [large], library_name="transformers", pipeline_tag="text-generation", tags=tags
        )


class DraftForCausalLM(_TrimmedHead, PretrainedHubMixin, PreTrainedModel, GenerationMixin):
    """
    A small causal language model over the vocabulary of a large one, made by [`build_draft_model`].

    The first layers of the large model read the text, an affine map (https://huggingface.co/papers/2303.08112)
    predicts the large model's last hidden state, and the rows of its head that belong to frequent tokens turn that
    into logits. Tokens outside the draft vocabulary get probability 0.

    Args:
        config ([`DraftConfig`]):
            Configuration of the body and size of the draft vocabulary.

    Example:

    ```python
    >>> draft = AutoModelForCausalLM.from_pretrained("draft")
    >>> large.generate(**inputs, assistant_model=draft)
    ```
    """

    config_class = DraftConfig
    base_model_prefix = "body"
    _auto_class = "AutoModelForCausalLM"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: DraftConfig):
        super().__init__(config)
        self.body = AutoModel.from_config(config.body)
        size = self.body.config.hidden_size
        self.affine = nn.Linear(size, size)
        self.head = nn.Linear(size, config.draft_vocab_size)
        self.register_buffer("draft_vocab_ids", torch.arange(config.draft_vocab_size))
        self.post_init()

    def _card(self, repo_id):
        large = repository_name(self.config.body.name_or_path)
        return self._draft_card(
            f"Draft model for {large or 'a local model'}",
            f"""A small model that drafts for a large one in speculative decoding and
[speculative cascades](https://huggingface.co/papers/2405.19261), cut out of the large one itself: its first
{self.config.get_text_config().num_hidden_layers} layers, an affine map
([tuned lens](https://huggingface.co/papers/2303.08112)) and the rows of its head for
{self.config.draft_vocab_size:,} frequent tokens. Made with `hf_iclr.build_draft_model`; {self.num_parameters():,}
parameters. On its own it writes poorly: the large model checks every token.""",
            f"""from transformers import AutoModelForCausalLM, AutoTokenizer

large = AutoModelForCausalLM.from_pretrained("{large or "user/large-model"}")
tokenizer = AutoTokenizer.from_pretrained("{large or "user/large-model"}")
draft = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)
inputs = tokenizer("Explain rain.", return_tensors="pt")
print(tokenizer.decode(large.generate(**inputs, assistant_model=draft, max_new_tokens=40)[0]))""",
            large,
        )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        cache=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, seq_len)`):
                Tokens of the large model's vocabulary.
            attention_mask (`torch.Tensor`, *optional*):
                Handed to the body: `(batch, kv_len)`, or `(batch, 1, seq_len, kv_len)`, which is used as it is.
            position_ids (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                Handed to the body.
            cache, past_key_values ([`~transformers.Cache`], *optional*):
                The body's key-value cache, under the newer or the older of its names.
            labels (`torch.LongTensor` of shape `(batch, seq_len)`, *optional*):
                Tokens for the cross-entropy, shifted here; -100 and tokens the draft cannot write are left out.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                How many last positions get logits (0: all), or their indices.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutputWithPast`]: `logits` has the large model's vocabulary.
        """
        outputs = self.body(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **cache_inputs(self.body, past_key_values if cache is None else cache),
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self._all_logits(self.affine(outputs.last_hidden_state[:, keep]))

        loss = None
        if labels is not None:
            labels = labels.masked_fill(~torch.isin(labels, self.draft_vocab_ids), -100)
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{UPSTREAM_NAME: find_cache(outputs)},
        )


class FeatureDraftForCausalLM(_TrimmedHead, PretrainedHubMixin, PreTrainedModel, GenerationMixin):
    """
    A draft model without attention: it reads the newest token and the large model's last hidden state one position
    earlier, which verification has computed anyway, and predicts the large model's next last hidden state. Further
    drafts of a round read predicted states. After EAGLE (https://huggingface.co/papers/2401.15077), without its
    transformer layer. Made by [`build_draft_model`] with `kind="features"`; serves in the batched cascade only.

    Args:
        config ([`FeatureDraftConfig`]):
            Sizes.

    Example:

    ```python
    >>> draft = AutoModelForCausalLM.from_pretrained("draft")
    >>> enable_cascade(large, draft).generate(**inputs, cascade_rule="spec")
    ```
    """

    config_class = FeatureDraftConfig
    base_model_prefix = "model"
    _auto_class = "AutoModelForCausalLM"
    reads_states = True  # how a cascade, also one in code from the Hub, tells it from other small models

    def __init__(self, config: FeatureDraftConfig):
        super().__init__(config)
        size = config.get_text_config().hidden_size
        self.affine = nn.Linear(2 * size, size)
        self.gate_up = nn.Linear(2 * size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, size, bias=False)
        self.head = nn.Linear(size, config.draft_vocab_size)
        self.register_buffer("draft_vocab_ids", torch.arange(config.draft_vocab_size))
        self.post_init()

    def predict(self, inputs_embeds: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """
        The large model's last hidden state at a token.

        Args:
            inputs_embeds (`torch.Tensor` of shape `(..., hidden_size)`):
                The large model's input embedding of the token.
            states (`torch.Tensor` of shape `(..., hidden_size)`):
                The last hidden state at the token before it, the large model's or a predicted one.

        Returns:
            `torch.Tensor` of shape `(..., hidden_size)`.
        """
        inputs = torch.cat([inputs_embeds, states], -1)
        gate, up = self.gate_up(inputs).chunk(2, -1)
        return self.affine(inputs) + self.down(nn.functional.silu(gate) * up)

    def forward(self, inputs_embeds: torch.Tensor | None = None, states: torch.Tensor | None = None, **kwargs):
        """
        Same arguments as `predict`.

        Returns:
            [`~transformers.modeling_outputs.CausalLMOutput`]: `logits` has the large model's vocabulary,
            `hidden_states` holds the predicted state.
        """
        if inputs_embeds is None or states is None:
            raise ValueError(
                "A feature draft reads the large model's hidden states, so it drafts only inside a cascade: "
                '`enable_cascade(large, draft).generate(...)`, or `pipeline("speculative-cascade", ...)`.'
            )
        states = self.predict(inputs_embeds, states)
        return CausalLMOutput(logits=self._all_logits(states), hidden_states=(states,))

    def drafter(self, large) -> "StateDrafter":
        """What a cascade's loop drafts with; `large` is the large model's decoder, which keeps its states."""
        return StateDrafter(self, large)

    def _card(self, repo_id):
        large = repository_name(self.config.body.name_or_path)
        return self._draft_card(
            f"Feature draft for {large or 'a local model'}",
            f"""Drafts for a large model in speculative decoding and
[speculative cascades](https://huggingface.co/papers/2405.19261). It has no attention layer: it reads the newest token
and the large model's own last hidden state one position earlier (after
[EAGLE](https://huggingface.co/papers/2401.15077)), and writes {self.config.draft_vocab_size:,} frequent tokens. Made
with `hf_iclr.build_draft_model(..., kind="features")`; {self.num_parameters():,} parameters.""",
            f"""import hf_iclr
from transformers import pipeline

pipe = pipeline("speculative-cascade", model="{large or "user/large-model"}", assistant_model="{repo_id}")
print(pipe("Explain rain.", cascade_rule="spec", max_new_tokens=40)[0]["generated_text"])""",
            large,
        )


class StateDrafter:
    """
    A [`FeatureDraftForCausalLM`] where the cascade's loop expects a decoder with a cache: it has none, and can't draft
    before the large model has read the prompt.
    """

    def __init__(self, model, large):
        self.model, self.large = model, large
        self.states: torch.Tensor | None = None  # at the last token that was read, of shape (batch, 1, hidden_size)
        self.path: list[torch.Tensor] = []  # in this round
        self.forwards, self.tokens, self.seconds = 0, 0, 0.0

    def __call__(self, input_ids: torch.Tensor, positions: torch.Tensor, logits_to_keep: int, lengths=None):
        start = time.perf_counter()
        embeddings = self.large.model.get_input_embeddings()(input_ids[:, -1:])
        output = self.model(embeddings, self.states)
        self.states = output.hidden_states[0]
        self.path.append(self.states)
        self.forwards, self.tokens = self.forwards + 1, self.tokens + len(input_ids)
        self.seconds += time.perf_counter() - start
        return output.logits.float()

    rereads = False

    @property
    def blind(self) -> bool:
        """Whether the large model has given no states yet."""
        return self.states is None

    def read(self, node: torch.Tensor, gamma: int, others: int) -> None:
        """
        Takes the large model's states where each row's next token was drawn, `(batch,)` columns of the logits of a
        round with γ drafts and so many siblings.
        """
        self.states, self.path = self.large.states[torch.arange(len(node), device=node.device), node][:, None], []

    def keep(self, kept: torch.Tensor, needed: int) -> None:
        """Goes back to the states after the drafts that are kept (`(batch, drafts read)`, boolean)."""
        path = torch.stack(self.path)
        self.states = path[kept.sum(1), torch.arange(len(kept), device=kept.device)]

    def hole_share(self, longest: int) -> float:
        return 0.0

    def compact(self, rows: torch.Tensor) -> None:
        """Keeps only `rows` (indices)."""
        assert self.states is not None
        self.states = self.states[rows]
