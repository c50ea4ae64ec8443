"""What one training step on a preference pair does to any answer: predicted by A·K·G, and measured."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch.func import functional_call, jvp
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.extras import new_figure
from hf_iclr.models import evaluation_mode, pad_answers

from .rows import EncodedAnswer, encode_answers


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class InfluenceReport:
    """
    Args:
        table (`pandas.DataFrame`):
            A row per pair, probe and kind of answer. In nats, summed over the answer's tokens: `pull_up` of the chosen
            answer, `push_down` of the rejected one, `rest` (what an optimiser does to parameters without a gradient or
            where the two gradients cancel), their sum `predicted`, and `measured`. The factors are `A`, the sum of
            ‖e_y - π‖ over the probe's `tokens`, `G_up` and `G_down`, the same of the two trained answers, and `K_up`
            and `K_down`, what is left: `pull_up = scale A K_up G_up`, `push_down = -scale A K_down G_down`.
        tokens (`pandas.DataFrame`):
            A row per token of each of these answers: `position`, `token`, `logp` before the step and the same parts.
        scale (`float`):
            What the factors are relative to: ∂L/∂log π(y⁻) = β/2, times the learning rate for a plain gradient step.
    """

    table: pd.DataFrame
    tokens: pd.DataFrame
    scale: float

    @property
    def correlation(self) -> float:
        """Of prediction and measurement over all rows."""
        return float(np.corrcoef(self.table["predicted"], self.table["measured"])[0, 1])

    @property
    def slope(self) -> float:
        """Of the measurement on the prediction; 1 where a step is small enough to be linear."""
        return float(np.polyfit(self.table["predicted"], self.table["measured"], 1)[0])

    def plot_tokens(self, pair: int = 0, probe: int = 0) -> "Figure":
        """
        Heat map of the change of every token of the answers to one probe.

        Args:
            pair, probe (`int`, *optional*, default to 0):
                Which.

        Returns:
            [`~matplotlib.figure.Figure`]
        """
        rows = self.tokens[(self.tokens["pair"] == pair) & (self.tokens["probe"] == probe)]
        if rows.empty:
            raise ValueError(f"Expected a pair and a probe of the report, got {pair} and {probe}.")
        parts = ["pull_up", "push_down", "measured"]
        kinds = list(rows["kind"].unique())
        widest = rows.groupby("kind").size().max()
        figure = new_figure("InfluenceReport.plot_tokens", (2 + 0.35 * widest, 1.8 * len(kinds)))
        limit = rows[parts].abs().to_numpy().max() or 1.0
        for axes, kind in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
            answer = rows[rows["kind"] == kind]
            picture = axes.imshow(answer[parts].T, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
            axes.set_xticks(range(len(answer)), answer["token"].str.replace("$", r"\$"), rotation=90, fontsize=7)
            axes.set_yticks(range(len(parts)), parts, fontsize=7)
            axes.set_title(kind, fontsize=8, loc="left")
        figure.colorbar(picture, ax=figure.axes, label="change of log π, nats", shrink=0.6)
        return figure


def influence_audit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Iterable[Mapping[str, Any]],
    probes: Iterable[Mapping[str, Any]],
    *,
    step_size: float | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    beta: float = 0.1,
    max_length: int | None = None,
    batch_size: int = 4,
) -> InfluenceReport:
    """
    Explain one DPO step on each pair (from the same weights, which are put back) by the decomposition of
    proposition 1 of https://huggingface.co/papers/2407.10490. At the start of DPO, where policy and reference agree, a
    step of size η changes the log-probability of any answer y to any prompt x by

        Δ log π(y | x) ≈ η β/2 (⟨∇log π(y | x), ∇log π(y⁺)⟩ - ⟨∇log π(y | x), ∇log π(y⁻)⟩),

    each inner product being Σ_m Σ_l A_m K_ml G_l over the tokens m of y and l of the trained answer: A_m = e_y - π and
    G_l = e_y - π in the space of the logits, K their empirical neural tangent kernel. The products are forward-mode
    derivatives along the two gradients, so they come per token of y at the price of one pass, and with an optimiser
    along the step it really takes: d = θ' - θ is split as d_i / g_i times the gradients of the two answers, where that
    is not more than a hundred times the largest d of the tensor.

    The attention is computed eagerly meanwhile, as others have no forward-mode derivative.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            In float32. With an adapter, only its parameters move.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Of the model.
        pairs (iterable of rows):
            `prompt`, `chosen`, `rejected`: text or messages.
        probes (iterable of rows):
            `prompt` and any number of answers, each column a kind, as [`build_probe_set`] makes them.
        step_size (`float`, *optional*):
            η of a plain gradient step. Either this or `optimizer`.
        optimizer ([`~torch.optim.Optimizer`], *optional*):
            Over parameters of `model`; its state is put back too. In the middle of a training its momentum is credited
            to the two answers like the gradient.
        beta (`float`, *optional*, defaults to `0.1`):
            β of DPO.
        max_length (`int`, *optional*):
            Tokens of prompt and answer together; what exceeds it is cut off.
        batch_size (`int`, *optional*, defaults to 4):
            Probe answers in one pass.

    Returns:
        [`InfluenceReport`]

    Raises:
        `ValueError`: when the model is not in float32, an answer is empty, or both or none of `step_size` and
            `optimizer` are given.
    """
    if (step_size is None) == (optimizer is None):
        raise ValueError("Expected either step_size or optimizer. For example `step_size=1e-4`.")
    if step_size is not None and not step_size > 0:
        raise ValueError(f"step_size must be positive, got {step_size}. For example `step_size=1e-4`.")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}. DPO's default is 0.1.")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if {p.dtype for p in model.parameters()} - {torch.float32, torch.float64} or not parameters:
        raise ValueError(
            "Expected a model in float32 with trainable parameters: a small step is lost in shorter types. Load it "
            "with `dtype=torch.float32`."
        )
    sides = encode_answers(tokenizer, pairs, ("chosen", "rejected"), max_length)
    trained = list(zip(sides[::2], sides[1::2], strict=True))
    asked = encode_answers(tokenizer, probes, None, max_length, "probes")

    weight = beta / 2
    scale = weight * (step_size or 1.0)
    rows, token_rows = [], []
    with _eager_attention(model), evaluation_mode(model):
        batches = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
        for pair, (chosen, rejected) in enumerate(tqdm(trained, desc="influence", disable=len(trained) == 1)):
            (up, norm_up), (down, norm_down) = (
                answer_gradient(model, parameters, each) for each in (chosen, rejected)
            )
            backup = {name: p.clone() for name, p in parameters.items()}
            try:
                directions = _step(parameters, up, down, weight, scale, optimizer)
                after = [_token_logps(model, batch)[0] for batch in batches]
            finally:
                for name, p in parameters.items():
                    p.copy_(backup[name])
            for batch, moved in zip(batches, after, strict=True):
                before, norms, mask = _token_logps(model, batch)
                parts = {
                    name: _derivative(model, parameters, direction, batch) for name, direction in directions.items()
                }
                parts.setdefault("rest", torch.zeros_like(before))
                parts["predicted"] = parts["pull_up"] + parts["push_down"] + parts["rest"]
                parts["measured"] = moved - before
                for index, answer in enumerate(batch):
                    own = mask[index]
                    by_token = {name: part[index][own].double() for name, part in parts.items()}
                    sums = {name: part.sum().item() for name, part in by_token.items()}
                    a = norms[index][own].double().sum().item()
                    where = {"pair": pair, "probe": answer.row, "kind": answer.kind}
                    factors = {
                        "A": a,
                        "K_up": sums["pull_up"] / (scale * a * norm_up),
                        "G_up": norm_up,
                        "K_down": -sums["push_down"] / (scale * a * norm_down),
                        "G_down": norm_down,
                    }
                    rows.append({**where, "tokens": len(answer.ids), **sums, **factors})
                    words = [tokenizer.decode([token]) for token in answer.ids]
                    token_rows.append(
                        pd.DataFrame(
                            {
                                **where,
                                "position": range(len(words)),
                                "token": words,
                                "logp": before[index][own].double().numpy(force=True),
                                **{name: part.numpy(force=True) for name, part in by_token.items()},
                            }
                        )
                    )
    return InfluenceReport(pd.DataFrame(rows), pd.concat(token_rows, ignore_index=True), scale)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _logits_and_targets(
    model: PreTrainedModel, answers: list[EncodedAnswer], parameters: dict[str, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = pad_answers([(answer.prompt_ids, answer.ids) for answer in answers], model.device)
    labels = inputs.pop("labels")
    kwargs = {**inputs, "use_cache": False}
    outputs = model(**kwargs) if parameters is None else functional_call(model, parameters, (), kwargs)
    return outputs.logits[:, :-1], inputs["input_ids"][:, 1:, None], labels[:, 1:] != -100


def _token_logps(
    model: PreTrainedModel, answers: list[EncodedAnswer]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log π(y), ‖e_y - π‖ and where the answers are, each of shape `(batch, length - 1)`."""
    logits, targets, mask = _logits_and_targets(model, answers)
    log_p = logits.log_softmax(-1)
    logps = log_p.gather(-1, targets).squeeze(-1)
    squares = log_p.exp_().square().sum(-1) - 2 * logps.exp() + 1
    return logps, squares.clamp(min=0).sqrt(), mask


def answer_gradient(
    model: PreTrainedModel, parameters: dict[str, torch.Tensor], answer: EncodedAnswer
) -> tuple[dict[str, torch.Tensor], float]:
    """
    ∇ log π of an answer.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            In evaluation mode.
        parameters (`dict[str, torch.Tensor]`):
            Those of `model` to differentiate by.
        answer ([`EncodedAnswer`]):
            The answer.

    Returns:
        `tuple[dict[str, torch.Tensor], float]`: the gradient, and Σ ‖e_y - π‖ over the answer's tokens.
    """
    with torch.enable_grad():
        logits, targets, mask = _logits_and_targets(model, [answer])
        logp = logits.log_softmax(-1).gather(-1, targets).squeeze(-1)[mask].sum()
        *gradients, residual = torch.autograd.grad(logp, [*parameters.values(), logits], allow_unused=True)
    gradients = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), gradients, strict=True)]
    return dict(zip(parameters, gradients, strict=True)), residual.norm(dim=-1).double().sum().item()


def _step(
    parameters: dict[str, torch.Tensor],
    up: dict[str, torch.Tensor],
    down: dict[str, torch.Tensor],
    weight: float,
    scale: float,
    optimizer: torch.optim.Optimizer | None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Move the parameters, and tell in which directions."""
    if optimizer is None:
        for name, p in parameters.items():
            p.add_(up[name] - down[name], alpha=scale)
        return {
            "pull_up": {name: g * scale for name, g in up.items()},
            "push_down": {name: g * -scale for name, g in down.items()},
        }
    state, kept = copy.deepcopy(optimizer.state_dict()), {name: p.grad for name, p in parameters.items()}
    before = {name: p.clone() for name, p in parameters.items()}
    try:
        gradients = {name: weight * (down[name] - up[name]) for name in parameters}
        for name, p in parameters.items():
            p.grad = gradients[name]
        optimizer.step()
        pull, push, rest = {}, {}, {}
        for name, p in parameters.items():
            moved = p - before[name]
            rate = weight * moved / gradients[name]
            # Where the gradients cancel but decay or momentum move on, the two parts would be huge and opposite.
            split = rate.abs() * (up[name].abs() + down[name].abs()) <= 100 * moved.abs().max()
            rate = torch.where(split & (gradients[name] != 0), rate, 0)
            pull[name], push[name] = -rate * up[name], rate * down[name]
            rest[name] = torch.where(rate == 0, moved, 0)
    finally:
        optimizer.load_state_dict(state)
        for name, p in parameters.items():
            p.grad = kept[name]
    directions = {"pull_up": pull, "push_down": push}
    return directions | ({"rest": rest} if any(d.any() for d in rest.values()) else {})


def _derivative(
    model: PreTrainedModel,
    parameters: dict[str, torch.Tensor],
    direction: dict[str, torch.Tensor],
    answers: list[EncodedAnswer],
) -> torch.Tensor:
    """Of log π along `direction`, per token."""

    def logps(values: dict[str, torch.Tensor]) -> torch.Tensor:
        logits, targets, _ = _logits_and_targets(model, answers, values)
        return logits.log_softmax(-1).gather(-1, targets).squeeze(-1)

    return jvp(logps, ({name: p.detach() for name, p in parameters.items()},), (direction,))[1]
