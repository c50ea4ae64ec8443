"""The token-wise constrained loss of https://huggingface.co/papers/2406.05946, equation 3, and where its window is."""

import torch
import torch.nn.functional as F


WINDOW_STARTS = ("completion", "after_template", "answer", "thinking_and_answer")
BUCKETS = ("first", "initial", "rest")  # of answer tokens
BEYOND_WINDOW = 1 << 30  # larger than any position in a window
_STRENGTHS = (1e-30, 1e30)  # beyond them nothing changes but float32 overflows


def constrained_sft_loss(logps: torch.Tensor, ref_logps: torch.Tensor, betas: torch.Tensor) -> torch.Tensor:
    """
    Loss of every answer token: equation 3 of https://huggingface.co/papers/2406.05946, shifted by a constant so that
    it reads in nats like cross-entropy.

    With `z = logps - ref_logps` it is `-(ref_logps + 2/β (log σ(β z) + log 2))`, computed as `-logps + 2/β log cosh(β
    z / 2)`, the same number and exact for a small β too. Its gradient is that of equation 3, cross-entropy weighted by
    `w = 2 σ(-β z)`; its value equals `-logps` where the model still equals the reference, and everywhere as β → 0.

    Args:
        logps (`torch.Tensor` of shape `(batch, seq_len)`):
            Log-probabilities (nats) of the target tokens under the model in training.
        ref_logps (`torch.Tensor` of shape `(batch, seq_len)`):
            The same under the frozen aligned model. Not read where `betas` is 0.
        betas (`torch.Tensor` of shape `(batch, seq_len)`):
            Strength β of the pull towards the reference at each token; 0 is plain cross-entropy.

    Returns:
        `torch.Tensor` of shape `(batch, seq_len)`: the loss in nats.

    Example:

    ```python
    >>> import torch
    >>> from hf_iclr import constrained_sft_loss

    >>> logps, ref_logps = torch.tensor([[-1.0, -0.5]]), torch.tensor([[-1.0, -3.0]])
    >>> constrained_sft_loss(logps, ref_logps, torch.tensor([[2.0, 2.0]]))  # 1 at the reference, flat above it
    tensor([[1.0000, 2.3136]])
    ```
    """
    constrained = betas > 0
    strength = torch.where(constrained, betas, 1.0).clamp(*_STRENGTHS)
    half = (strength / 2 * torch.where(constrained, logps - ref_logps, 0.0)).abs()
    log_cosh = half + torch.log1p(torch.expm1(-2 * half) / 2)
    return 2 / strength * log_cosh - logps


def constraint_weights(logps: torch.Tensor, ref_logps: torch.Tensor, betas: torch.Tensor) -> torch.Tensor:
    """
    The weight of each token's cross-entropy gradient under [`constrained_sft_loss`], `w = 2 σ(β (ref_logps - logps))`:
    1 at the reference, towards 0 for a token that has become more likely than there, at most 2.
    """
    return torch.where(betas > 0, 2 * torch.sigmoid(betas.clamp(*_STRENGTHS) * (ref_logps - logps)), 1.0)


def constraint_sums(
    logps: torch.Tensor,
    ref_logps: torch.Tensor,
    betas: torch.Tensor,
    positions: torch.Tensor,
    losses: torch.Tensor,
    mask: torch.Tensor,
    *,
    window_tokens: int,
) -> torch.Tensor:
    """
    What a batch adds to the metrics: the loss and the number of its tokens, then for each of `BUCKETS` the number of
    its constrained tokens, and the sums of their weights and of log π - log π_ref.
    """
    constrained = mask & (betas > 0)
    weights = constraint_weights(logps, ref_logps, betas)
    buckets = (positions == 1, (positions > 1) & (positions <= window_tokens), positions > window_tokens)
    zero = torch.zeros((), device=logps.device)
    sums = [losses.sum(dtype=torch.float32), mask.sum()]
    for bucket in buckets:
        inside = bucket & constrained
        log_ratio = torch.where(inside, logps - ref_logps, zero)
        sums += [inside.sum(), torch.where(inside, weights, zero).sum(), log_ratio.sum()]
    return torch.stack([value.float() for value in sums])


def constraint_means(sums: list[float]) -> dict[str, float]:
    """The metrics of summed [`constraint_sums`], of those buckets that had a token."""
    means: dict[str, float] = {}
    for index, name in enumerate(BUCKETS):
        count, weight, log_ratio = sums[3 * index : 3 * index + 3]
        if count:
            means |= {f"constraint/weight_{name}": weight / count, f"constraint/log_ratio_{name}": log_ratio / count}
    return means


def answer_positions(mask: torch.Tensor) -> torch.Tensor:
    """
    Number the tokens of every answer from 1.

    Args:
        mask (`torch.BoolTensor` of shape `(batch, seq_len)`):
            Tokens with a loss. Every contiguous run is an answer of its own: the turns of a conversation, and the
            documents of a packed row, whose first token never has a loss.

    Returns:
        `torch.LongTensor` of shape `(batch, seq_len)`: 1 at the first token of an answer, 0 outside of answers.
    """
    count = mask.cumsum(dim=-1)
    starts = mask & ~F.pad(mask, (1, 0))[..., :-1]
    before = torch.where(starts, count - 1, 0).cummax(dim=-1).values
    return torch.where(mask, count - before, 0)


def window_positions(
    labels: torch.Tensor,
    window_start: str = "completion",
    template_ids: frozenset[int] = frozenset(),
    end_of_thinking_id: int | None = None,
) -> torch.Tensor:
    """
    Position of every answer token counted from where the protected window starts.

    Args:
        labels (`torch.LongTensor` of shape `(batch, seq_len)`):
            Target tokens, -100 where there is no loss.
        window_start (`str`, *optional*, defaults to `"completion"`):
            `"completion"`: the window starts with each answer. `"after_template"`: it skips the special and blank
            tokens an answer begins with. `"answer"`: so does it, and it starts after the thinking where there is one.
            `"thinking_and_answer"`: one window at the start of the thinking, another at the start of the answer.
        template_ids (`frozenset[int]`, *optional*):
            Tokens that all but `"completion"` skip.
        end_of_thinking_id (`int`, *optional*):
            The token that ends the thinking; needed by `"answer"` and `"thinking_and_answer"`.

    Returns:
        `torch.LongTensor` of shape `(batch, seq_len)`: 1 at the first token of a window, 0 outside of answers,
        `BEYOND_WINDOW` for answer tokens in front of a window.
    """
    if window_start == "completion":
        return answer_positions(labels != -100)
    return torch.tensor(
        [_row_positions(row, window_start, template_ids, end_of_thinking_id) for row in labels.tolist()],
        device=labels.device,
    )


def _row_positions(
    labels: list[int], window_start: str, template_ids: frozenset[int], end_of_thinking_id: int | None
) -> list[int]:
    positions: list[int] = []
    answer_start = position = 0
    for index, label in enumerate(labels):
        if label == -100:
            answer_start, position = index + 1, 0
            positions.append(0)
        elif label == end_of_thinking_id and window_start != "after_template":
            if window_start == "answer":
                positions[answer_start:] = [BEYOND_WINDOW] * (index - answer_start)
            position = 0
            positions.append(BEYOND_WINDOW)
        elif position == 0 and label in template_ids:
            positions.append(BEYOND_WINDOW)
        else:
            position += 1
            positions.append(position)
    return positions


def schedule_betas(
    positions: torch.Tensor, beta_first: float, beta_initial: float, beta_rest: float, num_initial_tokens: int
) -> torch.Tensor:
    """
    The paper's schedule: `beta_first` for the first token of a window, `beta_initial` up to `num_initial_tokens`,
    `beta_rest` for all later answer tokens, 0 outside of answers (section 4.1 of
    https://huggingface.co/papers/2406.05946).
    """
    betas = torch.where(positions <= num_initial_tokens, beta_initial, beta_rest)
    betas = torch.where(positions == 1, beta_first, betas)
    return torch.where(positions > 0, betas, 0.0)
