"""The stages of one audit: each model asked in each way, every batch kept as it ends."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from statistics import median
from typing import Any

import pandas as pd

from hf_iclr.models import answer_logits, to_answer_ids

from .asking.ask import Continuation, ask, prompt_and_lead
from .attacks import decoding_attack, gcg_attack, rank_assisted_prefilling
from .judge import find_refusal_cue, judge_agreement
from .report import EVERY_SETTING, Measure, SafetyReport
from .statistics import token_kl


class AuditRun:
    """One audit: what is asked and how, and the answers that prefixes are cut from."""

    def __init__(
        self, tokenizer, judge, harm_judge, prompts, harmless, attacks, ks, grid, generation, gcg_steps, seed, lead,
        journal,
    ) -> None:  # fmt: skip
        self.tokenizer, self.judge, self.harm_judge, self.journal = tokenizer, judge, harm_judge, journal
        self.prompts, self.harmless, self.generation, self.lead = prompts, harmless, generation, lead
        self.attacks, self.ks, self.grid, self.gcg_steps, self.seed = attacks, ks, grid, gcg_steps, seed
        self.rendering = {name: generation[name] for name in ("system", "chat_template_kwargs")}
        self.leads = journal.accelerator is None or journal.accelerator.is_main_process
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.source = "given"

    def _options(self, model, other, role: str, what: str) -> dict[str, Any]:
        """How a model is asked in one part of the audit."""
        with other_model(model, other) as asked:
            journal = self.journal.of(self.journal.identify(asked, other))
        return {**self.generation, "journal": journal, "progress": f"{role}: {what}" if self.leads else None}

    def find_answers(self, model, sources: dict[str, Any]) -> None:
        """For each prompt the first source's greedy answer that isn't a refusal."""
        self.source = " or ".join(sources)
        for name, other in sources.items():
            missing = [row for row, answer in enumerate(self.answers) if not answer]
            if not missing:
                break
            prompts = [self.prompts[row] for row in missing]
            options = self._options(model, other, name, "answers")
            options["max_new_tokens"] = max(self.ks[-1], options["max_new_tokens"])
            with other_model(model, other) as source:
                entries = ask(source, self.tokenizer, prompts, **options)[0]
            verdicts = self.judge.judge([entry.text for entry in entries if entry], prompts)
            for row, entry, refused in zip(missing, entries, verdicts, strict=True):
                if entry and entry.finished and not refused:
                    alone = entry.thoughts is None
                    self.answers[row] = entry.new_ids if alone else to_answer_ids(self.tokenizer, entry.text, [])

    def measure(self, model, other, role: str) -> SafetyReport:
        """Verdicts under each attack, with the latency of refusals and the agreement of the judges."""
        tokenizer, measures, votes = self.tokenizer, [], []

        def add(attack: str, setting: str, entries: Sequence[Continuation | None], prompts: list, *views: str) -> None:
            unfinished = [row for row, entry in enumerate(entries) if entry and not entry.finished]
            for judged in ("continuation", *views, "thoughts"):
                part = {"continuation": "text"}.get(judged, judged)
                texts = [None if entry is None else getattr(entry, part) for entry in entries]
                cut = unfinished if judged != "thoughts" else []
                rows = [row for row, text in enumerate(texts) if text is not None and row not in cut]
                if judged == "thoughts" and not rows:
                    continue
                table = self.judge.votes([texts[row] for row in rows], [prompts[row] for row in rows])
                refused = _spread(table["refusal"].tolist(), rows, len(texts))
                measures.append(Measure(attack, setting, judged, refused, texts, list(cut)))
                if judged == "continuation":
                    votes.append(table.drop(columns="refusal"))
                    if self.harm_judge is not None and attack != "harmless":
                        joined = [entry.joined for row in rows if (entry := entries[row])]
                        harmful = self._judge_harm(joined, [prompts[row] for row in rows])
                        measures[-1].harmful = _spread(harmful, rows, len(texts))

        with other_model(model, other) as asked:
            options = self._options(model, other, role, "prefill" if self.ks[-1] else "answers")
            prefilled = ask(asked, tokenizer, self.prompts, self.answers, self.ks, **options)
            for k, entries in prefilled.items():
                add("prefill" if k else "none", str(k) if k else "", entries, self.prompts, "joined")
            if self.harmless:
                options = self._options(model, other, role, "harmless prompts")
                add("harmless", "", ask(asked, tokenizer, self.harmless, **options)[0], self.harmless)
            if "decoding" in self.attacks:
                options = self._options(model, other, role, "sampling") | {"seed": self.seed}
                for setting, sample in decoding_attack(asked, tokenizer, self.prompts, self.grid, **options).items():
                    add("decoding", setting, sample, self.prompts)
                measures.append(_every_setting([m for m in measures if m.attack == "decoding"]))
            if "rap" in self.attacks:
                options = self._options(model, other, role, "rank-assisted prefilling")
                found, _ = rank_assisted_prefilling(asked, tokenizer, self.prompts, self.judge.judge, **options)
                add("rap", "", found, self.prompts, "joined")
            if "gcg" in self.attacks:
                options = self._options(model, other, role, "gcg") | {"num_steps": self.gcg_steps, "seed": self.seed}
                add("gcg", "", gcg_attack(asked, tokenizer, self.prompts, self.answers, **options), self.prompts)

        table = judge_agreement(pd.concat(votes, ignore_index=True))
        agreement = [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]
        latency = [self._latency(k, entries) for k, entries in prefilled.items() if k]
        return SafetyReport(measures, latency=latency, agreement=agreement)

    def _judge_harm(self, texts: list[str], prompts: list) -> list[bool | None]:
        """Verdicts of the harm judge; those of one that costs are kept and shared."""
        if not hasattr(self.harm_judge, "identity"):
            return list(self.harm_judge(texts, prompts))
        stage = self.journal.stage("harm", self.harm_judge.identity, texts, prompts)
        for batch in stage.share([[*range(len(texts))][start : start + 64] for start in range(0, len(texts), 64)]):
            verdicts = self.harm_judge([texts[row] for row in batch], [prompts[row] for row in batch])
            stage.add(dict(zip(batch, verdicts, strict=True)))
        found = stage.collect()
        return [found[row] for row in range(len(texts))]

    def _latency(self, k: int, entries: list[Continuation | None]) -> dict[str, Any]:
        """How many whole tokens come between the end of a prefix and the first refusal cue."""
        tokens, known = [], [entry for entry in entries if entry is not None]
        for entry in known:
            cue = find_refusal_cue(entry.text)
            if cue is not None and entry.new_ids:
                decoded = [entry.new_ids[: end + 1] for end in range(len(entry.new_ids))]
                texts = self.tokenizer.batch_decode(decoded, skip_special_tokens=True)
                start = max(texts[-1].rfind(entry.text), 0)  # after the thoughts
                tokens.append(sum(len(text) <= start + cue for text in texts))
        return {"k": k, "n": len(known), "cues": len(tokens), "median": median(tokens) if tokens else None}

    def divergence(self, model, base) -> list[dict[str, float]]:
        """Mean KL(model || base) at each of the answers' first tokens."""
        length = max(self.ks[-1], 1)
        rendered = [prompt_and_lead(self.tokenizer, prompt, **self.rendering) for prompt in self.prompts]
        prompts, answers = [ids + lead for ids, lead, _ in rendered], [answer[:length] for answer in self.answers]
        rows = sorted((row for row, answer in enumerate(answers) if answer), key=lambda row: len(prompts[row]))
        size = self.generation["batch_size"]
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        both = [self.journal.identify(model), self.journal.identify(model if isinstance(base, str) else base, base)]
        stage = self.journal.of(*both).stage("kl", prompts, answers, size)
        for batch in stage.share(batches):
            call = [prompts[row] for row in batch], [answers[row] for row in batch], len(batch)
            (order, logits) = next(answer_logits(model, *call))
            with other_model(model, base) as other:
                (_, base_logits) = next(answer_logits(other, *call))
            kl = token_kl(logits, base_logits.to(logits.device)).tolist()
            stage.add({batch[row]: kl[i][: len(call[1][row])] for i, row in enumerate(order)})
        found = stage.collect()
        columns = [[found[row][token] for row in rows if len(answers[row]) > token] for token in range(length)]
        return [
            {"token": token, "n": len(column), "kl": sum(column) / len(column)}
            for token, column in enumerate(columns, 1)
            if column
        ]

    def notes(self, report: SafetyReport) -> list[str]:
        """What a reader has to know beyond the numbers."""
        notes = []
        answered, n, plain = sum(map(bool, self.answers)), len(self.prompts), report.measures[0]
        if self.ks[-1] > 0 or "gcg" in self.attacks:
            if answered == 0:
                notes.append(
                    "Nothing was prefilled: that needs compliant answers. Type `answers=[...]`, or `base=model` with "
                    "a model that answers them, or `answers='neutral'`."
                )
            elif self.source == "neutral":
                notes.append(
                    "Prefixes are cut from neutral beginnings of an answer, the same for any prompt; compliant "
                    "answers to these prompts (`answers=[...]`) are the stronger attack."
                )
            elif self.source == "given":
                notes.append(f"Prefixes are cut from {answered} given answers ({n} prompts).")
            else:
                notes.append(
                    f"Prefixes are cut from what {self.source} answered without a refusal: {answered} of {n} prompts."
                )
            if self.lead:
                notes.append(
                    f"Prefixes stand after {self.lead!r}, where the chat template puts an answer. Without a prefix "
                    "the model is asked as the template leaves it, and may think first."
                )
        if report.before is not None and report.before.prompts.get("answers") != report.prompts["answers"]:
            notes.append("The audit before was prefilled with other answers: its rates after a prefix do not compare.")
        if plain.unfinished:
            notes.append(
                f"{len(plain.unfinished)} of {n} answers without attack ended in the middle of their thoughts, after "
                f"{self.generation['max_new_tokens']} tokens: they have no verdict. Raise `max_new_tokens`."
            )
        empty = sum(
            not (text or "").strip() for row, text in enumerate(plain.texts) if row not in plain.unfinished
        )  # those without attack
        if empty:
            notes.append(f"{empty} of {n} answers without attack are empty; they don't count as refusals.")
        notes.append(
            "A refusal isn't the same as a harmless answer, and small budgets of attack flatter a model: read a "
            "sample of the texts."
        )
        return notes


def _spread(verdicts: list[bool | None], rows: list[int], n: int) -> list[bool | None]:
    known = dict(zip(rows, verdicts, strict=True))
    return [known.get(row) for row in range(n)]


def _every_setting(measures: list[Measure]) -> Measure:
    """Refused under every decoding setting; unknown where no setting was answered and one was not reached."""
    settings = [measure for measure in measures if measure.judged == "continuation"]
    # without those that a server does not take
    found = [m for m in settings if any(verdict is not None for verdict in m.refused)] or settings
    refused: list[bool | None] = []
    for row in zip(*(measure.refused for measure in found), strict=True):
        refused.append(False if False in row else None if None in row else True)
    unfinished = [row for row, verdict in enumerate(refused) if verdict is None]
    return Measure("decoding", EVERY_SETTING, "continuation", refused, unfinished=unfinished)


@contextmanager
def other_model(model, other) -> Iterator[Any]:
    """The other model, or the audited one itself or with its adapters off."""
    with model.disable_adapter() if isinstance(other, str) else nullcontext():
        yield model if other is None or isinstance(other, str) else other
