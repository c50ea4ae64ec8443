"""
Draws the pictures of README and docs from the results that are kept.

    python benchmarks/pictures.py               # all, into docs/pictures
    python benchmarks/pictures.py data_shapley

Each SVG says in its description which results it shows, with a digest of their tables, so that a test sees one that is
older than its results. The picture of masks is the demo model's own, on a drawn clip.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.arguments import RESULTS


ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "pictures"
BLUE, ORANGE, GRAY = "#2f6fb2", "#d9822b", "#9aa5b1"


def rows(name: str, table: int = 1) -> list[list[str]]:
    return json.loads((RESULTS / f"{name}.json").read_text())["tables"][table - 1]["rows"]


def digest(names: tuple[str, ...]) -> str:
    """What a picture was drawn from."""
    tables = [json.loads((RESULTS / f"{name}.json").read_text())["tables"] for name in names]
    return f"{', '.join(names)}: {hashlib.sha256(json.dumps(tables).encode()).hexdigest()[:12]}"


def bars(
    axes: Any, title: str, labels: list[str], values: list[float], unit: str, marked: tuple[int, ...] = ()
) -> None:
    """Bars to the right, each with its number; the marked ones are ours."""
    colours = [BLUE if index in marked else GRAY for index in range(len(values))]
    axes.barh(labels[::-1], values[::-1], color=colours[::-1])
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlim(min(0.0, 1.25 * min(values)), max(0.0, 1.2 * max(values)))
    for place, value in enumerate(values[::-1]):
        axes.annotate(
            f" {value:g}{unit} ", (value, place), va="center", ha="left" if value >= 0 else "right", fontsize=8
        )
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_xticks([])


def draw_shapley(axes: Any) -> None:
    found = {row[0]: float(row[2]) for row in rows("keep_refusals_by_shapley")}
    bars(axes, "Refusals kept, % (data Shapley)", list(found), list(found.values()), "", (3,))


def draw_cascade(axes: Any) -> None:
    """A line a rule: refusals by the tokens left to the large model."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for rule, alpha, prefix, refused, *_ in rows("refusals_under_cascades"):
        lines.setdefault(f"{rule} {alpha}", []).append((float(prefix), float(refused.split()[0])))
    for name, points in lines.items():
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        elif name.startswith("spec"):
            axes.axhline(points[0][1], color=GRAY, linestyle=":", label="large model")
    axes.set_title("Refusals with an unaligned small model, %", loc="left", fontsize=10)
    axes.set_xlabel("strict_prefix, tokens", fontsize=8)
    axes.set_xticks(sorted({place for points in lines.values() for place, _ in points}))
    axes.set_ylim(0, 105)
    axes.set_xlim(right=5.4)  # room for the legend
    axes.legend(fontsize=7, frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def draw_beta(axes: Any) -> None:
    found = {name: float(kept) for name, kept, *_ in rows("deep_safety_beta") if re.match(r"SFT$|[\d./]+$", name)}
    found |= {name: float(kept) for name, kept, *_ in rows("deep_safety_beta") if name == "recommended"}
    bars(axes, "Refusals kept after an attack, %, by beta", list(found), list(found.values()), "", (len(found) - 1,))


def draw_judge(axes: Any) -> None:
    names = {"gpt4": "GPT-4", "llama2new": "Llama 2", "mistralguard": "Mistral, safety prompt"}
    found = {names[row[0]]: 100 * float(row[2]) for row in rows("refusal_judge")[:3]}
    bars(axes, "Accuracy on a model left out of the fit, %", list(found), list(found.values()), "", (0, 1, 2))


def draw_squeeze(axes: Any) -> None:
    """What a push down does to the others and to the most likely one."""
    found = [(row[0].partition(":")[2].strip(), float(row[2]), float(row[4])) for row in rows("squeeze_toy")[1:4]]
    for place, (_, others, best) in enumerate(found[::-1]):
        axes.barh(place + 0.2, best, 0.35, color=ORANGE, label="most likely other" if place == 0 else None)
        axes.barh(place - 0.2, others, 0.35, color=BLUE, label="median of the others" if place == 0 else None)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_yticks(range(len(found)), [name for name, *_ in found[::-1]], fontsize=8)
    axes.set_title("Log ratio of other tokens after one push down", loc="left", fontsize=10)
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def draw_concepts(axes: Any) -> None:
    found = [(f"{row[0]} ({row[1]})", float(row[2])) for row in rows("concept_editor")]
    bars(
        axes,
        "How far pictures move, % of a pixel's range",
        [n for n, _ in found],
        [100 * v for _, v in found],
        "",
        (0, 1),
    )


def draw_phases(axes: Any) -> None:
    names = {"1": "1, each frame alone", "2": "2, masks tracked", "3": "3, clicks tracked"}
    found = {names[row[0]]: float(row[1]) for row in rows("data_engine")}
    bars(axes, "Seconds of a person a frame, modelled, by phase", list(found), list(found.values()), " s", (1, 2))


def draw_masks(figure: Any) -> None:
    """One object of a drawn clip, shown by one click on frame 0."""
    from hf_iclr.tour.demo.segmenter import load_demo_segmenter
    from hf_iclr.vision.evaluation.procedural_clips import procedural_clip
    from hf_iclr.vision.evaluation.simulated_prompts import first_prompt

    clip = procedural_clip(2 * 10**13 + 1, frames=8)
    prompt = first_prompt(clip.masks[1][0], 1)
    result = load_demo_segmenter()(clip.frames, prompts={0: {1: prompt}})
    for axes, number in zip(figure.subplots(1, 4), (0, 2, 4, 7), strict=True):
        axes.imshow(clip.frames[number])
        axes.contour(result[number].masks[1], levels=[0.5], colors="white", linewidths=2.5)
        axes.contour(result[number].masks[1], levels=[0.5], colors=ORANGE, linewidths=1.2)
        axes.set_title(f"frame {number}" + ", clicked" * (number == 0), fontsize=9)
        axes.set_axis_off()
        if number == 0:
            axes.plot(*prompt["points"][0], marker="*", color=ORANGE, markeredgecolor="white", markersize=14)


# Picture -> the results it shows, and what draws it.
PICTURES: dict[str, tuple[tuple[str, ...], Callable[[Any], None]]] = {
    "cascade": (("refusals_under_cascades",), draw_cascade),
    "deep_safety": (("deep_safety_beta",), draw_beta),
    "safety_audit": (("refusal_judge",), draw_judge),
    "squeeze": (("squeeze_toy",), draw_squeeze),
    "data_shapley": (("keep_refusals_by_shapley",), draw_shapley),
    "concept_editor": (("concept_editor",), draw_concepts),
    "sam2_data_engine": (("data_engine",), draw_phases),
}
OVERVIEW = ("cascade", "deep_safety", "safety_audit", "squeeze", "concept_editor", "sam2_data_engine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of pictures; left out, all")
    chosen = parser.parse_args().names or [*PICTURES, "sam2", "overview"]
    sys.path.insert(0, str(ROOT))

    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "hf_iclr", "font.family": "DejaVu Sans"})
    FOLDER.mkdir(exist_ok=True)
    for name in chosen:
        figure = Figure(figsize=(11, 8) if name == "overview" else (7.2, 2.6), layout="constrained", facecolor="white")
        if name == "sam2":
            figure.set_figheight(2.1)
            draw_masks(figure)
            figure.savefig(FOLDER / "sam2.png", dpi=90, metadata={"Software": None})
            continue
        parts = OVERVIEW if name == "overview" else (name,)
        for axes, part in zip(
            figure.subplots(3 if len(parts) > 1 else 1, len(parts) // 3 or 1, squeeze=False).flat, parts, strict=True
        ):
            PICTURES[part][1](axes)
            if name == "overview":
                title = axes.get_title(loc="left")
                axes.set_title(f"{part}: {title[0].lower()}{title[1:]}", loc="left", fontsize=10)
        shown = tuple(result for part in parts for result in PICTURES[part][0])
        figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None, "Description": digest(shown)})


if __name__ == "__main__":
    main()
