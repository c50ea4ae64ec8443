"""What every part asks of a language model: render a prompt, pad and continue rows, score answers."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence

from hf_iclr.cache_argument import cache_argument, cache_inputs, forward_parameters


if TYPE_CHECKING:
    from trl.trainer.utils import FusedCausalLMOutput


def check_prompts(prompts) -> list:
    """The prompts as a list; raises `ValueError` where there are none, `TypeError` where they are one string."""
    if isinstance(prompts, str):
        raise TypeError(f"Expected a list of prompts, got one string. Type `prompts=[{prompts[:30]!r}]`.")
    if not isinstance(prompts, Iterable) or isinstance(prompts, Mapping):
        raise TypeError(f"Expected a list of prompts, got {prompts!r:.80}.")
    prompts = list(prompts)
    if not prompts:
        raise ValueError("Expected at least one prompt, got none.")
    return prompts


def to_messages(prompt: str | list[dict], system: str | None = None) -> list[dict]:
    """A chat as it is, a string as the user's one turn; `system` is put first."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return messages if system is None else [{"role": "system", "content": system}, *messages]


def render_prompt(
    tokenizer,
    prompt: str | list[dict],
    *,
    answer: str | list[dict] | None = None,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> str:
    """
    Text of a prompt as the model reads it, up to where its answer begins.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's. With a chat template the text holds its special tokens, so tokenize it without adding any.
        prompt (`str` or a chat):
            A string is one user turn of the chat template when there is one, and stays as it is when there is none.
        answer (`str` or messages, *optional*):
            Rendered behind the prompt, with what the template puts after it.
        system (`str`, *optional*):
            A system turn before the prompt.
        chat_template_kwargs (`dict`, *optional*):
            More arguments of the chat template, for instance `{"enable_thinking": False}`.

    Returns:
        `str`

    Raises:
        ValueError: if there is a chat or a system prompt, and no chat template; if the template refuses the chat, or
            leaves out the system prompt.
    """
    if not tokenizer.chat_template:
        if not (isinstance(prompt, str) and isinstance(answer, str | None)):
            raise ValueError("Expected prompts as strings, since the tokenizer has no chat template; got a chat.")
        if system is not None:
            raise ValueError(
                "Expected a tokenizer with a chat template for the system prompt, got one without. Put the text "
                "into the prompts."
            )
        return prompt + (answer or "")
    messages = to_messages(prompt, system)
    if system is not None and sum(message["role"] == "system" for message in messages) > 1:
        raise ValueError("Expected one system prompt, got a chat with its own beside `system`. Leave one of them out.")
    if answer is not None:
        messages += [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    options = {"tokenize": False, "add_generation_prompt": answer is None, **(chat_template_kwargs or {})}
    try:
        text = tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise ValueError(f"Expected a chat that the model's template takes, but it says: {error}") from error
    if system is not None and system.strip() not in text:
        raise ValueError(
            "Expected a chat template that shows the model its system prompt, but this one leaves it out. Put the "
            "text into the prompts."
        )
    return text


def to_prompt_ids(
    tokenizer,
    prompt: str | list[dict],
    *,
    system: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Token ids of what [`render_prompt`] gives; raises `ValueError` where there are none."""
    text = render_prompt(tokenizer, prompt, system=system, chat_template_kwargs=chat_template_kwargs)
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    if not ids:
        raise ValueError(f"Expected prompts of at least one token, but {prompt!r} has none.")
    return ids


def to_answer_ids(tokenizer, answer: str | Sequence[int], eos: Sequence[int]) -> list[int]:
    """Token ids of an answer up to its first end-of-sequence token."""
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"] if isinstance(answer, str) else list(answer)
    return ids[: next((index for index, token in enumerate(ids) if token in eos), len(ids))]


def split_answer(prompt_ids: Sequence[int], ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """
    What the token ids of a prompt with its answer have in common with those of the prompt alone, and the rest: a
    tokenizer or a chat template may write the end of a prompt alone otherwise than in front of an answer.
    """
    same = [ours == theirs for ours, theirs in zip(prompt_ids, ids, strict=False)]
    start = same.index(False) if False in same else len(same)
    return list(ids[:start]), list(ids[start:])


def end_tokens(model, tokenizer) -> list[int]:
    """End-of-sequence tokens of the model's generation config, or of the tokenizer where it names none."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def pad_rows(
    rows: Sequence[Sequence[int]], side: str = "right", *, padding: int = 0, device: Any = None
) -> dict[str, torch.Tensor]:
    """
    Rows of token ids as one batch.

    Args:
        rows (`Sequence[Sequence[int]]`):
            Of any lengths.
        side (`str`, *optional*, defaults to `"right"`):
            Where the padding goes, `"right"` or `"left"`.
        padding (`int`, *optional*, defaults to 0):
            The padding's token id, which only penalties of repetition ever look at.
        device (`torch.device`, *optional*, defaults to the CPU):
            Where the batch goes.

    Returns:
        `dict[str, torch.Tensor]`: `input_ids` and `attention_mask`, int64 of shape `(rows, longest row)`.
    """
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return {
        name: pad_sequence(column, batch_first=True, padding_value=value, padding_side=side).to(device)
        for name, column, value in (("input_ids", ids, padding), ("attention_mask", mask, 0))
    }


def pad_around(
    before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], device: Any = None
) -> dict[str, torch.Tensor]:
    """
    Rows of token ids in two parts that meet in one column, the first parts padded on the left and the second ones on
    the right: [`pad_rows`] of shape `(rows, longest before + longest after)`.
    """
    left, right = pad_rows(before, "left", device=device), pad_rows(after, device=device)
    return {name: torch.cat([left[name], right[name]], 1) for name in left}


def pad_answers(pairs: Sequence[tuple[list[int], list[int]]], device: Any = None) -> dict[str, torch.Tensor]:
    """
    Token ids of prompts followed by their answers: [`pad_rows`] with `labels`, -100 outside the answers; all of shape
    `(rows, longest prompt and answer)`.
    """
    labels = pad_rows([[-100] * len(prompt) + answer for prompt, answer in pairs], padding=-100, device=device)
    return {**pad_rows([prompt + answer for prompt, answer in pairs], device=device), "labels": labels["input_ids"]}


def check_decoder(model) -> None:
    """Raises `TypeError` unless it is a model, `ValueError` unless that is a decoder with a key-value cache."""
    if not hasattr(model, "config"):
        cure = "Of one that is wrapped type `model.module`, of a trainer `trainer.model`."
        raise TypeError(f"Expected a model of transformers or PEFT, got {type(model).__name__}. {cure}")
    if model.config.is_encoder_decoder:
        raise ValueError(f"Expected a decoder-only model, got the encoder-decoder {type(model).__name__}.")
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"Expected adapters inside the model, got {model.active_peft_config.peft_type.value}, which puts virtual "
            "tokens before the prompt. Use LoRA, or merge what was learned into a plain model."
        )
    if cache_argument(model) is None:
        raise ValueError(
            f"Expected a model that takes a key-value cache, got {type(model).__name__}, which takes none."
        )


def share_storage(model: torch.nn.Module, other: torch.nn.Module) -> bool:
    """
    Whether to train `model` is to train `other` too: all parameters of `other` lie in the memory of `model`'s, or one
    does that may be trained.
    """
    own, others = (
        {parameter.untyped_storage().data_ptr() or id(parameter): parameter.requires_grad for parameter in part}
        for part in (model.parameters(), other.parameters())
    )
    return others.keys() <= own.keys() or any(own[place] for place in own.keys() & others.keys())


@contextmanager
def evaluation_mode(model) -> Iterator[None]:
    """No gradients and eval mode; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def generate_rows(
    model, rows: Sequence[Sequence[int]], ends: Sequence[int], *, batch_size: int, padding: int = 0, **generation
) -> Iterator[list[int]]:
    """
    What `model.generate` appends to rows of token ids. Where penalties and the sampling of `generate` don't matter,
    [`~hf_iclr.prefill.generate_answers`] needs no padding token and has draws of its own for each row.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder, in the mode and under the gradients that the caller gives it.
        rows (`Sequence[Sequence[int]]`):
            Token ids of prompts.
        ends (`Sequence[int]`):
            End-of-sequence tokens, see [`end_tokens`].
        batch_size (`int`):
            Rows in one call, in their order.
        padding (`int`, *optional*, defaults to 0):
            Token id of the padding, before the prompts and after the answers.
        generation (*optional*):
            Arguments of [`~transformers.GenerationMixin.generate`].

    Yields:
        `list[int]`: for each row, in order, new token ids up to and with the first end-of-sequence token.
    """
    for start in range(0, len(rows), batch_size):
        inputs = pad_rows(rows[start : start + batch_size], "left", padding=padding, device=model.device)
        output = model.generate(**inputs, pad_token_id=padding, **generation)
        for new in output[:, inputs["input_ids"].shape[1] :].tolist():
            yield new[: next((index + 1 for index, token in enumerate(new) if token in ends), len(new))]


def logits_at(model, ids: torch.Tensor, mask: torch.Tensor, columns: list[int], cache=None) -> torch.Tensor:
    """
    Logits of some columns of a batch, positions counted from each row's first token.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder.
        ids (`torch.Tensor` of shape `(batch, length)`):
            Token ids.
        mask (`torch.Tensor` of shape `(batch, cached length + length)`):
            1 at tokens, 0 at padding.
        columns (`list[int]`):
            Columns of `ids`. A model that can leaves out the others' logits.
        cache ([`~transformers.Cache`], *optional*):
            What was read before; gets this too.

    Returns:
        `torch.Tensor` of shape `(batch, len(columns), vocab)`, float32, where `ids` are.
    """
    accepts, options = forward_parameters(model), {}
    if "position_ids" in accepts:
        options["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    keep = torch.tensor(columns, device=ids.device)
    if "logits_to_keep" in accepts:
        options["logits_to_keep"] = keep
    logits = model(
        input_ids=ids, attention_mask=mask, use_cache=cache is not None, **cache_inputs(model, cache), **options
    ).logits.to(ids.device)
    return (logits if "logits_to_keep" in accepts else logits[:, keep]).float()


def answer_logits(
    model, prompts: list[list[int]], answers: list[list[int]], batch_size: int = 16
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """
    Teacher-forced logits of answer tokens.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder; read in eval mode without gradients, and left as found.
        prompts (`list[list[int]]`), answers (`list[list[int]]`):
            Token ids; rows with an empty answer are passed over.
        batch_size (`int`, *optional*, defaults to 16):
            Rows in one forward.

    Yields:
        `tuple`: indices of the batch's rows, and float32 logits of shape `(rows, longest answer, vocab)`. Entry t
        predicts answer token t; entries beyond a row's answer mean nothing.
    """
    order = sorted((row for row in range(len(prompts)) if answers[row]), key=lambda row: len(prompts[row]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # the answer's last token predicts nothing that is wanted
        before = max(len(answers[row]) for row in rows) - 1
        batch = pad_around([prompts[row] for row in rows], [answers[row][:before] for row in rows], model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with evaluation_mode(model):
            logits = logits_at(model, ids, mask, list(range(ids.shape[1] - before - 1, ids.shape[1])))
        yield rows, logits  # outside, so that the caller's gradients and modes are its own


def hash_weights(model: torch.nn.Module, *, exact: bool = False) -> str:
    """
    A name for a model's weights: sha256 of the sums of every parameter's rows and columns, over the bits of its
    numbers rounded to bfloat16, so that the same checkpoint has one name in float32 and in bfloat16, on any device.

    Args:
        model (`torch.nn.Module`):
            The model. A [`~peft.PeftModel`] has the name of its base model.
        exact (`bool`, *optional*, defaults to `False`):
            Hash every number of parameters and buffers as it is stored, adapters among them, and its type, for what
            another rounding changes.

    Returns:
        `str`: 16 hexadecimal digits, 64 of the exact hash.
    """
    digest = hashlib.sha256()
    if exact:
        for _, tensor in sorted(model.state_dict().items()):
            digest.update(str(tensor.dtype).encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()
    for name, parameter in sorted(base_parameters(model)):
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        matrix = parameter.detach().flatten(1) if parameter.ndim > 1 else parameter.detach().reshape(1, -1)
        columns = torch.zeros(matrix.shape[1], dtype=torch.int64, device=matrix.device)
        for rows in matrix.split(max(1, 2**24 // max(1, matrix.shape[1]))):
            bits = rows.to(torch.bfloat16).view(torch.int16) if rows.is_floating_point() else rows
            digest.update(bits.sum(1, dtype=torch.int64).cpu().numpy().tobytes())
            columns += bits.sum(0, dtype=torch.int64)
        digest.update(columns.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def base_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Names and parameters of a model, of one with adapters those it had without them."""
    if not isinstance(model, PeftModel):
        yield from model.named_parameters()
        return
    for name, parameter in model.get_base_model().named_parameters():
        own = ("modules_to_save.", "trainable_tokens_", getattr(model.base_model, "prefix", "prompt_"))
        if not any(part in name for part in own):
            yield name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter


class FusedOutputsProxy:
    """
    Stands in for `model` during one `compute_loss` of TRL: every output of the fused LM head passes through `rewrite`
    first. TRL's trainers only call `model` there, so their loss, normalisation and metrics stay their own. To a loss
    of somebody's own it is the model: an instance of its class, whose attributes are read and set.

    Args:
        model (`torch.nn.Module`):
            The model, wrapped for distributed training or not.
        rewrite (`Callable`):
            Gets the [`~trl.trainer.utils.FusedCausalLMOutput`] of a call with `fused_lm_head=True` and the keyword
            arguments of that call; what it returns is what TRL sees. Other calls are passed through.
        graph (`bool`, *optional*, defaults to `True`):
            Whether the model may leave a graph where gradients are on; `rewrite` and the loss may anyhow.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rewrite: "Callable[[FusedCausalLMOutput, dict[str, Any]], FusedCausalLMOutput]",
        graph: bool = True,
    ) -> None:
        self._model, self._rewrite, self._graph = model, rewrite, graph

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what `isinstance` asks
        return type(self._model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self._graph and torch.is_grad_enabled()):
            outputs = self._model(*args, **kwargs)
        return self._rewrite(outputs, kwargs) if kwargs.get("fused_lm_head") else outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_model", "_rewrite", "_graph"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._model, name, value)
