"""Builds a draft model out of the large model itself, for when no small sibling exists."""

import copy
import logging
import math
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from hf_iclr.generation.configuration_draft import DraftConfig
from hf_iclr.generation.modeling_draft import DraftForCausalLM


logger = logging.getLogger(__name__)

MAX_COUNTED_POSITIONS = 8192  # enough to rank the vocabulary; the full head is the costly part of the closed form
WARMUP_STEPS = 20


@dataclass
class TeacherRow:
    """One text with what the large model makes of it."""

    input_ids: torch.LongTensor  # (seq_len,)
    hidden_states: torch.Tensor  # (seq_len, hidden_size), the large model's last; filled by `read_teacher`
    mask: torch.BoolTensor  # (seq_len,), positions whose next token the draft has to predict


def build_draft_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str | dict[str, str]],
    num_layers: int = 2,
    draft_vocab_size: int = 8192,
    *,
    distill_minutes: float = 0.0,
    distill_steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    max_length: int = 256,
    ridge: float = 0.005,
    seed: int = 0,
) -> DraftForCausalLM:
    """
    Build a draft model for a causal language model that has no small sibling.

    One pass of the large model over `texts` gives, in closed form, the affine map from the state after its first
    `num_layers` layers to its last hidden state, and the tokens that carry most of its probability. With
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
            How many first layers of the model the draft keeps.
        draft_vocab_size (`int`, *optional*, defaults to 8192):
            How many tokens the draft can write.
        distill_minutes (`float`, *optional*, defaults to 0.0):
            Wall-clock minutes of distillation; 0 stops at the closed form.
        distill_steps (`int`, *optional*):
            Optimizer steps of distillation instead of minutes: the same result on each run.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Peak learning rate of the distillation, decayed along a cosine.
        batch_size (`int`, *optional*, defaults to 8):
            Texts in one step.
        max_length (`int`, *optional*, defaults to 256):
            Longer texts are cut into pieces of this many tokens.
        ridge (`float`, *optional*, defaults to 0.005):
            Penalty of the affine map, per position and unit of input variance.
        seed (`int`, *optional*, defaults to 0):
            Seed of the distillation's order of texts.

    Returns:
        [`DraftForCausalLM`]: in evaluation mode and in the type of `model`; pass it as `assistant_model=`.

    Raises:
        ValueError: if the model is an encoder-decoder, a number is out of range, or the texts are too short.

    Example:

    ```python
    >>> draft = build_draft_model(model, tokenizer, texts, distill_minutes=5)
    >>> draft.save_pretrained("draft")
    >>> model.generate(**inputs, assistant_model=draft)
    ```
    """
    _check_arguments(model, num_layers, draft_vocab_size)
    rows = read_teacher(model, tokenizer, texts, max_length=max_length, batch_size=batch_size)
    hidden_size = model.get_output_embeddings().weight.shape[1]
    num_positions = sum(int(row.mask.sum()) for row in rows)
    if num_positions < 2 * hidden_size:
        raise ValueError(
            f"Expected at least {2 * hidden_size} token positions to fit a map of width {hidden_size}, got "
            f"{num_positions}. Pass more or longer `texts`."
        )
    logger.info("The large model has read %d positions of %d texts.", num_positions, len(rows))

    draft = truncate(model, num_layers, frequent_tokens(model, rows, draft_vocab_size))
    inputs, targets = [], []
    for batch in _batches(rows, batch_size):
        states = draft.body(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        inputs.append(states[batch["mask"]])
        targets.append(batch["hidden_states"][batch["mask"]])
    weight, bias = fit_affine(torch.cat(inputs), torch.cat(targets), ridge)
    draft.affine.weight.data.copy_(weight)
    draft.affine.bias.data.copy_(bias)

    if distill_minutes or distill_steps:
        distill(
            model,
            draft,
            tokenizer,
            rows,
            minutes=distill_minutes,
            steps=distill_steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
        )
    return draft.to(model.dtype).eval()


@torch.no_grad()
def read_teacher(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str | dict[str, str]],
    *,
    max_length: int = 256,
    batch_size: int = 8,
) -> list[TeacherRow]:
    """
    Run the large model once over texts and keep its last hidden states, from which its logits can be had again.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        texts (`list[str]` or `list[dict[str, str]]`):
            Texts, or records with `"prompt"` and `"completion"`.
        max_length (`int`, *optional*, defaults to 256):
            Longer texts are cut into pieces of this many tokens.
        batch_size (`int`, *optional*, defaults to 8):
            Texts in one forward pass.

    Returns:
        `list[TeacherRow]`: sorted by length.

    Raises:
        ValueError: if there is no text, or the model does more to its logits than apply its head.
    """
    rows = sorted(_tokenize(tokenizer, texts, max_length), key=lambda row: len(row.input_ids))
    if not rows:
        raise ValueError("Expected texts for the draft to learn from, got none of two tokens or more.")
    head = model.get_output_embeddings()
    probe = rows[0].input_ids[None].to(model.device)
    if not torch.allclose(model(probe).logits.float(), head(model.base_model(probe)[0]).float(), atol=1e-3, rtol=1e-3):
        raise ValueError(
            f"Expected logits that are the head applied to the last hidden state, {type(model).__name__} changes them "
            "afterwards (a scale or a soft cap). Such models are not supported."
        )
    for start in tqdm(range(0, len(rows), batch_size), desc="Large model reads"):
        chunk = rows[start : start + batch_size]
        batch = _collate(chunk)
        states = model.base_model(
            input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device)
        )[0]
        for row, row_states in zip(chunk, states.float().cpu(), strict=True):
            row.hidden_states = row_states[: len(row.input_ids)].clone()
    return rows


@torch.no_grad()
def frequent_tokens(model: PreTrainedModel, rows: list[TeacherRow], size: int) -> torch.LongTensor:
    """
    Tokens that carry most of the large model's probability.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model, for its head.
        rows (`list[TeacherRow]`):
            What [`read_teacher`] returned.
        size (`int`):
            How many tokens.

    Returns:
        `torch.LongTensor` of shape `(size,)`, ascending.
    """
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
    The first layers of a model with its final norm, the identity as affine map, and some rows of its head.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model.
        num_layers (`int`):
            How many layers to keep.
        draft_vocab_ids (`torch.LongTensor` of shape `(draft_vocab_size,)`):
            Which rows of the head to keep.

    Returns:
        [`DraftForCausalLM`]: in float32, with a copy of the model's generation config.
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
    draft.head.load_state_dict(truncated_head(model, draft_vocab_ids).state_dict())
    draft.draft_vocab_ids.copy_(draft_vocab_ids)
    draft.generation_config = copy.deepcopy(model.generation_config)
    return draft


@torch.no_grad()
def truncated_head(model: PreTrainedModel, draft_vocab_ids: torch.LongTensor) -> torch.nn.Linear:
    """
    Some rows of a model's head.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model.
        draft_vocab_ids (`torch.LongTensor` of shape `(draft_vocab_size,)`):
            Which rows.

    Returns:
        `torch.nn.Linear`: in float32, its bias zero if the model has none.
    """
    head = model.get_output_embeddings()
    rows = torch.nn.Linear(head.in_features, len(draft_vocab_ids))
    rows.weight.copy_(head.weight[draft_vocab_ids])
    rows.bias.zero_() if head.bias is None else rows.bias.copy_(head.bias[draft_vocab_ids])
    return rows.requires_grad_(False)


def fit_affine(inputs: torch.Tensor, targets: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The affine map of least squared error, with a ridge penalty on the inputs scaled to unit variance.

    Args:
        inputs (`torch.Tensor` of shape `(num_positions, in_features)`):
            States after the first layers.
        targets (`torch.Tensor` of shape `(num_positions, out_features)`):
            Last hidden states at the same positions.
        ridge (`float`):
            Penalty λ in `Σ |y - W x - b|² + λ n Σ (σ_j W_ij)²`, with σ_j the standard deviation of input j.

    Returns:
        `tuple`: weight of shape `(out_features, in_features)` and bias of shape `(out_features,)`.
    """
    mean, mean_target, std = inputs.mean(0), targets.mean(0), inputs.std(0).clamp_min(1e-6)
    scaled = (inputs - mean) / std
    gram = scaled.T @ scaled + ridge * len(inputs) * torch.eye(inputs.shape[1])
    weight = torch.linalg.solve(gram, scaled.T @ (targets - mean_target)).T / std
    return weight, mean_target - weight @ mean


class DraftDistillationTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose only change is the loss: KL divergence, then total variation, to the large model.

    The large model is not run: its last hidden states come with the batch and its head has the draft's rows only.
    (TRL's own `DistillationTrainer` samples from the student and runs the teacher over the full vocabulary in each
    step, which takes hours on a CPU.)
    """

    def __init__(self, model: DraftForCausalLM, teacher_head: torch.nn.Linear, progress, **kwargs):
        super().__init__(model, **kwargs)
        self.teacher_head = teacher_head
        self.progress = progress

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        states = self.model.body(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state[inputs["mask"]]
        log_q = self.model.head(self.model.affine(states)).log_softmax(-1)
        with torch.no_grad():
            log_p = self.teacher_head(inputs["hidden_states"][inputs["mask"]]).log_softmax(-1)
        loss = distillation_loss(log_p, log_q, total_variation_weight=self.progress())
        return (loss, None) if return_outputs else loss


def distillation_loss(log_p: torch.Tensor, log_q: torch.Tensor, total_variation_weight: float) -> torch.Tensor:
    """
    Mean of `(1 - w) KL(p || q) + w TV(p, q)`; `1 - TV` is the chance that a drafted token is accepted.

    Args:
        log_p (`torch.Tensor` of shape `(num_positions, vocab_size)`):
            Log-probabilities (nats) of the large model.
        log_q (`torch.Tensor` of shape `(num_positions, vocab_size)`):
            Log-probabilities of the draft.
        total_variation_weight (`float`):
            The weight w, from 0 to 1.

    Returns:
        `torch.Tensor`: a scalar.
    """
    p, q = log_p.exp(), log_q.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    total_variation = (p - q).abs().sum(-1) / 2
    return ((1 - total_variation_weight) * divergence + total_variation_weight * total_variation).mean()


def distill(
    model: PreTrainedModel,
    draft: DraftForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[TeacherRow],
    *,
    minutes: float = 0.0,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """
    Train a draft in place towards the large model, with its input embeddings frozen.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model, for its head.
        draft ([`DraftForCausalLM`]):
            The draft, in float32.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer of both.
        rows (`list[TeacherRow]`):
            What [`read_teacher`] returned.
        minutes (`float`, *optional*, defaults to 0.0):
            When to stop.
        steps (`int`, *optional*):
            How many steps instead of minutes.
        learning_rate (`float`, *optional*, defaults to 1e-3):
            Peak learning rate.
        batch_size (`int`, *optional*, defaults to 8):
            Texts in one step.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order of texts.
    """
    teacher_head = truncated_head(model, draft.draft_vocab_ids)
    start = time.monotonic()

    def progress() -> float:
        done = trainer.state.global_step / steps if steps else (time.monotonic() - start) / (60 * minutes)
        return min(done, 1.0)

    class StopWhenDone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = progress() >= 1

    set_seed(seed)
    draft.train().requires_grad_(True).get_input_embeddings().requires_grad_(False)
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, progress() if step else 0.0))
    with tempfile.TemporaryDirectory() as folder:
        trainer = DraftDistillationTrainer(
            draft,
            teacher_head=teacher_head,
            progress=progress,
            args=SFTConfig(
                folder,
                max_steps=steps or 1_000_000,
                per_device_train_batch_size=batch_size,
                activation_checkpointing=False,
                use_cache=True,
                bf16=False,
                logging_steps=20,
                save_strategy="no",
                report_to="none",
                seed=seed,
                dataset_kwargs={"skip_prepare_dataset": True},
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_dict({"row": range(len(rows))}),
            data_collator=lambda records: _collate([rows[record["row"]] for record in records]),
            processing_class=tokenizer,
            optimizers=(optimizer, scheduler),
            callbacks=[StopWhenDone()],
        )
        trainer.train()
    del draft.forward  # TRL put its fused head there
    draft.requires_grad_(True).eval()


@torch.no_grad()
def distribution_overlap(large: PreTrainedModel, draft: PreTrainedModel, batches: Iterable[torch.LongTensor]) -> float:
    """
    Mean over positions of `sum_v min(p(v), q(v))`: the chance that a token drafted at temperature 1 is accepted.

    Args:
        large, draft ([`~transformers.PreTrainedModel`]):
            Models with the same vocabulary.
        batches (iterable of `torch.LongTensor` of shape `(batch, seq_len)`):
            Token ids without padding.

    Returns:
        `float`: between 0 and 1.
    """
    total, count = 0.0, 0
    for input_ids in batches:
        p, q = (model(input_ids.to(model.device)).logits.float().softmax(-1).cpu() for model in (large, draft))
        total += torch.minimum(p, q).sum().item()
        count += input_ids.numel()
    return total / count


@torch.no_grad()
def sample_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = 96,
    temperature: float = 1.0,
    batch_size: int = 32,
    seed: int = 0,
) -> list[dict[str, str]]:
    """
    Let the model answer prompts: the texts on which its draft will work.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The large model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer. If it has a chat template, each prompt becomes a user's message.
        prompts (`list[str]`):
            What to answer.
        max_new_tokens (`int`, *optional*, defaults to 96):
            Length of an answer.
        temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the sampling.
        batch_size (`int`, *optional*, defaults to 32):
            Prompts at a time.
        seed (`int`, *optional*, defaults to 0):
            Seed of the sampling.

    Returns:
        `list[dict[str, str]]`: records with `"prompt"` (in the chat template) and `"completion"`.
    """
    set_seed(seed)
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        prompts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    records = []
    for start in tqdm(range(0, len(prompts), batch_size), desc="Large model writes"):
        chunk = prompts[start : start + batch_size]
        inputs = tokenizer(chunk, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature, top_k=0, top_p=1.0
        )
        answers = output[:, inputs["input_ids"].shape[1] :]
        for prompt, answer in zip(chunk, answers.tolist(), strict=True):
            records.append({"prompt": prompt, "completion": tokenizer.decode(_until_eos(answer, model))})
    return records


def _check_arguments(model, num_layers, draft_vocab_size):
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"Expected a decoder-only model, got the encoder-decoder {type(model).__name__}. "
            "Use a smaller model of its family as `assistant_model`."
        )
    if not 1 <= num_layers < config.num_hidden_layers:
        raise ValueError(
            f"Expected `num_layers` from 1 to {config.num_hidden_layers - 1}, fewer than the model has, got "
            f"{num_layers}."
        )
    if not 1 <= draft_vocab_size <= config.vocab_size:
        raise ValueError(
            f"Expected `draft_vocab_size` from 1 to the model's {config.vocab_size} tokens, got {draft_vocab_size}."
        )


def _tokenize(tokenizer, texts, max_length) -> Iterator[TeacherRow]:
    for text in texts:
        prompt, completion = ("", text) if isinstance(text, str) else (text["prompt"], text["completion"])
        # A rendered prompt holds its special tokens already.
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        ids = prompt_ids + tokenizer(completion, add_special_tokens=not prompt)["input_ids"]
        mask = [position >= len(prompt_ids) - 1 for position in range(len(ids))]
        for start in range(0, len(ids) - 1, max_length):
            piece = torch.tensor(ids[start : start + max_length])
            yield TeacherRow(piece, torch.empty(0), torch.tensor(mask[start : start + max_length]))


def _collate(rows):
    columns = {
        "input_ids": [row.input_ids for row in rows],
        "attention_mask": [torch.ones_like(row.input_ids) for row in rows],
        "hidden_states": [row.hidden_states for row in rows],
        "mask": [row.mask for row in rows],
    }
    return {name: torch.nn.utils.rnn.pad_sequence(column, batch_first=True) for name, column in columns.items()}


def _batches(rows, batch_size):
    for start in range(0, len(rows), batch_size):
        yield _collate(rows[start : start + batch_size])


def _schedule(step, progress):
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (1 + math.cos(math.pi * progress)) / 2


def _until_eos(ids, model):
    stops = model.generation_config.eos_token_id
    stops = {stops} if isinstance(stops, int) else set(stops or ())
    end = next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]
