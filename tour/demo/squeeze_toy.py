"""The squeezing effect where it is exact: one gradient step of a softmax over a handful of logits."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_iclr.extras import new_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SqueezeStep(NamedTuple):
    """
    One exact step of softmax regression on `-log π(y)`, up (a negative gradient) or down (a positive one).

    Args:
        logits (`np.ndarray` of shape `(vocab,)`):
            After the step.
        probs_before (`np.ndarray` of shape `(vocab,)`):
            π.
        probs (`np.ndarray` of shape `(vocab,)`):
            π' after the step.
        ratio (`np.ndarray` of shape `(vocab,)`):
            α_i = π'_i / π_i.
        threshold (`float`):
            τ. After a negative gradient the tokens other than `target` with π_i > τ gain and all others lose; after a
            positive one those with π_i < τ gain.
        first_order_threshold (`float`):
            Σ_i π_i² - π(y), what τ tends to as `step_size` goes to zero.
    """

    logits: NDArray[np.float64]
    probs_before: NDArray[np.float64]
    probs: NDArray[np.float64]
    ratio: NDArray[np.float64]
    threshold: float
    first_order_threshold: float


def squeeze_step(logits: ArrayLike, target: int, step_size: float, negative: bool = True) -> SqueezeStep:
    """
    One exact step of a softmax on the negative log-likelihood of one token: the model of section 3.3 and appendix C of
    https://huggingface.co/papers/2407.10490. With a learning rate η and features φ the step is h = η ‖φ‖².

    A negative gradient moves the logits by h (π - e_y), so

        α_i = exp(h (π_i - 1[i = y])) / Z,   Z = Σ_j π_j exp(h (π_j - 1[j = y])),

    and a token other than y gains exactly if π_i > τ = log Z / h. A positive gradient is the same with -h for h. The
    threshold is worked out here; the paper states what follows from it: π(y) falls, the most likely other token gains,
    the rich get richer, and all the more so the peakier π is and the less likely y is.

    By hand: π = (1/2, 1/4, 1/4), y the last, h = 4 log 2. The exponents h (π_i - 1[i = y]) are 2 log 2, log 2 and
    -3 log 2, so Z = 1/2 · 4 + 1/4 · 2 + 1/4 · 1/8 = 81/32, α = (4, 2, 1/8) · 32/81 and π' = (64, 16, 1) / 81. The
    token at 1/4 loses, as τ = log(81/32) / (4 log 2) = .335 lies above it; to first order τ is 3/8 - 1/4 = 1/8.

    Args:
        logits (array of shape `(vocab,)`):
            Before the step.
        target (`int`):
            y.
        step_size (`float`):
            h, positive, in logits per unit of probability.
        negative (`bool`, *optional*, defaults to `True`):
            Whether to go up on `-log π(y)`, as DPO does for a rejected answer, rather than down.

    Returns:
        [`SqueezeStep`]

    Raises:
        `ValueError`: when a logit is not finite, `target` is no index, or `step_size` is not positive.
    """
    before = np.asarray(logits, dtype=np.float64)
    if before.ndim != 1 or len(before) < 2 or not np.isfinite(before).all():
        raise ValueError(f"logits must be a vector of at least two finite numbers, got {before!r:.80}.")
    if not 0 <= target < len(before):
        raise ValueError(f"target must be in 0 .. {len(before) - 1}, got {target}.")
    if not 0 < step_size < np.inf:
        raise ValueError(f"step_size must be positive, got {step_size}. For example `step_size=0.5`.")
    h = step_size if negative else -step_size
    log_probs = _log_softmax(before)
    probs = np.exp(log_probs)
    direction = probs.copy()
    direction[target] -= 1
    growth = h * direction
    if step_size < 1:
        log_z = np.log1p(probs @ np.expm1(growth))  # Z - 1 is of the order of h
    else:
        log_z = np.logaddexp.reduce(log_probs + growth)
    ratio = np.exp(growth - log_z)
    return SqueezeStep(before + growth, probs, probs * ratio, ratio, log_z / h, probs @ probs - probs[target])


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return logits - np.logaddexp.reduce(logits)


class SqueezePanel(NamedTuple):
    """
    One picture of [`squeeze_panels`].

    Args:
        title (`str`):
            What is done to which distribution.
        step ([`SqueezeStep`]):
            The step on `target` alone.
        target (`int`):
            y.
        chosen (`int`, *optional*):
            A token whose likelihood is raised at the same time, in `with_chosen`.
        with_chosen (`np.ndarray` of shape `(vocab,)`, *optional*):
            π' after both gradients.
    """

    title: str
    step: SqueezeStep
    target: int
    chosen: int | None = None
    with_chosen: NDArray[np.float64] | None = None


def squeeze_panels(seed: int = 0) -> list[SqueezePanel]:
    """
    The five cases in which the paper shows the effect, drawn anew: softmax regression of 50 classes on 4 features (and
    of 1000 on 50 in the last), steps of the size of the authors' code.

    With both gradients on the *same* context their terms in π cancel, the logits move by h (e_chosen - e_target), and
    no third token is squeezed: in a language model squeezing comes from contexts the two answers do not share.

    Args:
        seed (`int`, *optional*, defaults to 0):
            Of features and weights.

    Returns:
        `list[SqueezePanel]`: A positive gradient, B to E negative ones.
    """
    rng = np.random.default_rng(seed)
    features = rng.standard_normal(4)
    features *= 2 / np.linalg.norm(features)
    scale = float(features @ features)
    plain = features @ rng.standard_normal((4, 50))
    flat = features @ (1 + 0.05 * rng.standard_normal((4, 50)))
    peaky = plain.copy()
    peaky[5:13] += scale  # as after a few steps of learning eight of the classes
    peak = int(peaky.argmax())
    valley = int(np.argsort(peaky)[len(peaky) // 4])
    chosen = int(np.argsort(peaky)[len(peaky) // 2])
    both = peaky.copy()
    both[[chosen, valley]] += np.array([0.5, -0.5]) * scale
    wide = rng.standard_normal(50)
    large = wide @ (0.5 * rng.standard_normal((50, 1000)))
    median = int(np.argsort(large)[500])
    return [
        SqueezePanel("A: positive gradient", squeeze_step(plain, 21, 0.5 * scale, negative=False), 21),
        SqueezePanel("B: negative, flat", squeeze_step(flat, 42, 0.3 * scale), 42),
        SqueezePanel("C: negative, on the peak", squeeze_step(peaky, peak, 0.5 * scale), peak),
        SqueezePanel(
            "D: negative, in a valley",
            squeeze_step(peaky, valley, 0.5 * scale),
            valley,
            chosen,
            np.exp(_log_softmax(both)),
        ),
        SqueezePanel("E: negative, 1000 classes", squeeze_step(large, median, float(wide @ wide)), median),
    ]


def plot_squeeze_panels(panels: list[SqueezePanel] | None = None) -> "Figure":
    """
    The panels, one above the other, probabilities before and after on a logarithmic axis with the threshold τ.

    Args:
        panels (`list[SqueezePanel]`, *optional*, defaults to `squeeze_panels()`):
            What to draw.

    Returns:
        [`~matplotlib.figure.Figure`]
    """
    panels = squeeze_panels() if panels is None else panels
    figure = new_figure("plot_squeeze_panels", (9, 2.2 * len(panels)))
    for axes, panel in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        step, classes = panel.step, np.arange(len(panel.step.probs))
        others = classes != panel.target
        losing = int((step.ratio[others] < 1).sum())
        axes.plot(classes, step.probs_before, color="0.6", lw=1, label="before")
        axes.plot(classes, step.probs, ".", ms=4, color="C0", label="after")
        if panel.with_chosen is not None:
            axes.plot(classes, panel.with_chosen, "x", ms=4, color="C2", label="after, chosen raised as well")
            axes.axvline(panel.chosen, color="C2", lw=0.7, ls=":")
        axes.axvline(panel.target, color="C3", lw=0.7, ls=":", label="target")
        if step.threshold > 0:
            axes.axhline(step.threshold, color="C1", lw=0.8, ls="--", label="τ")
        axes.set_yscale("log")
        axes.set_title(f"{panel.title} ({losing} of {others.sum()} others lose)", fontsize=9)
        axes.set_ylabel("probability", fontsize=8)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_xlabel("class")
    return figure
