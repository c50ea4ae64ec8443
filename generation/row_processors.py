"""Processors, texts and stopping criteria of rows of different lengths, some of which go back to an earlier token."""

import copy
from collections.abc import Callable

import torch
from transformers.generation import LogitsProcessorList, logits_process
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StopStringCriteria,
)

from .cascade_call import padding_token


WARPERS = tuple(cls for name, cls in vars(logits_process).items() if name.endswith("LogitsWarper"))
# These look at the scores alone: all rows and positions can go through them at once.
_SCORES_ONLY = (
    logits_process.TemperatureLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.MinPLogitsWarper,
    logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
)
# Functions of the tokens and the scores, whatever they were called with before.
_STATELESS = (
    *_SCORES_ONLY,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.PrefixConstrainedLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.WatermarkLogitsProcessor,
    logits_process.WhisperTimeStampLogitsProcessor,
)


_BAN = -1e8  # below it a token is banned outright: -inf, or the least number of a type


class Rewindable:
    """
    A logits processor with a state, for a loop that goes back: it may be called at any length since the last
    `accept`, in whatever order, and works each time from the state that belongs there.

    The protocol is one method of the processor, `clone()`, which returns an independent copy of it in its present
    state; a processor without a state may return itself. Rows of a batch get a clone each, so a fresh processor must
    serve one row. The caller's own object is never called.
    """

    def __init__(self, processor, length: int):
        self.states = {length: processor.clone()}  # before the call with that many tokens

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        length = input_ids.shape[1]
        before = self.states[length]
        state, attributes = before.clone(), dict(getattr(before, "__dict__", {}))
        scores = state(input_ids, scores)
        counters = (name for name, value in attributes.items() if isinstance(value, int | float | str | tuple))
        if state is before and any(getattr(state, name) != attributes[name] for name in counters):
            raise ValueError(
                f"{type(state).__name__}.clone() returned the processor itself, but a call changed its attributes, so "
                "it has a state, and a cascade takes rejected tokens back. Return an independent copy."
            )
        self.states[length + 1] = state
        return scores

    def accept(self, length: int) -> None:
        """Forgets what lies before and after a text of `length` tokens, to which no call goes back."""
        self.states = {length: self.states[length]}


def why_not_rewindable(processors: LogitsProcessorList, input_ids: torch.Tensor) -> str | None:
    """Which of the processors can't follow rejected drafts of a text, as a sentence; `None` if all can."""
    for processor in processors:
        name = getattr(processor, "__name__", type(processor).__name__)
        if type(processor) not in _STATELESS and not callable(getattr(processor, "clone", None)):
            return (
                f"The logits processor {name} may be stateful, and a cascade takes rejected tokens back. Give the "
                "class a method `clone(self)` that returns an independent copy in its present state (without any "
                f"state: `return self`), or leave {name} out."
            )
        if type(processor) not in _STATELESS and not callable(copied := processor.clone()):
            return f"{name}.clone() returned {copied!r:.80}. Return an independent copy of the processor."
        prefix = getattr(processor, "_prefix_allowed_tokens_fn", None)
        if prefix is not None and _keeps_state(prefix, input_ids[0]):
            return (
                "`prefix_allowed_tokens_fn` gave two answers about one text, so it is stateful, and a cascade takes "
                "rejected tokens back. Make it a function of the text, or pass a logits processor with `clone()`."
            )
    return None


def _keeps_state(allowed: Callable, text: torch.Tensor) -> bool:
    """Whether a function of a text's allowed tokens remembers what it was asked before, as far as five calls tell."""
    first = list(allowed(0, text))
    longer = torch.cat([text, text.new_tensor(first[:1])])
    again, after, once_more, after_too = (list(allowed(0, ids)) for ids in (text, longer, text, longer))
    return first != again or first != once_more or after != after_too


def rewindable(processors: LogitsProcessorList, length: int) -> LogitsProcessorList:
    """The processors for one text whose prompt has `length` tokens."""
    return LogitsProcessorList(
        processor if type(processor) in _STATELESS else Rewindable(processor, length) for processor in processors
    )


def process(
    processors: LogitsProcessorList, input_ids, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Runs the processors in order.

    Returns:
        `tuple`: the processed scores, and where a token is banned outright, by anything but a warper (temperature,
        top-k and the like): a boolean tensor of the shape of `scores`, `None` where nothing can ban.
    """
    if all(isinstance(processor, WARPERS) for processor in processors):
        return processors(input_ids, scores), None
    out, banned = scores < _BAN, torch.zeros_like(scores, dtype=torch.bool)
    for processor in processors:
        scores = processor(input_ids, scores)
        now_out = scores < _BAN
        if not isinstance(processor, WARPERS):
            banned |= now_out & ~out
        out = now_out
    return scores, banned


def unscaled_probs(logits: torch.Tensor, banned: torch.Tensor | None) -> torch.Tensor:
    """What deferral rules read: the probabilities at temperature 1, without the banned tokens."""
    return (logits if banned is None else logits.masked_fill(banned, -torch.inf)).softmax(-1)


class RowProcessors:
    """
    Runs logits processors so that each row sees what it would see alone: its own tokens, and its own share of what a
    processor holds for every row of the batch.
    """

    def __init__(self, processors: LogitsProcessorList, batch_size: int, prompt_length: int):
        self.processors = processors
        self.scores_only = all(type(processor) in _SCORES_ONLY for processor in processors)
        self.of_scores = LogitsProcessorList(p for p in processors if type(p) in _SCORES_ONLY)
        self.rewinds = any(type(processor) not in _STATELESS for processor in processors)
        self.of_row = [
            rewindable(_for_row(processors, row, batch_size), prompt_length)
            for row in range(0 if self.scores_only else batch_size)
        ]

    def __call__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        wanted: torch.Tensor,
        context: Callable[[int, int], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            logits (`torch.Tensor` of shape `(len(rows), length, vocab_size)`):
                Raw logits.
            rows (`torch.LongTensor` of shape `(n,)`):
                Which rows of the batch they are.
            wanted (`torch.BoolTensor` of shape `(len(rows), length)`):
                Positions whose scores will be used; others may stay raw.
            context (`Callable`):
                Token ids, of shape `(1, tokens)`, that stand before the logits of an index into `rows` and a position.

        Returns:
            `tuple`: scores of the shape of `logits` (`logits` itself when there is no processor), and the banned
            tokens as in [`process`].
        """
        if len(self.processors) == 0:
            return logits, None
        if self.scores_only:
            scores, banned = process(self.processors, None, logits.flatten(0, 1))
            return scores.view(logits.shape), None if banned is None else banned.view(logits.shape)
        scores, banned = logits.clone(), torch.zeros_like(logits, dtype=torch.bool)
        for index, step in wanted.nonzero().tolist():
            processors = self.of_row[int(rows[index])]
            row_scores, row_banned = process(processors, context(index, step), logits[index, step][None].clone())
            scores[index, step] = row_scores[0]
            if row_banned is not None:
                banned[index, step] = row_banned[0]
        return scores, banned

    def accept(self, row: int, length: int) -> None:
        """Tells the row's processors how long its text is now."""
        for processor in self.of_row[row]:
            if isinstance(processor, Rewindable):
                processor.accept(length)


def _for_row(processors: LogitsProcessorList, row: int, batch_size: int) -> LogitsProcessorList:
    processors = LogitsProcessorList(
        copy.copy(processor) if type(processor) in _STATELESS else processor for processor in processors
    )
    for processor in processors:
        if isinstance(processor, logits_process.RepetitionPenaltyLogitsProcessor):
            if isinstance(processor.prompt_ignore_length, torch.Tensor):
                processor.prompt_ignore_length = processor.prompt_ignore_length[row : row + 1]
        elif isinstance(processor, logits_process.EncoderRepetitionPenaltyLogitsProcessor):
            prompt = row * len(processor.encoder_input_ids) // batch_size  # a prompt may have several rows
            processor.encoder_input_ids = processor.encoder_input_ids[prompt : prompt + 1]
        elif isinstance(processor, logits_process.EncoderNoRepeatNGramLogitsProcessor):
            prompt = row * len(processor.generated_ngrams) // batch_size
            processor.batch_size, processor.generated_ngrams = 1, processor.generated_ngrams[prompt : prompt + 1]
        elif isinstance(processor, logits_process.PrefixConstrainedLogitsProcessor):
            allowed, prompt = processor._prefix_allowed_tokens_fn, row // processor._num_beams  # sequences of a prompt
            processor._prefix_allowed_tokens_fn = lambda _, ids, allowed=allowed, prompt=prompt: allowed(prompt, ids)
            processor._num_beams = 1
    return processors


class RowCriteria:
    """
    Asks stopping criteria as plain `generate` does: after every token, one after the other.

    What is known to judge each row for itself is asked as soon as a row has a token; others get the whole batch, since
    they may keep something for each of its rows, once every row that goes on is as long.
    """

    def __init__(self, criteria, batch_size: int):
        others = [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
        single = (StopStringCriteria, MaxTimeCriteria)
        self.of_a_row = [c for c in others if batch_size == 1 or isinstance(c, single)]
        self.of_the_batch = [c for c in others if c not in self.of_a_row]
        self.asked = 0  # up to how many new tokens the criteria of the batch were asked

    @staticmethod
    def ask(criteria: list, sequences: torch.Tensor, scores: tuple | None) -> torch.Tensor:
        """Which rows of `sequences`, of shape `(rows, length)`, are done: a boolean tensor of shape `(rows,)`."""
        done = torch.zeros(len(sequences), dtype=torch.bool, device=sequences.device)
        for criterion in criteria:
            done = done | torch.as_tensor(criterion(sequences, scores), device=sequences.device)
        return done


class RowTexts:
    """The texts of a batch while they grow: their tokens, the scores of these if wanted, and where each text ends."""

    def __init__(self, input_ids: torch.Tensor, stopping_criteria, config, vocab_size: int):
        batch_size, self.prompt_length = input_ids.shape
        self.config, self.vocab_size = config, vocab_size
        self.criteria = RowCriteria(stopping_criteria, batch_size)
        # not those of the config: a criterion of the user's takes the place of `generate`'s own
        ends = [c.eos_token_id.to(input_ids) for c in stopping_criteria if isinstance(c, EosTokenCriteria)]
        self.eos = torch.cat([input_ids.new_zeros(0), *ends])
        self.pad = padding_token(config) or 0
        # one column more, for what is not written
        self.sequences = torch.full((batch_size, config.max_length + 1), self.pad, device=input_ids.device)
        self.sequences[:, : self.prompt_length] = input_ids
        self.budget = config.max_length - self.prompt_length
        self.produced = torch.zeros(batch_size, dtype=torch.long, device=input_ids.device)  # new tokens of each row
        self.outputs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(batch_size)]
        self.keep_outputs = config.return_dict_in_generate and (config.output_scores or config.output_logits)

    def length(self, row: int) -> int:
        """Tokens of a row, its prompt's among them."""
        return self.prompt_length + int(self.produced[row])

    def of_row(self, row: int) -> torch.Tensor:
        """The token ids of a row, of shape `(length,)`."""
        return self.sequences[row, : self.length(row)]

    def so_far(self) -> torch.Tensor:
        """All rows, of shape `(batch, length)`, padded on the right."""
        return self.sequences[:, : self.prompt_length + int(self.produced.max())]

    def kept(self, name: str, length: int) -> tuple[torch.Tensor, ...] | None:
        """The "scores" or "logits" of the first `length` new tokens, `(batch, vocab_size)` each, if wanted."""
        if not (self.keep_outputs and getattr(self.config, f"output_{name}")):
            return None
        which, empty = int(name == "logits"), torch.zeros(self.vocab_size, device=self.sequences.device)
        return tuple(
            torch.stack([row[step][which] if step < len(row) else empty for row in self.outputs])
            for step in range(length)
        )

    def write(self, rows, tokens, counts, scores, logits) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Appends the first `counts` of `tokens` (`(active rows, width)`) to the texts of `rows`.

        Returns:
            `tuple`: how many tokens each row got (an end inside of them cuts the rest), and which rows go on.
        """
        columns, finished = (
            torch.arange(tokens.shape[1], device=tokens.device),
            torch.zeros_like(counts, dtype=torch.bool),
        )
        if len(self.eos):
            is_eos = torch.isin(tokens, self.eos) & (columns < counts[:, None])
            finished = is_eos.any(1)
            counts = torch.where(finished, is_eos.to(torch.int8).argmax(1) + 1, counts)
        begin = self.prompt_length + self.produced[rows]
        slots = torch.where(columns < counts[:, None], begin[:, None] + columns, self.sequences.shape[1] - 1)
        self.sequences[rows[:, None], slots] = tokens
        if self.keep_outputs:
            for index, (row, count) in enumerate(zip(rows.tolist(), counts.tolist(), strict=True)):
                self.outputs[row] += [(scores[index, i], logits[index, i]) for i in range(count)]
        if self.criteria.of_a_row:
            counts, finished = self._stop_rows(rows, begin, counts, finished)
        self.produced[rows] += counts
        unfinished = ~finished & (self.produced[rows] < self.budget)
        return counts, self._stop_together(rows, unfinished) if self.criteria.of_the_batch else unfinished

    def _stop_rows(self, rows, begin, counts, finished):
        """Checks stop strings, time and, for one row, other criteria after every token, as plain `generate` does."""
        counts = counts.clone()
        for index, row in enumerate(rows.tolist()):
            first, total = int(begin[index]), int(counts[index])
            for count in range(1, total + 1):
                so_far = self.sequences[row : row + 1, : first + count]
                # only a single row comes with its scores: stop strings and time read none
                alone = len(self.outputs) == 1
                scores = self.kept("scores", first + count - self.prompt_length) if alone else None
                if self.criteria.ask(self.criteria.of_a_row, so_far, scores)[0]:
                    self.sequences[row, first + count : first + total] = self.pad
                    counts[index], finished[index] = count, True
                    del self.outputs[row][first + count - self.prompt_length :]
                    break
        return counts, finished

    def _stop_together(self, rows: torch.Tensor, unfinished: torch.Tensor) -> torch.Tensor:
        """Asks the other criteria about all tokens that every row has which goes on; says which rows still do."""
        stopped = torch.zeros(len(self.sequences), dtype=torch.bool, device=self.sequences.device)
        while True:
            going = rows[unfinished & ~stopped[rows]]
            common = int(self.produced[going].min()) if len(going) else int(self.produced.max())
            if self.criteria.asked >= common:
                return unfinished & ~stopped[rows]
            self.criteria.asked += 1
            width = self.prompt_length + self.criteria.asked
            scores = self.kept("scores", self.criteria.asked)
            done = self.criteria.ask(self.criteria.of_the_batch, self.sequences[:, :width], scores)
            stopped |= done
            self.sequences[done, width:] = self.pad
            self.produced[done] = self.produced[done].clamp(max=self.criteria.asked)
            for row in done.nonzero()[:, 0].tolist():
                del self.outputs[row][self.criteria.asked :]
