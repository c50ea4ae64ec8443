"""The speculative cascade loop for a batch of prompts (algorithm 4 of https://huggingface.co/papers/2405.19261)."""

import copy
import time
from typing import NamedTuple

import torch
from transformers.generation import GenerateDecoderOnlyOutput, LogitsProcessorList, StoppingCriteriaList

from .cache_argument import UPSTREAM_NAME
from .cached_decoder import CachedDecoder, align_vocabulary, position_limit, reads_states, vocabulary_size
from .cascade_call import CascadeOptions, CascadeStatistics, DraftLength
from .deferral_rules import cascade_target, one_hot_of_largest, sample, total_variation
from .row_processors import RowProcessors, RowTexts, unscaled_probs


_MAX_HOLE_SHARE = 0.25


class _Distributions(NamedTuple):
    """Next-token probabilities of shape `(batch, length, vocab)`."""

    probs: torch.Tensor  # processed; one-hot in greedy decoding
    unscaled: torch.Tensor  # at temperature 1, without banned tokens

    @classmethod
    def cat(cls, parts: list["_Distributions"]) -> "_Distributions":
        probs = torch.cat([part.probs for part in parts], 1)
        if all(part.unscaled is part.probs for part in parts):
            return cls(probs, probs)
        return cls(probs, torch.cat([part.unscaled for part in parts], 1))


class BatchedCascade:
    """
    Draft, verify, accept, for several rows that move at their own pace. One object is one `generate` call.

    Each round the small model drafts up to γ tokens for every row, the large model scores them in one forward, and a
    drafted token x is kept with probability min(1, π(x) / q(x)); the first token that is not kept is replaced by a
    sample of norm(max(0, π - q)), and a row that kept all its drafts gets one more sample of π. Every emitted token
    follows π.
    """

    def __init__(
        self, model, assistant, input_ids, positions, logits_processor, stopping_criteria, config, options,
        cache=None, token_type_ids=None,
    ):  # fmt: skip
        batch_size, prompt_length = input_ids.shape
        device, input_ids = model.device, input_ids.to(model.device)
        self.config, self.options = config, options
        self.greedy = not config.do_sample
        self.processors = RowProcessors(logits_processor, batch_size, prompt_length)
        self.texts = RowTexts(input_ids, stopping_criteria, config, vocabulary_size(model))
        self.statistics = CascadeStatistics.for_rows("batched", options.rule, options.alpha, batch_size)
        self.vocab_size, self.small_vocab_size = vocabulary_size(model), vocabulary_size(assistant)
        self.gamma = options.num_assistant_tokens
        self.draft_length: DraftLength | None = None
        if options.schedule == "auto" and (position_limit(model) or position_limit(assistant) or 99) > 40:
            kind = (batch_size, self.greedy, options.rule == "spec", str(device), model.dtype, assistant.dtype)
            self.draft_length = DraftLength(
                model, assistant, kind, lambda: _round_seconds(model, assistant, batch_size, config, options)
            )
            self.statistics.round_seconds = self.draft_length.costs

        # rounds, drafted, accepted, deferred, drift of each row
        self.totals = torch.zeros(5, batch_size, dtype=torch.float64, device=device)
        self.rows = torch.arange(batch_size, device=device)  # unfinished rows, as indices of the call's rows
        self.last_position = positions[:, -1]  # position of the newest token
        # What each model has yet to read, newest token last: token ids and positions of shape (active rows, width).
        self.small_pending = (input_ids, positions)
        cached = 0 if cache is None else cache.get_seq_length()
        self.large_pending = (input_ids[:, cached:], positions[:, cached:])
        types = None if token_type_ids is None else token_type_ids.to(device)
        self.large = CachedDecoder(
            model, input_ids[:, :cached], positions[:, :cached], cache if cached else None,
            types if types is None else types[:, cached:], keep_states=reads_states(assistant),
        )  # fmt: skip
        if reads_states(assistant):
            self.small = assistant.drafter(self.large)
        else:
            self.small = CachedDecoder(assistant, input_ids[:, :0], positions[:, :0], token_type_ids=types)
        self.prompt_positions, self.types = positions, types

    @torch.no_grad()
    def run(self, streamer=None) -> torch.Tensor:
        """Generates until every row is finished and returns `(batch, length)` token ids, padded on the right."""
        start = time.perf_counter()
        while len(self.rows):
            self._round()
            if streamer is not None:
                streamer.put(self.emitted.cpu())
        if streamer is not None:
            streamer.end()
        stats = self.statistics
        stats.rounds, stats.drafted, stats.accepted = self.totals[:3].long().tolist()
        stats.new_tokens = self.texts.produced.tolist()
        stats.deferred, stats.drift = self.totals[3:].tolist()
        stats.large_forwards, stats.large_tokens = self.large.forwards, self.large.tokens
        stats.small_forwards, stats.small_tokens = self.small.forwards, self.small.tokens
        stats.verify_seconds, stats.draft_seconds = self.large.seconds, self.small.seconds
        stats.total_seconds = time.perf_counter() - start
        return self.texts.so_far()

    def output(self) -> GenerateDecoderOnlyOutput:
        """What `generate` returns with `return_dict_in_generate`; scores of a finished row are 0."""
        sequences, length = self.texts.so_far(), int(self.texts.produced.max())
        outputs = {name: self.texts.kept(name, length) for name in ("scores", "logits")}
        return GenerateDecoderOnlyOutput(sequences=sequences, **outputs, **{UPSTREAM_NAME: self._cache(sequences)})

    def _cache(self, sequences: torch.Tensor):
        """The large model's cache of all columns of `sequences` but the last, as plain `generate` returns it."""
        rows = torch.arange(len(sequences), device=sequences.device)
        if len(rows) == 1 and bool((self.prompt_positions >= 0).all()):
            self.large.positions.masked_fill_(self.large.positions >= sequences.shape[1] - 1, -1)
            self.large.compact(rows)
            return self.large.cache
        # Rows left the cache as they ended: their texts are read once more, at their places.
        produced = torch.arange(sequences.shape[1] - self.prompt_positions.shape[1], device=sequences.device)
        after = self.prompt_positions[:, -1:] + 1 + produced
        after = torch.where(produced < self.texts.produced[:, None], after, -1)
        positions = torch.cat([self.prompt_positions, after], 1)[:, :-1]
        decoder = CachedDecoder(self.large.model, sequences[:, :0], positions[:, :0], token_type_ids=self.types)
        decoder(sequences[:, :-1], positions, logits_to_keep=1)
        return decoder.cache

    def _round(self) -> None:
        if self.draft_length is not None:
            self.gamma = self.draft_length.next()
        alone = not self._can_draft()  # the large model writes this token, whatever the rule
        remaining = self.texts.budget - self.texts.produced[self.rows]
        gamma = min(0 if alone else int(self.gamma), int(remaining.max()) - 1)
        if self.large.switch is not None:
            same_rotation = self.large.switch.drafts(int(self.last_position.max()) + 1)
            gamma = gamma if same_rotation is None else min(gamma, same_rotation)

        # 1. The small model drafts up to gamma tokens a row; q is kept for each of them.
        drafts, q, draft_lengths = self._draft(gamma, (remaining - 1).clamp(max=gamma), alone)
        gamma = drafts.shape[1]
        self.statistics.draft_lengths[gamma] = self.statistics.draft_lengths.get(gamma, 0) + 1

        # 2. The large model scores all drafts and the position after them in one forward.
        ids, positions = self.large_pending
        columns = torch.arange(gamma, device=drafts.device)
        draft_positions = torch.where(columns < draft_lengths[:, None], self.last_position[:, None] + 1 + columns, -1)
        logits = self.large(
            torch.cat([ids, drafts], 1), torch.cat([positions, draft_positions], 1), logits_to_keep=gamma + 1
        )
        if torch.isnan(logits).any():
            raise ValueError(
                f"The large model gave NaN logits after {int(self.texts.produced.max())} new tokens. Expected finite "
                "numbers: check its weights, or load it with `dtype=torch.bfloat16` instead of float16."
            )
        in_use = torch.arange(gamma + 1, device=drafts.device) <= draft_lengths[:, None]
        scores, p = self._distributions(logits, drafts, in_use, first=0)

        # 3. Accept drafts from the left.
        accepted, pi, deferred, drift = self._accept(drafts, q, p, draft_lengths)

        # 4. One more token a row: a correction where a draft was rejected, a sample of π where all were kept.
        used_last_draft = False
        bonus = accepted == draft_lengths
        if q is not None and gamma and self.options.rule != "spec" and bool((bonus & (draft_lengths == gamma)).any()):
            # π at the position after the last draft needs q there; the small model must read that draft anyway.
            position = torch.where(bonus & (draft_lengths == gamma), draft_positions[:, -1], -1)
            step = self._small_step(drafts[:, -1:], position[:, None], drafts, position >= 0, first=gamma)
            q = _Distributions.cat([q, step])
            used_last_draft = True
        next_token = self._next_token(accepted, bonus, q, p, pi, deferred, drift)

        # 5. Book-keeping: sequences, statistics, caches.
        unfinished = self._emit(drafts, draft_lengths, accepted, next_token, deferred, drift, scores, logits)
        self._update_caches(drafts, accepted, next_token, used_last_draft, q is None)
        self._compact(unfinished)
        if self.draft_length is not None and gamma:
            self.draft_length.record(*map(int, torch.stack([accepted.sum(), (~bonus).sum()]).tolist()))
        elif self.options.schedule.startswith("heuristic"):
            # as transformers does: two tokens more after a round without rejection, else one fewer
            self.gamma = self.gamma + 2 if bool(bonus.all()) else max(1, self.gamma - 1)

    def _can_draft(self) -> bool:
        """False only before the large model has read the prompt for a draft that reads its states."""
        return not self.large.keep_states or self.small.states is not None

    def _draft(
        self, gamma: int, lengths: torch.Tensor, alone: bool
    ) -> tuple[torch.Tensor, "_Distributions | None", torch.Tensor]:
        ids, positions = self.small_pending
        drafts = ids.new_empty(len(self.rows), 0)
        if gamma == 0:
            # of a last token only a rule that reads q needs the small model
            if alone or self.options.rule == "spec":
                return drafts, None, lengths
            return drafts, self._small_step(ids, positions, drafts, lengths >= 0, first=0), lengths
        parts = []
        for step in range(gamma):
            # π after a row's last draft needs q there, too: a row may draft less than others
            parts.append(self._small_step(ids, positions, drafts, step <= lengths, first=step))
            probs = parts[-1].probs[:, 0]
            token = probs.argmax(-1) if self.greedy else sample(probs)
            drafts = torch.cat([drafts, token[:, None]], 1)
            if len(self.texts.eos):  # nothing follows the end of a text
                lengths = torch.where(torch.isin(token, self.texts.eos), lengths.clamp(max=step + 1), lengths)
            if self.options.confidence_threshold > 0:
                # The token that lowers the confidence is still verified; only later ones are not drafted, so whether a
                # position has a draft depends on accepted tokens alone and the law stays exact.
                unsure = parts[-1].unscaled[:, 0].gather(1, token[:, None])[:, 0] < self.options.confidence_threshold
                lengths = torch.where(unsure, lengths.clamp(max=step + 1), lengths)
                if bool((lengths <= step + 1).all()):
                    break
            ids = token[:, None]
            positions = torch.where(step < lengths, self.last_position + 1 + step, -1)[:, None]
        return drafts, _Distributions.cat(parts), lengths

    def _small_step(self, ids, positions, drafts, in_use, first: int) -> _Distributions:
        logits = self.small(ids.clamp(max=self.small_vocab_size - 1), positions, logits_to_keep=1)
        return self._distributions(align_vocabulary(logits, self.vocab_size), drafts, in_use[:, None], first)[1]

    def _distributions(
        self, logits: torch.Tensor, drafts: torch.Tensor, in_use: torch.Tensor, first: int
    ) -> tuple[torch.Tensor, _Distributions]:
        """
        Processed scores and what they mean, for logits that stand after `first`, `first + 1`, ... drafted tokens;
        `in_use` says which of them count.
        """

        def context(index: int, step: int) -> torch.Tensor:
            return torch.cat([self.texts.of_row(self.rows[index]), drafts[index, : first + step]])[None]

        scores, banned = self.processors(logits, self.rows, in_use, context)
        unscaled = unscaled_probs(logits, banned)
        if self.greedy and self.options.rule != "ensemble":  # an ensemble takes the argmax of the mixture instead
            return scores, _Distributions(one_hot_of_largest(scores), unscaled)
        return scores, _Distributions(unscaled if scores is logits else scores.softmax(-1), unscaled)

    def _target(self, q: _Distributions, p: _Distributions, start: int, stop: int):
        """π, deferred mass and TV(π, p) of the positions `start` to `stop` after the round's first token."""
        p_part, q_part = p.probs[:, start:stop], q.probs[:, start:stop]
        pi, deferred = cascade_target(
            self.options.rule,
            self.options.alpha,
            q_part,
            p_part,
            q.unscaled[:, start:stop],
            p.unscaled[:, start:stop],
        )
        if self.options.strict_prefix:
            index = self.texts.produced[self.rows][:, None] + torch.arange(start, stop, device=pi.device)
            strict = index < self.options.strict_prefix
            pi = torch.where(strict[..., None], p_part, pi)
            deferred = torch.where(strict, 1.0, deferred)
        if self.greedy and self.options.rule == "ensemble":
            pi = one_hot_of_largest(pi)
        return pi, deferred, total_variation(pi, p_part)

    def _accept(self, drafts, q, p, draft_lengths):
        batch_size, gamma = drafts.shape
        # one column more, for the position after the last draft
        deferred = torch.ones(batch_size, gamma + 1, device=drafts.device)
        drift = torch.zeros(batch_size, gamma + 1, device=drafts.device)
        if gamma == 0:
            return torch.zeros_like(draft_lengths), None, deferred, drift
        pi, deferred[:, :gamma], drift[:, :gamma] = self._target(q, p, 0, gamma)
        pi_draft = pi.gather(-1, drafts[..., None])[..., 0]
        if self.greedy:
            kept = pi_draft > 0.5
        else:
            q_draft = q.probs.gather(-1, drafts[..., None])[..., 0]
            kept = torch.rand_like(pi_draft) * q_draft < pi_draft
        drafted = torch.arange(gamma, device=drafts.device) < draft_lengths[:, None]
        accepted = (kept & drafted).long().cumprod(1).sum(1)
        return accepted, pi, deferred, drift

    def _next_token(self, accepted, bonus, q, p, pi, deferred, drift):
        """Samples the token after the accepted drafts and fills the last column of `deferred` and `drift`."""
        index = torch.arange(len(accepted), device=accepted.device)
        gamma = p.probs.shape[1] - 1
        if q is not None and q.probs.shape[1] == gamma + 1:
            after, deferred[:, gamma:], drift[:, gamma:] = self._target(q, p, gamma, gamma + 1)
        else:  # no row needs q there
            after = p.probs[:, gamma:]
        targets = after if pi is None else torch.cat([pi, after], 1)
        target = targets[index, accepted]
        if self.greedy:
            return target.argmax(-1)
        if pi is not None:
            residual = (target - q.probs[index, accepted.clamp(max=q.probs.shape[1] - 1)]).clamp(min=0)
            # A residual of mass 0 means π = q up to rounding: then a rejection is rounding too, and π serves.
            usable = ~bonus & (residual.sum(-1) > 0)
            target = torch.where(usable[:, None], residual, target)
        return sample(target)

    def _emit(self, drafts, draft_lengths, accepted, next_token, deferred, drift, scores, logits) -> torch.Tensor:
        """Writes the round's tokens; returns how many each active row got (it may stop inside its accepted drafts)."""
        tokens = torch.cat([drafts, next_token[:, None]], 1).scatter(1, accepted[:, None], next_token[:, None])
        counts, unfinished = self.texts.write(self.rows, tokens, accepted + 1, scores, logits)
        written = torch.arange(tokens.shape[1], device=drafts.device) < counts[:, None]
        values = [torch.ones_like(counts), draft_lengths, torch.minimum(accepted, counts)]
        values += [(written * part.double()).sum(1) for part in (deferred, drift)]
        self.totals[:, self.rows] += torch.stack([value.double() for value in values])
        self.emitted = tokens[0, : int(counts[0])]
        if self.processors.rewinds:
            for row in self.rows[unfinished].tolist():
                self.processors.accept(row, self.texts.length(row))
        return unfinished

    def _update_caches(self, drafts, accepted, next_token, used_last_draft: bool, small_skipped: bool) -> None:
        gamma = drafts.shape[1]
        columns = torch.arange(gamma, device=drafts.device)
        if gamma:
            self.large.keep(columns < accepted[:, None])
            in_small = gamma if used_last_draft else gamma - 1
            if in_small:
                self.small.keep(columns[:in_small] < accepted[:, None])
        if self.large.keep_states:
            self.small.read(accepted)
        last_draft = self.last_position + gamma
        self.last_position = self.last_position + accepted + 1
        newest = (next_token[:, None], self.last_position[:, None])
        unread = self.small_pending
        self.large_pending = self.small_pending = newest
        if small_skipped:
            self.small_pending = tuple(torch.cat(parts, 1) for parts in zip(unread, newest, strict=True))
        owes_last_draft = accepted == gamma
        if gamma and not used_last_draft and bool(owes_last_draft.any()):
            position = torch.where(owes_last_draft, last_draft, -1)[:, None]
            self.small_pending = (
                torch.cat([drafts[:, -1:], newest[0]], 1),
                torch.cat([position, newest[1]], 1),
            )

    def _compact(self, unfinished: torch.Tensor) -> None:
        """Drops finished rows, and cache slots once too many are holes."""
        finished = not bool(unfinished.all())
        holes = len(self.rows) > 1 and max(self.large.hole_share(), self.small.hole_share()) > _MAX_HOLE_SHARE
        if not (finished or holes):
            return
        select = unfinished.nonzero()[:, 0]
        self.rows = self.rows[select]
        if len(select) == 0:
            return
        self.last_position = self.last_position[select]
        self.large_pending = tuple(tensor[select] for tensor in self.large_pending)
        self.small_pending = tuple(tensor[select] for tensor in self.small_pending)
        self.large.compact(select)
        self.small.compact(select)


def _round_seconds(model, assistant, rows: int, config, options) -> dict[int, float]:
    """
    Seconds of a round by its draft length, of `DraftLength.MEASURED`: the fastest of three after a short text. No
    random number of the caller is used up.
    """
    config = copy.copy(config)
    config.max_length, config.eos_token_id, config.return_dict_in_generate = 4096, None, False
    ids = torch.arange(8, device=model.device).remainder(vocabulary_size(model)).expand(rows, -1)
    places = torch.arange(8, device=model.device).expand(rows, -1)
    seconds: dict[int, float] = {}
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), torch.no_grad():
        for gamma in DraftLength.MEASURED:
            loop = BatchedCascade(
                model, assistant, ids, places, LogitsProcessorList(), StoppingCriteriaList(), config,
                CascadeOptions(options.rule, options.alpha, 0, options.backend, gamma, "constant", 0.0),
            )  # fmt: skip
            for turn in range(4 if gamma else 5):
                begin = time.perf_counter()
                loop._round()
                loop.emitted.tolist()  # waits for the device
                if turn:
                    seconds[gamma] = min(time.perf_counter() - begin, seconds.get(gamma, torch.inf))
    return seconds
