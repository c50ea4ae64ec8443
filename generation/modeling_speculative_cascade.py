"""A large and a small model as one: saved, loaded and pushed as one repository, cascaded by plain `generate`."""

import copy
import os
import re

from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from .cache_argument import cache_inputs
from .cached_decoder import same_vocabulary, vocabulary_size
from .cascade_generation import SpeculativeCascadeGenerationMixin
from .configuration_speculative_cascade import SpeculativeCascadeConfig
from .hub import PretrainedHubMixin, model_card, repository_name
from .modeling_draft import DraftForCausalLM, FeatureDraftForCausalLM


class SpeculativeCascadeForCausalLM(
    PretrainedHubMixin, SpeculativeCascadeGenerationMixin, PreTrainedModel, GenerationMixin
):
    """
    A causal language model that behaves as its large half everywhere but in `generate`, which cascades with the small
    half.

    Args:
        config ([`SpeculativeCascadeConfig`]):
            Both configurations and the default rule.
        large, small ([`~transformers.PreTrainedModel`], *optional*):
            The models themselves; built from the configuration when left out.

    Example:

    ```python
    >>> model = SpeculativeCascadeForCausalLM.from_cascade_pretrained("large", "small", cascade_rule="opt")
    >>> model.save_pretrained("cascade")
    >>> AutoModelForCausalLM.from_pretrained("cascade").generate(**inputs)
    ```
    """

    config_class = SpeculativeCascadeConfig
    base_model_prefix = "large"
    supports_gradient_checkpointing = True
    _one_vocabulary = True  # made of two models of one tokenizer, whatever their embeddings are padded to
    _auto_class = "AutoModelForCausalLM"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SpeculativeCascadeConfig, large=None, small=None):
        super().__init__(config)
        self.large = large if large is not None else _from_config(config.large)
        self.small = small if small is not None else _from_config(config.small)
        self.config.large, self.config.small = self.large.config, self.small.config
        self.generation_config = copy.deepcopy(self.large.generation_config)
        self.post_init()

    @property
    def cascade_pair(self) -> tuple:
        """Both halves."""
        return self.large, self.small

    @classmethod
    def from_cascade_pretrained(
        cls,
        large,
        small,
        *,
        cascade_rule: str = "spec",
        cascade_alpha: float = 0.3,
        as_reference: bool = False,
        large_revision: str | None = None,
        small_revision: str | None = None,
        **kwargs,
    ) -> "SpeculativeCascadeForCausalLM":
        """
        Builds a composite of two models.

        Args:
            large, small (`str` or [`~transformers.PreTrainedModel`]):
                Repository, folder or model. Both must have one tokenizer; where their embeddings are padded to two
                sizes, it is looked for beside both.
            cascade_rule (`str`, *optional*, defaults to `"spec"`):
                Default rule of `generate`.
            cascade_alpha (`float`, *optional*, defaults to 0.3):
                Its parameter.
            as_reference (`bool`, *optional*, defaults to `False`):
                `save_pretrained` then writes the two names and no weights. Needs names, not models.
            large_revision, small_revision (`str`, *optional*):
                Revisions to load.
            kwargs (*optional*):
                Passed to both `from_pretrained` calls, such as `dtype=torch.bfloat16, device_map="auto"`.

        Raises:
            TypeError: if a half is neither name nor model, or `as_reference` is asked for models.
            ValueError: if the vocabularies differ, a model is an encoder-decoder, or the rule does not fit.
        """
        if as_reference and not (isinstance(large, str) and isinstance(small, str)):
            raise TypeError(
                f"`as_reference=True` stores names, got a {type(large).__name__} and a {type(small).__name__}. Pass "
                "two repository names or folders."
            )
        for half in (large, small):
            if not (isinstance(half, (str, PreTrainedModel)) or hasattr(half, "peft_config")):
                raise TypeError(f"Expected a repository name, a folder or a model, got {half!r:.80}.")
            if getattr(half, "reads_states", False) and not hasattr(half, "_card"):
                raise TypeError("An EAGLE-3 head stays in a repository of its own: `enable_cascade(large, head)`.")
        references = {}
        if as_reference:
            references = {
                "large_name_or_path": large,
                "small_name_or_path": small,
                "large_revision": large_revision,
                "small_revision": small_revision,
            }
        halves = [
            AutoModelForCausalLM.from_pretrained(half, revision=revision or "main", **kwargs)
            if isinstance(half, str)
            else half
            for half, revision in ((large, large_revision), (small, small_revision))
        ]
        if any(hasattr(half, "peft_config") or getattr(half, "_hf_peft_config_loaded", False) for half in halves):
            raise TypeError(
                "A composite is saved as two plain models, got one with adapters. Pass what its `merge_and_unload()` "
                "returns, or use `enable_cascade(large, small)`, which takes adapters."
            )
        options = {name: kwargs[name] for name in ("cache_dir", "token", "trust_remote_code") if name in kwargs}
        if not same_vocabulary(*halves, **options):
            raise ValueError(
                f"A composite model needs one vocabulary, got {vocabulary_size(halves[0])} entries (large) and "
                f"{vocabulary_size(halves[1])} (small), and no tokenizer beside both that says they differ by padding "
                "only. Use `enable_cascade(large, small)` and pass both tokenizers to `generate`."
            )
        if any(half.config.is_encoder_decoder for half in halves):
            raise ValueError(
                "A composite model is decoder-only, got an encoder-decoder. Use `enable_cascade(large, small)`."
            )
        config = cls.config_class(
            large=copy.deepcopy(halves[0].config),
            small=copy.deepcopy(halves[1].config),
            cascade_rule=cascade_rule,
            cascade_alpha=cascade_alpha,
            dtype=halves[0].dtype,
            **references,
        )
        return cls(config, *halves).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        Same as [`~transformers.PreTrainedModel.from_pretrained`]; a configuration of references loads both
        repositories, only safetensors of them. `trust_remote_code=True` is trust in this repository, not in those that
        it names: to trust them too, name them yourself, `from_cascade_pretrained(large, small,
        trust_remote_code=True)`.

        Raises:
            ValueError: if the weights of one half are missing, or a repository refers to what is none.
        """
        if config is None:
            config = cls.config_class.from_pretrained(pretrained_model_name_or_path)
        if config.is_reference:
            _check_references(config, pretrained_model_name_or_path)
            passed = ("adapter_kwargs", "output_loading_info", "revision", "state_dict", "_from_auto")
            for name in (*passed, "trust_remote_code"):
                kwargs.pop(name, None)
            return cls.from_cascade_pretrained(
                config.large_name_or_path,
                config.small_name_or_path,
                cascade_rule=config.cascade_rule,
                cascade_alpha=config.cascade_alpha,
                as_reference=True,
                large_revision=config.large_revision,
                small_revision=config.small_revision,
                **{"use_safetensors": True, **kwargs},
            )
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of the cascade, the first is "
                f"{missing[0]!r}. Build it again with `{cls.__name__}.from_cascade_pretrained(large, small)`."
            )
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """
        Same as [`~transformers.PreTrainedModel.save_pretrained`], and a card; a model of references saves no weights.
        """
        if self.config.is_reference:
            state_dict = {}
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def _card(self, repo_id, usage=None):
        config = self.config
        large = repository_name(config.large_name_or_path or self.large.name_or_path)
        small = repository_name(config.small_name_or_path or self.small.name_or_path)
        return model_card(
            f"Speculative cascade of {large or 'a local model'} and {small or 'a local model'}",
            f"""Two causal language models as one, after
[Faster Cascades via Speculative Decoding](https://huggingface.co/papers/2405.19261): the small one drafts, and a rule
says for each token whether the small one's stays or the large one's is written. Made with `hf_iclr`.
{"This repository holds the names of both and no weights." if config.is_reference else ""}

| | model | parameters |
| --- | --- | --- |
| large | {large or type(self.large).__name__} | {self.large.num_parameters():,} |
| small | {small or type(self.small).__name__} | {self.small.num_parameters():,} |

Rule `{config.cascade_rule}` with alpha {config.cascade_alpha:g}, unless a call says otherwise:
`generate(..., cascade_rule="opt", cascade_alpha=0.2)`.""",
            usage
            or f"""from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo_id}", trust_remote_code=True)  # with hf_iclr imported: without
tokenizer = AutoTokenizer.from_pretrained("{large or repo_id}")
inputs = tokenizer("Explain rain.", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
print(model.cascade_statistics)""",
            [large, small],
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["speculative-cascade", "speculative-decoding"],
        )

    def _init_weights(self, module):
        # Both halves initialise themselves; a composite adds no weight.
        pass

    def get_input_embeddings(self):
        return self.large.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.large.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.large.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.large.set_output_embeddings(new_embeddings)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        return self.large.prepare_inputs_for_generation(*args, **kwargs)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        cache=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """The large model's forward, arguments unchanged; the cache may come under either of its names."""
        return self.large(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **cache_inputs(self.large, past_key_values if cache is None else cache),
            **kwargs,
        )


def _check_references(config, source):
    """A folder may refer to folders, as its owner wrote it; a repository only to repositories."""
    for name in (config.large_name_or_path, config.small_name_or_path):
        repository = isinstance(name, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) and ".." not in name
        if not repository and not (isinstance(name, str) and os.path.isdir(source) and os.path.isdir(name)):
            raise ValueError(
                f"Expected {source} to refer to repositories such as 'user/model', got {name!r:.80}. Name both models "
                "yourself: `SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, small)`."
            )


def _from_config(config):
    for draft in (DraftForCausalLM, FeatureDraftForCausalLM):  # known here even where nothing registered them
        if type(config) is draft.config_class:
            return draft(config)
    return AutoModelForCausalLM.from_config(config)
