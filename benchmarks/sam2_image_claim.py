"""The paper's "6x faster than SAM" on images: the encoder of SAM 2.1 B+ against that of SAM ViT-H, one thread.

    python benchmarks/sam2_image_claim.py --repeats 3

Weights are random, which time does not depend on. Both encode one image of 1024 x 1024 in the same process, in turn;
printed are parameters, floating-point operations (counted on meta tensors) and the fastest CPU seconds. In the paper
the whole image task, of which the encoder is nearly all, runs at 130.1 and 21.7 frames a second on an A100.
"""

import argparse
import os
import time

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", type=int, default=1024, help="pixels of the image; the paper's is 1024")
    return parse(parser, repeats=1, side=256)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pandas as pd
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam2HieraDetConfig, Sam2VisionConfig, Sam2VisionModel, SamVisionConfig, SamVisionModel

from common.report import print_frame


PAPER = 130.1 / 21.7


def encoders(side: int) -> dict[str, nn.Module]:
    """Both shapes for images of `side` pixels, on the current default device."""
    hiera = Sam2HieraDetConfig(
        image_size=[side, side],
        hidden_size=112,
        num_attention_heads=2,
        blocks_per_stage=[2, 3, 16, 3],
        embed_dim_per_stage=[112, 224, 448, 896],
        num_attention_heads_per_stage=[2, 4, 8, 16],
        window_positional_embedding_background_size=[14, 14],
        global_attention_blocks=[12, 16, 20],
    )
    vit = SamVisionConfig(
        image_size=side,
        hidden_size=1280,
        num_hidden_layers=32,
        num_attention_heads=16,
        global_attn_indexes=[7, 15, 23, 31],
    )
    sizes = [[side // stride] * 2 for stride in (4, 8, 16)]
    sam2 = Sam2VisionConfig(
        backbone_config=hiera, backbone_channel_list=[896, 448, 224, 112], backbone_feature_sizes=sizes
    )
    return {"SAM 2.1 B+": Sam2VisionModel(sam2).eval(), "SAM ViT-H": SamVisionModel(vit).eval()}


@torch.inference_mode()
def measure(side: int, repeats: int) -> pd.DataFrame:
    """One row an encoder."""
    with torch.device("meta"):
        shapes = encoders(side)
    table = pd.DataFrame(index=list(shapes))
    for name, model in shapes.items():
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, side, side, device="meta"))
        table.loc[name, "parameters (M)"] = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        table.loc[name, "operations (T)"] = counter.get_total_flops() / 1e12
    torch.manual_seed(0)
    models, image = encoders(side), torch.randn(1, 3, side, side)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            start = time.process_time()
            model(image)
            seconds[name].append(time.process_time() - start)
    table["CPU seconds"] = {name: min(times) for name, times in seconds.items()}
    return table


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    table = measure(args.side, args.repeats)
    ratios = table.loc["SAM ViT-H"] / table.loc["SAM 2.1 B+"]
    print_frame(table.reset_index(names="encoder"), digits=2)
    slower, larger = ratios["CPU seconds"], ratios["operations (T)"]
    print(f"\nSAM ViT-H takes {slower:.1f} x the time and {larger:.1f} x the operations.")
    print(f"Paper, one A100: {PAPER:.1f} x.")
    write_json(args.out / "sam2_image_claim.json", {"table": table.to_dict("index"), "ratios": ratios.to_dict()})


if __name__ == "__main__":
    main(ARGUMENTS)
