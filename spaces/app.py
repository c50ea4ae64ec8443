"""Three parts of hf_iclr to try in a browser: `python spaces/app.py`. Models load when a tab is first used."""

import tempfile
import threading
from functools import cache
from pathlib import Path

import gradio as gr
import torch
from PIL import Image
from transformers import set_seed

from hf_iclr import AlphaEditConfig, AlphaEditor, EditRequest, KeyStatistics, SpeculativeCascadePipeline
from hf_iclr.generation.deferral_rules import DEFERRAL_RULES
from hf_iclr.tour.demo.draft import load_demo_draft
from hf_iclr.tour.demo.facts import demo_text
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.tour.demo.segmenter import load_demo_segmenter
from hf_iclr.vision.evaluation import procedural_clip
from hf_iclr.vision.formats import draw_overlay


LOCK = threading.Lock()  # one model for all visitors
ZOOM = 4  # clips are of 128 x 128 pixels
FIRST_SEED = 50_000  # the segmenter was trained on none of these clips


@cache
def cascade_pipeline() -> SpeculativeCascadePipeline:
    model, tokenizer = load_demo_model(torch.float32)
    return SpeculativeCascadePipeline(
        model=model, tokenizer=tokenizer, assistant_model=load_demo_draft("quick", torch.float32)
    )


def cascade(prompt: str, rule: str, alpha: float, tokens: int) -> tuple[str, str]:
    """The answer, and what the small model saved."""
    if not prompt.strip():
        raise gr.Error("Type a prompt first.")
    with LOCK:
        set_seed(0)
        chat = [{"role": "user", "content": prompt}]
        sampling = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_new_tokens": int(tokens)}
        try:
            (record,) = cascade_pipeline()(chat, cascade_rule=rule, cascade_alpha=alpha, **sampling)
        except ValueError as error:  # a sentence about the rule's parameter
            raise gr.Error(str(error)) from error
    told = record["cascade"]
    return record["generated_text"][-1]["content"], (
        f"{told['new_tokens']} tokens in {told['call']['large_forwards']} passes of the large model. It kept "
        f"{told['accepted']} of {told['drafted']} drafted tokens."
    )


@cache
def editor() -> AlphaEditor:
    model, tokenizer = load_demo_model(torch.float32)
    statistics = KeyStatistics.from_dataset(model, tokenizer, demo_text(), max_tokens=4_000, max_length=128)
    return AlphaEditor(model, tokenizer, AlphaEditConfig(num_contexts=2, kl_factor=0.0, num_steps=20), statistics)


def edit(prompt: str, subject: str, target: str, other: str) -> list[list[str]]:
    """What is said before, with the edit, and after it was undone."""
    try:
        request = EditRequest(prompt, subject, target)
    except (ValueError, TypeError) as error:
        raise gr.Error(str(error)) from error
    asked = [text for text in (request.text, other) if text.strip()]
    with LOCK:
        said = [[text, ask(text)] for text in asked]
        try:
            editor().edit([request])
        except ValueError as error:
            raise gr.Error(str(error)) from error
        said = [[*line, ask(line[0])] for line in said]
        editor().undo()
        return [[*line, ask(line[0])] for line in said]


def ask(text: str) -> str:
    model, tokenizer = editor().model, editor().tokenizer
    output = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=8, do_sample=False)
    return tokenizer.decode(output[0], skip_special_tokens=True)[len(text) :].strip()


def enlarged(frame) -> Image.Image:
    return Image.fromarray(frame).resize([ZOOM * side for side in (frame.shape[1], frame.shape[0])], 0)


@cache
def frames(number: int):
    return procedural_clip(FIRST_SEED + number, hard=True, frames=16).frames


def show(number: float) -> Image.Image:
    return enlarged(frames(int(number))[0])


def follow(number: float, event: gr.SelectData) -> str:
    """A moving picture of the object under the click."""
    clip, (x, y) = frames(int(number)), event.index
    with LOCK:
        session = segmenter().session(clip, output="rle")
        session.add(frame=0, obj=1, points=[[x / ZOOM, y / ZOOM]])
        drawn = [enlarged(draw_overlay(clip[found.frame], found)) for found in session.propagate()]
    path = Path(tempfile.mkdtemp()) / "followed.gif"
    drawn[0].save(path, save_all=True, append_images=drawn[1:], duration=160, loop=0)
    return str(path)


segmenter = cache(load_demo_segmenter)

with gr.Blocks(title="hf_iclr") as app:
    gr.Markdown(
        "# Three parts of hf_iclr\nSmall models on two processor cores. The first answer of a tab takes longest."
    )
    with gr.Tab("Cascade"):
        gr.Markdown("A small model drafts, a large one keeps what the rule allows. `spec` keeps its law.")
        prompt = gr.Textbox("Explain rain in two sentences.", label="Prompt")
        with gr.Row():
            rule = gr.Dropdown(sorted(DEFERRAL_RULES), value="token_v3", label="Rule")
            alpha = gr.Slider(0, 1, 0.3, label="Alpha")
            tokens = gr.Slider(8, 96, 32, step=8, label="New tokens")
        button = gr.Button("Answer", variant="primary", elem_id="answer")
        answer = gr.Textbox(label="Answer", lines=4, elem_id="answered")
        button.click(cascade, [prompt, rule, alpha, tokens], [answer, gr.Markdown(elem_id="saved")])
    with gr.Tab("Edit"):
        gr.Markdown("One fact is changed, asked for, and taken back. The other prompt should keep its own answer.")
        with gr.Row():
            template = gr.Textbox("The capital of {} is", label="Prompt, with {} for the subject")
            subject = gr.Textbox("France", label="Subject")
            target = gr.Textbox("Rome", label="New answer")
        other = gr.Textbox("The capital of Italy is", label="Another prompt")
        button = gr.Button("Edit, ask, undo", variant="primary", elem_id="edit")
        columns = ["Prompt", "Before", "Edited", "Undone"]
        table = gr.Dataframe(headers=columns, type="array", wrap=True, interactive=False, elem_id="edited")
        button.click(edit, [template, subject, target, other], table)
    with gr.Tab("Segmentation"):
        gr.Markdown("Click on an object: it is followed through 16 frames, also behind others.")
        number = gr.Slider(0, 20, 0, step=1, label="Clip")
        with gr.Row():
            first = gr.Image(show(0), label="First frame", interactive=False, elem_id="first")
            followed = gr.Image(label="Followed", type="filepath", interactive=False, elem_id="followed")
        number.change(show, number, first)
        first.select(follow, number, followed)

if __name__ == "__main__":
    app.launch()
