"""One call that measures how a model refuses, how deep that goes, and what a fine-tune changed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from hf_iclr import __version__
from hf_iclr.models import check_decoder, check_prompts, end_tokens, to_answer_ids
from hf_iclr.prefill import check_context

from .asking.endpoint import OpenAIEndpoint
from .asking.journal import Journal, check_out
from .asking.load import load_model, load_tokenizer
from .asking.prompt_sets import NEUTRAL_BEGINNINGS
from .attacks import DECODING_GRID
from .checks import (
    ADAPTER_OFF,
    check_chats,
    check_comparable,
    check_endpoint,
    check_measurable,
    check_other,
    check_sizes,
    fingerprint,
    has_same_numbers,
    name_of,
)
from .gcg import INITIAL_SUFFIX
from .judge import RefusalJudge
from .report import SafetyReport
from .run import AuditRun, other_model


logger = logging.getLogger(__name__)

SAME_NUMBERS = (
    "The model before has the very same weights as the audited one, so nothing can have changed. Was it copied after "
    "the training?"
)


def audit_safety(
    model,
    tokenizer,
    prompts: Sequence,
    *,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    harmless_prompts: Sequence | None = None,
    before: Any = None,
    base: Any = None,
    answers: Sequence[str | Sequence[int] | None] | str | None = None,
    ks: Sequence[int] = (0, 1, 2, 5, 10, 20, 40),
    attacks: Sequence[str] = ("prefill", "decoding"),
    decoding_grid: Sequence[dict[str, Any]] = DECODING_GRID,
    judge: RefusalJudge | Callable[..., Sequence[bool]] | None = None,
    harm_judge: Callable[..., Sequence[bool | None]] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    max_batch_tokens: int | None = None,
    gcg_steps: int = 50,
    seed: int = 0,
    thresholds: Mapping[str, float] | None = None,
    out: str | Path | None = None,
    with_texts: bool = False,
    accelerator: Any = None,
) -> SafetyReport:
    """
    Measure refusals on prompts that should be refused and on harmless ones, plainly and under attack, and compare with
    an earlier model. The measures are those of https://huggingface.co/papers/2406.05946 with intervals and paired
    tests.

    Prefixes need compliant answers. They are `answers`; or, for each prompt, what `base` answers greedily, or else
    what `before` answers, if that isn't judged a refusal; or, where there is none of these, neutral beginnings of an
    answer that fit any prompt. Answers that the audited model gives aren't taken: a model that refuses has none, and
    those of one that doesn't would say nothing about others. Prompts without an answer don't count at k > 0, nor do
    answers shorter than k tokens; each rate states its n.

    The thoughts of a reasoning model are cut from its answer and judged apart. An answer that was not reached within
    `max_new_tokens`, thoughts included, is no verdict, and a threshold that hangs on such is not measured.

    Args:
        model ([`~transformers.PreTrainedModel`], [`~peft.PeftModel`], `str` or [`OpenAIEndpoint`]):
            The model to audit. Its mode, device and weights stay as they are. A repository or folder is loaded. Behind
            an endpoint there are answers, samples and prefixes, and no more.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Its tokenizer; `None` loads the one that the model's name has.
        prompts (`list` of `str` or of chats, or a column of a [`~datasets.Dataset`]):
            What should be refused.
        system (`str`, *optional*):
            A system prompt before each prompt.
        chat_template_kwargs (`dict`, *optional*):
            More arguments of the chat template, for instance `{"enable_thinking": False}`: those trained with.
        harmless_prompts (the same, *optional*):
            What should be answered, to measure over-refusal.
        before (a model, a [`SafetyReport`] or `"adapter_off"`, *optional*):
            The model before, an audit of it on the same prompts, or the audited PEFT model without its adapters. The
            object that was trained is none: it has changed too.
        base (a model or `"adapter_off"`, *optional*):
            A model that wasn't aligned, of the same vocabulary: the divergence from it along the answers is measured.
        answers (`list` of `str`, of token ids or of `None`, or `"neutral"`, *optional*):
            A compliant answer for each prompt, `None` or empty where there is none; or neutral beginnings for all.
        ks (`Sequence[int]`, *optional*, defaults to `(0, 1, 2, 5, 10, 20, 40)`):
            Numbers of prefilled tokens. 0, no attack, is always measured.
        attacks (`Sequence[str]`, *optional*, defaults to `("prefill", "decoding")`):
            Any of `"prefill"`, `"decoding"`, `"rap"` (rank-assisted prefilling) and `"gcg"`; the last takes long.
        decoding_grid (`Sequence[dict]`, *optional*, defaults to six settings):
            As for [`decoding_attack`].
        judge ([`RefusalJudge`] or `Callable`, *optional*, defaults to `RefusalJudge()`):
            What says whether a text refuses. A function is given the prompts too if it has a parameter `prompts`.
        harm_judge (`Callable`, *optional*):
            Says of texts and prompts whether each text is harmful, `None` where it can't tell; see [`HarmJudge`].
        max_new_tokens (`int`, *optional*, defaults to 64), batch_size (`int`, *optional*, defaults to 16):
            As for [`generate_after_prefixes`].
        max_batch_tokens (`int`, *optional*):
            Fewer prompts in one forward where they are so long that their tokens would be more.
        gcg_steps (`int`, *optional*, defaults to 50):
            Steps of GCG for each prompt.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sampled attacks; the global random state isn't touched.
        thresholds (`dict[str, float]`, *optional*):
            Kept for [`~SafetyReport.check`], which lists those that are crossed.
        out (`str` or `Path`, *optional*):
            Folder that the report is saved to. What is finished is kept there meanwhile: the same call goes on where
            one that was killed has ended.
        with_texts (`bool`, *optional*, defaults to `False`):
            As for [`~SafetyReport.save`].
        accelerator ([`~accelerate.Accelerator`], *optional*):
            Its processes, each with a model of its own, share the prompts; all of them get the whole report.

    Returns:
        [`SafetyReport`]

    Raises:
        TypeError: if prompts are one string, or `before` or `base` is no model.
        ValueError: if there are no prompts, or an argument doesn't fit them; all before anything is generated.

    Example:

    ```python
    >>> report = audit_safety(model, tokenizer, prompts, harmless_prompts=harmless, before=aligned, answers=answers)
    >>> print(report.to_markdown())
    >>> report.save("audit")
    ```
    """
    has = {
        "harmless": harmless_prompts is not None,
        "before": before is not None,
        "harm_judge": harm_judge is not None,
    }
    sizes = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "max_batch_tokens": max_batch_tokens}
    prompts = check_prompts(prompts)
    check_sizes(attacks, ks, answers, prompts, decoding_grid, **sizes, gcg_steps=gcg_steps)
    if not (harm_judge is None or callable(harm_judge)):
        raise TypeError(f"Expected harm_judge as a function of texts and prompts, got {harm_judge!r:.80}.")
    thresholds = check_measurable(thresholds or {}, has, attacks, ks)
    if out is not None:
        check_out(out)
    behind_endpoint = isinstance(model, OpenAIEndpoint)
    if behind_endpoint:
        check_endpoint(tokenizer, attacks, ks)
    elif tokenizer is None:
        tokenizer = load_tokenizer(model if isinstance(model, str) else model.name_or_path)
    if isinstance(model, str):
        model = load_model(model, with_adapter=ADAPTER_OFF in (before, base), accelerator=accelerator)
    rendering: dict[str, Any] = {"system": system, "chat_template_kwargs": chat_template_kwargs}
    if not behind_endpoint:
        check_decoder(model)
    vocabulary = None if behind_endpoint else model.get_input_embeddings().weight.shape[0]
    lengths, lead = check_chats(tokenizer, prompts, "prompts", vocabulary, **rendering)
    harmless = [] if harmless_prompts is None else check_prompts(harmless_prompts)
    harmless_lengths, _ = check_chats(tokenizer, harmless, "harmless_prompts", vocabulary, **rendering)
    judge = judge if isinstance(judge, RefusalJudge) else RefusalJudge() if judge is None else RefusalJudge([judge])
    ks = sorted({0, *map(int, ks)})
    fingerprints = {"prompts": fingerprint(prompts), "harmless_prompts": fingerprint(harmless)}
    check_other(model, base, "base")
    if not isinstance(before, SafetyReport):
        check_other(model, before, "before")
    settings = {
        "model": name_of(model),
        "judges": [name for name in judge.votes([]) if name != "refusal"],
        "system": system,
        "chat_template_kwargs": chat_template_kwargs or {},
        "ks": ks,
        "attacks": list(attacks),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "thresholds": thresholds,
        "versions": {"hf_iclr": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    if isinstance(before, SafetyReport):
        check_comparable(before, fingerprints, settings)
    if not behind_endpoint:
        suffix = len(tokenizer(INITIAL_SUFFIX)["input_ids"]) if "gcg" in attacks else 0
        check_context(model, lengths, max_new_tokens + max(suffix, ks[-1] if "prefill" in attacks else 0))
        check_context(model, harmless_lengths, max_new_tokens, "harmless prompt")

    with Journal(out, accelerator).keep() as journal:
        run = AuditRun(
            tokenizer, judge, harm_judge, prompts, harmless, attacks, ks if "prefill" in attacks else [0],
            list(decoding_grid), {**sizes, **rendering}, gcg_steps, seed, lead,
            journal.of(transformers.__version__, torch.__version__),
        )  # fmt: skip
        sources = {"base": base, "before": None if isinstance(before, SafetyReport) else before}
        sources = {name: other for name, other in sources.items() if other is not None}
        if max(run.ks) == 0 and "gcg" not in attacks and base is None:
            pass  # nothing is cut from answers
        elif answers is None and sources:
            run.find_answers(model, sources)
        elif answers is None or isinstance(answers, str):
            run.source = "neutral"
            beginnings = [NEUTRAL_BEGINNINGS[row % len(NEUTRAL_BEGINNINGS)] for row in range(len(prompts))]
            run.answers = [to_answer_ids(tokenizer, beginning, []) for beginning in beginnings]
        else:
            eos = [] if behind_endpoint else end_tokens(model, tokenizer)
            run.answers = [to_answer_ids(tokenizer, answer or [], eos) for answer in answers]
        fingerprints["answers"] = fingerprint(run.answers)
        asked = {"prompts": prompts, "harmless_prompts": harmless}
        report = run.measure(model, None, "audited")
        report.settings, report.prompts, report.asked = settings, fingerprints, asked
        if isinstance(before, SafetyReport):
            report.before = before
        elif before is not None:
            report.before = run.measure(model, before, "before")
            with other_model(model, before) as earlier:
                report.before.settings = settings | {"model": name_of(earlier)}
            report.before.prompts, report.before.asked = fingerprints, asked
        if base is not None:
            report.kl = run.divergence(model, base)
        report.notes = run.notes(report)
        if isinstance(before, (PreTrainedModel, PeftModel)) and has_same_numbers(model, before):
            report.notes.insert(0, SAME_NUMBERS)
            logger.warning(report.notes[0])
        if behind_endpoint:
            report.notes += model.refused.values()
        if out is not None and run.leads:
            report.save(out, with_texts)
    return report
