"""
What an edit costs: against EasyEdit's own code at the same settings, and the low-rank solve against the dense one.

    git clone https://github.com/zjunlp/EasyEdit
    OMP_NUM_THREADS=1 python benchmarks/alphaedit_speed.py --easyedit EasyEdit --data DIR

EasyEdit's `apply_AlphaEdit_to_model` runs unmodified in this process, on the same model, facts, contexts, layers and
null space, at the paper's settings. The ways take turns in every repeat; CPU time and wall time are medians of the
repeats. `neutral` is ours in float32 without a stop of its own, which must give EasyEdit's weights; `default` is what
users get. All are scored on the facts edited. Without `--easyedit` only ours run. DIR is as in `alphaedit.py`.

The dense solve is float32 `torch.linalg.solve` on d x d, as in the reference. What either keeps from earlier batches
is made beforehand: P and the second moment of the keys, or the projected keys and their factor.
"""

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--easyedit", type=Path, help="checkout of https://github.com/zjunlp/EasyEdit")
    parser.add_argument("--data", type=Path, help="folder with the data; left out: the project's own facts")
    parser.add_argument("--facts", type=int, nargs="+", default=[2, 12], help="edited in one call")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60_000, help="of text for the statistics")
    return parse(parser, facts=[2], repeats=1, tokens=2000)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch
from datasets import Dataset

from common.edit_data import load_edit_data
from hf_iclr import AlphaEditConfig, AlphaEditor, EditRequest, KeyStatistics
from hf_iclr.editors.alpha_edit import evaluate_edits
from hf_iclr.editors.alpha_edit.closed_form import EditedKeys
from hf_iclr.editors.alpha_edit.rows import sample_contexts
from hf_iclr.tour.demo.language_model import load_demo_model


NEUTRAL = {"optimization_dtype": "float32", "nll_threshold": 0.0}


class EasyEdit:
    """Their algorithm on our model. Only the modules it needs are imported: the package's own imports every method."""

    def __init__(self, folder: Path, editor: AlphaEditor) -> None:
        if not (folder / "easyeditor/models/alphaedit").is_dir():
            sys.exit(f"Expected a checkout of EasyEdit in --easyedit, got {folder}, which has no easyeditor/models.")
        for name in ("easyeditor", "easyeditor.models"):
            module = types.ModuleType(name)
            module.__path__ = [str(folder.joinpath(*name.split(".")))]
            sys.modules[name] = module
        self.main = importlib.import_module("easyeditor.models.alphaedit.AlphaEdit_main")
        config, layers = editor.config, [projection.index for projection in editor.setup.projections]
        projectors = [torch.eye(len(basis)) - (basis @ basis.T).float() for basis in editor.setup.preserved.values()]
        with tempfile.NamedTemporaryFile(suffix=".pt", delete=False) as file:
            torch.save(torch.stack(projectors), file)
        # the name leads to its branch for Llama-like models
        self.settings = importlib.import_module("easyeditor.models.alphaedit").AlphaEditHyperParams(
            layers=layers, layer_selection="all", fact_token="subject_last", v_num_grad_steps=config.num_steps,
            v_lr=config.learning_rate, v_loss_layer=editor.model.config.num_hidden_layers - 1,
            v_weight_decay=config.weight_decay, clamp_norm_factor=config.clamp_factor, kl_factor=config.kl_factor,
            mom2_adjustment=True, mom2_update_weight=0, rewrite_module_tmp="model.layers.{}.mlp.down_proj",
            layer_module_tmp="model.layers.{}", mlp_module_tmp="model.layers.{}.mlp",
            attn_module_tmp="model.layers.{}.self_attn", ln_f_module="model.norm", lm_head_module="lm_head",
            mom2_dataset="", mom2_n_samples=0, mom2_dtype="float32", nullspace_threshold=config.nullspace_threshold,
            L2=config.l2, alg_name="AlphaEdit", device="cpu", model_name="llama", stats_dir="", P_loc=file.name,
        )  # fmt: skip
        self.main.CONTEXT_TEMPLATES_CACHE = [["{}"], config.context_templates[1:]]

    def edit(self, model: Any, tokenizer: Any, facts: list[EditRequest]) -> None:
        rows = [
            {"prompt": f.text, "subject": f.subject, "target_new": f.target_new, "case_id": i}
            for i, f in enumerate(facts)
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints each step
            self.main.apply_AlphaEdit_to_model(model, tokenizer, rows, self.settings, reset_cache=True)


class Bench:
    """The model, its statistics and the ways of editing it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.model, self.tokenizer = load_demo_model(torch.float32)
        self.tokenizer.padding_side = "right"
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        data = load_edit_data(args.data)
        self.facts = data.facts[: max(args.facts)]
        path = args.out / "statistics"
        if not path.exists():
            text = Dataset.from_dict({"text": data.sentences[100:]})
            KeyStatistics.from_dataset(
                self.model, self.tokenizer, text, max_tokens=args.tokens, max_length=96, batch_size=32
            ).save_pretrained(path)
        self.statistics = KeyStatistics.from_pretrained(path)
        contexts = sample_contexts(self.model, self.tokenizer, AlphaEditConfig())
        editors = {
            name: AlphaEditor(
                self.model, self.tokenizer, AlphaEditConfig(context_templates=contexts, **settings), self.statistics
            )
            for name, settings in (("neutral", NEUTRAL), ("default", {}))
        }
        self.weights = [projection.module.weight for projection in editors["default"].projections]
        self.original = [weight.clone() for weight in self.weights]
        # how to edit and how to take it back
        self.ways: dict[str, tuple[Callable, Callable]] = {}
        if args.easyedit:
            easyedit = EasyEdit(args.easyedit, editors["default"])
            self.ways["EasyEdit"] = partial(easyedit.edit, self.model, self.tokenizer), self.restore
        for name, editor in editors.items():
            self.ways[name] = partial(editor.edit, progress=False), editor.undo

    def restore(self) -> None:
        for weight, original in zip(self.weights, self.original, strict=True):
            weight.copy_(original)

    def compare(self, count: int, repeats: int) -> list[dict[str, Any]]:
        """A row a way: seconds an edit, scores, and how far its update is from the first way's."""
        facts, seconds, updates, scores = self.facts[:count], {}, {}, {}
        for _ in range(repeats):
            for name, (edit, take_back) in self.ways.items():
                cpu, wall = time.process_time(), time.perf_counter()
                edit(facts)
                spent = (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count
                seconds.setdefault(name, []).append(spent)
                if name not in scores:
                    updates[name] = torch.cat(
                        [(w - o).flatten() for w, o in zip(self.weights, self.original, strict=True)]
                    )
                    scores[name] = evaluate_edits(self.model, self.tokenizer, facts, progress=False)
                take_back()
        first = next(iter(updates))
        slow = median(cpu for cpu, _ in seconds[first])
        return [
            {
                "facts": count, "way": name, "cpu": median(cpu for cpu, _ in spent),
                "wall": median(wall for _, wall in spent), "faster": slow / median(cpu for cpu, _ in spent),
                "difference": float((updates[name] - updates[first]).norm() / updates[first].norm()),
                **{key: 100 * float(scores[name][key]) for key in ("efficacy", "generalisation", "specificity")},
            }
            for name, spent in seconds.items()
        ]  # fmt: skip


def cpu_seconds(function: Callable[[], Any]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def solve_times(width: int, previous: int, new: int, preserved: int) -> tuple[float, float]:
    """Median seconds of the low-rank solve in float64 and of the dense one in float32."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, preserved, dtype=torch.float64, generator=generator))[0]
    keys = torch.randn(width, new, dtype=torch.float64, generator=generator)
    before = torch.randn(width, previous, dtype=torch.float64, generator=generator)
    residuals = torch.randn(576, new, generator=generator)
    edited = EditedKeys(basis, 10.0)
    edited.add(before)
    projector = (torch.eye(width, dtype=torch.float64) - basis @ basis.T).float()
    cache, dense_keys = (before @ before.T).float(), keys.float()

    def low_rank() -> None:
        residuals @ edited.add(keys).float()
        edited.keep_first(previous)

    def dense() -> None:
        left = projector @ (dense_keys @ dense_keys.T + cache) + 10.0 * torch.eye(width)
        torch.linalg.solve(left, projector @ dense_keys @ residuals.T)

    return tuple(sorted(cpu_seconds(function) for _ in range(5))[2] for function in (low_rank, dense))


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    bench = Bench(args)
    report: dict[str, Any] = {"edits": [], "solve": []}
    print("| facts | | CPU s an edit | wall s | | update differs by | efficacy | generalisation | specificity |")
    print("| --- " * 9 + "|")
    for count in args.facts:
        for row in bench.compare(count, args.repeats):
            report["edits"].append(row)
            times = f"{row['cpu']:.2f} | {row['wall']:.2f} | {row['faster']:.1f} x | {row['difference']:.0e}"
            scores = " | ".join(f"{row[name]:.1f}" for name in ("efficacy", "generalisation", "specificity"))
            print(f"| {count} | {row['way']} | {times} | {scores} |", flush=True)
    print("\n| solve, d = 1536, m = 400 | low rank, ms | dense, ms | |\n| --- | --- | --- | --- |")
    for previous, new in ((0, 50), (50, 50), (450, 50), (200, 100), (400, 100)):
        fast, dense = solve_times(1536, previous, new, 400)
        report["solve"].append({"before": previous, "new": new, "low rank": fast, "dense": dense})
        times = f"{1e3 * fast:.1f} | {1e3 * dense:.1f} | {dense / fast:.1f} x faster"
        print(f"| {previous} keys before, {new} new | {times} |")
    small, kept, large = 1536 * 400 * 8 / 1e6, (1536 + 450) * 450 * 8 / 1e6, 2 * 1536**2 * 4 / 1e6
    stored = f"{small:.1f} MB a layer (d x m float64) and {kept:.1f} MB for 450 keys"
    print(f"\nStored for it: {stored}; the dense P and cache: {large:.1f} MB.")
    write_json(args.out / "alphaedit_speed.json", report)


if __name__ == "__main__":
    main(ARGUMENTS)
