"""The cascade's section of `hf-iclr tour`: SmolLM2 and a draft made of its own first layers."""

import time
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers import set_seed

from hf_iclr.generation.pipeline_speculative_cascade import SpeculativeCascadePipeline

from .demo.draft import docstrings, load_demo_draft


# (label, rule, alpha); the large model alone comes first
NEAR = 0.5  # nats a token that a text may be less likely to the large model than its own, for the headline
METHODS = (
    ("speculative", "spec", 0.0),
    ("token_v3", "token_v3", 0.3),
    ("token_v3", "token_v3", 0.8),
    ("opt", "opt", 0.2),
    ("small alone", "chow", 1.0),
)


def section(out_dir: Path, quick: bool, progress):
    """
    Runs three docstrings through plain sampling, speculative decoding and three cascades.

    Args:
        out_dir (`pathlib.Path`):
            Where figures go.
        quick (`bool`):
            Fewer tokens.
        progress (`Callable`):
            A tqdm.

    Returns:
        [`~hf_iclr.tour.TourSection`]
    """
    from .demo.language_model import fastest_dtype, load_demo_model
    from .pages import TourSection

    max_new_tokens = 12 if quick else 16
    dtype = fastest_dtype()
    model, tokenizer = load_demo_model(dtype)
    draft = load_demo_draft("quick", dtype)
    pipe = SpeculativeCascadePipeline(model=model, tokenizer=tokenizer, assistant_model=draft)
    prompts = [text[:240] for text in docstrings()[-3:]]  # not among those that the draft is made from
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_new_tokens": max_new_tokens}

    rows, examples, statistics = [], [], []
    for label, rule, alpha in progress((("large alone", None, None), *METHODS), desc="cascade"):
        texts, new_tokens, seconds = [], 0, 0.0
        forwards = drafted = accepted = deferred = drift = 0
        for seed, prompt in enumerate(prompts):
            set_seed(seed)
            inputs = tokenizer(prompt, return_tensors="pt")
            begin = time.process_time()
            if rule is None:
                output = model.generate(**inputs, **sampling)
                count = forwards_of_call = output.shape[1] - inputs["input_ids"].shape[1]
                texts.append(tokenizer.decode(output[0, -count:], skip_special_tokens=True))
            else:
                record = pipe(
                    prompt,
                    cascade_rule=rule,
                    cascade_alpha=alpha,
                    return_full_text=False,
                    **sampling,
                )[0]
                texts.append(record["generated_text"])
                stats = record["cascade"]
                statistics.append(stats | {"prompt": prompt})
                count, forwards_of_call = stats["new_tokens"], stats["call"]["large_forwards"]
                drafted, accepted = drafted + stats["drafted"], accepted + stats["accepted"]
                deferred, drift = deferred + stats["deferred"], drift + stats["drift"]
            seconds += time.process_time() - begin
            new_tokens, forwards = new_tokens + count, forwards + forwards_of_call
        rows.append(
            {
                "method": label,
                "alpha": alpha if rule not in (None, "spec") else None,
                "CPU ms/token": 1000 * seconds / new_tokens,
                "tokens/forward": new_tokens / forwards,
                "kept %": 100 * accepted / drafted if drafted else None,
                "deferred %": 100 * deferred / new_tokens if rule else None,
                "TV": drift / new_tokens if rule else None,
                "NLL": _nll(model, tokenizer, prompts, texts),
            }
        )
        examples.append(f"{label}{f' (alpha {alpha})' if rule else ''}: {texts[0]}")

    table = pd.DataFrame(rows)
    cascades = table[1:-1]  # the small model alone is no cascade
    near = cascades[cascades["NLL"] <= table["NLL"][0] + NEAR]
    best = (near if len(near) else cascades)["CPU ms/token"].idxmin()
    alpha = table["alpha"][best]
    quickest = table["method"][best] if pd.isna(alpha) else f"{table['method'][best]}, alpha {alpha:g}"
    about = (
        f"SmolLM2-135M-Instruct ({str(dtype).removeprefix('torch.')}) goes on with {len(prompts)} "
        "docstrings at temperature 0.7; a draft made of its own weights and other docstrings proposes "
        "tokens, as many as come quickest."
    )
    speed = (
        f"Plain sampling took {table['CPU ms/token'][0]:.1f} ms of processor time a token; of the cascades whose "
        f"texts are at most {NEAR} nats a token less likely the quickest ({quickest}) took "
        f"{table['CPU ms/token'][best]:.1f} ms. Speculative decoding keeps the large model's law; a cascade gives up "
        "some of it, 'TV', the distance from it, says how much."
    )
    caution = (
        "NLL is that of the texts under the large model, nats a token: a rough figure for so few tokens. "
        "benchmarks/cascade.py measures speed and likelihood properly."
    )
    return TourSection(
        title="Speculative cascades",
        headline=f"{table['CPU ms/token'][0] / table['CPU ms/token'][best]:.2f} times as quick as plain ({quickest}).",
        command='hf-iclr cascade "Explain rain." --model LARGE --assistant-model SMALL',
        summary=[about, speed, caution],
        table=table,
        figures=[_figure(table, out_dir / "cascade.png")],
        examples=examples,
        data={"statistics": statistics},
    )


@torch.no_grad()
def _nll(model, tokenizer, prompts, texts) -> float:
    """Mean negative log-likelihood (nats a token) of the texts under the large model at temperature 1."""
    total, count = 0.0, 0
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt + text, return_tensors="pt")["input_ids"]
        length = ids.shape[1] - len(tokenizer(prompt)["input_ids"])
        if length > 0:
            log_probs = model(ids[:, :-1]).logits[0, -length:].float().log_softmax(-1)
            total -= log_probs.gather(1, ids[0, -length:, None]).sum().item()
            count += length
    return total / max(count, 1)


def _figure(table: pd.DataFrame, path: Path) -> Path:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(table["CPU ms/token"], table["NLL"], color=["C3", "C2", *["C0"] * (len(table) - 2)])
    for index, (_, row) in enumerate(table.iterrows()):
        label = row["method"] + ("" if pd.isna(row["alpha"]) else f", α = {row['alpha']}")
        offset = (4, 4 + 11 * (index % 3))  # neighbours would overlap
        axes.annotate(label, (row["CPU ms/token"], row["NLL"]), fontsize=8, xytext=offset, textcoords="offset points")
    axes.set_xlabel("processor time, ms per token (lower is quicker)")
    axes.set_ylabel("NLL under the large model, nats per token")
    axes.margins(0.2)
    figure.savefig(path, dpi=130)
    return path
