"""The editing section of `hf-iclr tour`: SmolLM2 is edited, asked, undone and asked again."""

from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from hf_iclr.editors.alpha_edit import AlphaEditConfig, AlphaEditor, KeyStatistics, evaluate_edits, perplexity

from .demo.facts import demo_requests, demo_text
from .demo.language_model import load_demo_model


def section(out_dir: Path, quick: bool, progress):
    """
    Moves some capitals, asks for them and for others, and takes it all back.

    Args:
        out_dir (`pathlib.Path`):
            Where the figure and the edits go.
        quick (`bool`):
            Fewer edits and less text.
        progress (`Callable`):
            A tqdm.

    Returns:
        [`~hf_iclr.tour.TourSection`]
    """
    from .pages import TourSection

    model, tokenizer = load_demo_model(torch.float32)
    text = demo_text()
    held_out, general = text.select(range(10)), text.select(range(10, len(text)))
    statistics = KeyStatistics.from_dataset(
        model, tokenizer, general, max_tokens=4_000 if quick else 8_000, max_length=128
    )
    requests = demo_requests(4 if quick else 10)
    config = AlphaEditConfig(num_contexts=2, kl_factor=0.0, num_steps=20)
    editor = AlphaEditor(model, tokenizer, config, statistics)

    def measure(when: str) -> dict[str, float | str]:
        scores = evaluate_edits(model, tokenizer, requests, progress=False)
        drift = perplexity(model, tokenizer, held_out["text"], max_length=128, progress=False)
        names = ("efficacy", "generalisation", "specificity")
        return {"model": when, **{f"{name} %": 100 * scores[name] for name in names}, "perplexity": drift}

    answers = [f"before: {ask(model, tokenizer, requests[0].text)}"]
    rows = [measure("before")]
    report = editor.edit(requests, batch_size=5)
    answers.append(f"edited: {ask(model, tokenizer, requests[0].text)}")
    rows.append(measure("edited"))
    editor.save_pretrained(out_dir / "edits")
    editor.undo(len(editor.batches))
    answers.append(f"undone: {ask(model, tokenizer, requests[0].text)}")
    rows.append(measure("undone"))
    assert rows[0] | {"model": ""} == rows[2] | {"model": ""}, "undo must be exact"

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    table = report.to_pandas()
    places = range(len(table))
    axes.bar([place - 0.2 for place in places], table.p_before, 0.4, label="before")
    axes.bar([place + 0.2 for place in places], table.p_after, 0.4, label="after")
    axes.set_xticks(list(places), [f"{row.subject}: {row.target_new}" for row in table.itertuples()], rotation=60)
    axes.set_ylabel("probability of the new answer")
    axes.legend()
    path = out_dir / "alphaedit.png"
    figure.savefig(path, dpi=120)
    return TourSection(
        title="AlphaEdit: knowledge edits",
        headline=f"{rows[1]['efficacy %']:.0f} % of {len(requests)} new facts hold, "
        f"{rows[0]['efficacy %']:.0f} % did before; undone to the bit.",
        command="hf-iclr edit MODEL facts.jsonl --text FILE --out DIR",
        summary=[
            f"{len(requests)} capitals of SmolLM2 moved on purpose: {report}.",
            f"The edits are a LoRA adapter in {out_dir / 'edits'}. Undoing them restored every number above exactly.",
        ],
        table=pd.DataFrame(rows),
        figures=[path],
        examples=answers,
        data={"edits": report.edits, "layers": report.layers},
    )


def ask(model, tokenizer, prompt: str) -> str:
    """Greedy continuation by a few tokens."""
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**encoded, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(output[0], skip_special_tokens=True)
