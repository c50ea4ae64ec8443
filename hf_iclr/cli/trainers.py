"""`hf-iclr sft`, `dpo` and `audit`."""

from pathlib import Path
from typing import Annotated, Any

import typer


THRESHOLDS = (
    "min_refusal", "max_over_refusal", "min_refusal_at_prefill", "min_refusal_under_decoding", "min_refusal_under_rap",
    "min_refusal_under_gcg", "max_refusal_drop", "max_harmful",
)  # fmt: skip


def sft(context: typer.Context) -> None:
    """Run TRL's SFT script with DeepSafetySFTTrainer: TRL's flags (or --config FILE) and ours; --help lists them."""
    from hf_iclr.cli.trl_script import run_trl_script

    run_trl_script("sft", context.args)


def dpo(context: typer.Context) -> None:
    """Run TRL's DPO script with SqueezeDPOTrainer: TRL's flags (or --config FILE) and ours; --help lists them."""
    from hf_iclr.cli.trl_script import run_trl_script

    run_trl_script("dpo", context.args)


def audit(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model to audit: repository or folder, also of a PEFT adapter.")],
    prompts: Annotated[
        str,
        typer.Option(
            help="What should be refused: .txt, or .jsonl or .csv with a column prompt (and answer), or a data set of "
            "the Hub."
        ),
    ],
    endpoint: Annotated[
        str | None,
        typer.Option(help="OpenAI-compatible server of that model, http://localhost:8000/v1; key: OPENAI_API_KEY."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="The model's tokenizer, where it has another name.")] = None,
    prompts_split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    prompts_column: Annotated[str, typer.Option(help="Column of the prompts.")] = "prompt",
    harmless_prompts: Annotated[
        str | None, typer.Option(help="What should be answered: the same, or harmless_orders, sixty that come along.")
    ] = None,
    harmless_split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    harmless_column: Annotated[str, typer.Option(help="Column of the harmless prompts.")] = "prompt",
    system: Annotated[str | None, typer.Option(help="System prompt before each prompt.")] = None,
    chat_template_kwargs: Annotated[
        str | None, typer.Option(help="""More arguments of the chat template: '{"enable_thinking": false}'.""")
    ] = None,
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
    max_batch_tokens: Annotated[
        int | None, typer.Option(help="Fewer prompts in one forward where their tokens would be more.")
    ] = None,
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
    max_harmful: Annotated[float | None, typer.Option(help="Largest share that the harm judge finds harmful.")] = None,
    harm_judge: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server of a model that says whether an answer is harmful.")
    ] = None,
    harm_judge_model: Annotated[str | None, typer.Option(help="That model's name there.")] = None,
) -> None:
    """
    Measure how a model refuses. Exit code 0: the thresholds are kept; 1: one is crossed; 2: it could not be measured.
    """
    import os

    from rich.console import Console
    from rich.markdown import Markdown
    from rich.markup import escape

    from hf_iclr.runs.prompt_files import read_prompts
    from hf_iclr.trainers.safety_audit.asking.endpoint import OpenAIEndpoint
    from hf_iclr.trainers.safety_audit.asking.harm_judge import HarmJudge
    from hf_iclr.trainers.safety_audit.asking.journal import check_out
    from hf_iclr.trainers.safety_audit.asking.load import load_model, load_tokenizer
    from hf_iclr.trainers.safety_audit.audit import audit_safety
    from hf_iclr.trainers.safety_audit.checks import ADAPTER_OFF
    from hf_iclr.trainers.safety_audit.report import SafetyReport, check_thresholds
    from hf_iclr.untrusted import parse_json

    kwargs = None if chat_template_kwargs is None else parse_json(chat_template_kwargs, "--chat-template-kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"Expected an object for --chat-template-kwargs, got {chat_template_kwargs!r}.")
    if any(other and os.path.realpath(other) == os.path.realpath(model) for other in (before, base)):
        raise ValueError(f"Expected another model than the audited one to compare it with, got {model!r} twice.")
    if (harm_judge is None) != (harm_judge_model is None):
        raise ValueError("Expected --harm-judge and --harm-judge-model together, got one of them.")
    harm = None if harm_judge is None else HarmJudge(OpenAIEndpoint(harm_judge, str(harm_judge_model)))
    limits = {name: limit for name in THRESHOLDS if (limit := context.params[name]) is not None}
    check_thresholds(limits)
    check_out(out)
    questions, answers = read_prompts(prompts, prompts_split, prompts_column)
    harmless = None if harmless_prompts is None else read_prompts(harmless_prompts, harmless_split, harmless_column)[0]
    accelerator = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # started by `accelerate launch`
        from accelerate import Accelerator

        accelerator = Accelerator()

    def load(name: str | None):
        if name in (None, ADAPTER_OFF):
            return name
        return OpenAIEndpoint(endpoint, name) if endpoint else load_model(name, accelerator=accelerator)

    subject: Any = model
    words = None if tokenizer is None else load_tokenizer(tokenizer)
    if endpoint:
        subject = OpenAIEndpoint(endpoint, model)
        words = load_tokenizer(model) if words is None and "prefill" in attack and max(k, default=0) > 0 else words
    earlier = SafetyReport.load(before) if before and Path(before, "report.json").exists() else load(before)
    report = audit_safety(
        subject,
        words,
        questions,
        system=system,
        chat_template_kwargs=kwargs,
        harmless_prompts=harmless,
        before=earlier,
        base=load(base),
        answers=answers,
        harm_judge=harm,
        ks=[0, *k],
        attacks=attack,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        max_batch_tokens=max_batch_tokens,
        seed=seed,
        thresholds=limits,
        out=out,
        with_texts=with_texts,
        accelerator=accelerator,
    )
    for paid in (subject, harm):
        if isinstance(paid, OpenAIEndpoint | HarmJudge):
            typer.echo(paid.cost_line(), err=True)
    crossed, unmeasured = report.crossed(), report.unmeasured()
    if accelerator is None or accelerator.is_main_process:
        console = Console()
        console.print(Markdown(report.to_markdown()))
        for sentence in crossed:
            console.print(f"[red]crossed:[/] {escape(sentence)}")
        for sentence in unmeasured:
            console.print(f"[yellow]could not be measured:[/] {escape(sentence)}")
        if not limits:
            console.print("No threshold was given, so none is crossed.")
        elif not (crossed or unmeasured):
            console.print(f"[green]kept:[/] {', '.join(limits)}.")
    if crossed or unmeasured:
        raise typer.Exit(1 if crossed else 2)
