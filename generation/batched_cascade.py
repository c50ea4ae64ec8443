"""The speculative cascade loop for a batch of prompts (algorithm 4 of https://huggingface.co/papers/2405.19261)."""

import time

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .cache_argument import UPSTREAM_NAME
from .cached_decoder import CachedDecoder, align_vocabulary, position_limit, reads_states, vocabulary_size
from .cascade_call import CascadeStatistics, check_numbers
from .deferral_rules import (
    DEFERRAL_RULES,
    Accepted,
    Distributions,
    accept_drafts,
    decide,
    draw_next,
    draw_siblings,
    mixed_probs,
    sample,
)
from .proposals import DraftLength, Plan, TextLookup, measure_rounds
from .row_processors import RowProcessors, RowTexts, unscaled_probs


_MAX_HOLE_SHARE = 0.25


class BatchedCascade:
    """
    Draft, verify, accept, for several rows that move at their own pace. One object is one `generate` call.

    Each round the small model drafts up to γ tokens for every row, the large model scores them in one forward, and a
    drafted token x is kept with probability min(1, π(x) / q(x)); the first token that is not kept is replaced by a
    sample of norm(max(0, π - q)), and a row that kept all its drafts gets one more sample of π. Every emitted token
    follows π.

    Where it pays the first draft has siblings, other candidates for its place, which the same forward scores. If it is
    refused, the first of them has its chance, against what is then left of π, and so on. Under `spec` a row whose
    newest tokens stood in its text before drafts what followed them, for which no small model has to run.
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
        self.vocab_size = vocabulary_size(model)
        self.small_vocab_size = self.vocab_size if assistant is None else vocabulary_size(assistant)
        rule = DEFERRAL_RULES[options.rule]
        self.reads_q = options.rule != "spec"
        self.reads_p0, self.reads_q0 = rule.reads_unscaled, rule.reads_unscaled and rule.reads_draft
        self.reads_q0 |= options.confidence_threshold > 0
        self.gamma = options.num_assistant_tokens
        self.siblings, self.measured = 0, False  # if measured, each round does all that one may have to

        # rounds, drafted, accepted, deferred, drift of each row
        self.totals = torch.zeros(5, batch_size, dtype=torch.float64, device=device)
        self.rows = torch.arange(batch_size, device=device)  # unfinished rows, as indices of the call's rows
        self.last_position = positions[:, -1]  # position of the newest token
        # the same, and how many tokens each row has written, where the host need not wait for a GPU
        self.lengths, self.written = positions[:, -1].tolist(), [0] * batch_size
        # What each model has yet to read, newest token last: token ids and positions of shape (active rows, width).
        self.small_pending = (input_ids, positions)
        cached = 0 if cache is None else cache.get_seq_length()
        self.large_pending = (input_ids[:, cached:], positions[:, cached:])
        types = None if token_type_ids is None else token_type_ids.to(device)
        self.large = CachedDecoder(
            model, input_ids[:, :cached], positions[:, :cached], cache if cached else None,
            types if types is None else types[:, cached:], keep_states=reads_states(assistant),
        )  # fmt: skip
        self.small = None
        if reads_states(assistant):
            self.small = assistant.drafter(self.large)
        elif assistant is not None:
            self.small = CachedDecoder(assistant, input_ids[:, :0], positions[:, :0], token_type_ids=types)
        self.prompt_positions, self.types = positions, types

        self.draft_length: DraftLength | None = None
        limits = [position_limit(half) or 99 for half in (model, assistant) if half is not None]
        if self.large.switch is not None and self.large.switch.dynamic:  # it keeps the rotation of what was measured
            limits.append(self.large.switch.length)
        if options.schedule == "auto" and min(limits) > 56:
            warpers = self.processors.of_scores
            kind = (batch_size, self.greedy, options.rule == "spec", str(device), model.dtype)
            kind = (*kind, *map(type, warpers))
            self.draft_length = DraftLength(model, assistant, kind, lambda: measure_rounds(self, assistant))
        self.lookup: TextLookup | None = None
        # a processor with a state can't be asked about a token that it forbids
        if not self.reads_q and not self.processors.rewinds and (assistant is None or self.draft_length is not None):
            texts = zip(input_ids.tolist(), (positions >= 0).tolist(), strict=True)
            self.lookup = TextLookup([[token for token, real in zip(*text, strict=True) if real] for text in texts])

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
        stats.verify_seconds = self.large.seconds
        if self.small is not None:
            stats.small_forwards, stats.small_tokens = self.small.forwards, self.small.tokens
            stats.draft_seconds = self.small.seconds
        if self.draft_length is not None and self.draft_length.measured is not None:
            stats.round_seconds = self.draft_length.measured.rounds
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
        sizes = [0] * len(self.rows) if self.lookup is None else self.lookup.sizes()
        plan = Plan(int(self.gamma), self.siblings) if self.draft_length is None else self.draft_length.next(sizes)
        # before it has read the prompt for a draft that reads its states, the large model writes, whatever the rule
        alone = self.large.keep_states and self.small.blind
        small = plan.small and self.small is not None and not alone and not all(sizes)
        able = small or any(sizes) or (self.measured and self.small is None)
        gamma = min(plan.gamma if able else 0, self.texts.budget - min(self.written) - 1)
        if self.large.switch is not None:
            same_rotation = self.large.switch.drafts(max(self.lengths) + 1)
            gamma = gamma if same_rotation is None else min(gamma, same_rotation)

        # 1. The small model drafts up to gamma tokens a row, or they are copied; q is kept for each of them.
        room = (self.texts.budget - self.texts.produced[self.rows] - 1).clamp(max=gamma)
        drafts, siblings, q, lengths = self._draft(Plan(gamma, plan.siblings, small), room, alone, sizes)
        gamma, others = drafts.shape[1], siblings.shape[1]
        skipped = not small if gamma else q is None  # the small model has read nothing
        self.statistics.count(gamma, others)

        # 2. The large model scores all drafts and the positions after them in one forward.
        ids, positions = self.large_pending
        columns = torch.arange(gamma, device=drafts.device)
        any_draft = (lengths > 0)[:, None].expand(-1, others)
        first = self.last_position[:, None] + 1
        places = [torch.where(columns < lengths[:, None], first + columns, -1), torch.where(any_draft, first, -1)]
        logits = self.large(
            torch.cat([ids, drafts, siblings], 1), torch.cat([positions, *places], 1), gamma + 1 + others,
            leaves=others, lengths=self.lengths,
        )  # fmt: skip
        broken = logits.amax(-1).isnan().any()

        # 3. Accept drafts from the left.
        scores, p = logits[:, :gamma], None
        if gamma:
            scores, p = self._distributions(scores, drafts, columns <= lengths[:, None], 0, self.reads_p0)
        found, pi, deferred, drift = self._accept(drafts, siblings, q, p, lengths)

        # 4. One more token a row: a correction where a draft was rejected, a sample of π where all were kept.
        step = q if gamma == 0 else None
        if gamma and self.reads_q:
            # π after the last draft needs q there; the small model must read that draft anyway
            flags, nodes, ends = torch.stack([broken.expand_as(found.node), found.node, found.ends]).tolist()
            check_numbers(flags[0], self.written)
            if any(ends) or self.measured:
                self._keep_in_small(found, nodes)
                last = found.drafts.gather(1, (found.counts - 1).clamp(min=0)[:, None])
                place = torch.where(found.ends, self.last_position + found.counts, -1)
                step = self._small_step(last, place[:, None], found.drafts, found.ends, found.counts)[1]
        next_logits = logits.take_along_dim(found.node[:, None, None], 1)
        yes = torch.ones_like(found.bonus)[:, None]
        next_scores, p = self._distributions(next_logits, found.drafts, yes, found.counts, self.reads_p0)
        next_token = self._next_token(found, q, p, step, pi, deferred, drift)

        # 5. Book-keeping: sequences, statistics, caches. The host learns all it has to in one piece.
        drafted, outputs = lengths + any_draft.sum(1), ((scores, next_scores), (logits[:, :gamma], next_logits))
        tokens, counts, unfinished = self._emit(found, drafted, next_token, deferred, drift, outputs)
        facts = torch.stack([broken.expand_as(counts), counts, unfinished, found.counts, found.node, found.bonus])
        flags, written, going, kept, nodes, bonus, *new_tokens = torch.cat([facts, tokens.T]).tolist()
        check_numbers(flags[0], self.written)
        self.emitted = tokens[0, : written[0]]
        if self.lookup is not None:
            for row, new in enumerate(zip(*new_tokens, strict=True)):
                self.lookup.extend(row, new[: written[row]])
                if sizes[row] and gamma:
                    self.statistics.looked_up += gamma
                    self.statistics.looked_up_accepted += min(kept[row], written[row]) if nodes[row] <= gamma else 0
        self.written = [before + count for before, count in zip(self.written, written, strict=True)]
        if self.processors.rewinds:
            for row in self.rows[unfinished].tolist():
                self.processors.accept(row, self.texts.length(row))
        self._update_caches(found, next_token, others, step is None, skipped, kept, nodes)
        self._compact(going)
        if self.draft_length is not None and gamma:
            self.draft_length.record(Plan(gamma, others, small), sizes, kept, nodes, bonus)
        elif self.options.schedule.startswith("heuristic"):
            # as transformers does: two tokens more after a round without rejection, else one fewer
            self.gamma = self.gamma + 2 if all(bonus) else max(1, self.gamma - 1)

    def _draft(self, plan: Plan, lengths: torch.Tensor, alone: bool, sizes: list[int]):
        """Drafts `(rows, γ)`, siblings of the first, q or `None`, and how many drafts each row has."""
        ids, positions = self.small_pending
        drafts = siblings = ids.new_empty(len(self.rows), 0)
        copies, copied = None, torch.tensor(sizes, device=ids.device) > 0
        if plan.gamma and self.lookup is not None and (any(sizes) or not plan.small):
            copies = torch.tensor(self.lookup.drafts(sizes, plan.gamma), device=ids.device)
            if not plan.small:
                q = Distributions.one_hot(copies, self.vocab_size)
                return copies, siblings, q, lengths if self.measured else torch.where(copied, lengths, 0)
        if plan.gamma == 0:
            # of a last token only a rule that reads q needs the small model
            if alone or not self.reads_q:
                return drafts, siblings, None, lengths
            return drafts, siblings, self._small_step(ids, positions, drafts, lengths >= 0, 0)[1], lengths
        parts = []
        for step in range(plan.gamma):
            # π after a row's last draft needs q there, too: a row may draft less than others
            scores, q = self._small_step(ids, positions, drafts, step <= lengths, step)
            token = q.probs[:, 0].argmax(-1) if self.greedy else sample(q.probs[:, 0])
            if copies is not None:
                token = torch.where(copied, copies[:, step], token)
                where, one_hot = copied[:, None, None], Distributions.one_hot(token[:, None], self.vocab_size)
                q = Distributions(*(torch.where(where, *pair) for pair in zip(one_hot, q, strict=True)))
            parts.append(q)
            if step == 0 and plan.siblings and not self.processors.rewinds:  # a processor has a state for a length
                probs = scores[:, 0] if self.greedy else q.probs[:, 0]
                siblings = draw_siblings(probs, token, plan.siblings, self.greedy)
            drafts = torch.cat([drafts, token[:, None]], 1)
            if len(self.texts.eos):  # nothing follows the end of a text
                lengths = torch.where(torch.isin(token, self.texts.eos), lengths.clamp(max=step + 1), lengths)
            if self.options.confidence_threshold > 0:
                # The token that lowers the confidence is still verified; only later ones are not drafted, so whether a
                # position has a draft depends on accepted tokens alone and the law stays exact.
                unsure = q.unscaled[:, 0].gather(1, token[:, None])[:, 0] < self.options.confidence_threshold
                lengths = torch.where(unsure, lengths.clamp(max=step + 1), lengths)
                if bool((lengths <= step + 1).all()):
                    break
            ids = token[:, None]
            positions = torch.where(step < lengths, self.last_position + 1 + step, -1)[:, None]
        return drafts, siblings, Distributions.cat(parts), lengths

    def _small_step(self, ids, positions, drafts, in_use, first) -> tuple[torch.Tensor, Distributions]:
        lengths = [length + first for length in self.lengths] if isinstance(first, int) else None
        logits = self.small(ids.clamp(max=self.small_vocab_size - 1), positions, 1, lengths=lengths)
        logits = align_vocabulary(logits, self.vocab_size)
        return self._distributions(logits, drafts, in_use[:, None], first, self.reads_q0)

    def _distributions(
        self, logits, drafts, in_use, first, reads_unscaled: bool
    ) -> tuple[torch.Tensor, Distributions]:
        """
        Processed scores and what they mean, for logits that stand after `first`, `first + 1`, ... drafted tokens (a
        number, or one a row); `in_use` says which of them count.
        """

        def context(index: int, step: int) -> torch.Tensor:
            drafted = step + (first if isinstance(first, int) else int(first[index]))
            return torch.cat([self.texts.of_row(self.rows[index]), drafts[index, :drafted]])[None]

        scores, banned = self.processors(logits, self.rows, in_use, context)
        probs = mixed_probs(self.options.rule, scores, self.greedy)
        if not reads_unscaled or (scores is logits and not self.greedy):
            return scores, Distributions(probs, probs)
        return scores, Distributions(probs, unscaled_probs(logits, banned))

    def _target(self, q: Distributions, p: Distributions, start):
        """π, deferred mass and TV(π, p) at positions from `start` (a number, or one a row) after the text's end."""
        strict = None
        if self.options.strict_prefix:
            first = (self.texts.produced[self.rows] + start)[:, None]
            columns = torch.arange(p.probs.shape[1], device=p.probs.device)
            strict = first + columns < self.options.strict_prefix
        return decide(self.options.rule, self.options.alpha, q, p, self.greedy, strict)

    def _accept(self, drafts, siblings, q, p, lengths):
        """What is kept of the drafts, π at each; and deferred mass and TV(π, p), with a column for one more."""
        batch_size, gamma = drafts.shape
        deferred, drift = (torch.full((batch_size, gamma + 1), fill, device=drafts.device) for fill in (1.0, 0.0))
        if gamma == 0:
            none, yes = torch.zeros_like(lengths), torch.ones_like(lengths, dtype=torch.bool)
            return Accepted(drafts, none, none, yes, yes, None), None, deferred, drift
        pi, deferred[:, :gamma], drift[:, :gamma] = self._target(q, p, 0)
        return accept_drafts(drafts, siblings, pi, q.probs, lengths, self.greedy), pi, deferred, drift

    def _next_token(self, found: Accepted, q, p: Distributions, step, pi, deferred, drift) -> torch.Tensor:
        """Samples the token after the accepted drafts; `step` is q where these end. Fills in its deferred mass."""
        counts, ends = found.counts, found.ends
        index = torch.arange(len(counts), device=counts.device)
        target, last = p.probs[:, 0], (torch.ones_like(deferred[:, :1]), torch.zeros_like(drift[:, :1]))
        if step is not None:
            after, *last = self._target(step, p, counts)
            target = after[:, 0]
        for part, value in zip((deferred, drift), last, strict=True):
            part[index, counts] = torch.where(ends, value[:, 0], part[index, counts])
        return draw_next(found, target, pi, None if q is None else q.probs, self.greedy)

    def _emit(self, found: Accepted, drafted, next_token, deferred, drift, outputs):
        """Writes the round's tokens. Returns them, how many each row got (it may end inside), and which rows go on."""
        tokens = torch.cat([found.drafts, next_token[:, None]], 1)
        tokens = tokens.scatter(1, found.counts[:, None], next_token[:, None])
        if self.texts.keep_outputs:
            order = torch.arange(tokens.shape[1], device=tokens.device)
            order = torch.where(order == found.counts[:, None], tokens.shape[1] - 1, order)[..., None]
            outputs = (torch.cat(parts, 1).take_along_dim(order, 1) for parts in outputs)
        counts, unfinished = self.texts.write(self.rows, tokens, found.counts + 1, *outputs)
        within = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        values = [torch.ones_like(counts), drafted, torch.minimum(found.counts, counts)]
        values += [(within * part.double()).sum(1) for part in (deferred, drift)]
        self.totals[:, self.rows] += torch.stack([value.double() for value in values])
        return tokens, counts, unfinished

    def _keep_in_small(self, found: Accepted, nodes: list[int]) -> None:
        """Takes the refused drafts out of the small model's cache, which has read all but the last."""
        read = found.drafts.shape[1] - 1
        in_chain = torch.where(found.node > read + 1, 0, found.counts)
        kept = torch.arange(read, device=in_chain.device) < in_chain[:, None]
        self.small.keep(kept, max(min(node, read) if node <= read + 1 else 0 for node in nodes))

    def _update_caches(self, found: Accepted, next_token, others, unread: bool, skipped, kept, nodes) -> None:
        gamma = found.drafts.shape[1]
        if gamma:
            columns = torch.arange(1, gamma + others + 1, device=next_token.device)
            chain = torch.where(found.node > gamma, 0, found.counts)[:, None]
            self.large.keep((columns <= chain) | ((columns > gamma) & (columns == found.node[:, None])), max(nodes))
            if unread and not skipped:
                self._keep_in_small(found, nodes)
        if self.large.keep_states:
            self.small.read(found.node, gamma, others)
        owed = torch.where(found.ends, self.last_position + found.counts, -1)[:, None]
        columns = torch.arange(gamma, device=next_token.device)
        places = torch.where(columns < found.counts[:, None], self.last_position[:, None] + 1 + columns, -1)
        self.last_position = self.last_position + found.counts + 1
        self.lengths = [length + count + 1 for length, count in zip(self.lengths, kept, strict=True)]
        newest = (next_token[:, None], self.last_position[:, None])
        unread_before = self.small_pending
        self.large_pending = self.small_pending = newest
        if self.small is None or (self.large.keep_states and not self.small.rereads):
            return  # it reads the newest token alone
        if skipped or self.large.keep_states:
            before = unread_before if skipped else tuple(part[:, :0] for part in unread_before)
            parts = zip(before, (found.drafts, places), newest, strict=True)
            self.small_pending = tuple(torch.cat(part, 1) for part in parts)
        elif gamma and unread and any(node >= gamma for node in nodes):
            last = found.drafts.gather(1, (found.counts - 1).clamp(min=0)[:, None])
            self.small_pending = (torch.cat([last, newest[0]], 1), torch.cat([owed, newest[1]], 1))

    def _compact(self, going: list[int]) -> None:
        """Drops finished rows, and cache slots once too many are holes."""
        longest = max(self.lengths)
        decoders = [self.large] if self.small is None else [self.large, self.small]
        holes = max(decoder.hole_share(longest) for decoder in decoders) > _MAX_HOLE_SHARE
        if all(going) and not holes:
            return
        kept = [index for index, goes_on in enumerate(going) if goes_on]
        select = torch.tensor(kept, dtype=torch.long, device=self.rows.device)
        self.rows = self.rows[select]
        if len(kept) == 0:
            return
        self.lengths, self.written = ([part[index] for index in kept] for part in (self.lengths, self.written))
        self.last_position = self.last_position[select]
        self.large_pending = tuple(tensor[select] for tensor in self.large_pending)
        self.small_pending = tuple(tensor[select] for tensor in self.small_pending)
        for decoder in decoders:
            decoder.compact(select)
        if self.lookup is not None:
            self.lookup.keep(kept)
