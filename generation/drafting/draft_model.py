"""Builds a draft model out of the large model itself, for when no small sibling exists."""

import copy
import logging
import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_iclr.generation.configuration_speculative_cascade import DraftConfig, FeatureDraftConfig
from hf_iclr.generation.drafting.distillation import distill, student_states
from hf_iclr.generation.drafting.teacher import TeacherRow, collate, read_teacher
from hf_iclr.generation.modeling_draft import DraftForCausalLM, FeatureDraftForCausalLM


logger = logging.getLogger(__name__)

MAX_COUNTED_POSITIONS = 8192  # enough to rank the vocabulary; the full head is the costly part of the closed form


def build_draft_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str | dict[str, str]],
    num_layers: int = 2,
    draft_vocab_size: int = 8192,
    *,
    kind: str = "layers",
    distill_minutes: float = 0.0,
    distill_steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 4,
    max_length: int = 256,
    ridge: float = 0.005,
    seed: int = 0,
) -> DraftForCausalLM | FeatureDraftForCausalLM:
    """
    Build a draft model for a causal language model that has no small sibling.

    One pass of the large model over `texts` gives the tokens that carry most of its probability and, in closed form,
    the affine map to its last hidden state: from the state after its first `num_layers` layers (`kind="layers"`), or
    from the token and the last hidden state one position earlier (`kind="features"`). With
    `distill_minutes` or `distill_steps` the whole draft is then trained to raise its overlap with the large model,
    which is what decides how many drafted tokens are accepted.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model, a decoder whose logits are its head applied to its last hidden state.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        texts (`list[str]` or `list[dict[str, str]]`):
            Texts like those that will be generated, best of all the model's own samples. Of a record with `"prompt"`
            and `"completion"` only the completion is learned.
        num_layers (`int`, *optional*, defaults to 2):
            How many first layers of the model the draft keeps; a feature draft keeps none.
        draft_vocab_size (`int`, *optional*, defaults to 8192):
            How many tokens the draft can write.
        kind (`str`, *optional*, defaults to `"layers"`):
            `"layers"` is a model of its own, for any loop. `"features"` reads the states that the large model computes
            anyway: about a hundredth of its cost a token, for the batched cascade only.
        distill_minutes (`float`, *optional*, defaults to 0.0):
            Wall-clock minutes of distillation; 0 stops at the closed form.
        distill_steps (`int`, *optional*):
            Optimizer steps of distillation instead of minutes: the same result on each run.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Peak learning rate of the distillation, decayed along a cosine.
        batch_size (`int`, *optional*, defaults to 4):
            Texts in one step of distillation. With minutes to spend, many small steps go further than few large ones.
        max_length (`int`, *optional*, defaults to 256):
            Longer texts are cut into pieces of this many tokens.
        ridge (`float`, *optional*, defaults to 0.005):
            Penalty of the affine map, per position and unit of input variance.
        seed (`int`, *optional*, defaults to 0):
            Seed of the distillation's order of texts.

    Returns:
        [`DraftForCausalLM`] or [`FeatureDraftForCausalLM`]: in evaluation mode and in the type of `model`; pass it as
        `assistant_model=`.

    Raises:
        ValueError: if the model is an encoder-decoder, a number is out of range, or the texts are too short.

    Example:

    ```python
    >>> draft = build_draft_model(model, tokenizer, texts, distill_minutes=5)
    >>> draft.save_pretrained("draft")
    >>> model.generate(**inputs, assistant_model=draft)
    ```
    """
    _check_arguments(model, kind, num_layers, draft_vocab_size)
    rows = read_teacher(model, tokenizer, texts, max_length=max_length)
    hidden_size = model.get_output_embeddings().weight.shape[1]
    num_positions = sum(int(row.mask.sum()) for row in rows)
    if num_positions < 2 * hidden_size:
        raise ValueError(
            f"Expected at least {2 * hidden_size} token positions to fit a map of width {hidden_size}, got "
            f"{num_positions}. Pass more or longer `texts`."
        )
    logger.info("The large model has read %d positions of %d texts.", num_positions, len(rows))

    vocabulary = frequent_tokens(model, rows, draft_vocab_size)
    embeddings = copy.deepcopy(model.get_input_embeddings()).float().cpu().requires_grad_(False)
    draft: DraftForCausalLM | FeatureDraftForCausalLM
    if kind == "layers":
        draft = truncate(model, num_layers, vocabulary)
        fit_closed_form(draft, rows, ridge=ridge)
    else:
        draft = fit_feature_draft(model, vocabulary, embeddings, rows, ridge=ridge, seed=seed)
    if distill_minutes or distill_steps:
        distill(
            draft,
            truncated_head(model, vocabulary),
            embeddings,
            rows,
            minutes=distill_minutes,
            steps=distill_steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
        )
    draft.config.expected_acceptance = round(overlap(model, draft, embeddings, rows), 3)
    return draft.to(device=model.device, dtype=model.dtype).eval()


@torch.no_grad()
def overlap(model, draft, embeddings: torch.nn.Module, rows: list[TeacherRow]) -> float:
    """Mean Σ min(p, q) over some positions of `rows`: the chance that the first draft of a round is accepted."""
    total, count, head = 0.0, 0, model.get_output_embeddings()
    for row in rows[:: max(1, len(rows) // 16)]:
        states, mask = next(student_states(draft, collate([row]), embeddings))
        keep = mask[0].nonzero()[:64, 0]
        p = head(row.hidden_states[keep].to(head.weight)).float().softmax(-1).cpu()[:, draft.draft_vocab_ids]
        total += torch.minimum(p, draft.head(states[0, keep]).softmax(-1)).sum().item()
        count += len(keep)
    return total / max(1, count)


@torch.no_grad()
def frequent_tokens(model: PreTrainedModel, rows: list[TeacherRow], size: int) -> torch.LongTensor:
    """The `size` tokens that carry most of the large model's probability, ascending."""
    head = model.get_output_embeddings()
    states = torch.cat([row.hidden_states[row.mask] for row in rows])
    states = states[:: math.ceil(len(states) / MAX_COUNTED_POSITIONS)].to(head.weight)
    mass = sum(head(chunk).float().softmax(-1).sum(0) for chunk in states.split(64)).cpu()
    kept = mass.topk(size).indices.sort().values
    logger.info(
        "%d tokens carry %.1f %% of the large model's probability.", size, 100 * mass[kept].sum() / len(states)
    )
    return kept


@torch.no_grad()
def truncate(model: PreTrainedModel, num_layers: int, draft_vocab_ids: torch.LongTensor) -> DraftForCausalLM:
    """
    The first layers of a model with its final norm, the identity as affine map, and some rows of its head: in float32,
    with a copy of its generation config.
    """
    body = copy.deepcopy(model.config)
    body.num_hidden_layers = num_layers
    if getattr(body, "layer_types", None):
        body.layer_types = body.layer_types[:num_layers]
    body.dtype = torch.float32
    draft = DraftForCausalLM(DraftConfig(body=body, draft_vocab_size=len(draft_vocab_ids))).float().eval()
    names = draft.body.state_dict().keys()
    draft.body.load_state_dict({k: v for k, v in model.base_model.state_dict().items() if k in names})
    draft.affine.weight.copy_(torch.eye(len(draft.affine.weight)))
    draft.affine.bias.zero_()
    return _with_head(draft, model, draft_vocab_ids)


def _with_head(draft, model: PreTrainedModel, draft_vocab_ids: torch.LongTensor):
    """The draft with these rows of the model's head and a copy of its generation config."""
    draft.head.load_state_dict(truncated_head(model, draft_vocab_ids).state_dict())
    draft.draft_vocab_ids.copy_(draft_vocab_ids)
    draft.generation_config = copy.deepcopy(model.generation_config)
    return draft


@torch.no_grad()
def truncated_head(model: PreTrainedModel, draft_vocab_ids: torch.LongTensor) -> torch.nn.Linear:
    """Some rows of a model's head, in float32; the bias is zero if the model has none."""
    head = model.get_output_embeddings()
    rows = torch.nn.Linear(head.in_features, len(draft_vocab_ids))
    rows.weight.copy_(head.weight[draft_vocab_ids])
    rows.bias.zero_() if head.bias is None else rows.bias.copy_(head.bias[draft_vocab_ids])
    return rows.requires_grad_(False)


def fit_affine(inputs: torch.Tensor, targets: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Weight and bias of the affine map of least squared error from states `(num_positions, in_features)` to others, with
    a penalty λ, `ridge`, on the inputs scaled to unit variance: `Σ |y - W x - b|² + λ n Σ (σ_j W_ij)²`, with σ_j the
    standard deviation of input j.
    """
    mean, mean_target, std = inputs.mean(0), targets.mean(0), inputs.std(0).clamp_min(1e-6)
    scaled = (inputs - mean) / std
    gram = scaled.T @ scaled + ridge * len(inputs) * torch.eye(inputs.shape[1])
    weight = torch.linalg.solve(gram, scaled.T @ (targets - mean_target)).T / std
    return weight, mean_target - weight @ mean


@torch.no_grad()
def fit_closed_form(draft: DraftForCausalLM, rows: list[TeacherRow], ridge: float) -> None:
    """Sets the affine map of a draft, in float32, to the best one in closed form."""
    inputs, targets = [], []
    for start in range(0, len(rows), 8):
        batch = collate(rows[start : start + 8])
        states = draft.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        inputs.append(states[batch["mask"]])
        targets.append(batch["hidden_states"][batch["mask"]])
    weight, bias = fit_affine(torch.cat(inputs), torch.cat(targets), ridge)
    draft.affine.weight.copy_(weight)
    draft.affine.bias.copy_(bias)


@torch.no_grad()
def fit_feature_draft(
    model: PreTrainedModel,
    draft_vocab_ids: torch.LongTensor,
    embeddings: torch.nn.Module,
    rows: list[TeacherRow],
    ridge: float,
    seed: int,
) -> FeatureDraftForCausalLM:
    """A feature draft whose affine map is the best one in closed form, and whose hidden layer adds nothing yet."""
    config = FeatureDraftConfig(body=copy.deepcopy(model.config), draft_vocab_size=len(draft_vocab_ids))
    draft = FeatureDraftForCausalLM(config).float().eval()
    inputs = torch.cat([torch.cat([embeddings(r.input_ids[1:]), r.hidden_states[:-1]], 1)[r.mask[1:]] for r in rows])
    weight, bias = fit_affine(inputs, torch.cat([r.hidden_states[1:][r.mask[1:]] for r in rows]), ridge)
    draft.affine.weight.copy_(weight)
    draft.affine.bias.copy_(bias)
    torch.nn.init.normal_(draft.gate_up.weight, std=0.02, generator=torch.Generator().manual_seed(seed))
    draft.gate_up.weight.div_(inputs.std(0).clamp_min(1e-6))
    draft.down.weight.zero_()
    return _with_head(draft, model, draft_vocab_ids)


def _check_arguments(model, kind, num_layers, draft_vocab_size):
    if kind not in ("layers", "features"):
        raise ValueError(f"Expected `kind` to be 'layers' or 'features', got {kind!r}.")
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"Expected a decoder-only model, got the encoder-decoder {type(model).__name__}. "
            "Use a smaller model of its family as `assistant_model`."
        )
    if kind == "layers" and not 1 <= num_layers < config.num_hidden_layers:
        raise ValueError(
            f"Expected `num_layers` from 1 to {config.num_hidden_layers - 1}, fewer than the model has, got "
            f"{num_layers}."
        )
    if not 1 <= draft_vocab_size <= config.vocab_size:
        raise ValueError(
            f"Expected `draft_vocab_size` from 1 to the model's {config.vocab_size} tokens, got {draft_vocab_size}."
        )
