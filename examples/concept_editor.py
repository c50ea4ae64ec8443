"""
Erase and replace concepts of a text-to-image pipeline in closed form, look, undo, look again.

    python examples/concept_editor.py               # a pipeline of random weights, a few seconds on one core
    python examples/concept_editor.py model         # Stable Diffusion 1.x, 2.x, XL or 3, Flux, AuraFlow, PixArt, Sana

A real checkpoint needs its files (a Hub, or a folder), the memory to draw with it, and prompts that are its own:
choose what to retain among the neighbours of what is edited. The random pipeline draws noise that depends on the
words, so the table says how far pictures move, not what they show.
"""

import sys
import tempfile

import torch
from diffusers import DiffusionPipeline

from hf_iclr import ConceptEditor
from hf_iclr.tour.demo.pipeline import build_demo_pipeline


if len(sys.argv) == 2:
    pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
    retain = ["a dog", "a mouse", "Mickey Mouse", "Donald Duck", "a painting", "a painting by Monet"]
    concepts = {"Snoopy": "", "a painting by Van Gogh": "a painting"}
    settings, drawing = {}, {"num_inference_steps": 20}
else:
    pipeline = build_demo_pipeline("unet")
    retain = ["a dog", "the fox", "a tree"]
    concepts = {"a cat": "a owl", "jug": ""}
    settings, drawing = {"nullspace_energy": 1.0, "l2": 1e-6}, {"num_inference_steps": 4, "height": 8, "width": 8}


def draw(prompt: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline(prompt, generator=generator, output_type="np", **drawing).images)


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return (first - second).abs().mean().item()


prompts = [*concepts, *concepts.values(), *retain]
before = {prompt: draw(prompt) for prompt in prompts}

editor = ConceptEditor(pipeline, retain=retain, **settings)
print(editor.edit(concepts).to_string(index=False))
after = {prompt: draw(prompt) for prompt in prompts}
with tempfile.TemporaryDirectory() as folder:
    editor.save_pretrained(folder)  # pipeline.load_lora_weights(folder) draws the same

editor.undo()
undone = {prompt: draw(prompt) for prompt in prompts}

print(
    "\n| prompt | role | moved | to the other's, before | after | after undo |\n| --- | --- | --- | --- | --- | --- |"
)
for prompt in dict.fromkeys(prompts):
    other = concepts.get(prompt)
    role = f'reads as "{other}"' if other else "erased" if prompt in concepts else "retained"
    role = "replaces" if prompt and prompt in concepts.values() else role
    pairs = [] if other is None else [(before[prompt], before[other]), (after[prompt], before[other])]
    told = [f"{distance(*pair):.1e}" for pair in [(after[prompt], before[prompt]), *pairs]]
    told += [""] * (3 - len(told)) + [f"{distance(undone[prompt], before[prompt]):.1e}"]
    print(f"| {prompt or '(empty)'} | {role} | {' | '.join(told)} |")
