"""Target distributions of speculative cascades: https://huggingface.co/papers/2405.19261, section 4."""

import math
from typing import NamedTuple

import torch


class DeferralRule(NamedTuple):
    """What a rule keeps of the draft, the range of its `alpha`, and what both ends of the range give."""

    keeps: str
    minimum: float
    maximum: float
    at_minimum: str
    at_maximum: str
    reads_draft: bool = True  # False: the rule reads only the large model and the drafted token
    reads_unscaled: bool = True  # False: it reads the processed probabilities alone


# q and p are the next-token probabilities of the small and the large model; q0 and p0 the same at temperature 1 and
# without banned tokens; H is entropy in nats; TV is the total variation distance of the processed q and p.
DEFERRAL_RULES: dict[str, DeferralRule] = {
    "spec": DeferralRule(
        "nothing: plain speculative decoding", -math.inf, math.inf, "large model", "large model", False, False
    ),
    "chow": DeferralRule("q if max q0 >= 1 - alpha", -1.0, 1.0, "large model", "small model"),
    "chow_log": DeferralRule("q if H(q0) <= alpha", -math.inf, math.inf, "large model", "small model"),
    "diff": DeferralRule("q if max q0 >= max p0 - alpha", -1.0, 1.0, "large model", "small model"),
    "opt": DeferralRule("q if max q0 >= max p0 - alpha TV(p, q)", -math.inf, math.inf, "large model", "small model"),
    "opt_log": DeferralRule("q if H(q0) <= H(p0) + alpha TV(p, q)", -math.inf, math.inf, "large model", "small model"),
    "token_v1": DeferralRule("tokens with q0(v) >= max p0 - alpha", -1.0, 1.0, "large model", "small model"),
    "token_v2": DeferralRule("tokens with p0(v) >= max p0 - alpha", -1.0, 1.0, "large model", "small model", False),
    "token_v3": DeferralRule(
        "tokens with p0(v) >= (1 - alpha) max p0", 0.0, 1.0, "large model, its top token kept", "small model", False
    ),
    "lossy": DeferralRule(
        "max(min(q, p / (1 - alpha)), p / beta)", 0.0, 1.0, "large model", "small model (alpha < 1)", True, False
    ),
    "ensemble": DeferralRule("the share alpha of q", 0.0, 1.0, "large model", "small model", True, False),
}


def check_rule(rule: str, alpha: float) -> None:
    """Raises `ValueError` when `rule` is unknown or `alpha` lies outside the rule's range."""
    if not isinstance(rule, str) or rule not in DEFERRAL_RULES:
        raise ValueError(f"Unknown cascade_rule {rule!r}. Choose one of {', '.join(DEFERRAL_RULES)}.")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or math.isnan(alpha):
        raise ValueError(f"cascade_alpha must be a number, got {alpha!r}. For example `cascade_alpha=0.3`.")
    low, high = DEFERRAL_RULES[rule].minimum, DEFERRAL_RULES[rule].maximum
    if not low <= alpha <= high or (rule == "lossy" and alpha == 1):
        closing = ")" if rule == "lossy" else "]"
        raise ValueError(f"cascade_alpha for rule {rule!r} must lie in [{low:g}, {high:g}{closing}, got {alpha:g}.")


class Distributions(NamedTuple):
    """Next-token probabilities of shape `(batch, length, vocab)`."""

    probs: torch.Tensor  # processed; one-hot in greedy decoding
    unscaled: torch.Tensor  # at temperature 1, without banned tokens; `probs` where the rule doesn't read it

    @classmethod
    def one_hot(cls, tokens: torch.Tensor, size: int) -> "Distributions":
        """Of tokens `(...)` that no model drew."""
        probs = torch.zeros(*tokens.shape, size, device=tokens.device).scatter_(-1, tokens[..., None], 1.0)
        return cls(probs, probs)

    @classmethod
    def cat(cls, parts: list["Distributions"]) -> "Distributions":
        probs = torch.cat([part.probs for part in parts], 1)
        if all(part.unscaled is part.probs for part in parts):
            return cls(probs, probs)
        return cls(probs, torch.cat([part.unscaled for part in parts], 1))


def target_distribution(
    rule: str,
    alpha: float,
    q: torch.Tensor,
    p: torch.Tensor,
    q_unscaled: torch.Tensor | None = None,
    p_unscaled: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    The distribution π(q, p) that a speculative cascade samples from, instead of p as speculative decoding does.

    With deferral indicator r, `π(v) = q(v) (1 - r(v)) + p(v) Σ_u r(u) q(u)` (equation 12 of the paper); a rule that
    looks at no single token gives `π = (1 - r) q + r p`. Rules read the probabilities at temperature 1, the mixture is
    made of the processed ones, as in the authors' code; banned tokens have no part in either.

    Args:
        rule (`str`):
            One of [`DEFERRAL_RULES`], which also holds the range of alpha and what both limits give.
        alpha (`float`):
            How much is left to the small model. Probability units; nats for `chow_log`; a price for `opt`, `opt_log`.
        q (`torch.Tensor` of shape `(..., vocab_size)`):
            Next-token probabilities of the small model, after temperature, top-k, top-p and other processors.
        p (`torch.Tensor` of shape `(..., vocab_size)`):
            The same of the large model.
        q_unscaled (`torch.Tensor` of shape `(..., vocab_size)`, *optional*, defaults to `q`):
            Probabilities of the small model at temperature 1, without banned tokens.
        p_unscaled (`torch.Tensor` of shape `(..., vocab_size)`, *optional*, defaults to `p`):
            The same of the large model.

    Returns:
        `torch.Tensor` of shape `(..., vocab_size)`: probabilities that sum to 1.

    Raises:
        ValueError: if the rule is unknown or alpha lies outside its range.
    """
    check_rule(rule, alpha)
    return cascade_target(rule, alpha, q, p, q_unscaled, p_unscaled)[0]


def cascade_target(
    rule: str,
    alpha: float,
    q: torch.Tensor,
    p: torch.Tensor,
    q_unscaled: torch.Tensor | None = None,
    p_unscaled: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    [`target_distribution`] together with the deferred mass Σ_u r(u) q(u), a tensor of shape `(...)`: the probability
    that the large model decides. Deferral is not rejection: a draft is rejected with probability TV(π, q).
    """
    q0 = q if q_unscaled is None else q_unscaled
    p0 = p if p_unscaled is None else p_unscaled
    if rule == "spec":
        return p, torch.ones_like(p[..., 0])
    if rule == "ensemble":
        return alpha * q + (1 - alpha) * p, torch.full_like(p[..., 0], 1 - alpha)
    if rule == "lossy":
        pi = _lossy_target(alpha, q, p)
        return pi, 1 - torch.minimum(q, pi).sum(-1)

    if rule == "chow":
        kept = _top(q0) >= 1 - alpha
    elif rule == "chow_log":
        kept = _entropy(q0) <= alpha
    elif rule == "diff":
        kept = _top(q0) >= _top(p0) - alpha
    elif rule == "opt":
        kept = _top(q0) >= _top(p0) - alpha * total_variation(p, q)[..., None]
    elif rule == "opt_log":
        kept = _entropy(q0) <= _entropy(p0) + alpha * total_variation(p, q)[..., None]
    elif rule == "token_v1":
        kept = q0 >= _top(p0) - alpha
    elif rule == "token_v2":
        kept = p0 >= _top(p0) - alpha
    else:
        kept = p0 >= _top(p0) * (1 - alpha)

    if kept.shape[-1] == 1:  # all tokens or none
        return torch.where(kept, q, p), (~kept[..., 0]).to(p.dtype)
    kept_q = q * kept
    deferred = (1 - kept_q.sum(-1, keepdim=True)).clamp(min=0)
    return kept_q + deferred * p, deferred[..., 0]


def mixed_probs(rule: str, scores: torch.Tensor, greedy: bool) -> torch.Tensor:
    """What a rule mixes, of processed scores `(..., vocab_size)`; in greedy decoding `ensemble` mixes first."""
    return one_hot_of_largest(scores) if greedy and rule != "ensemble" else scores.softmax(-1)


def decide(
    rule: str, alpha: float, q: Distributions, p: Distributions, greedy: bool, strict: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    π of a call, the deferred mass and TV(π, p), tensors of shape `(...)`, of what [`mixed_probs`] gave. `strict`,
    boolean of shape `(...)`, says where the large model decides whatever the rule.
    """
    pi, deferred = cascade_target(rule, alpha, q.probs, p.probs, q.unscaled, p.unscaled)
    if strict is not None:
        pi, deferred = torch.where(strict[..., None], p.probs, pi), torch.where(strict, 1.0, deferred)
    large = p.probs
    if greedy and rule == "ensemble":
        pi, large = one_hot_of_largest(pi), one_hot_of_largest(large)
    return pi, deferred, total_variation(pi, large)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Total variation distance Σ_v max(0, p(v) - q(v)) of distributions of shape `(..., vocab_size)`."""
    return (p - q).clamp(min=0).sum(-1)


def one_hot_of_largest(scores: torch.Tensor) -> torch.Tensor:
    """The distribution, of shape `(..., vocab_size)`, that greedy decoding draws from."""
    return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)


def sample(probs: torch.Tensor) -> torch.Tensor:
    """
    Draws token ids of shape `(...)` from probabilities, or a multiple of them, of shape `(..., vocab)`: the cumulative
    sum is inverted, first over blocks of tokens, then inside of one.
    """
    size, draw = probs.shape[-1], torch.rand(probs.shape[:-1], dtype=torch.float64, device=probs.device)
    if size <= _BLOCK:
        return _invert(probs, draw)[0]
    missing = -size % _BLOCK
    blocks = torch.nn.functional.pad(probs, (0, missing)) if missing else probs
    blocks = blocks.unflatten(-1, (-1, _BLOCK))
    block, rest = _invert(blocks.sum(-1), draw)
    inside = blocks.take_along_dim(block[..., None, None], -2)[..., 0, :]
    token, _ = _invert(inside, rest)
    return (block * _BLOCK + token).clamp(max=size - 1)  # beyond it only where there are no numbers


_BLOCK = 256


def _invert(masses: torch.Tensor, draw: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry in which the share `draw` of the whole mass lies, and what share of that entry lies before it."""
    cumulative = masses.cumsum(-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    draw = draw[..., None] * total
    draw = torch.minimum(draw, total.nextafter(torch.zeros_like(total)))  # rounding must not reach past the last one
    entry = torch.searchsorted(cumulative, draw, right=True).clamp(max=masses.shape[-1] - 1)
    mass = masses.gather(-1, entry)
    share = (draw - cumulative.gather(-1, entry) + mass) / mass
    return entry[..., 0], share[..., 0].clamp(0, 1)


def draw_siblings(probs: torch.Tensor, first: torch.Tensor, count: int, greedy: bool) -> torch.Tensor:
    """
    Further candidates for the place of a drafted token, of shape `(batch, count)`: drawn from `probs` (`(batch,
    vocab)`) without those before them; in greedy decoding, the tokens that come next in these scores.
    """
    count = min(count, probs.shape[-1] - 1)
    if greedy:
        return probs.scatter(-1, first[:, None], -torch.inf).topk(count).indices
    tokens, rest = [first], probs
    for _ in range(count):
        rest = rest.scatter(-1, tokens[-1][:, None], 0.0)
        tokens.append(sample(rest))
    return torch.stack(tokens[1:], 1) if count else first[:, None][:, :0]


class Accepted(NamedTuple):
    """What verification kept of a round's drafts, row by row."""

    drafts: torch.Tensor  # (batch, γ); a sibling that was taken stands in the place of the first draft
    counts: torch.Tensor  # how many of them are kept
    node: torch.Tensor  # the column of the large model's logits after the last one kept; beyond γ, a sibling's
    bonus: torch.Tensor  # whether nothing was refused
    ends: torch.Tensor  # whether there is no q yet after the last one kept
    residual: torch.Tensor | None  # what is left of π where the first draft and its siblings were refused


def accept_drafts(drafts, siblings, pi, q, lengths, greedy: bool) -> Accepted:
    """
    Accepts drafts `(batch, γ)`, of which row i has `lengths[i]`, from the left against π `(batch, γ, vocab)`, and
    where the first is refused its siblings `(batch, n)`.
    """
    gamma = drafts.shape[1]
    pi_draft = pi.gather(-1, drafts[..., None])[..., 0]
    if greedy:
        kept = pi_draft > 0.5
    else:
        kept = torch.rand_like(pi_draft) * q.gather(-1, drafts[..., None])[..., 0] < pi_draft
    drafted = torch.arange(gamma, device=drafts.device) < lengths[:, None]
    counts = (kept & drafted).long().cumprod(1).sum(1)
    bonus = counts == lengths
    ends = bonus & (counts == gamma)
    if siblings.shape[1] == 0:
        return Accepted(drafts, counts, counts, bonus, ends, None)
    which, residual = accept_sibling(pi[:, 0], q[:, 0], drafts[:, 0], siblings, greedy)
    other = (counts == 0) & (lengths > 0) & (which > 0)
    taken = siblings.gather(1, (which - 1).clamp(min=0)[:, None])
    drafts = torch.cat([torch.where(other[:, None], taken, drafts[:, :1]), drafts[:, 1:]], 1)
    node = torch.where(other, gamma + which, counts)
    return Accepted(drafts, counts + other, node, bonus | other, ends | other, residual)


def draw_next(found: Accepted, target: torch.Tensor, pi, q, greedy: bool) -> torch.Tensor:
    """
    The token after the drafts that are kept: of `target` (`(batch, vocab)`) where these end, else of what is left of π
    `(batch, γ, vocab)` where one was refused; π is `None` where nothing was drafted.
    """
    if pi is not None:
        index, drafted = torch.arange(len(found.counts), device=target.device), found.counts.clamp(max=pi.shape[1] - 1)
        target = torch.where(found.ends[:, None], target, pi[index, drafted])
    if greedy:
        return target.argmax(-1)
    if pi is not None:
        residual = (target - q[index, drafted]).clamp(min=0)
        if found.residual is not None:
            residual = torch.where((found.counts == 0)[:, None], found.residual, residual)
        # A residual of mass 0 means π = q up to rounding: then a refusal is rounding too, and π serves.
        usable = ~found.bonus & (residual.sum(-1) > 0)
        target = torch.where(usable[:, None], residual, target)
    return sample(target)


def accept_sibling(
    pi: torch.Tensor, q: torch.Tensor, first: torch.Tensor, siblings: torch.Tensor, greedy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Recursive rejection sampling (https://huggingface.co/papers/2305.09781), after a draft `first` of q was refused:
    the target is what is left of π, the proposal is q without the tokens tried. What is accepted, or else drawn from
    what is left in the end, follows π.

    Args:
        pi, q (`torch.Tensor` of shape `(batch, vocab_size)`):
            The target and the distribution that `first` was drawn from; one-hot in greedy decoding.
        first (`torch.LongTensor` of shape `(batch,)`), siblings (`torch.LongTensor` of shape `(batch, count)`):
            Candidates, in the order in which they were drawn.
        greedy (`bool`):
            Whether a candidate is accepted where π is one-hot.

    Returns:
        `tuple`: which sibling is accepted, from 1 on, 0 for none; and what is left of π, of any mass.
    """
    which, left, rest, tried = torch.zeros_like(first), (pi - q).clamp(min=0), q, first
    for index in range(siblings.shape[1]):
        token = siblings[:, index : index + 1]
        if greedy:
            hit = pi.gather(-1, token)[:, 0] > 0.5
        else:
            rest = rest.scatter(-1, tried[:, None], 0.0)
            tiny = torch.finfo(pi.dtype).tiny
            left = left / left.sum(-1, keepdim=True).clamp(min=tiny)
            proposal = rest / rest.sum(-1, keepdim=True).clamp(min=tiny)
            offered = proposal.gather(-1, token)[:, 0]  # 0 where q has no other token
            hit = (torch.rand_like(offered) * offered < left.gather(-1, token)[:, 0]) & (offered > 0)
            left, tried = (left - proposal).clamp(min=0), token[:, 0]
        which = torch.where(hit & (which == 0), index + 1, which)
    return which, left


def _top(probs: torch.Tensor) -> torch.Tensor:
    return probs.amax(-1, keepdim=True)


def _entropy(probs: torch.Tensor) -> torch.Tensor:
    return torch.special.entr(probs).sum(-1, keepdim=True)


def _lossy_target(alpha: float, q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """
    max(min(q, p / (1 - α)), t p) with t = 1/β in [0, 1] chosen so that the mass is 1. The mass is convex and piecewise
    linear in t and at least 1 at t = 1, so Newton's method from there reaches the root in finitely many steps.
    """
    lenient = torch.minimum(q, p / (1 - alpha))
    t = torch.ones_like(_top(p))
    for _ in range(64):
        below = lenient <= t * p
        slope = (p * below).sum(-1, keepdim=True)
        root = (1 - (lenient * ~below).sum(-1, keepdim=True)) / slope.clamp(min=torch.finfo(p.dtype).tiny)
        new_t = torch.where(slope > 0, root.clamp(0, 1), t)
        if torch.equal(new_t, t):
            break
        t = new_t
    return torch.maximum(lenient, t * p)
