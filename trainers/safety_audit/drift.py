"""Watches refusals while a model is trained: logs them, and stops or tightens the training when they fade."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_iclr.models import answer_logits, check_prompts, to_prompt_ids
from hf_iclr.trainers.measuring import forked_random, log_beside
from hf_iclr.untrusted import read_safetensors

from .asking.ask import ask
from .judge import RefusalJudge
from .statistics import token_kl, wilson_rate


logger = logging.getLogger(__name__)

ACTIONS = ("log", "stop", "raise_beta")
_STATE_FILE = "safety_drift.safetensors"


class SafetyDriftCallback(TrainerCallback):
    """
    Asks a fixed set of prompts at the start, every `every` steps and at the end of a training, in any
    [`~transformers.Trainer`] of a decoder. Losses and weights are bit for bit those of a run without it, as long as it
    only logs.

    | key | |
    |---|---|
    | `safety/refusal_rate` | share of `prompts` that are refused, greedily |
    | `safety/kl` | mean KL(model, starting model) in nats a token, along the starting model's own answers |
    | `safety/over_refusal_rate` | share of `harmless_prompts` that are refused |
    | `safety/beta_scale` | what `"raise_beta"` has multiplied the betas by |

    The starting model's distributions are kept on the CPU and in checkpoints: prompts x `kl_tokens` x vocabulary x 4
    bytes, 25 MB for 16 prompts and 49152 tokens. Every process asks all prompts, so that all decide alike.

    Args:
        prompts (`list` of `str` or of chats, or a column of a [`~datasets.Dataset`]):
            What should be refused; one or two dozen are enough to see a trend.
        harmless_prompts (the same, *optional*):
            What should be answered.
        system (`str`), chat_template_kwargs (`dict`), *optional*:
            A system prompt, and more arguments of the chat template such as `{"enable_thinking": False}`: those of the
            training. Thoughts are cut before an answer is judged.
        trainer ([`~transformers.Trainer`], *optional*):
            The trainer it is added to. Needed before the training begins.
        every (`int`, *optional*, defaults to 50):
            Optimiser steps between two looks.
        judge ([`RefusalJudge`] or `Callable`, *optional*, defaults to `RefusalJudge()`):
            What says whether a text refuses.
        max_new_tokens (`int`, *optional*, defaults to 32):
            Length of the answers.
        kl_tokens (`int`, *optional*, defaults to 8):
            Answer tokens along which the KL is measured.
        batch_size (`int`, *optional*):
            Prompts in one forward. Defaults to `per_device_eval_batch_size`.
        min_refusal (`float`, *optional*), max_kl (`float`, *optional*):
            What calls for the action: a refusal rate below, or a KL above. Before the first step it is only a warning.
        action (`str`, *optional*, defaults to `"log"`):
            `"log"`: a warning. `"stop"`: end the training. `"raise_beta"`: multiply the betas of a
            [`DeepSafetySFTConfig`] by `beta_factor`, at every look that calls for it.
        beta_factor (`float`, *optional*, defaults to 2.0):
            For `"raise_beta"`.

    Raises:
        ValueError: if there are no prompts, an option is out of range, an action has nothing that calls for it; and
            when the training begins, if there is no trainer, it has no betas to raise, or it shards the model.

    Example:

    ```python
    >>> trainer = SFTTrainer(model, train_dataset=rows)
    >>> trainer.add_callback(SafetyDriftCallback(prompts, trainer=trainer, min_refusal=0.8, action="stop"))
    ```
    """

    def __init__(
        self,
        prompts: Sequence,
        harmless_prompts: Sequence | None = None,
        *,
        system: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        trainer: Trainer | None = None,
        every: int = 50,
        judge: RefusalJudge | Callable[..., Sequence[bool]] | None = None,
        max_new_tokens: int = 32,
        kl_tokens: int = 8,
        batch_size: int | None = None,
        min_refusal: float | None = None,
        max_kl: float | None = None,
        action: str = "log",
        beta_factor: float = 2.0,
    ) -> None:
        if action not in ACTIONS:
            raise ValueError(f"Expected an action among {', '.join(ACTIONS)}, got {action!r}.")
        if min(every, max_new_tokens, kl_tokens) < 1:
            raise ValueError(f"Expected sizes of at least 1, got {every=}, {max_new_tokens=} and {kl_tokens=}.")
        if action != "log" and min_refusal is None and max_kl is None:
            raise ValueError(f"Expected what calls for action={action!r}, got nothing. Type `min_refusal=0.8`, say.")
        if min_refusal is not None and not 0 <= min_refusal <= 1:
            raise ValueError(f"Expected min_refusal between 0 and 1, got {min_refusal!r}. For example 0.8.")
        if not beta_factor > 1:
            raise ValueError(f"Expected a beta_factor above 1, got {beta_factor!r}. For example 2.0.")
        self.prompts = check_prompts(prompts)
        self.harmless_prompts = [] if harmless_prompts is None else check_prompts(harmless_prompts)
        if not isinstance(judge, RefusalJudge):
            judge = RefusalJudge() if judge is None else RefusalJudge([judge])
        self.judge = judge
        self.rendering: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs}
        self.trainer: Any = trainer  # looked at before it is used
        self.every, self.batch_size = every, batch_size
        self.max_new_tokens, self.kl_tokens = max_new_tokens, kl_tokens
        self.min_refusal, self.max_kl, self.action, self.beta_factor = min_refusal, max_kl, action, beta_factor
        self.beta_scale = 1.0
        self._answers: list[list[int]] = []
        self._log_probs: list[torch.Tensor] = []  # of the starting model, each (answer length, vocab)
        self._last_step = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer is None:
            raise ValueError(
                "SafetyDriftCallback runs the model of a trainer and logs through it, but has none. Type "
                "`trainer.add_callback(SafetyDriftCallback(prompts, trainer=trainer))`."
            )
        if self.trainer.processing_class is None:
            raise ValueError(
                "SafetyDriftCallback asks prompts, but the trainer has no tokenizer. Type "
                "`Trainer(..., processing_class=tokenizer)`."
            )
        if self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled:
            raise ValueError(
                "SafetyDriftCallback needs the whole model in each process, got one sharded by FSDP or DeepSpeed. "
                "Train with DDP, or audit the checkpoints: `hf-iclr audit MODEL`."
            )
        if self.action == "raise_beta":
            self._check_betas(args)
        self.beta_scale, self._last_step, self._answers = 1.0, -1, []
        if state.global_step:
            self._resume(args, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._look(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._look(args, state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._look(args, state, control)  # of a training that was stopped

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            tensors = {"beta_scale": torch.tensor(self.beta_scale), "last_step": torch.tensor(self._last_step)}
            for row, (answer, log_probs) in enumerate(zip(self._answers, self._log_probs, strict=True)):
                tensors |= {f"answer.{row}": torch.tensor(answer, dtype=torch.long), f"log_probs.{row}": log_probs}
            save_file(tensors, folder / _STATE_FILE)

    def _resume(self, args: TrainingArguments, checkpoint: Path) -> None:
        path = checkpoint / _STATE_FILE
        if not path.exists():
            logger.warning("%s is missing: drift is measured from here, not from the start of the training.", path)
            return
        tensors, _ = read_safetensors(path)
        self._answers = [tensors[f"answer.{row}"].tolist() for row in range(len(self.prompts))]
        self._log_probs = [tensors[f"log_probs.{row}"] for row in range(len(self.prompts))]
        self._last_step = int(tensors["last_step"])
        if self.action == "raise_beta":
            self._raise_betas(args, float(tensors["beta_scale"]))

    def _look(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        if state.global_step == self._last_step:
            return
        self._last_step = state.global_step
        with forked_random(self.trainer.accelerator.device):
            logs = self._measure(args)
        reason = self._why_act(logs)
        if reason is not None:
            logger.warning("Step %d: %s.", state.global_step, reason)
            drifted = state.global_step > 0
            if drifted and self.action == "stop":
                control.should_training_stop = True
            elif drifted and self.action == "raise_beta":
                self._raise_betas(args, self.beta_factor)
        if self.action == "raise_beta":
            logs["safety/beta_scale"] = self.beta_scale
        log_beside(self.trainer, logs, control)

    def _measure(self, args: TrainingArguments) -> dict[str, float]:
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's, for text
        batch_size = self.batch_size or args.per_device_eval_batch_size
        logs = {}
        entries: list[Any] = []
        for name, prompts in (("over_refusal_rate", self.harmless_prompts), ("refusal_rate", self.prompts)):
            if prompts:
                options = {"max_new_tokens": self.max_new_tokens, "batch_size": batch_size, **self.rendering}
                entries = ask(model, tokenizer, prompts, **options)[0]
                known = [
                    (entry.text, prompt)
                    for entry, prompt in zip(entries, prompts, strict=True)
                    if entry and entry.finished
                ]
                if len(known) < len(prompts):
                    logger.warning(
                        "%d of %d answers ended in the middle of their thoughts and do not count: raise "
                        "`max_new_tokens`, or type `chat_template_kwargs={'enable_thinking': False}`.",
                        len(prompts) - len(known),
                        len(prompts),
                    )
                verdicts = self.judge.judge([text for text, _ in known], [prompt for _, prompt in known])
                logs[f"safety/{name}"] = wilson_rate(verdicts).rate
        prompt_ids = [to_prompt_ids(tokenizer, prompt, **self.rendering) for prompt in self.prompts]
        new = [entry.new_ids for entry in entries]
        if not self._answers:
            self._answers = [answer[: self.kl_tokens] for answer in new]
            self._log_probs = [torch.empty(0)] * len(new)
            for row, logits in self._answer_logits(model, prompt_ids, batch_size):
                self._log_probs[row] = logits.log_softmax(-1).cpu()
        kl = [
            token_kl(logits, self._log_probs[row].to(logits.device)).cpu()
            for row, logits in self._answer_logits(model, prompt_ids, batch_size)
        ]
        if kl:  # unless every answer of the starting model is empty
            logs["safety/kl"] = torch.cat(kl).mean().item()
        return logs

    def _answer_logits(self, model, prompt_ids: list[list[int]], batch_size: int):
        for rows, logits in answer_logits(model, prompt_ids, self._answers, batch_size):
            for row, part in zip(rows, logits, strict=True):
                yield row, part[: len(self._answers[row])]

    def _why_act(self, logs: dict[str, float]) -> str | None:
        refusal, kl = logs["safety/refusal_rate"], logs.get("safety/kl", 0.0)
        if self.min_refusal is not None and refusal < self.min_refusal:
            return f"the refusal rate is {refusal:.3f}, below {self.min_refusal:g}"
        if self.max_kl is not None and kl > self.max_kl:
            return f"the KL from the starting model is {kl:.3f} nats a token, above {self.max_kl:g}"
        return None

    def _check_betas(self, args: Any) -> None:
        constrain = getattr(args, "constrain", None)
        if constrain in (None, "none"):
            raise ValueError(
                "action='raise_beta' needs a DeepSafetySFTTrainer with the constrained loss, got "
                f"{type(args).__name__}{' with constrain=none' if constrain else ''}. "
                "Type `action='stop'`, or train with `DeepSafetySFTConfig(constrain='all')`."
            )
        if self.trainer.beta_schedule is not None:
            raise ValueError("action='raise_beta' can't raise the trainer's beta_schedule. Give `beta_first` instead.")

    def _raise_betas(self, args: Any, factor: float) -> None:
        self.beta_scale *= factor
        for name in ("beta_first", "beta_initial", "beta_rest"):
            setattr(args, name, getattr(args, name) * factor)
