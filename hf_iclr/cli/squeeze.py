"""`hf-iclr squeeze`: what a preference training did, or will do, to the answers it should keep."""

from pathlib import Path
from typing import Annotated

import typer


STATES = "trainer_state.json of any trainer, a checkpoint, or JSON Lines with an entry an evaluation."
PAIRS = "Pairs with prompt, chosen and rejected: .jsonl, .csv or .parquet, or a folder or repository of a dataset."
Model = Annotated[str, typer.Argument(help="Model that will be trained: repository or folder.")]
Pairs = Annotated[str, typer.Argument(help=PAIRS)]
Split = Annotated[str, typer.Option(help="Split of the dataset, where it has several.")]
MaxLength = Annotated[int | None, typer.Option(help="Tokens of prompt and answer together; the rest is cut off.")]


def report(
    state: Annotated[Path, typer.Argument(help=STATES)],
    out: Annotated[Path, typer.Option(help="Folder for the page, the figure and the numbers.")] = Path("squeeze"),
    title: Annotated[str, typer.Option(help="Heading.")] = "Squeezing report",
) -> None:
    """Write what a run logged as a page with its figure."""
    from hf_iclr.trainers.squeeze.report import write_squeeze_report
    from hf_iclr.trainers.squeeze.warning import read_log

    typer.echo(write_squeeze_report(read_log(state), out, title))


def replay(
    states: Annotated[list[Path], typer.Argument(help=STATES)],
    delta: Annotated[
        float | None, typer.Option(help="Fall that is one, in nats a token; by default the monitor's.")
    ] = None,
    tokens_per_answer: Annotated[
        float, typer.Option(help="For logs that hold sums over an answer, such as TRL's own.")
    ] = 50.0,
) -> None:
    """Say when the warning would have come in runs that are over."""
    from rich.console import Console
    from rich.table import Table

    from hf_iclr.trainers.squeeze.warning import replay_log

    table = Table("run", "watched", "evaluations", "highest at step", "warning at step", "fall at the end")
    rule = {} if delta is None else {"delta": delta}
    for state in states:
        for row in replay_log(state, tokens_per_answer, **rule).itertuples():
            alarm = "none" if row.alarm is None else f"{row.alarm}"
            table.add_row(str(state), row.watched, f"{row.evaluations}", f"{row.highest_at}", alarm, f"{row.fall:.3f}")
    Console().print(table)


def audit(
    model: Model,
    pairs: Pairs,
    split: Split = "train",
    out: Annotated[Path | None, typer.Option(help="CSV file for all scores.")] = None,
    worst: Annotated[int, typer.Option(min=1, help="Riskiest pairs to show.")] = 10,
    beta: Annotated[float, typer.Option(help="β of DPO.")] = 0.1,
    max_length: MaxLength = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in one forward.")] = 8,
) -> None:
    """Rank preference pairs by how likely training on them lowers their own chosen answers."""
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_iclr.runs.dataset_files import load_rows
    from hf_iclr.trainers.squeeze.pair_audit import audit_pairs

    rows = load_rows(pairs, split)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
    scores = audit_pairs(
        loaded, AutoTokenizer.from_pretrained(model), rows, beta=beta, max_length=max_length, batch_size=batch_size
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        scores.to_csv(out, index_label="row")
    shown = ("ches_per_token", "logp_chosen", "logp_rejected", "pressure", "force")
    table = Table("row", *shown)
    for index, row in scores.sort_values("ches_per_token", ascending=False).head(worst).iterrows():
        table.add_row(f"{index}", *(f"{row[name]:.3f}" for name in shown))
    Console().print(table)


def influence(
    model: Model,
    pairs: Pairs,
    split: Split = "train",
    probes: Annotated[str | None, typer.Option(help="Answers to ask about; by default made of the pairs.")] = None,
    count: Annotated[int, typer.Option(min=1, help="Pairs to take a step on, each alone: the first.")] = 1,
    step_size: Annotated[float, typer.Option(help="Learning rate of that step.")] = 1e-4,
    beta: Annotated[float, typer.Option(help="β of DPO.")] = 0.1,
    max_length: MaxLength = None,
    out: Annotated[Path | None, typer.Option(help="CSV file for all answers.")] = None,
) -> None:
    """Explain what one DPO step on a pair does to other answers: pull of the chosen, push of the rejected one."""
    from rich.console import Console
    from rich.table import Table
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_iclr.runs.dataset_files import load_rows
    from hf_iclr.trainers.squeeze.influence import influence_audit
    from hf_iclr.trainers.squeeze.probes import build_probe_set

    rows = load_rows(pairs, split)
    asked = build_probe_set(rows, num_probes=count) if probes is None else load_rows(probes)
    first = rows.select(range(min(count, len(rows)))).select_columns(["prompt", "chosen", "rejected"])
    found = influence_audit(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32", device_map="auto"),
        AutoTokenizer.from_pretrained(model),
        first,
        asked,
        step_size=step_size,
        beta=beta,
        max_length=max_length,
    )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        found.table.to_csv(out, index=False)
    parts = ("pull_up", "push_down", "predicted", "measured")
    table = Table("answer", *parts, title="Mean change in nats")
    for kind, row in found.table.groupby("kind", sort=False)[list(parts)].mean().iterrows():
        table.add_row(str(kind), *(f"{row[name]:+.4f}" for name in parts))
    Console().print(table)
