"""A draft model that is a piece of its large model: first layers, an affine map, a head over the frequent tokens."""

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_argument import UPSTREAM_NAME, cache_inputs, find_cache
from .configuration_draft import DraftConfig
from .hub import PretrainedHubMixin, model_card, repository_name


MISSING_LOGIT = -1e4  # finite, so no warper makes it NaN, and its probability is exactly 0 in float32


class DraftForCausalLM(PretrainedHubMixin, PreTrainedModel, GenerationMixin):
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
        return model_card(
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
            [large],
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["draft-model", "speculative-decoding"],
        )

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, new_embeddings):
        self.head = new_embeddings

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
        draft_logits = self.head(self.affine(outputs.last_hidden_state[:, keep]))  # (batch, seq_len, draft_vocab_size)
        logits = draft_logits.new_full((*draft_logits.shape[:-1], self.config.vocab_size), MISSING_LOGIT)
        logits = logits.index_copy(-1, self.draft_vocab_ids, draft_logits)

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
