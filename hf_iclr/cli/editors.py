"""`hf-iclr edit`."""

from pathlib import Path
from typing import Annotated

import typer


def edit(
    model: Annotated[str | None, typer.Argument(help="Model to edit: repository or folder.")] = None,
    requests: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="JSON lines, or a list, with prompt (with {}), subject and target_new; or rows of CounterFact, zsRE, "
            "MQuAKE, EasyEdit or KnowEdit.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the adapter, journal and card; edits in it are added to.")
    ] = Path("edits"),
    statistics: Annotated[
        str | None, typer.Option(help="Key statistics of the model: folder or repository. Left out: made from --text.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Text that must not change: .txt, a paragraph a line. It is read for the first edits in --out only.",
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text to read at most.")] = 200_000,
    solver: Annotated[
        str | None,
        typer.Option(help="alphaedit, memit, memit_seq or ridge. Left out: that of the edits in --out, or alphaedit."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Facts solved for at once.")] = 100,
    undo: Annotated[int, typer.Option(help="Take back the last so many batches in --out instead.")] = 0,
) -> None:
    """Write facts into a model and save them as an adapter, or take the last back; a kill loses no whole batch."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from hf_iclr import AlphaEditConfig, AlphaEditor, KeyStatistics
    from hf_iclr.editors.alpha_edit.batches import ADAPTER_CONFIG
    from hf_iclr.editors.records.ledger import JOURNAL_NAME, check_adapter

    console = Console()
    if undo:
        if not out.is_dir():
            raise ValueError(f"Expected --out to be a folder with edits, got {out}, which is none.")
        editor = AlphaEditor.from_pretrained(out)
        gone = editor.undo(undo)
        console.print(f"{len(gone)} edits taken back, {len(editor.edits)} left in {out}.", markup=False)
        return
    kept = (out / JOURNAL_NAME).exists()
    if model is None or requests is None or (statistics is None) == (text is None) and not kept:
        raise ValueError(
            "Expected a model, a file of requests and one of --statistics and --text, or --undo N. For instance "
            "`hf-iclr edit MODEL requests.jsonl --text wikipedia.txt --out edits`."
        )
    check_adapter(out, ADAPTER_CONFIG)  # before the text is read
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_iclr.editors.alpha_edit import edit_requests
    from hf_iclr.runs.prompt_files import read_json_lines
    from hf_iclr.untrusted import parse_json

    whole = requests.read_bytes().lstrip(b"\xef\xbb\xbf \n\r\t")
    rows_asked = parse_json(whole, requests) if whole.startswith(b"[") else read_json_lines(requests)
    facts, config = edit_requests(rows_asked), AlphaEditConfig(solver=solver or "alphaedit")
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
    tokenizer = AutoTokenizer.from_pretrained(model)
    keys: KeyStatistics | None = None
    if statistics is not None:
        keys = KeyStatistics.from_pretrained(statistics)
    elif kept:
        if (out / "statistics").is_dir():
            keys = KeyStatistics.from_pretrained(out / "statistics")
    elif text is not None:
        rows = Dataset.from_dict(
            {"text": [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]}
        )
        keys = KeyStatistics.from_dataset(
            loaded, tokenizer, rows, max_tokens=max_tokens, checkpoint=out / "statistics" / "part"
        )
        keys.save_pretrained(out / "statistics")
    if kept:
        editor = AlphaEditor.from_pretrained(out, loaded, tokenizer, keys)
        if solver not in (None, editor.config.solver):
            raise ValueError(f"Expected the solver of the edits in {out}, {editor.config.solver}, got {solver}.")
    else:
        editor = AlphaEditor(loaded, tokenizer, config, keys, folder=out)
    report = editor.edit(facts, batch_size=batch_size)
    table = Table("edit", "new answer", "before", "after", "", title=str(report), title_justify="left")
    for row in report.edits + report.rejected:
        subject, measured = row["subject"], [f"{row[name]:.3f}" for name in ("p_before", "p_after") if name in row]
        asked = row["prompt"] if subject is None else row["prompt"].replace("{}", subject)
        cells = [asked, row["target_new"], *(measured or ["", ""]), row.get("reason", "")]
        table.add_row(*map(Text, cells))  # "[/INST]" is no markup
    console.print(table)
    usage = f"`pipeline('text-generation', model={str(out)!r})`"
    console.print(f"Saved to {out}: an adapter for PEFT and {usage}.", markup=False)
