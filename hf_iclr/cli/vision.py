"""`hf-iclr segment`, `vos`, `annotate`, `annotate-ui`, `inpaint` and `train-sam2`."""

from pathlib import Path
from typing import Annotated

import typer


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
    rate: Annotated[
        float | None, typer.Option(min=0.1, help="Frames per second of the overlay. Left out: the video's.")
    ] = None,
) -> None:
    """Follow clicked objects through a video: an overlay, a palette PNG a frame, masks and prompts as JSON."""
    from rich.console import Console
    from rich.table import Table

    from hf_iclr.cli.segment_command import parse_prompts, segment_video

    prompts = parse_prompts(point, box, mask)
    result = segment_video(video, prompts, out, model, direction, rate)
    console = Console()
    table = Table("object", "frames in sight", "mean score", title=f"{len(result)} frames", title_justify="left")
    for obj, track in result.tracks().items():
        spans = ", ".join(f"{first}-{last}" for first, last in track["visible"]) or "none"
        table.add_row(str(obj), spans, f"{sum(track['scores'].values()) / len(track['scores']):.3f}")
    console.print(table)
    if result.damage:
        console.print(f"[yellow]{result.damage}[/]")
    console.print(f"Saved to {out}: overlay.mp4, masks/, masks.json (COCO) and prompts.json.")


def vos(
    dataset: Annotated[Path, typer.Argument(help="Folder in the layout of DAVIS, YouTube-VOS or SA-V val and test.")],
    out: Annotated[Path, typer.Option(help="Folder for masks and table.csv; what is there is not done again.")],
    model: Annotated[
        str, typer.Option(help="SAM 2 video model: repository or folder.")
    ] = "facebook/sam2.1-hiera-tiny",
    split: Annotated[str, typer.Option(help="Which of the dataset's lists of videos to keep to.")] = "val",
    non_overlap: Annotated[bool, typer.Option("--non-overlap", help="Each pixel belongs to one object only.")] = False,
) -> None:
    """Follow every object of a dataset from its first mask, with J&F; `accelerate launch` shares videos out."""
    from rich.console import Console
    from rich.table import Table
    from transformers import pipeline

    from hf_iclr.vision.evaluation.vos_inference import processes, segment_dataset

    if not dataset.is_dir():
        raise ValueError(f"There is no folder {dataset}. Give that of a dataset, such as DAVIS.")
    state = processes()
    pipe = pipeline("promptable-video-segmentation", model=model, device=state.device)
    scores = segment_dataset(pipe, dataset, out, split, non_overlap=non_overlap)
    if not state.is_main_process:
        return
    console = Console()
    if scores is None:
        console.print("No frame but those that show an object first has masks, so there is nothing to score.")
    else:
        table = Table("video", "objects", "J", "F", "J&F", title=str(dataset), title_justify="left")
        columns = ["j", "f", "j_and_f"]
        for name, rows in scores.groupby("video"):
            table.add_row(str(name), str(len(rows)), *(f"{value:.3f}" for value in rows[columns].mean()))
        table.add_row("all objects", str(len(scores)), *(f"{value:.3f}" for value in scores[columns].mean()))
        console.print(table)
    console.print(f"Saved to {out}: masks/, scores/ and, if there are any, table.csv.", markup=False)


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
        bool,
        typer.Option("--browser", help="Then serve what does not pass the quality gate on a page, to be corrected."),
    ] = False,
    host: Annotated[str, typer.Option(help="Where the page listens; whoever reaches it can use it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the page; 0 takes a free one.")] = 7860,
    push: Annotated[str | None, typer.Option(help="Dataset repository for the accepted masklets.")] = None,
) -> None:
    """Find and track everything in videos, as a dataset of masklets; a kill loses no whole video."""
    from contextlib import ExitStack

    from rich.console import Console
    from rich.table import Table
    from transformers import pipeline

    from hf_iclr.vision.annotation.browser import listen, serve
    from hf_iclr.vision.annotation.data_engine import annotate
    from hf_iclr.vision.annotation.page import AnnotationPage
    from hf_iclr.vision.annotation.project import AnnotationProject
    from hf_iclr.vision.annotation.store import annotation_statistics, review_queue

    console = Console()
    with ExitStack() as stack:
        listener = stack.enter_context(listen(host, port)) if browser else None  # before hours of work
        pipe = pipeline("promptable-video-segmentation", model=model)
        masklets = annotate(
            folder,
            pipe,
            out=out,
            automatic={
                "points_per_side": points_per_side,
                "pred_iou_thresh": pred_iou_thresh,
                "stability_score_thresh": stability_score_thresh,
                "every": every,
            },
        )
        if listener is not None:
            page = AnnotationPage(AnnotationProject(out, pipe))
            _serve(page, listener, host, serve, console, "Ctrl+C ends; everything is saved as it is clicked.")
            masklets = page.project.store.read([])
    table = Table("", "", title=masklets.info.description, title_justify="left", show_header=False)
    for name, value in annotation_statistics(masklets).items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    console.print(table)
    for row in review_queue(masklets).select_columns(["name", "object", "reason"]):
        console.print(f"waits for review: {row['name']}, object {row['object']}, {row['reason']}", markup=False)
    if not browser and "waiting" in masklets["status"]:
        console.print(f"Look at what waits by `hf-iclr annotate-ui {out} --model {model}`.", markup=False)
    console.print(f"Saved to {out}: `load_dataset('parquet', data_files='{out}/shards/*.parquet')`.", markup=False)
    if push is not None:
        masklets.filter(lambda row: row["status"] == "accepted").push_to_hub(push)
        console.print(f"Pushed to {push}.")


def annotate_ui(
    video: Annotated[
        str | None,
        typer.Argument(
            help="Video file, URL or folder of images; a folder of videos; or what `annotate` wrote, whose queue is "
            "then served. Left out: chosen on the page."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Segmenter: repository or folder.")] = "facebook/sam2.1-hiera-tiny",
    out: Annotated[Path, typer.Option(help="JSON file (SA-V) for the masks of one video, written on Done.")] = Path(
        "annotations.json"
    ),
    project: Annotated[
        Path | None,
        typer.Option(help="Folder to which every edit is saved before it is answered. Left out: beside --out."),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; whoever reaches it can use the page.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 7860,
) -> None:
    """Click, draw, track, name and accept objects in the browser; the same command goes on where it ended."""
    from rich.console import Console
    from transformers import pipeline

    from hf_iclr.vision.annotation.browser import listen, serve
    from hf_iclr.vision.annotation.page import AnnotationPage
    from hf_iclr.vision.annotation.project import AnnotationProject
    from hf_iclr.vision.formats.annotation_json import write_sav

    console = Console()
    if out.is_dir():
        raise ValueError(
            f"Expected a JSON file for --out, got the folder {out}. Pass --out {out / 'annotations.json'}."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    if video is not None and "://" not in video and not Path(video).exists():
        raise ValueError(f"There is no video {video}.")
    written = video is not None and (Path(video, "shards").is_dir() or Path(video, "project.sqlite").is_file())
    with listen(host, port) as listener:
        pipe = pipeline("promptable-video-segmentation", model=model)
        folder = Path(str(video)) if written else project or out.with_suffix(".project")
        opened = AnnotationProject(folder, pipe)
        names = [] if video is None or written else opened.add_videos([video] if "://" in video else video)
        single = len(names) == 1
        page = AnnotationPage(opened, names[0] if single else None, single=single or video is None)
        said = f"Every edit is saved to {folder}; Ctrl+C ends, and the same command goes on."
        segments = _serve(page, listener, host, serve, console, said)
    if segments is None or not segments.objects:
        without = "" if segments is None else " There is no object, so no masks were written."
        console.print(f"Saved to {folder}.{without}")
    else:
        write_sav(segments, out)
        console.print(f"Masks of {len(segments)} frames written to {out}.")


def _serve(page, listener, host: str, serve, console, said: str):
    """Serves a page until it is done or Ctrl+C is pressed."""
    try:
        return serve(page, listener, host, lambda url: console.print(f"Open {url} in a browser. {said}"))
    except KeyboardInterrupt:
        return None


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
    rate: Annotated[
        float | None,
        typer.Option(help="Frames per second of the painted video, without sound. Left out: as the video."),
    ] = None,
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

    if (masks is None) == (prompts is None):
        raise ValueError("Expected one of --masks and --prompts. For instance `hf-iclr inpaint VIDEO --masks m.json`.")
    if prompts is not None:
        segmenter = transformers.pipeline("promptable-video-segmentation", model=model)
        segments = segmenter(video, VideoPrompts.from_json(prompts), direction="both", output="rle")
    else:
        segments = read_davis(masks) if masks.is_dir() else read_sav(masks)[0]  # type: ignore[union-attr, arg-type]
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
    shares = ", ".join(f"{share:.0%} {source}" for source, share in painted.sources.items() if share)
    Console().print(f"{len(painted)} frames written to {out}. Painted pixels: {shares}.")


def train_sam2(context: typer.Context) -> None:
    """Train SAM 2 as CONFIG (YAML or JSON) says: model, data, output_dir, settings of training; --help lists them."""
    from rich.console import Console

    from hf_iclr.cli.train_command import run_training

    folder = run_training(context.args)
    Console().print(f"Saved to {folder}: `pipeline('promptable-video-segmentation', model={folder!r})`.", markup=False)
