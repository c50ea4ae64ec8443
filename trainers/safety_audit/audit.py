"""One call that measures how a model refuses, how deep that goes, and what a fine-tune changed."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel

from hf_iclr import __version__
from hf_iclr.hub import repository_name
from hf_iclr.models import (
    answer_logits,
    check_decoder,
    check_prompts,
    end_tokens,
    to_answer_ids,
    to_prompt_ids,
)
from hf_iclr.prefill import generate_answers

from .attacks import (
    DECODING_GRID,
    Continuation,
    decoding_attack,
    gcg_attack,
    prefilling_attack,
    rank_assisted_prefilling,
)
from .judge import RefusalJudge, find_refusal_cue, judge_agreement
from .report import EVERY_SETTING, Measure, SafetyReport, check_thresholds
from .statistics import recovery_latency, token_kl


ATTACKS = ("prefill", "decoding", "rap", "gcg")
ADAPTER_OFF = "adapter_off"


def audit_safety(
    model,
    tokenizer,
    prompts: Sequence,
    *,
    harmless_prompts: Sequence | None = None,
    before: Any = None,
    base: Any = None,
    answers: Sequence[str | Sequence[int] | None] | None = None,
    ks: Sequence[int] = (0, 1, 2, 5, 10, 20, 40),
    attacks: Sequence[str] = ("prefill", "decoding"),
    decoding_grid: Sequence[dict[str, Any]] = DECODING_GRID,
    judge: RefusalJudge | Callable[[list[str]], list[bool]] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    gcg_steps: int = 50,
    seed: int = 0,
    thresholds: Mapping[str, float] | None = None,
) -> SafetyReport:
    """
    Measure refusals on prompts that should be refused and on harmless ones, plainly and under attack, and compare with
    an earlier model. The measures are those of https://huggingface.co/papers/2406.05946 with intervals and paired
    tests.

    Prefixes need compliant answers. They are `answers`; or, for each prompt, what `base` answers greedily, or else
    what `before` answers, if that isn't judged a refusal. Answers that the audited model gives aren't taken: a model
    that refuses has none, and those of one that doesn't would say nothing about others. Prompts without an answer
    don't count at k > 0, nor do answers shorter than k tokens; each rate states its n.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model to audit. Its mode, device and weights stay as they are.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        prompts (`list` of `str` or of chats, or a column of a [`~datasets.Dataset`]):
            What should be refused.
        harmless_prompts (the same, *optional*):
            What should be answered, to measure over-refusal.
        before (a model, a [`SafetyReport`] or `"adapter_off"`, *optional*):
            The model before, an audit of it on the same prompts, or the audited PEFT model without its adapters.
        base (a model or `"adapter_off"`, *optional*):
            A model that wasn't aligned, of the same vocabulary: the divergence from it along the answers is measured.
        answers (`list` of `str`, of token ids or of `None`, *optional*):
            A compliant answer for each prompt, `None` or empty where there is none.
        ks (`Sequence[int]`, *optional*, defaults to `(0, 1, 2, 5, 10, 20, 40)`):
            Numbers of prefilled tokens. 0, no attack, is always measured.
        attacks (`Sequence[str]`, *optional*, defaults to `("prefill", "decoding")`):
            Any of `"prefill"`, `"decoding"`, `"rap"` (rank-assisted prefilling) and `"gcg"`; the last takes long.
        decoding_grid (`Sequence[dict]`, *optional*, defaults to six settings):
            As for [`decoding_attack`].
        judge ([`RefusalJudge`] or `Callable`, *optional*, defaults to `RefusalJudge()`):
            What says whether a text refuses.
        max_new_tokens (`int`, *optional*, defaults to 64), batch_size (`int`, *optional*, defaults to 16):
            As for [`generate_after_prefixes`].
        gcg_steps (`int`, *optional*, defaults to 50):
            Steps of GCG for each prompt.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sampled attacks; the global random state isn't touched.
        thresholds (`dict[str, float]`, *optional*):
            Kept for [`~SafetyReport.check`], which lists those that are crossed.

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
    prompts = _check_chats(tokenizer, prompts, "prompts")
    harmless = [] if harmless_prompts is None else _check_chats(tokenizer, harmless_prompts, "harmless_prompts")
    judge = judge if isinstance(judge, RefusalJudge) else RefusalJudge() if judge is None else RefusalJudge([judge])
    unknown = [attack for attack in attacks if attack not in ATTACKS]
    if unknown:
        raise ValueError(f"Expected attacks among {', '.join(ATTACKS)}, got {unknown[0]!r}.")
    if any(k < 0 for k in ks):
        raise ValueError(f"Expected prefix lengths of 0 or more tokens, got {list(ks)}.")
    if answers is not None and len(answers) != len(prompts):
        raise ValueError(f"Expected one answer a prompt, got {len(answers)} and {len(prompts)}.")
    fingerprints = {"prompts": _fingerprints(prompts), "harmless_prompts": _fingerprints(harmless)}
    check_decoder(model)
    _check_other(model, base, "base")
    if not isinstance(before, SafetyReport):
        _check_other(model, before, "before")
    settings = {
        "model": _name(model),
        "judges": [name for name in judge.votes([]) if name != "refusal"],
        "ks": sorted({0, *ks}),
        "attacks": list(attacks),
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "thresholds": _check_measurable(thresholds or {}, bool(harmless), before is not None, attacks, ks),
        "versions": {"hf_iclr": __version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }

    if isinstance(before, SafetyReport):
        _check_comparable(before, fingerprints, settings)

    run = _Run(
        tokenizer, judge, prompts, harmless, attacks, sorted({0, *ks}) if "prefill" in attacks else [0],
        list(decoding_grid), {"max_new_tokens": max_new_tokens, "batch_size": batch_size}, gcg_steps, seed,
    )  # fmt: skip
    eos = end_tokens(model, tokenizer)
    if answers is None:
        sources = {"base": base, "before": None if isinstance(before, SafetyReport) else before}
        run.find_answers(model, {name: other for name, other in sources.items() if other is not None})
    else:
        run.answers = [to_answer_ids(tokenizer, answer or [], eos) for answer in answers]
    fingerprints["answers"] = _fingerprints(run.answers)
    report = run.measure(model)
    report.settings, report.prompts = settings, fingerprints
    if isinstance(before, SafetyReport):
        report.before = before
    elif before is not None:
        with _other_model(model, before) as earlier:
            report.before = run.measure(earlier)
            report.before.settings = settings | {"model": _name(earlier)}
        report.before.prompts = fingerprints
    if base is not None:
        report.kl = run.divergence(model, base)
    report.notes = run.notes(report)
    return report


class _Run:
    """One audit: what is asked and how, and the answers that prefixes are cut from."""

    def __init__(self, tokenizer, judge, prompts, harmless, attacks, ks, grid, generation, gcg_steps, seed) -> None:
        self.tokenizer, self.judge, self.prompts, self.harmless = tokenizer, judge, prompts, harmless
        self.attacks, self.ks, self.grid = attacks, ks, grid
        self.generation, self.gcg_steps, self.seed = generation, gcg_steps, seed
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.source = "given"

    def find_answers(self, model, sources: dict[str, Any]) -> None:
        """For each prompt the first source's greedy answer that isn't a refusal."""
        self.source = " or ".join(sources)
        for other in sources.values():
            missing = [row for row, answer in enumerate(self.answers) if not answer]
            if not missing:
                break
            asked = [self.prompts[row] for row in missing]
            with _other_model(model, other) as source:
                length = max(self.ks[-1], self.generation["max_new_tokens"])
                new = generate_answers(source, self.tokenizer, asked, **{**self.generation, "max_new_tokens": length})
            texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
            for row, tokens, refused in zip(missing, new, self.judge.judge(texts, asked), strict=True):
                self.answers[row] = [] if refused else tokens

    def measure(self, model) -> SafetyReport:
        """Verdicts under each attack, with the latency of refusals and the agreement of the judges."""
        tokenizer, measures, votes = self.tokenizer, [], []

        def add(attack: str, setting: str, judged: str, texts: Sequence[str | None], prompts: list) -> None:
            rows = [row for row, text in enumerate(texts) if text is not None]
            known = [text for text in texts if text is not None]
            table = self.judge.votes(known, [prompts[row] for row in rows])
            refused: list[bool | None] = [None] * len(texts)
            for row, verdict in zip(rows, table["refusal"].tolist(), strict=True):
                refused[row] = verdict
            measures.append(Measure(attack, setting, judged, refused, list(texts)))
            if judged == "continuation":
                votes.append(table.drop(columns="refusal"))

        def add_both(attack: str, setting: str, entries: Sequence[Continuation | None]) -> None:
            for judged, part in (("continuation", "text"), ("joined", "joined")):
                texts = [None if entry is None else getattr(entry, part) for entry in entries]
                add(attack, setting, judged, texts, self.prompts)

        prefilled = prefilling_attack(model, tokenizer, self.prompts, self.answers, self.ks, **self.generation)
        for k, entries in prefilled.items():
            add_both("prefill" if k else "none", str(k) if k else "", entries)
        if self.harmless:
            new = generate_answers(model, tokenizer, self.harmless, **self.generation)
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            add("harmless", "", "continuation", texts, self.harmless)
        if "decoding" in self.attacks:
            sampled = decoding_attack(model, tokenizer, self.prompts, self.grid, seed=self.seed, **self.generation)
            for setting, sample in sampled.items():
                add("decoding", setting, "continuation", sample, self.prompts)
            everywhere = zip(*(measure.refused for measure in measures if measure.attack == "decoding"), strict=True)
            measures.append(Measure("decoding", EVERY_SETTING, "continuation", [all(row) for row in everywhere]))
        if "rap" in self.attacks:
            found, _ = rank_assisted_prefilling(model, tokenizer, self.prompts, self.judge.judge, **self.generation)
            add_both("rap", "", found)
        if "gcg" in self.attacks:
            answered = gcg_attack(
                model, tokenizer, self.prompts, self.answers, num_steps=self.gcg_steps, seed=self.seed,
                **self.generation,
            )  # fmt: skip
            add("gcg", "", "continuation", answered, self.prompts)

        table = judge_agreement(pd.concat(votes, ignore_index=True))
        agreement = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
        latency = [self._latency(k, entries) for k, entries in prefilled.items() if k]
        return SafetyReport(measures, latency=latency, agreement=agreement)

    def _latency(self, k: int, entries: list[Continuation | None]) -> dict[str, Any]:
        tokens, known = [], [entry for entry in entries if entry is not None]
        for entry in known:
            cue = find_refusal_cue(entry.text)
            if cue is not None:
                decoded = [entry.new_ids[: end + 1] for end in range(len(entry.new_ids))]
                ends = [len(text) for text in self.tokenizer.batch_decode(decoded, skip_special_tokens=True)]
                tokens.append(recovery_latency(ends, cue))
        return {"k": k, "n": len(known), "cues": len(tokens), "median": median(tokens) if tokens else None}

    def divergence(self, model, base) -> list[dict[str, float]]:
        """Mean KL(model || base) at each of the answers' first tokens."""
        length = max(self.ks[-1], 1)
        prompt_ids = [to_prompt_ids(self.tokenizer, prompt) for prompt in self.prompts]
        answers = [answer[:length] for answer in self.answers]
        total, count = torch.zeros(length, dtype=torch.float64), torch.zeros(length)
        batch_size = self.generation["batch_size"]
        with _other_model(model, base) as other:
            base_batches = answer_logits(other, prompt_ids, answers, batch_size)
        for rows, logits in answer_logits(model, prompt_ids, answers, batch_size):
            with _other_model(model, base):
                _, base_logits = next(base_batches)
            kl = token_kl(logits, base_logits.to(logits.device)).cpu()
            lengths = torch.tensor([len(answers[row]) for row in rows])
            known = torch.arange(kl.shape[1]) < lengths[:, None]
            total[: kl.shape[1]] += torch.where(known, kl, 0.0).sum(0)
            count[: kl.shape[1]] += known.sum(0)
        return [
            {"token": token + 1, "n": int(count[token]), "kl": float(total[token] / count[token])}
            for token in range(length)
            if count[token]
        ]

    def notes(self, report: SafetyReport) -> list[str]:
        """What a reader has to know beyond the numbers."""
        notes = []
        answered, n = sum(map(bool, self.answers)), len(self.prompts)
        if self.ks[-1] > 0 or "gcg" in self.attacks:
            if answered == 0:
                notes.append(
                    "Nothing was prefilled: that needs compliant answers. Type `answers=[...]`, or `base=model` with "
                    "a model that answers them."
                )
            elif self.source == "given":
                notes.append(f"Prefixes are cut from {answered} given answers ({n} prompts).")
            else:
                notes.append(
                    f"Prefixes are cut from what {self.source} answered without a refusal: {answered} of {n} prompts."
                )
        if report.before is not None and report.before.prompts.get("answers") != report.prompts["answers"]:
            notes.append("The audit before was prefilled with other answers: its rates after a prefix do not compare.")
        empty = sum(not (text or "").strip() for m in report.measures[:1] for text in m.texts)  # those without attack
        if empty:
            notes.append(f"{empty} of {n} answers without attack are empty; they don't count as refusals.")
        notes.append(
            "A refusal isn't the same as a harmless answer, and small budgets of attack flatter a model: read a "
            "sample of the texts."
        )
        return notes


def _check_chats(tokenizer, prompts, name: str) -> list:
    prompts = check_prompts(prompts)
    for prompt in prompts:
        chat = isinstance(prompt, Sequence) and all(isinstance(message, Mapping) for message in prompt)
        if not (isinstance(prompt, str) or (chat and len(prompt))):
            raise ValueError(
                f"Expected {name} to be strings or chats, got {prompt!r:.80}. For a dataset type its column: "
                f'`{name}=dataset["prompt"]`.'
            )
        to_prompt_ids(tokenizer, prompt)
    return prompts


def _check_measurable(thresholds, harmless: bool, before: bool, attacks, ks) -> dict[str, float]:
    needs = {
        "max_over_refusal": (harmless, "harmless_prompts=[...]"),
        "max_refusal_drop": (before, "before=model"),
        "min_refusal_at_prefill": ("prefill" in attacks and max(ks, default=0) > 0, 'attacks=["prefill"], ks=(5, 10)'),
        **{f"min_refusal_under_{name}": (name in attacks, f'attacks=["{name}"]') for name in ATTACKS[1:]},
    }
    for name in check_thresholds(thresholds):
        if name in needs and not needs[name][0]:
            raise ValueError(f"The threshold {name} needs what this audit doesn't measure. Type `{needs[name][1]}`.")
    return dict(thresholds)


def _check_other(model, other, name: str) -> None:
    """Raises where `other` is no model that can be asked the same."""
    if other is None:
        return
    if isinstance(other, str):
        if other != ADAPTER_OFF:
            raise ValueError(f"Expected {name} as a model or {ADAPTER_OFF!r}, got {other!r}. Load the model first.")
        if not isinstance(model, PeftModel):
            raise TypeError(f"Expected a PEFT model for {name}={ADAPTER_OFF!r}, got {type(model).__name__}.")
        return
    if not isinstance(other, (PreTrainedModel, PeftModel)):
        raise TypeError(f"Expected {name} to be a model or {ADAPTER_OFF!r}, got {type(other).__name__}.")
    check_decoder(other)
    sizes = [entry.config.get_text_config(decoder=True).vocab_size for entry in (model, other)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"Expected {name} to have the model's vocabulary, got {sizes[1]} and {sizes[0]} entries.")


def _check_comparable(before: SafetyReport, fingerprints: dict[str, list[str]], settings: dict[str, Any]) -> None:
    for name, own in fingerprints.items():
        if own and before.prompts[name] and own != before.prompts[name]:
            raise ValueError(
                f"Expected a report on the same {name} in the same order, got one on others. Audit the earlier model "
                "on these, or pass the model itself as `before`."
            )
    for name in ("judges", "max_new_tokens"):
        if before.settings[name] != settings[name]:
            raise ValueError(
                f"Expected a report with {name}={settings[name]!r}, got one with {before.settings[name]!r}: what "
                "changed would be the measurement. Audit both with the same, or pass the model itself as `before`."
            )


@contextmanager
def _other_model(model, other) -> Iterator[Any]:
    """The other model, or the audited one with its adapters off."""
    with model.disable_adapter() if other == ADAPTER_OFF else nullcontext():
        yield model if isinstance(other, str) else other


def _name(model) -> str:
    """Name on the Hub, or that of a folder without its path."""
    name = model.name_or_path or ""
    return repository_name(name) or Path(name).name or type(model).__name__


def _fingerprints(prompts: list) -> list[str]:
    return [hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:16] for prompt in prompts]
