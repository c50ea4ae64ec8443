"""`hf-iclr sft`, `dpo` and `audit`."""

from pathlib import Path
from typing import Annotated

import typer


def sft(context: typer.Context) -> None:
    """Run TRL's SFT script with DeepSafetySFTTrainer: TRL's flags (or --config FILE) and ours; --help lists them."""
    from hf_iclr.cli.trl_script import run_trl_script

    run_trl_script("sft", context.args)


def dpo(context: typer.Context) -> None:
    """Run TRL's DPO script with SqueezeDPOTrainer: TRL's flags (or --config FILE) and ours; --help lists them."""
    from hf_iclr.cli.trl_script import run_trl_script

    run_trl_script("dpo", context.args)


def audit(
    model: Annotated[str, typer.Argument(help="Model to audit: repository or folder, also of a PEFT adapter.")],
    prompts: Annotated[
        Path, typer.Option(help="What should be refused: .txt, or .jsonl or .csv with a column prompt (and answer).")
    ],
    harmless_prompts: Annotated[Path | None, typer.Option(help="What should be answered; the same formats.")] = None,
    before: Annotated[
        str | None,
        typer.Option(help="The model before: repository, folder, folder of an earlier audit, or adapter_off."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="A model that wasn't aligned: repository, folder, or adapter_off.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.json, the figure and model_card.md.")] = Path("audit"),
    attack: Annotated[list[str], typer.Option(help="prefill, decoding, rap or gcg; may be repeated.")] = [  # noqa: B006
        "prefill",
        "decoding",
    ],
    k: Annotated[list[int], typer.Option(help="Prefilled tokens; may be repeated.")] = [1, 2, 5, 10, 20, 40],  # noqa: B006
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts in one forward.")] = 16,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    with_texts: Annotated[
        bool, typer.Option("--with-texts", help="Write the answers too; they may be harmful.")
    ] = False,
    min_refusal: Annotated[float | None, typer.Option(help="Least share refused.")] = None,
    max_over_refusal: Annotated[float | None, typer.Option(help="Largest share of harmless prompts refused.")] = None,
    min_refusal_at_prefill: Annotated[float | None, typer.Option(help="Least share refused after each k.")] = None,
    min_refusal_under_decoding: Annotated[
        float | None, typer.Option(help="Least share refused under every decoding setting.")
    ] = None,
    min_refusal_under_rap: Annotated[float | None, typer.Option(help="The same under rank-assisted prefixes.")] = None,
    min_refusal_under_gcg: Annotated[float | None, typer.Option(help="The same under GCG suffixes.")] = None,
    max_refusal_drop: Annotated[float | None, typer.Option(help="Largest fall of the refusal rate.")] = None,
) -> None:
    """Measure how a model refuses; exit with 1 when a threshold is crossed."""
    from peft import AutoPeftModelForCausalLM
    from rich.console import Console
    from rich.markdown import Markdown
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_iclr.cli.prompt_files import read_prompts
    from hf_iclr.trainers.safety_audit.audit import ADAPTER_OFF, audit_safety
    from hf_iclr.trainers.safety_audit.report import SafetyReport

    def load(name: str | None):
        if name is None or name == ADAPTER_OFF:
            return name
        auto = AutoPeftModelForCausalLM if ADAPTER_OFF in (before, base) else AutoModelForCausalLM
        return auto.from_pretrained(name, dtype="auto", device_map="auto")

    limits = {
        "min_refusal": min_refusal,
        "max_over_refusal": max_over_refusal,
        "min_refusal_at_prefill": min_refusal_at_prefill,
        "min_refusal_under_decoding": min_refusal_under_decoding,
        "min_refusal_under_rap": min_refusal_under_rap,
        "min_refusal_under_gcg": min_refusal_under_gcg,
        "max_refusal_drop": max_refusal_drop,
    }
    questions, answers = read_prompts(prompts)
    report = audit_safety(
        load(model),
        AutoTokenizer.from_pretrained(model),
        questions,
        harmless_prompts=None if harmless_prompts is None else read_prompts(harmless_prompts)[0],
        before=SafetyReport.load(before) if before and (Path(before) / "report.json").exists() else load(before),
        base=load(base),
        answers=answers,
        ks=[0, *k],
        attacks=attack,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        thresholds={name: limit for name, limit in limits.items() if limit is not None},
    )
    report.save(out, with_texts)
    console = Console()
    console.print(Markdown(report.to_markdown()))
    for sentence in report.check():
        console.print(f"[red]crossed:[/] {sentence}")
    if report.check():
        raise typer.Exit(1)
