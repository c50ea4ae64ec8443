"""Configurations of draft models, made of their large model, and of a composite: a large and a small model as one."""

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .deferral_rules import check_rule


class DraftConfig(PreTrainedConfig):
    r"""
    Configuration of a [`DraftForCausalLM`].

    Args:
        body ([`~transformers.PreTrainedConfig`] or `dict`):
            Configuration of the decoder without head: that of the large model with fewer layers.
        draft_vocab_size (`int`, *optional*, defaults to 8192):
            Number of tokens the draft can write. All tokens of the large model can be read.
        expected_acceptance (`float`, *optional*):
            Mean Σ min(p, q) on texts like those it was made of, at temperature 1: where the choice of draft lengths
            begins.
    """

    model_type = "affine-draft"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "body": SubConfigSpec(config_class=AutoConfig, model_type="llama")
    }
    _auto_class = "AutoConfig"

    body: PreTrainedConfig | dict | None = None
    draft_vocab_size: int = 8192
    expected_acceptance: float | None = None

    @property
    def vocab_size(self) -> int:
        """Number of tokens the draft reads, and the width of its logits: that of the large model."""
        return self.body.vocab_size  # type: ignore[union-attr]

    def get_text_config(self, decoder=None, encoder=None):
        return self.body.get_text_config(decoder=decoder, encoder=encoder)


class FeatureDraftConfig(DraftConfig):
    r"""
    Configuration of a [`FeatureDraftForCausalLM`].

    Args:
        body ([`~transformers.PreTrainedConfig`] or `dict`):
            Configuration of the large model, whose sizes the draft shares.
        draft_vocab_size (`int`, *optional*, defaults to 8192):
            Number of tokens the draft can write.
        intermediate_size (`int`, *optional*, defaults to 1536):
            Width of the draft's one hidden layer.
    """

    model_type = "feature-draft"

    intermediate_size: int = 1536


class SpeculativeCascadeConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SpeculativeCascadeForCausalLM`].

    Args:
        large ([`~transformers.PreTrainedConfig`] or `dict`):
            Configuration of the large model.
        small ([`~transformers.PreTrainedConfig`] or `dict`):
            Configuration of the small model.
        cascade_rule (`str`, *optional*, defaults to `"spec"`):
            One of [`DEFERRAL_RULES`].
        cascade_alpha (`float`, *optional*, defaults to 0.3):
            Parameter of the rule.
        large_name_or_path, small_name_or_path (`str`, *optional*):
            When set, the model holds no weights of its own: it loads them from these repositories or folders.
        large_revision, small_revision (`str`, *optional*):
            Revisions of those repositories.

    Raises:
        ValueError: if one half is missing or the rule does not fit.
    """

    model_type = "speculative-cascade"
    sub_configs_defaults: ClassVar[dict] = {
        "large": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "small": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    _auto_class = "AutoConfig"

    large: PreTrainedConfig | dict | None = None
    small: PreTrainedConfig | dict | None = None
    cascade_rule: str = "spec"
    cascade_alpha: float = 0.3
    large_name_or_path: str | None = None
    small_name_or_path: str | None = None
    large_revision: str | None = None
    small_revision: str | None = None

    def __post_init__(self, **kwargs):
        check_rule(self.cascade_rule, self.cascade_alpha)
        if (self.large is None) != (self.small is None):
            missing = "large" if self.large is None else "small"
            raise ValueError(
                f"A cascade needs a large and a small model, the configuration of `{missing}` is missing. Build it "
                "with `SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, small)` and save that."
            )
        for name in ("large", "small"):
            half = getattr(self, name)
            for draft in (DraftConfig, FeatureDraftConfig):  # known here even where nothing registered them
                if isinstance(half, dict) and half.get("model_type") == draft.model_type:
                    setattr(self, name, draft(**half))
        super().__post_init__(**kwargs)

    @property
    def is_reference(self) -> bool:
        """Whether the weights live in two other repositories."""
        return self.large_name_or_path is not None

    def get_text_config(self, decoder=None, encoder=None):
        return self.large.get_text_config(decoder=decoder, encoder=encoder)
