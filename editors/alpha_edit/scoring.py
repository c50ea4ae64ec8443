"""A model's answers to edited prompts and its perplexity, read with as few tokens as there are; metrics of both."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from hf_iclr.cache_argument import cache_inputs, find_cache, forward_parameters
from hf_iclr.models import check_decoder, check_prompts, evaluation_mode, generate_rows, pad_rows

from .config import AlphaEditConfig
from .projections import caches_by_token
from .requests import EditRequest
from .rows import chat_context, encode_in_contexts, split_answer


# What each kind of prompt measures.
KINDS = {"rewrite": "efficacy", "paraphrase": "generalisation", "neighborhood": "specificity"}


def evaluate_edits(
    model: Any,
    tokenizer: Any,
    requests: Sequence[EditRequest],
    *,
    fluency_prompts: Sequence[str] = (),
    chat_template: bool = False,
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
        chat_template (`bool`, *optional*, defaults to `False`):
            Ask every prompt as a turn of a chat, by the tokenizer's chat template.
        batch_tokens (`int`, *optional*, defaults to 1024):
            Tokens in one forward.
        seed (`int`, *optional*, defaults to 0):
            Seed of the continuations.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `dict[str, float]`: what [`edit_success`] says, between 0 and 1, and
        `fluency` in bits.

    Raises:
        ValueError: see [`score_edits`].

    Example:

    ```python
    >>> evaluate_edits(model, tokenizer, edit_requests(rows, limit=100))["efficacy"]
    ```
    """
    table = score_edits(
        model, tokenizer, requests, chat_template=chat_template, batch_tokens=batch_tokens, progress=progress
    )
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
    chat_template: bool = False,
    batch_tokens: int = 1024,
    progress: bool = True,
) -> pd.DataFrame:
    """
    Both answers' likelihoods after every prompt of the requests. Prompts that occur several times are read once, and
    both answers share the reading of their prompt: an answer of one token costs nothing more.

    Args:
        model, tokenizer, requests, chat_template, batch_tokens, progress:
            Same as in [`evaluate_edits`].

    Returns:
        `pandas.DataFrame`: one row a prompt, with `request` (its id), `kind` (`"rewrite"`, `"paraphrase"` or
        `"neighborhood"`), `prompt`, `nll_new` and `nll_true` (nats per token; NaN without such an answer) and
        `accuracy` (share of the wanted answer's tokens that are the most likely ones). The rows of some requests, put
        into [`edit_success`], give the scores of these.

    Raises:
        ValueError: when there is no request, one has a neighbourhood without a known answer, a prompt or an answer
            has no token of its own, or the tokenizer is not a fast one.
    """
    check_decoder(model)
    requests = list(requests)
    if not requests:
        raise ValueError("Expected at least one request, got none.")
    context = chat_context(tokenizer) if chat_template else "{}"
    split = partial(split_answer, tokenizer, context=context, rendered=chat_template)
    asked = [
        (request.id, kind, prompt, [split(request if kind == "rewrite" else prompt, answer) for answer in answers])
        for request in requests
        for kind, prompt, *answers in _prompts_of(request)
    ]
    pairs = {pair for *_, both in asked for pair in both if pair is not None}
    scores = {None: (float("nan"), float("nan"))} | _answer_scores(model, pairs, batch_tokens, progress)
    table = []
    for request, kind, prompt, (new, true) in asked:
        wanted = scores[true if kind == "neighborhood" else new]
        table.append((request, kind, prompt, scores[new][0], scores[true][0], wanted[1]))
    return pd.DataFrame(table, columns=["request", "kind", "prompt", "nll_new", "nll_true", "accuracy"])


def _prompts_of(request: EditRequest) -> Iterator[tuple[str, str, str | None, str | None]]:
    """Kind, prompt, new and true answer of every prompt."""
    yield "rewrite", request.text, request.target_new, request.target_true
    for prompt in request.paraphrases:
        yield "paraphrase", prompt, request.target_new, request.target_true
    for neighbour in request.neighborhood:
        if not isinstance(neighbour, str):  # a question with an answer of its own, as zsRE has it
            yield "neighborhood", neighbour[0], None, neighbour[1]
        elif request.target_true is not None:
            yield "neighborhood", neighbour, request.target_new, request.target_true
        else:
            raise ValueError(
                f"Expected target_true of request {request.id!r}, the answer its neighbourhood should keep, got None. "
                "Give it, or pairs of prompt and answer as neighborhood."
            )


def edit_probabilities(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], config: AlphaEditConfig
) -> list[float]:
    """Probability of each request's target, the geometric mean of its tokens, in the very row that is edited."""
    rows = [encode_in_contexts(tokenizer, request, config)[0] for request in requests]
    pairs = [(tuple(row.ids[: row.start]), tuple(row.ids[row.start :])) for row in rows]
    scores = _answer_scores(model, set(pairs), 1024, progress=False)
    return [math.exp(-scores[pair][0]) for pair in pairs]


def _answer_scores(
    model: Any, pairs: set[tuple[tuple[int, ...], tuple[int, ...]]], batch_tokens: int, progress: bool
) -> dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[float, float]]:
    """Negative log-likelihood per token, and share of most likely tokens, of answers after prompts."""
    parts: dict[Any, list] = {}
    if not caches_by_token(model):  # then a prompt's reading cannot be shared: every token is asked for by itself
        parts = {pair: [(pair[0] + pair[1][:k], pair[1][k : k + 1]) for k in range(len(pair[1]))] for pair in pairs}
        pairs = {part for each in parts.values() for part in each}
    answers: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt, answer in sorted(pairs):
        answers.setdefault(prompt, []).append(answer)
    device = model.get_input_embeddings().weight.device
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
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
    return scores | {pair: tuple(np.mean([scores[part] for part in each], 0)) for pair, each in parts.items()}


def _equal_lengths(rows: list[tuple[int, ...]], batch_tokens: int) -> Iterator[list[tuple[int, ...]]]:
    """Batches of rows of one length, so that nothing is padded and nothing masked; the longest ones first."""
    by_length: dict[int, list[tuple[int, ...]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    for length in sorted(by_length, reverse=True):
        size = max(1, batch_tokens // length)
        for start in range(0, len(by_length[length]), size):
            yield by_length[length][start : start + size]


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
    device, total, count = model.get_input_embeddings().weight.device, 0.0, 0
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
    Sampled continuations of prompts, for [`ngram_entropy`].

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
    device = model.get_input_embeddings().weight.device
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


def edit_success(
    request: Sequence[str],
    kind: Sequence[str],
    nll_new: Sequence[float],
    nll_true: Sequence[float],
    accuracy: Sequence[float],
) -> dict[str, float]:
    """
    Efficacy, generalisation and specificity of edits as in https://huggingface.co/papers/2410.02355, and their
    harmonic mean. Each argument has one value a prompt; prompts are averaged within their request, then requests.

    On the edited prompt and its paraphrases the new answer should win, on prompts of the neighbourhood the true one
    (as the code has it: the paper's equation 21 prints the sign the other way).

    Args:
        request (`Sequence[str]`):
            Which request the prompt belongs to.
        kind (`Sequence[str]`):
            `"rewrite"`, `"paraphrase"` or `"neighborhood"`.
        nll_new, nll_true (`Sequence[float]`):
            Negative log-likelihood of both answers after the prompt, in nats per token; NaN where there is no such
            answer, and then the prompt does not count in the comparison.
        accuracy (`Sequence[float]`):
            Share of the tokens of the wanted answer that are the most likely ones, given those before them.

    Returns:
        `dict[str, float]`: between 0 and 1, NaN where nothing was measured. `efficacy`, `generalisation`,
        `specificity`, `score`: the wanted answer is the likelier of the two. With `_argmax`: every token of the wanted
        answer is the most likely of all. With `_tokens`: share of such tokens, which is zsRE's measure.

    Raises:
        ValueError: when a kind is unknown or there is no prompt.
    """
    table = pd.DataFrame(
        {"request": request, "kind": kind, "new": nll_new, "true": nll_true, "tokens": accuracy}
    ).astype({"new": float, "true": float, "tokens": float})
    if table.empty:
        raise ValueError("Expected at least one prompt to measure, got none.")
    if unknown := sorted(set(table["kind"]) - set(KINDS)):
        raise ValueError(f"Expected kinds among {list(KINDS)}, got {unknown}.")
    margin = table["true"] - table["new"]
    margin = margin.where(table["kind"] != "neighborhood", -margin)
    table["wins"] = (margin > 0).astype(float).where(margin.notna())
    table["argmax"] = (table["tokens"] == 1).astype(float).where(table["tokens"].notna())
    means = table.groupby(["kind", "request"])[["wins", "argmax", "tokens"]].mean().groupby("kind").mean()
    means = means.reindex(list(KINDS))
    scores: dict[str, float] = {}
    for column, suffix in (("wins", ""), ("argmax", "_argmax"), ("tokens", "_tokens")):
        values = means[column]
        scores |= {f"{name}{suffix}": float(values[kind]) for kind, name in KINDS.items()}
        scores[f"score{suffix}"] = harmonic_mean(values.tolist())
    return scores


def harmonic_mean(values: Sequence[float]) -> float:
    """The harmonic mean of numbers that are not negative: 0 when one of them is 0, NaN when one of them is NaN."""
    numbers = np.asarray(values, dtype=float)
    if np.isnan(numbers).any():
        return float("nan")
    return 0.0 if (numbers == 0).any() else float(len(numbers) / (1 / numbers).sum())


def ngram_entropy(text: str) -> float:
    """
    Fluency of one text: word n-gram entropy, 2/3 of the bigrams' and 4/3 of the trigrams' averaged, as the code of
    https://huggingface.co/papers/2410.02355 has it (its equation 22 omits the sign and the mean). Text that repeats
    itself is near 0. Words and marks are split by a regular expression, where the papers use NLTK's tokenizer.

    Args:
        text (`str`):
            Generated text.

    Returns:
        `float`: in bits; the papers print a hundred times this.
    """
    words = re.findall(r"\w+|[^\w\s]", text)
    return (2 / 3 * _entropy_bits(words, 2) + 4 / 3 * _entropy_bits(words, 3)) / 2


def fluency(texts: Sequence[str]) -> float:
    """The mean [`ngram_entropy`] of texts."""
    return float(np.mean([*map(ngram_entropy, texts)]))


def _entropy_bits(words: list[str], n: int) -> float:
    counts = np.array(list(Counter(zip(*(words[start:] for start in range(n)), strict=False)).values()))
    shares = counts / counts.sum()
    return float((shares * np.log2(1 / shares)).sum())
