"""Reads a model's answers to edited prompts, its perplexity and its hidden states, with as few tokens as there are."""

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from hf_iclr.cache_argument import cache_inputs, find_cache, forward_parameters
from hf_iclr.models import check_decoder, check_prompts, evaluation_mode, generate_rows, pad_rows, split_answer

from .metrics import edit_success, fluency
from .requests import EditRequest


def evaluate_edits(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    fluency_prompts: Sequence[str] = (),
    batch_tokens: int = 1024,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """
    Scores of a model on edit requests, as https://huggingface.co/papers/2410.02355 measures them: after all edits, on
    the prompt, its paraphrases and its neighbourhood.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A decoder, edited or not. Its train or eval mode is left as found.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer; not changed.
        requests (`Sequence[EditRequest]`):
            What was or will be edited.
        fluency_prompts (`Sequence[str]`, *optional*):
            Prompts to continue by 100 tokens, which adds `fluency`; CounterFact has them as `generation_prompts`.
        batch_tokens (`int`, *optional*, defaults to 1024):
            Tokens in one forward.
        seed (`int`, *optional*, defaults to 0):
            Seed of the continuations.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[str, float]`: what [`~hf_iclr.editors.alpha_edit.edit_success`] says, between 0 and 1, and
        `fluency` in bits.

    Raises:
        ValueError: see [`score_edits`].

    Example:

    ```python
    >>> evaluate_edits(model, tokenizer, edit_requests(rows, limit=100))["efficacy"]
    ```
    """
    table = score_edits(model, tokenizer, requests, batch_tokens=batch_tokens, progress=progress)
    scores = edit_success(**table.drop(columns="prompt").to_dict("list"))
    if fluency_prompts:
        texts = continue_texts(model, tokenizer, fluency_prompts, seed=seed)
        scores["fluency"] = fluency(texts)
    return scores


def score_edits(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> pd.DataFrame:
    """
    Both answers' likelihoods after every prompt of the requests. Prompts that occur several times are read once, and
    both answers share the reading of their prompt: an answer of one token costs nothing more.

    Args:
        model, tokenizer, requests, batch_tokens, progress:
            Same as in [`evaluate_edits`].

    Returns:
        `pandas.DataFrame`: one row a prompt, with `request` (its id), `kind` (`"rewrite"`, `"paraphrase"` or
        `"neighborhood"`), `prompt`, `nll_new` and `nll_true` (nats per token; NaN without such an answer) and
        `accuracy` (share of the wanted answer's tokens that are the most likely ones). The rows of some requests, put
        into [`~hf_iclr.editors.alpha_edit.edit_success`], give the scores of these.

    Raises:
        ValueError: when there is no request, one has a neighbourhood without a known answer, or a prompt has no token.
    """
    check_decoder(model)
    requests = list(requests)
    if not requests:
        raise ValueError("Expected at least one request, got none.")
    rows = [row for request in requests for row in _prompts_of(request)]
    split = {}  # (prompt, answer) -> token ids of both
    for _, _, prompt, new, true in rows:
        for answer in (new, true):
            if answer is not None and (prompt, answer) not in split:
                split[prompt, answer] = _split_ids(tokenizer, prompt, answer)
    scores = _answer_scores(model, set(split.values()), batch_tokens, progress)
    nothing = (float("nan"), float("nan"))
    table = []
    for request, kind, prompt, new, true in rows:
        found_new, found_true = (
            nothing if answer is None else scores[split[prompt, answer]] for answer in (new, true)
        )
        wanted = found_true if kind == "neighborhood" else found_new
        table.append((request, kind, prompt, found_new[0], found_true[0], wanted[1]))
    return pd.DataFrame(table, columns=["request", "kind", "prompt", "nll_new", "nll_true", "accuracy"])


def _prompts_of(request: EditRequest) -> Iterator[tuple[str, str, str, str | None, str | None]]:
    """Request, kind, prompt, new and true answer of every prompt."""
    yield request.id, "rewrite", request.text, request.target_new, request.target_true
    for prompt in request.paraphrases:
        yield request.id, "paraphrase", prompt, request.target_new, request.target_true
    for neighbour in request.neighborhood:
        if not isinstance(neighbour, str):  # a question with an answer of its own, as zsRE has it
            yield request.id, "neighborhood", neighbour[0], None, neighbour[1]
        elif request.target_true is not None:
            yield request.id, "neighborhood", neighbour, request.target_new, request.target_true
        else:
            raise ValueError(
                f"Expected target_true of request {request.id!r}, the answer its neighbourhood should keep, got None. "
                "Give it, or pairs of prompt and answer as neighborhood."
            )


def _split_ids(tokenizer: Any, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a prompt and of the answer after it: what the two together have beyond the prompt alone."""
    prompt = prompt.rstrip()
    alone = tokenizer(prompt)["input_ids"]
    both = tokenizer(f"{prompt} {answer.strip()}")["input_ids"]
    prompt_ids, answer_ids = split_answer(alone, both)
    if not prompt_ids or not answer_ids:
        raise ValueError(f"Expected a prompt and an answer of at least one token each, got {prompt!r} and {answer!r}.")
    return tuple(prompt_ids), tuple(answer_ids)


def _answer_scores(
    model: Any, pairs: set[tuple[tuple[int, ...], tuple[int, ...]]], batch_tokens: int, progress: bool
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float]]:
    """Negative log-likelihood per token, and share of most likely tokens, of answers after prompts."""
    answers: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt, answer in sorted(pairs):
        answers.setdefault(prompt, []).append(answer)
    device, last_only = _device(model), _last_only(model)
    scores = {}
    with evaluation_mode(model), tqdm(total=len(answers), desc="Prompts", disable=not progress) as bar:
        for prompts in _equal_lengths(list(answers), batch_tokens):
            batch = [(row, answer) for row, prompt in enumerate(prompts) for answer in answers[prompt]]
            rows = torch.tensor([row for row, _ in batch], device=device)
            tokens = torch.tensor([answer[0] for _, answer in batch], device=device)
            longer = [entry for entry in batch if len(entry[1]) > 1]
            output = model(torch.tensor(prompts, device=device), use_cache=bool(longer), **last_only)
            first = output.logits[:, -1].float()
            nll = (first.logsumexp(-1)[rows] - first[rows, tokens]).tolist()
            hits = (first.argmax(-1)[rows] == tokens).tolist()
            totals = {entry: [n, float(h)] for entry, n, h in zip(batch, nll, hits, strict=True)}
            if longer:
                # The rest of an answer reads on from its prompt's cache. Padding comes after it, so nothing sees it.
                padded, mask = pad_rows([answer for _, answer in longer], device=device).values()
                wanted = mask[:, 1:].bool()
                cache = find_cache(output)
                cache.batch_select_indices(torch.tensor([row for row, _ in longer], device=device))
                logits = model(padded[:, :-1], use_cache=True, **cache_inputs(model, cache)).logits.float()
                losses = logits.logsumexp(-1) - logits.gather(-1, padded[:, 1:, None])[..., 0]
                nll = (losses * wanted).sum(1).tolist()
                hits = ((logits.argmax(-1) == padded[:, 1:]) & wanted).sum(1).tolist()
                for entry, n, h in zip(longer, nll, hits, strict=True):
                    totals[entry][0] += n
                    totals[entry][1] += h
            for (row, answer), (n, h) in totals.items():
                scores[prompts[row], answer] = (n / len(answer), h / len(answer))
            bar.update(len(prompts))
    return scores


def _equal_lengths(rows: list[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Batches of rows of one length, so that nothing is padded and nothing masked; the longest ones first."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for length in sorted(by_length, reverse=True):
        size = max(1, batch_tokens // length)
        for start in range(0, len(by_length[length]), size):
            yield by_length[length][start : start + size]


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device


def _last_only(model: Any) -> dict[str, int]:
    return {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}


def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    max_length: int = 512,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> float:
    """
    Perplexity of texts: exp of the mean negative log-likelihood of all their tokens but each text's first.

    Args:
        model, tokenizer, batch_tokens, progress:
            Same as in [`evaluate_edits`].
        texts (`Sequence[str]`):
            Text the edits should not touch.
        max_length (`int`, *optional*, defaults to 512):
            Tokens of a text to read.

    Returns:
        `float`

    Raises:
        TypeError: when `texts` is one string.
        ValueError: when no text has two tokens.
    """
    ids = [tokenizer(text, truncation=True, max_length=max_length)["input_ids"] for text in check_prompts(texts)]
    ids = sorted((row for row in ids if len(row) > 1), key=len)
    if not ids:
        raise ValueError("Expected a text of at least two tokens, got none.")
    device, total, count = _device(model), 0.0, 0
    with evaluation_mode(model), tqdm(total=len(ids), desc="Texts", disable=not progress) as bar:
        while ids:
            size = max(1, batch_tokens // len(ids[-1]))
            batch, ids = ids[-size:], ids[:-size]
            padded, mask = pad_rows(batch, device=device).values()
            logits = model(padded, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            labels = padded[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
            total += torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += int(mask[:, 1:].sum())
            bar.update(len(batch))
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def last_hidden_states(
    model: Any, tokenizer: Any, prompts: Sequence[str], layer: int, *, batch_tokens: int = 1024
) -> torch.Tensor:
    """
    Output of a decoder layer at the last token of prompts, for [`~hf_iclr.editors.alpha_edit.hidden_drift`].

    Args:
        model, tokenizer, batch_tokens:
            Same as in [`evaluate_edits`].
        prompts (`Sequence[str]`):
            Prompts; end them with a subject to see its state.
        layer (`int`):
            Index of the layer, from 0. The last layer's output is taken after the final norm.

    Returns:
        `torch.Tensor` of shape `(prompts, hidden)`: float32 on the CPU, in the order of the prompts.

    Raises:
        TypeError: when `prompts` is one string.
        ValueError: when there is no prompt or no such layer.
    """
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if not 0 <= layer < layers:
        raise ValueError(f"Expected a layer between 0 and {layers - 1}, got {layer}.")
    rows = [tuple(tokenizer(prompt)["input_ids"]) for prompt in check_prompts(prompts)]
    states: dict[tuple[int, ...], torch.Tensor] = {}
    with evaluation_mode(model):
        for batch in _equal_lengths(list(dict.fromkeys(rows)), batch_tokens):
            ids = torch.tensor(batch, device=_device(model))
            output = model(ids, output_hidden_states=True, use_cache=False, **_last_only(model))
            states |= zip(batch, output.hidden_states[layer + 1][:, -1].float().cpu(), strict=True)
    return torch.stack([states[row] for row in rows])


def continue_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    top_k: int = 5,
    batch_size: int = 32,
    seed: int = 0,
) -> list[str]:
    """
    Sampled continuations of prompts, for [`~hf_iclr.editors.alpha_edit.ngram_entropy`].

    Args:
        model, tokenizer, seed:
            Same as in [`evaluate_edits`]. The global random state is left as found.
        prompts (`Sequence[str]`):
            Where the texts begin.
        max_new_tokens (`int`, *optional*, defaults to 100):
            Length of each continuation; the end of a text is not sampled. 100 and the next as in the paper's code.
        top_k (`int`, *optional*, defaults to 5):
            Draw from so many of the most likely tokens.
        batch_size (`int`, *optional*, defaults to 32):
            Prompts in one batch.

    Returns:
        `list[str]`: prompts and continuations.

    Raises:
        TypeError: when `prompts` is one string.
        ValueError: when there is no prompt.
    """
    rows = [tokenizer(prompt)["input_ids"] for prompt in check_prompts(prompts)]
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    device = _device(model)
    with evaluation_mode(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        new = generate_rows(
            model,
            [rows[row] for row in order],
            ends=(),
            batch_size=batch_size,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=top_k,
            min_new_tokens=max_new_tokens,
            max_new_tokens=max_new_tokens,
        )
        texts = {row: tokenizer.decode(ids, skip_special_tokens=True) for row, ids in zip(order, new, strict=True)}
    return [prompt + texts[row] for row, prompt in enumerate(prompts)]
