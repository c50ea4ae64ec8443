"""DeepSpeed's optimizer in ZeRO's first and second stage, with gradients and moments divided among processes."""

import importlib
from collections import ChainMap
from collections.abc import Callable
from typing import Any

from torch import nn

from .coverage import refusal


_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def optimizer_of(trainer: Any) -> Any:
    """The trainer's optimizer without accelerate's wrapper, DeepSpeed's as a [`ZeroOptimizer`]."""
    if trainer.is_deepspeed_enabled:
        return ZeroOptimizer(trainer.deepspeed)
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


class ZeroOptimizer:
    """
    The optimizer of a DeepSpeed engine as if it were PyTorch's: groups hold the model's parameters rather than flat
    parts of them, and the state of a parameter has all of its second moment, as all processes have it together. Where
    `bit16_groups` and the flat parts are DeepSpeed tells nobody but its optimizer: 0.19 was tried.

    Args:
        engine (`deepspeed.DeepSpeedEngine`): with ZeRO's stage 1 or 2, or it is refused.
    """

    def __init__(self, engine: Any) -> None:
        if engine.zero_optimization_stage() not in (1, 2):
            raise refusal("DeepSpeed but in ZeRO's stages 1 and 2", '`"zero_optimization": {"stage": 2}`')
        if engine.fp16_enabled():
            raise refusal("fp16 under DeepSpeed, which scales losses by itself", "`bf16=True`")
        if engine.zero_offload_optimizer() is not None:
            raise refusal("an optimizer that DeepSpeed keeps elsewhere", 'a configuration without "offload_optimizer"')
        self.engine, flat = engine, engine.optimizer.optimizer
        own = engine.optimizer.bit16_groups
        # Over the optimizer's groups, so that options are those of the present step
        self.param_groups: list[Any] = [
            ChainMap({"params": params}, group) for params, group in zip(own, flat.param_groups, strict=True)
        ]
        self.state = _States(engine.optimizer)

    def clip_factor(self) -> float:
        """By what the last step has multiplied gradients."""
        most, norm = self.engine.gradient_clipping(), self.engine.get_global_grad_norm()
        return min(most / (float(norm) + 1e-6), 1.0) if most and norm is not None else 1.0

    def register_step_pre_hook(self, function: Callable[[], Any]) -> "_StepPreHook":
        """Call `function` before the engine makes a step, which accelerate has it do at the end of `backward`."""
        return _StepPreHook(self.engine, function)


class _StepPreHook:
    def __init__(self, engine: Any, function: Callable[[], Any]) -> None:
        self._engine, step = engine, engine.step

        def step_after(*args: Any, **kwargs: Any) -> Any:
            function()
            return step(*args, **kwargs)

        engine.step = step_after

    def remove(self) -> None:
        """Give the engine back its method."""
        del self._engine.step


class _States:
    """The optimizer's state of each parameter; what is asked of one must be asked in all processes."""

    def __init__(self, zero: Any) -> None:
        self._zero, self._linked = zero, False

    def __bool__(self) -> bool:
        return bool(self.values())

    def values(self) -> Any:
        """Those of flat parts, which know the number of steps."""
        return self._zero.optimizer.state.values()

    def get(self, parameter: nn.Parameter, default: Any = None) -> Any:
        """That of one parameter, its second moment as a whole."""
        flat = next(iter(self.values()), None)
        if not flat:
            return default
        if "state2" in flat:
            raise ValueError(
                f"Expected 32-bit moments under DeepSpeed, got those of {type(self._zero.optimizer).__name__}, which "
                'can\'t be put together. Type `optim="adamw_torch"`.'
            )
        utils = importlib.import_module("deepspeed.utils")
        if not self._linked:  # DeepSpeed does so after the first group's first step, and never for the others
            parts = zip(self._zero.bit16_groups, self._zero.single_partition_of_fp32_groups, strict=True)
            for parameters, part in parts:
                utils.lazy_init_hp_params_optimizer_state(parameters, part, self._zero.optimizer.state)
            self._linked = True
        known = [name for name in _MOMENTS if name in flat]
        return {**flat, **{name: utils.safe_get_full_optimizer_state(parameter, name) for name in known}}
