"""vLLM's rejection sampler with π in the place of the large model's distribution, in pure PyTorch."""

import functools
import inspect
import os

import torch

from hf_iclr.generation.deferral_rules import (
    DEFERRAL_RULES,
    Distributions,
    cascade_target,
    check_rule,
    one_hot_of_largest,
    sample,
)


PLACEHOLDER = -1  # what vLLM writes after a request's last token
GREEDY = -1  # the temperature that vLLM gives to requests that decode greedily
RULE, ALPHA = "HF_ICLR_CASCADE_RULE", "HF_ICLR_CASCADE_ALPHA"


def rejection_sample(
    draft_token_ids: torch.Tensor,
    num_draft_tokens: list[int],
    max_spec_len: int,
    cu_num_draft_tokens: torch.Tensor,
    draft_probs: torch.Tensor | None,
    target_probs: torch.Tensor,
    bonus_token_ids: torch.Tensor,
    sampling_metadata,
    *,
    rule: str = "spec",
    alpha: float = 0.0,
) -> torch.Tensor:
    """
    Accepts drafts against π instead of p; arguments and result are those of vLLM's function of this name.

    Rules read the processed probabilities here, as vLLM hands over no others. The token after a draft that is kept
    whole is vLLM's own, of the large model.

    Args:
        draft_token_ids (`torch.LongTensor` of shape `(drafts,)`):
            Drafted tokens of all requests, one after the other.
        num_draft_tokens (`list[int]`):
            How many belong to each request.
        max_spec_len (`int`):
            The largest of these.
        cu_num_draft_tokens (`torch.Tensor` of shape `(requests,)`):
            Their cumulative sum; not used.
        draft_probs (`torch.Tensor` of shape `(drafts, vocab_size)`, *optional*):
            q at each draft. `None` for drafts without probabilities (n-grams), whose q is one-hot.
        target_probs (`torch.Tensor` of shape `(drafts, vocab_size)`):
            p at each draft; logits where all requests decode greedily.
        bonus_token_ids (`torch.Tensor` of shape `(requests, 1)`):
            The token after a draft that is kept whole.
        sampling_metadata (`vllm.v1.sample.metadata.SamplingMetadata`):
            `all_greedy`, `all_random`, `temperature` and `generators` are read.
        rule (`str`, *optional*, defaults to `"spec"`), alpha (`float`, *optional*, defaults to 0.0):
            See [`target_distribution`].

    Returns:
        `torch.IntTensor` of shape `(requests, max_spec_len + 1)`, filled up with -1.
    """
    requests, device = len(num_draft_tokens), target_probs.device
    output = torch.full((requests, max_spec_len + 1), PLACEHOLDER, dtype=torch.int32, device=device)
    owner = torch.arange(requests, device=device).repeat_interleave(torch.tensor(num_draft_tokens, device=device))
    p, ids = target_probs.float(), draft_token_ids.long()[:, None]
    q = Distributions.one_hot(ids[:, 0], p.shape[1]).probs if draft_probs is None else draft_probs.float()
    greedy = torch.full((requests,), sampling_metadata.all_greedy, device=device)
    if not sampling_metadata.all_greedy and not sampling_metadata.all_random:
        greedy = sampling_metadata.temperature == GREEDY
    greedy = greedy[owner]
    p0 = p.softmax(-1) if sampling_metadata.all_greedy else p
    p, q = (torch.where(greedy[:, None], one_hot_of_largest(probs), probs) for probs in (p0, q))
    pi = cascade_target(rule, alpha, q, p, draft_probs, p0)[0]

    draws = torch.rand(len(ids), device=device)
    for request, generator in sampling_metadata.generators.items():
        draws[owner == request] = torch.rand(num_draft_tokens[request], generator=generator, device=device)
    kept = draws * q.gather(1, ids)[:, 0] < pi.gather(1, ids)[:, 0]
    residual = (pi - q).clamp(min=0)
    # of mass 0 where π = q up to rounding: then a refusal is rounding, too
    instead = sample(torch.where(residual.sum(-1, keepdim=True) > 0, residual, pi))

    first = 0
    for request, (count, mine) in enumerate(zip(num_draft_tokens, kept.split(num_draft_tokens), strict=True)):
        accepted = int(mine.long().cumprod(0).sum())
        tokens = draft_token_ids[first : first + accepted]
        last = bonus_token_ids[request] if accepted == count else instead[first + accepted][None]
        output[request, : accepted + 1] = torch.cat([tokens, last.to(tokens)])
        first += count
    return output


def register() -> None:
    """
    What vLLM calls in each of its processes (entry point `vllm.general_plugins`): puts [`rejection_sample`] in the
    place of its own where the environment names a rule.

    Raises:
        ValueError: if the rule or alpha does not fit.
        RuntimeError: if the installed vLLM calls its sampler in another way.
    """
    rule = os.environ.get(RULE)
    if rule is None:
        return
    if rule not in DEFERRAL_RULES:
        check_rule(rule, 0.0)
    alpha = float(os.environ.get(ALPHA, "0.3"))
    check_rule(rule, alpha)
    from vllm.v1.sample import rejection_sampler as upstream

    ours = [name for name, entry in inspect.signature(rejection_sample).parameters.items() if entry.kind != 3]
    theirs = list(inspect.signature(upstream.rejection_sample).parameters)
    if theirs[: len(ours)] != ours:
        raise RuntimeError(
            f"{RULE}={rule} needs a vLLM whose `rejection_sample` takes {', '.join(ours)}; the installed one takes "
            f"{', '.join(theirs)}. Unset {RULE}, or install another vLLM."
        )
    upstream.rejection_sample = functools.partial(rejection_sample, rule=rule, alpha=alpha)
