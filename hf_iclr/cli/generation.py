"""`hf-iclr cascade`."""

import json
from pathlib import Path
from typing import Annotated

import typer


def cascade(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: Annotated[
        str | None, typer.Option(help="Large or composite model: repository or folder. Left out: SmolLM2.")
    ] = None,
    assistant_model: Annotated[str | None, typer.Option(help="Small model: repository or folder.")] = None,
    rule: Annotated[
        str | None, typer.Option(help="Deferral rule. Left out: spec, the large model's own text, only quicker.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Parameter of the rule: how much is left to the small model. Left out: 0.3.")
    ] = None,
    num_assistant_tokens: Annotated[
        int | None, typer.Option(help="Tokens drafted in a round. Left out: as tokens come quickest.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 decodes greedily.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder whose cascade.jsonl gets the statistics.")] = None,
) -> None:
    """Answer one prompt by a speculative cascade, token by token, and show its statistics."""
    from rich.console import Console
    from rich.table import Table
    from transformers import TextStreamer, pipeline, set_seed

    from hf_iclr.generation.cascade_call import complete_options

    complete_options({"cascade_rule": rule, "cascade_alpha": alpha})
    if model is not None:
        pipe = pipeline("speculative-cascade", model=model, assistant_model=assistant_model)
    else:
        from hf_iclr.tour.demo.draft import load_demo_draft
        from hf_iclr.tour.demo.language_model import fastest_dtype, load_demo_model

        large, tokenizer = load_demo_model(fastest_dtype())
        pipe = pipeline(
            "speculative-cascade",
            model=large,
            tokenizer=tokenizer,
            assistant_model=load_demo_draft("quick", large.dtype),
        )
    set_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    record = pipe(
        [{"role": "user", "content": prompt}] if pipe.tokenizer.chat_template else prompt,
        cascade_rule=rule,
        cascade_alpha=alpha,
        num_assistant_tokens=num_assistant_tokens,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )[0]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with (out / "cascade.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record["cascade"]) + "\n")
    table = Table("", "", show_header=False)
    for name, value in {**record["cascade"], **record["cascade"]["call"]}.items():
        if name == "draft_lengths":
            value = ", ".join(f"{length} in {rounds} rounds" for length, rounds in value.items())
        if name == "round_seconds":
            value = ", ".join(f"{1000 * seconds:.0f} ms with {length}" for length, seconds in value.items())
        if name != "call" and value != "":
            table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
