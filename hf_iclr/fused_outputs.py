"""What both trainers lean on: a stand-in for `model` that sees the fused LM head's outputs before TRL's loss does."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch


if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput


class FusedOutputsProxy:
    """
    Stands in for `model` during one `compute_loss` of TRL: every output of the fused LM head passes through `rewrite`
    first. TRL's trainers only call `model` there, so their loss, normalisation and metrics stay their own.

    Args:
        model (`torch.nn.Module`):
            The model, wrapped for distributed training or not.
        rewrite (`Callable`):
            Gets the [`~trl.trainer.utils.FusedCausalLMOutput`] of a call with `fused_lm_head=True` and the keyword
            arguments of that call; what it returns is what TRL sees. Other calls are passed through.
    """

    def __init__(
        self, model: torch.nn.Module, rewrite: "Callable[[FusedCausalLMOutput, dict[str, Any]], FusedCausalLMOutput]"
    ) -> None:
        self._model, self._rewrite = model, rewrite

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self._model(*args, **kwargs)
        return self._rewrite(outputs, kwargs) if kwargs.get("fused_lm_head") else outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
