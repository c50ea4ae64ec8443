"""Configurations of draft models that are made of their large model: of its first layers, or of its last states."""

from typing import ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


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
