"""The command `hf-iclr`: one function a command, heavy imports inside it so that `hf-iclr --help` is quick."""

from pathlib import Path
from typing import Annotated

import typer

from hf_iclr import __version__


app = typer.Typer(
    help="The six ICLR 2025 award papers as drop-in parts of the Hugging Face stack.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_iclr {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


@app.command()
def tour(
    out: Annotated[Path, typer.Option(help="Folder for index.html, tour.json and the figures.")] = Path("out/tour"),
    quick: Annotated[bool, typer.Option("--quick", help="Run each part in its shortest form.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print the traceback of a part that fails.")] = False,
) -> None:
    """Run every part on real input and write one page about it."""
    from hf_iclr.extras import require

    require("cli", "hf-iclr tour")
    from hf_iclr.tour.pages import has_failed, run_tour

    if any(has_failed(result) for result in run_tour(out, quick, debug=debug)):
        raise typer.Exit(1)


@app.command()
def cascade(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    model: Annotated[
        str | None, typer.Option(help="Large or composite model: repository or folder. Left out: SmolLM2.")
    ] = None,
    assistant_model: Annotated[str | None, typer.Option(help="Small model: repository or folder.")] = None,
    rule: Annotated[str, typer.Option(help="Deferral rule.")] = "token_v3",
    alpha: Annotated[float, typer.Option(help="Parameter of the rule: how much is left to the small model.")] = 0.3,
    num_assistant_tokens: Annotated[int, typer.Option(help="Tokens drafted in a round.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 decodes greedily.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Answer one prompt by a speculative cascade, token by token, and show its statistics."""
    from rich.console import Console
    from rich.table import Table
    from transformers import TextStreamer, pipeline, set_seed

    from hf_iclr.generation.deferral_rules import check_rule

    try:
        check_rule(rule, alpha)
        if model is not None:
            pipe = pipeline("speculative-cascade", model=model, assistant_model=assistant_model)
        else:
            from hf_iclr.tour.demo.draft import load_demo_draft
            from hf_iclr.tour.demo.language_model import load_demo_model, quicker_dtype

            large, tokenizer = load_demo_model(quicker_dtype())
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
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    table = Table("", "", show_header=False)
    for name, value in {**record["cascade"], **record["cascade"]["call"]}.items():
        if name != "call":
            table.add_row(name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@app.command(context_settings=_PASS_ON)
def sft(context: typer.Context) -> None:
    """Run TRL's SFT script with DeepSafetySFTTrainer: TRL's flags (or --config FILE) and ours; --help lists them."""
    from hf_iclr.cli.trl_script import run_trl_script

    run_trl_script("sft", context.args)


@app.command(context_settings=_PASS_ON)
def dpo(context: typer.Context) -> None:
    """Run TRL's DPO script with SqueezeDPOTrainer: TRL's flags (or --config FILE) and ours; --help lists them."""
    from hf_iclr.cli.trl_script import run_trl_script

    run_trl_script("dpo", context.args)


@app.command()
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
    try:
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
    except (ValueError, TypeError, OSError) as error:  # exit code 2; 1 is that of a crossed threshold
        raise typer.BadParameter(str(error)) from error
    report.save(out, with_texts)
    console = Console()
    console.print(Markdown(report.to_markdown()))
    for sentence in report.check():
        console.print(f"[red]crossed:[/] {sentence}")
    if report.check():
        raise typer.Exit(1)


@app.command()
def edit(
    model: Annotated[str | None, typer.Argument(help="Model to edit: repository or folder.")] = None,
    requests: Annotated[
        Path | None,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="JSON lines with prompt (with {}), subject and target_new; or CounterFact or zsRE rows.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the adapter, ledger and card.")] = Path("edits"),
    statistics: Annotated[
        str | None, typer.Option(help="Key statistics of the model: folder or repository. Left out: made from --text.")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text that must not change: .txt, a paragraph a line."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of the text to read at most.")] = 200_000,
    solver: Annotated[str, typer.Option(help="alphaedit, memit, memit_seq or ridge.")] = "alphaedit",
    batch_size: Annotated[int, typer.Option(help="Facts solved for at once.")] = 100,
    undo: Annotated[int, typer.Option(help="Take back the last so many batches in --out instead.")] = 0,
) -> None:
    """Write facts into a model and save them as an adapter, or take the last back; a kill loses no whole batch."""
    import json

    from rich.console import Console
    from rich.table import Table

    from hf_iclr import AlphaEditConfig, AlphaEditor, KeyStatistics

    console = Console()
    try:
        if undo:
            if not out.is_dir():
                raise ValueError(f"Expected --out to be a folder with edits, got {out}, which is none.")
            editor = AlphaEditor.from_pretrained(out)
            gone = editor.undo(undo)
            editor.save_pretrained(out)
            console.print(f"{len(gone)} edits taken back, {len(editor.edits)} left in {out}.")
            return
        if model is None or requests is None or (statistics is None) == (text is None):
            raise ValueError(
                "Expected a model, a file of requests and one of --statistics and --text, or --undo N. For instance "
                "`hf-iclr edit MODEL requests.jsonl --text wikipedia.txt --out edits`."
            )
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hf_iclr.editors.alpha_edit import edit_requests

        facts = edit_requests([json.loads(line) for line in requests.read_text().splitlines() if line.strip()])
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map="auto")
        tokenizer = AutoTokenizer.from_pretrained(model)
        if text is not None:
            rows = Dataset.from_dict({"text": [line for line in text.read_text().splitlines() if line.strip()]})
            keys = KeyStatistics.from_dataset(
                loaded, tokenizer, rows, max_tokens=max_tokens, checkpoint=out / "statistics" / "part"
            )
            keys.save_pretrained(out / "statistics")
        else:
            keys = KeyStatistics.from_pretrained(str(statistics))
        editor = AlphaEditor(loaded, tokenizer, AlphaEditConfig(solver=solver), keys, folder=out)
        report = editor.edit(facts, batch_size=batch_size)
        editor.save_pretrained(out)
    except (ValueError, json.JSONDecodeError) as error:
        raise typer.BadParameter(str(error)) from error
    table = Table("edit", "new answer", "before", "after", "", title=str(report), title_justify="left")
    for row in report.edits:
        asked = row["prompt"].replace("{}", row["subject"])
        table.add_row(asked, row["target_new"], f"{row['p_before']:.3f}", f"{row['p_after']:.3f}", "")
    for row in report.rejected:
        table.add_row(row["prompt"].replace("{}", row["subject"]), row["target_new"], "", "", row["reason"])
    console.print(table)
    console.print(f"Saved to {out}: an adapter for PEFT and `pipeline('text-generation', model={str(out)!r})`.")


@app.command()
def annotate_ui(
    video: Annotated[
        str | None, typer.Argument(help="Video file, URL or folder of images. Left out: chosen on the page.")
    ] = None,
    model: Annotated[str, typer.Option(help="Segmenter: repository or folder.")] = "facebook/sam2.1-hiera-tiny",
    out: Annotated[Path, typer.Option(help="JSON file for the masks, written on Done.")] = Path("annotations.json"),
    host: Annotated[str, typer.Option(help="Where to listen; whoever reaches it can use the page.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 7860,
) -> None:
    """Click, track and correct objects of a video in the browser, until Done is pressed."""
    from rich.console import Console
    from transformers import pipeline

    from hf_iclr.vision.annotation.page import annotate_in_browser
    from hf_iclr.vision.formats.annotation_json import write_sav

    console = Console()
    try:
        pipe = pipeline("promptable-video-segmentation", model=model)
        session = None if video is None else pipe.session(video, output="rle", undo_levels=20)
        segments = annotate_in_browser(
            pipe,
            session,
            host,
            port,
            lambda url: console.print(f"Open {url} in a browser. Ctrl+C ends without saving."),
        )
        write_sav(segments, out)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"Masks of {len(segments)} frames written to {out}.")


@app.command()
def inpaint(
    video: Annotated[str, typer.Argument(help="Video file, URL or folder of images.")],
    masks: Annotated[
        Path | None,
        typer.Option(exists=True, help="Masks of every frame: SA-V JSON, or a folder of PNGs as in DAVIS."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help='Or what to segment: JSON such as {"0": {"1": {"points": [[x, y]]}}}.'
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Segmenter for --prompts.")] = "facebook/sam2.1-hiera-tiny",
    out: Annotated[Path, typer.Option(help="The painted video: .mp4 or .gif.")] = Path("inpainted.mp4"),
    object_: Annotated[
        list[int] | None, typer.Option("--object", help="Object to remove or keep; may be repeated. Left out: all.")
    ] = None,
    mode: Annotated[str, typer.Option(help="remove or replace_background.")] = "remove",
    pipeline: Annotated[
        str | None,
        typer.Option(help="Inpainting pipeline of diffusers: repository or folder. Left out: what other frames show."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What the pipeline is to draw.")] = "",
    dilation: Annotated[int | None, typer.Option(help="Pixels by which the painted region grows.")] = None,
    feather: Annotated[int, typer.Option(help="Pixels over which it fades out.")] = 2,
    steps: Annotated[int | None, typer.Option(help="Steps of the pipeline.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    rate: Annotated[float, typer.Option(help="Frames per second of the painted video.")] = 24,
) -> None:
    """Take objects out of a video, or put them before another background."""
    import inspect

    import torch
    import transformers
    from rich.console import Console

    from hf_iclr.extras import require
    from hf_iclr.vision.formats.annotation_json import read_sav
    from hf_iclr.vision.formats.mask_folders import read_davis
    from hf_iclr.vision.inpainting.inpainting import inpaint_video
    from hf_iclr.vision.session.prompts import VideoPrompts

    try:
        if (masks is None) == (prompts is None):
            raise ValueError(
                "Expected one of --masks and --prompts. For instance `hf-iclr inpaint VIDEO --masks m.json`."
            )
        if prompts is not None:
            segmenter = transformers.pipeline("promptable-video-segmentation", model=model)
            segments = segmenter(video, VideoPrompts.from_json(prompts), direction="both", output="rle")
        else:
            segments = read_davis(masks) if masks.is_dir() else read_sav(masks, stride=1)[0]  # type: ignore[union-attr, arg-type]
        painter = None
        if pipeline is not None:
            require("diffusion", "hf-iclr inpaint --pipeline")
            import diffusers

            painter = diffusers.DiffusionPipeline.from_pretrained(pipeline)
            if {"mask_image", "mask", "mask_video"}.isdisjoint(inspect.signature(painter.__call__).parameters):
                painter = diffusers.AutoPipelineForInpainting.from_pipe(painter)
            painter.to("cuda" if torch.cuda.is_available() else "cpu")
        painted = inpaint_video(
            video,
            segments,
            painter,
            objects=object_,
            mode=mode,
            prompt=prompt,
            dilation=dilation,
            feather=feather,
            seed=seed,
            **({} if steps is None else {"num_inference_steps": steps}),
        )
        painted.save(out, rate)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    shares = ", ".join(f"{share:.0%} {source}" for source, share in painted.sources.items() if share)
    Console().print(f"{len(painted)} frames written to {out}. Painted pixels: {shares}.")


@app.command()
def segment(
    video: Annotated[str, typer.Argument(help="Video file, image or folder of images.")],
    point: Annotated[
        list[str], typer.Option(help="FRAME:OBJECT:X,Y, or :0 after it for a click beside the object; repeatable.")
    ] = [],  # noqa: B006
    box: Annotated[list[str], typer.Option(help="FRAME:OBJECT:X0,Y0,X1,Y1; repeatable.")] = [],  # noqa: B006
    mask: Annotated[list[str], typer.Option(help="FRAME:OBJECT:IMAGE, black beside the object; repeatable.")] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(help="New folder for overlay.mp4, masks and JSON.")] = Path("segments"),
    model: Annotated[str, typer.Option(help="Repository or folder.")] = "facebook/sam2.1-hiera-tiny",
    direction: Annotated[str, typer.Option(help="forward, backward or both.")] = "forward",
    rate: Annotated[float, typer.Option(min=0.1, help="Frames per second of the overlay.")] = 24.0,
) -> None:
    """Follow clicked objects through a video: an overlay, a palette PNG a frame, masks and prompts as JSON."""
    from rich.console import Console
    from rich.table import Table

    from hf_iclr.cli.segment_command import parse_prompts, segment_video

    try:
        prompts = parse_prompts(point, box, mask)
        result = segment_video(video, prompts, out, model, direction, rate)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    console = Console()
    table = Table("object", "frames in sight", "mean score", title=f"{len(result)} frames", title_justify="left")
    for obj, track in result.tracks().items():
        spans = ", ".join(f"{first}-{last}" for first, last in track["visible"]) or "none"
        table.add_row(str(obj), spans, f"{sum(track['scores'].values()) / len(track['scores']):.3f}")
    console.print(table)
    if result.damage:
        console.print(f"[yellow]{result.damage}[/]")
    console.print(f"Saved to {out}: overlay.mp4, masks/, masks.json (COCO) and prompts.json.")


@app.command()
def annotate(
    folder: Annotated[Path, typer.Argument(help="Videos, or folders of images; or one video.", exists=True)],
    out: Annotated[Path, typer.Option(help="Folder for the masklets; what is there already is not done again.")],
    model: Annotated[
        str, typer.Option(help="SAM 2 video model: repository or folder.")
    ] = "facebook/sam2.1-hiera-tiny",
    points_per_side: Annotated[int, typer.Option(help="Side of the grid of clicks that finds objects.")] = 32,
    pred_iou_thresh: Annotated[float, typer.Option(help="Least IoU that the model expects of a found mask.")] = 0.8,
    stability_score_thresh: Annotated[float, typer.Option(help="Least stability of a found mask.")] = 0.95,
    every: Annotated[int | None, typer.Option(help="Look for new objects again each so many frames.")] = None,
    browser: Annotated[
        bool, typer.Option("--browser", help="Correct what does not pass the quality gate, on a page.")
    ] = False,
    push: Annotated[str | None, typer.Option(help="Dataset repository for the accepted masklets.")] = None,
) -> None:
    """Find and track everything in videos, as a dataset of masklets; a kill loses no whole video."""
    from rich.console import Console
    from rich.table import Table
    from transformers import pipeline

    from hf_iclr.vision.annotation.data_engine import annotate
    from hf_iclr.vision.annotation.store import annotation_statistics, review_queue

    console = Console()

    def by_hand(masklet):
        import webbrowser

        from hf_iclr.vision.annotation.page import annotate_in_browser

        def tell(address: str) -> None:
            console.print(f"{masklet.name}, object {masklet.object}: {masklet.reason}. Correct it at {address}")
            webbrowser.open(address)

        return annotate_in_browser(pipe, masklet.session, on_ready=tell)

    try:
        pipe = pipeline("promptable-video-segmentation", model=model)
        masklets = annotate(
            folder,
            pipe,
            corrector=by_hand if browser else None,
            out=out,
            automatic={
                "points_per_side": points_per_side,
                "pred_iou_thresh": pred_iou_thresh,
                "stability_score_thresh": stability_score_thresh,
                "every": every,
            },
        )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    table = Table("", "", title=masklets.info.description, title_justify="left", show_header=False)
    for name, value in annotation_statistics(masklets).items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    console.print(table)
    for row in review_queue(masklets).select_columns(["name", "object", "reason"]):
        console.print(f"waits for review: {row['name']}, object {row['object']}, {row['reason']}", markup=False)
    console.print(f"Saved to {out}: `load_dataset('parquet', data_files='{out}/shards/*.parquet')`.", markup=False)
    if push is not None:
        masklets.filter(lambda row: row["status"] == "accepted").push_to_hub(push)
        console.print(f"Pushed to {push}.")


@app.command(context_settings=_PASS_ON)
def train_sam2(context: typer.Context) -> None:
    """Train SAM 2 as CONFIG (YAML or JSON) says: model, data, output_dir, settings of training; --help lists them."""
    from rich.console import Console

    from hf_iclr.cli.train_command import run_training

    try:
        folder = run_training(context.args)
    except (TypeError, ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    Console().print(f"Saved to {folder}: `pipeline('promptable-video-segmentation', model={folder!r})`.", markup=False)


@app.command()
def doctor(
    seams: Annotated[bool, typer.Option("--seams", help="List all upstream code we lean on.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of what is broken.")] = False,
) -> None:
    """Run each part on tiny models and say what works here, what is broken by whom and what is not installed."""
    from rich.console import Console

    from hf_iclr.doctor.report import examine
    from hf_iclr.doctor.tables import is_sound, machine_table, package_table, part_table, seam_table

    console = Console()
    with console.status("Each part runs on tiny models, which takes some 15 seconds."):
        findings = examine()
    tables = (machine_table(findings), package_table(), part_table(findings), seam_table(findings, seams))
    for table in tables:
        console.print(table)
    if debug:
        for finding in findings.values():
            if finding.details:
                console.rule(finding.title)
                console.print(finding.details, markup=False, highlight=False)
    if not is_sound(findings):
        raise typer.Exit(1)
