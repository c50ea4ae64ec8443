"""What a round of a cascade proposes: how many drafts, and those that need no small model."""

import copy
import itertools
import time
import weakref
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from transformers.generation import StoppingCriteriaList

from .cascade_call import CascadeOptions


class TextLookup:
    """
    Drafts that need no small model: what stood after the newest tokens where a row's own text, prompt or answer, had
    them last. A draft is a function of the tokens that are written, so its q is one-hot and `spec` stays exact.

    Args:
        texts (`list[list[int]]`):
            Token ids of each row so far.
    """

    # how many newest tokens must agree (the most that do count), and the acceptance that is expected at first
    SIZES: ClassVar = {8: 0.8, 5: 0.6, 3: 0.4, 2: 0.3}

    def __init__(self, texts: list[list[int]]):
        self.texts: list[list[int]] = [[] for _ in texts]
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in texts]  # of each run of tokens, what follows it
        for row, text in enumerate(texts):
            self.extend(row, text)

    def extend(self, row: int, tokens: Sequence[int]) -> None:
        """Adds new tokens to a row's text."""
        text, after = self.texts[row], self._after[row]
        for token in tokens:
            for size in self.SIZES:
                if size <= len(text):
                    after[tuple(text[-size:])] = len(text)
            text.append(token)

    def keep(self, rows: list[int]) -> None:
        """Keeps only `rows`."""
        self.texts, self._after = [self.texts[row] for row in rows], [self._after[row] for row in rows]

    def sizes(self) -> list[int]:
        """How many newest tokens of each row have stood in its text before, of `SIZES`; 0 for none."""
        return [
            next((size for size in self.SIZES if tuple(text[-size:]) in after), 0)
            for text, after in zip(self.texts, self._after, strict=True)
        ]

    def drafts(self, sizes: list[int], count: int) -> list[list[int]]:
        """Of each row `count` tokens that followed then; of a row without a match any."""
        found = []
        for size, text, after in zip(sizes, self.texts, self._after, strict=True):
            copied = list(text[after[tuple(text[-size:])] :][:count]) if size else [0] * count
            period = len(copied)
            while len(copied) < count:  # the text repeats itself up to its end
                copied.append(copied[-period])
            found.append(copied)
        return found


_MOST_TURNS = 4  # of timing each kind of round
# Of a large model, a small one and the kind of call: what rounds cost.
_round_costs: "weakref.WeakKeyDictionary[object, weakref.WeakKeyDictionary]" = weakref.WeakKeyDictionary()


class RoundCosts(NamedTuple):
    """Seconds, the least of a few rounds."""

    rounds: dict[int, float]  # a round by its draft length
    sibling: float  # each other candidate for its first draft
    draft: float  # how much of a round each draft of the small model takes


class Plan(NamedTuple):
    """What a round tries."""

    gamma: int
    siblings: int = 0  # other candidates for the first draft
    small: bool = True  # whether the small model drafts where nothing can be looked up


class DraftLength:
    """
    Chooses the draft length of each round, how many siblings its first draft has, and whether the small model drafts
    or only what was looked up in the text is tried, so that tokens come quickest: none at all where drafts don't
    promise to pay. (A rule still has its say about such a token.)

    What counts is the mean number of rounds that rows take, as a call lasts as long as its slowest row: that one row
    copies is little help to seven others. A round with γ drafts of which each is accepted with probability a gives (1
    - a^(γ+1)) / (1 - a) tokens; with n siblings of the first, of which each is accepted with probability b when its
    turn comes, (1 - a) (1 - (1 - b)^n) more. All are those of the call so far, old rounds counting less and less; what
    was looked up has an a of its own for each number of tokens that agreed. Where drafts of the small model are given
    up they are tried again after a while, as the text may have become an easier one. What rounds cost is measured once
    for two models and that many rows, and kept: the choice then depends on the tokens alone, and a seed gives the same
    text again.

    Args:
        large, small ([`~transformers.PreTrainedModel`]):
            The models, the latter `None` where there is none; the acceptance that is expected at first is 0.6, or 0.6
            of its `config.expected_acceptance`.
        kind (`tuple`):
            What else costs depend on.
        measure (`Callable`):
            Returns [`RoundCosts`] with the lengths `MEASURED`; called once, when the first choice is made.
    """

    MEASURED = (0, 1, 4)
    LONGEST, MOST_SIBLINGS = 16, 4
    MEMORY, WEIGHT, PAUSE = 0.95, 4.0, 32
    PREMIUM = 0.05  # how much quicker drafts must promise to be: costs are known from a few rounds only

    def __init__(self, large, small, kind: tuple, measure: Callable[[], RoundCosts]):
        pairs = _round_costs.setdefault(large, weakref.WeakKeyDictionary())
        self._known = pairs.setdefault(large if small is None else small, {})
        self._kind, self._measure, self._small = (kind, small is None), measure, small is not None
        known = getattr(small.config, "expected_acceptance", None) if self._small else None
        self._expected = 0.6 * known if known else 0.6  # it is known of the texts that a draft was made of
        self._begins, self._rest, self._retry, self._pause = True, 0, False, self.PAUSE
        # what was looked up, by how many tokens agreed: weights of what is accepted and refused
        self._looked_up = {size: (2 * share, 2 - 2 * share) for size, share in TextLookup.SIZES.items()}
        self._forget(self.WEIGHT)

    def _forget(self, weight: float) -> None:
        self._accepted, self._rejected = weight * self._expected, weight * (1 - self._expected)
        # a candidate that is not the first is about half as often right
        self._hits, self._misses = weight * self._expected / 2, weight * (1 - self._expected / 2)

    @property
    def measured(self) -> RoundCosts | None:
        """What rounds cost, if it is known by now."""
        return self._known.get(self._kind)

    def next(self, sizes: Sequence[int] = (0,)) -> Plan:
        """The plan of the next round, where so many tokens of each row agree with an earlier place of its text."""
        if self._begins:  # nearly free: the large model reads the prompt in that round
            self._begins = False
            return Plan(4, 0, self._small)
        drafts = self._small and not self._rest
        if self._rest:
            self._rest -= 1
        elif self._retry:
            self._retry = False
            self._forget(1.0)
            return Plan(1)
        elif drafts and not self._quickest((0,), self._acceptance)[0].gamma:
            self._rest, self._pause = self._pause - 1, 2 * self._pause
            self._retry, drafts = self._quickest((0,), 0.95)[0].gamma > 0, False
        if not drafts and not any(sizes):
            return Plan(0, 0, False)
        plans = [self._quickest(sizes, None)] if any(sizes) or not drafts else []
        if drafts and not all(sizes):
            plans.append(self._quickest(sizes, self._acceptance))
        return max(plans, key=lambda plan: plan[1])[0]

    @property
    def _acceptance(self) -> float:
        return self._accepted / (self._accepted + self._rejected)

    def _quickest(self, sizes: Sequence[int], acceptance: float | None) -> tuple[Plan, float]:
        """The best plan, and its tokens a second; without an `acceptance` the small model has a rest."""
        if self._kind not in self._known:  # not before: a call may end in its first round
            self._known[self._kind] = self._measure()
        costs, lengths = self._known[self._kind], np.arange(self.LONGEST + 1)
        known = sorted(costs.rounds)
        seconds = np.interp(lengths, known, [costs.rounds[length] for length in known])
        slope = (costs.rounds[known[-1]] - costs.rounds[known[-2]]) / (known[-1] - known[-2])
        seconds += np.maximum(lengths - known[-1], 0) * max(slope, 0.0)
        seconds[0] /= 1 + self.PREMIUM
        gain = np.zeros((1, 1))  # tokens of the siblings
        if acceptance is None:
            seconds = (seconds - costs.draft * lengths)[:, None]
        else:
            siblings, drafts = np.arange(self.MOST_SIBLINGS + 1), np.minimum(lengths, 1)[:, None]
            gain = drafts * (1 - acceptance) * (1 - (self._misses / (self._hits + self._misses)) ** siblings)
            seconds = seconds[:, None] + drafts * costs.sibling * siblings
        rounds = np.zeros_like(seconds)  # that all rows together take for a token each
        for size in set(sizes):
            accepted, refused = self._looked_up.get(size, (acceptance or 0.0, 1 - (acceptance or 0.0)))
            a = min(accepted / (accepted + refused), 0.999)
            tokens = ((1 - a ** (lengths + 1)) / (1 - a))[:, None] + (0 if size else gain)
            rounds = rounds + list(sizes).count(size) / tokens
        rate = len(sizes) ** 2 / (rounds * seconds)
        gamma, others = np.unravel_index(rate.argmax(), rate.shape)
        return Plan(int(gamma), int(others), acceptance is not None and int(gamma) > 0), float(rate.max())

    def record(self, plan: Plan, sizes, kept: list[int], nodes: list[int], bonus: list[int]) -> None:
        """
        Takes what a round with drafts gave: of each row how many tokens agreed, how many drafts were kept, the column
        of the logits after the last one (beyond γ a sibling's), and whether nothing was refused.
        """
        for size in set(sizes) - {0}:
            rows = [row for row, own in enumerate(sizes) if own == size]
            whole = [bonus[row] and nodes[row] <= plan.gamma for row in rows]
            new = sum(kept[row] for row in rows if nodes[row] <= plan.gamma), len(rows) - sum(whole)
            accepted, refused = self._looked_up[size]
            self._looked_up[size] = self.MEMORY * accepted + new[0], self.MEMORY * refused + new[1]
        if not plan.small:
            return
        rows = [row for row, size in enumerate(sizes) if not size]
        kept, nodes, bonus = ([part[row] for row in rows] for part in (kept, nodes, bonus))
        tries = [node - plan.gamma for node in nodes if node > plan.gamma]
        hits = len(tries)
        refused = sum(node == 0 and not whole for node, whole in zip(nodes, bonus, strict=True))
        self._accepted = self.MEMORY * self._accepted + sum(kept) - hits
        self._rejected = self.MEMORY * self._rejected + len(bonus) - sum(bonus) + hits
        if plan.siblings and refused + hits:
            self._hits = self.MEMORY * self._hits + hits
            self._misses = self.MEMORY * self._misses + sum(tries) - hits + refused * plan.siblings


def _agree(seconds: list[float]) -> bool:
    least, second = sorted(seconds)[:2]
    return second < 1.03 * least


def measure_rounds(loop, assistant) -> RoundCosts:
    """
    What rounds of a [`BatchedCascade`] with the small model `assistant` cost, after a short text in as many rows. They
    take turns, so that a machine that slows down slows down all.
    """
    config, device, rows = copy.copy(loop.config), loop.rows.device, len(loop.texts.sequences)
    config.max_length, config.eos_token_id, config.return_dict_in_generate = 4096, None, False
    places = torch.arange(8, device=device).expand(rows, -1)
    call = places.remainder(loop.vocab_size), places, loop.processors.of_scores, StoppingCriteriaList(), config
    options = CascadeOptions(loop.options.rule, loop.options.alpha, 0, loop.options.backend, 0, "constant", 0.0)
    kinds = [(gamma, 0) for gamma in DraftLength.MEASURED] + [(1, DraftLength.MOST_SIBLINGS)]
    seconds: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    drafts = []
    # no random number of the caller is used up
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        one = type(loop)(loop.large.model, assistant, *call, options)
        one.measured = True
        one._round()  # reads the text
        # until the two least of each agree, or the machine is found too busy for that
        while (turn := len(seconds[kinds[0]])) < 2 or turn < _MOST_TURNS and not all(map(_agree, seconds.values())):
            for one.gamma, one.siblings in kinds:
                before, begin = 0.0 if one.small is None else one.small.seconds, time.perf_counter()
                one._round()
                one.emitted.tolist()  # waits for the device
                seconds[one.gamma, one.siblings].append(time.perf_counter() - begin)
                if one.gamma and one.small is not None:
                    drafts.append((one.small.seconds - before) / one.gamma)
    least = {kind: min(values) for kind, values in seconds.items()}
    # the difference of two timings, but at least a hundredth of a round
    draft, sibling = min(drafts, default=0.0), (least.popitem()[1] - least[1, 0]) / DraftLength.MOST_SIBLINGS
    # a busy machine only adds time: no round takes longer than a longer one, nor drafts less than the small model does
    shortest = [*itertools.accumulate(reversed(least.values()), min)][::-1]
    rounds = [max(own, shortest[0] + draft * gamma) for own, gamma in zip(shortest, DraftLength.MEASURED, strict=True)]
    return RoundCosts(dict(zip(DraftLength.MEASURED, rounds, strict=True)), max(sibling, 0.01 * rounds[0]), draft)
