"""Concepts erased and replaced in whole pipelines, prompt to image; what is retained, undone, saved and pushed."""

import json
import os

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
)
from safetensors.torch import load_file, save_file

from hf_iclr.editors.concepts.editor import WEIGHTS_NAME, ConceptEditor
from hf_iclr.editors.concepts.pipelines import find_text_layers
from hf_iclr.editors.records import ledger
from hf_iclr.tour.demo.pipeline import WORDS, build_demo_pipeline


RETAIN = ["a dog", "the fox", "a tree"]
EXACT = {"nullspace_energy": 1.0, "l2": 1e-6}
KINDS = ["unet", "transformer"]


def options(pipeline):
    return {"max_sequence_length": 8} if isinstance(pipeline, FluxPipeline) else {}


def draw(pipeline, prompt):
    """Two steps, with guidance: a UNet is also given the empty prompt."""
    return pipeline(
        prompt,
        num_inference_steps=2,
        guidance_scale=5.0,
        height=8,
        width=8,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **options(pipeline),
    ).images


def make_editor(pipeline, retain=RETAIN, **settings):
    return ConceptEditor(pipeline, retain, encode_options=options(pipeline), **{**EXACT, **settings})


def distance(first, second):
    return (first - second).abs().max().item()


def weights(pipeline):
    return {name: value.clone() for name, value in getattr(pipeline, component(pipeline)).state_dict().items()}


def component(pipeline):
    return "transformer" if isinstance(pipeline, FluxPipeline) else "unet"


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize("kind", KINDS)
def test_a_concept_is_drawn_as_the_other_and_the_retained_as_before(kind):
    pipeline = build_demo_pipeline(kind)
    before = {prompt: draw(pipeline, prompt) for prompt in [*RETAIN, "", "a cat", "a owl"]}
    start = weights(pipeline)
    editor = make_editor(pipeline)
    report = editor.edit({"a cat": "a owl"})
    assert distance(before["a cat"], before["a owl"]) > 1e-2
    assert distance(draw(pipeline, "a cat"), before["a owl"]) < 1e-3
    for prompt in [*RETAIN, ""]:
        assert distance(draw(pipeline, prompt), before[prompt]) < 1e-5
    assert distance(draw(pipeline, "a owl"), before["a owl"]) < 1e-4  # the ridge holds it, not the projector
    assert report.loc[0, "residual"] < 1e-2 and report.loc[0, "retain_shift"] < 1e-5
    editor.undo()
    assert same(weights(pipeline), start) and editor.concepts == {}


@pytest.mark.parametrize("kind", KINDS)
def test_an_erased_concept_is_drawn_as_nothing_in_particular(kind):
    pipeline = build_demo_pipeline(kind)
    empty, retained, before = draw(pipeline, ""), draw(pipeline, "a dog"), draw(pipeline, "cat")
    make_editor(pipeline).edit({"cat": ""})
    assert distance(draw(pipeline, "cat"), empty) < 1e-3 < distance(before, empty)
    assert distance(draw(pipeline, "a dog"), retained) < 1e-5


def test_without_the_retained_prompts_they_move():
    """The control: it is the null space that holds them."""
    pipeline = build_demo_pipeline()
    before = draw(pipeline, "a dog")
    ConceptEditor(pipeline, [], nullspace_rank=0, l2=1e-6).edit({"a cat": "a owl"})
    assert distance(draw(pipeline, "a dog"), before) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_batches_follow_each_other_and_are_undone_one_by_one(kind):
    pipeline = build_demo_pipeline(kind)
    editor = make_editor(pipeline, ["a dog"])
    start = weights(pipeline)
    editor.edit({"a cat": "a owl"})
    first, cat, cup = weights(pipeline), draw(pipeline, "a cat"), draw(pipeline, "a cup")
    editor.edit({"a jug": "a cup"})
    assert distance(draw(pipeline, "a cat"), cat) < 1e-3 and distance(draw(pipeline, "a jug"), cup) < 1e-2
    assert editor.concepts == {"a cat": "a owl", "a jug": "a cup"}
    editor.undo()
    assert same(weights(pipeline), first)
    editor.edit({"a jug": "a cup"})
    editor.undo(2)
    assert same(weights(pipeline), start)


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_lora_draws_what_the_edited_pipeline_draws(kind, tmp_path):
    edited, other = build_demo_pipeline(kind), build_demo_pipeline(kind)
    start = draw(other, "a cat")
    editor = make_editor(edited)
    editor.edit({"a cat": "a owl"})
    editor.edit({"a jug": ""})
    editor.save_pretrained(tmp_path)
    other.load_lora_weights(tmp_path, weight_name=WEIGHTS_NAME)
    for prompt in ("a cat", "a jug", "a dog"):
        assert distance(draw(other, prompt), draw(edited, prompt)) < 1e-5
    assert distance(draw(other, "a cat"), start) > 1e-3
    other.unload_lora_weights()
    assert distance(draw(other, "a cat"), start) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_saving_after_the_last_undo_leaves_no_edit(kind, tmp_path):
    edited, other = build_demo_pipeline(kind), build_demo_pipeline(kind)
    start = draw(other, "a cat")
    editor = make_editor(edited)
    editor.edit({"a cat": "a owl"})
    editor.save_pretrained(tmp_path)
    editor.undo()
    editor.save_pretrained(tmp_path)
    other.load_lora_weights(tmp_path, weight_name=WEIGHTS_NAME)
    assert distance(draw(other, "a cat"), start) == 0
    assert ConceptEditor.from_pretrained(tmp_path, build_demo_pipeline(kind)).concepts == {}


def test_other_edits_in_a_folder_are_not_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "WAIT", 0.1)
    first, second = make_editor(build_demo_pipeline()), make_editor(build_demo_pipeline())
    first.edit({"a cat": "a owl"})
    second.edit({"a cat": "a owl"})  # the same, and yet not the first's
    first.save_pretrained(tmp_path)
    there = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="with other edits.*from_pretrained"):
        second.save_pretrained(tmp_path)
    assert there == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    loaded = ConceptEditor.from_pretrained(tmp_path, build_demo_pipeline())
    loaded.undo()
    loaded.edit({"a jug": ""})
    loaded.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="with other edits"):
        first.save_pretrained(tmp_path)
    assert ConceptEditor.from_pretrained(tmp_path, build_demo_pipeline()).concepts == {"a jug": ""}
    with ledger.locked(tmp_path), pytest.raises(TimeoutError, match="another editor is still writing"):
        loaded.save_pretrained(tmp_path)
    (tmp_path / "style").mkdir()
    save_file({"other": torch.ones(1)}, tmp_path / "style" / WEIGHTS_NAME)
    with pytest.raises(ValueError, match="another adapter"):
        first.save_pretrained(tmp_path / "style")


def test_a_ledger_from_elsewhere_is_not_believed(tmp_path):
    editor = make_editor(build_demo_pipeline(), modules=r".*attn2\.to_v")
    editor.edit({"a cat": "a owl"})
    editor.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)

    def written(change, **others):
        events = json.loads(json.dumps(editor._events))
        change(events)
        (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        save_file({**tensors, **others}, tmp_path / WEIGHTS_NAME, {ledger.MARK: ledger.digests(events)[-1]})
        return tmp_path

    # An expression that takes for ever on names of this length is not tried: the layers are the file's.
    slow = written(lambda events: events[0]["settings"].update(modules="(.+)+!"))
    assert same(weights(ConceptEditor.from_pretrained(slow, build_demo_pipeline()).pipeline), weights(editor.pipeline))
    with pytest.raises(ValueError, match="KeyError: 'states'"):
        ConceptEditor.from_pretrained(written(lambda e: e[1]["batches"][0].update(ranks={})), build_demo_pipeline())
    name = next(iter(tensors))
    spoilt = written(lambda events: None, **{name: tensors[name] * float("nan")})
    with pytest.raises(ValueError, match="finite: False"):
        ConceptEditor.from_pretrained(spoilt, build_demo_pipeline())


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_kill_leaves_the_edits_before(tmp_path, monkeypatch, step):
    editor = make_editor(build_demo_pipeline())
    for concept in ("a cat", "a jug"):
        editor.edit({concept: ""})
        editor.save_pretrained(tmp_path)
    editor.undo()
    editor.edit({"a owl": ""})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, killed)
    with pytest.raises(KeyboardInterrupt):
        editor.save_pretrained(tmp_path)
    monkeypatch.undo()
    loaded = ConceptEditor.from_pretrained(tmp_path, build_demo_pipeline())
    assert list(loaded.concepts) == ["a cat", "a jug"] and len(loaded.lora_state_dict()) > 0
    editor.save_pretrained(tmp_path)
    assert list(ConceptEditor.from_pretrained(tmp_path, build_demo_pipeline()).concepts) == ["a cat", "a owl"]


def pixart():
    words = build_demo_pipeline("transformer")
    torch.manual_seed(0)
    size = {"attention_head_dim": 8, "num_attention_heads": 3, "caption_channels": 64, "cross_attention_dim": 24}
    return PixArtAlphaPipeline(
        tokenizer=words.tokenizer_2,
        text_encoder=words.text_encoder_2,
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval(),
        transformer=PixArtTransformer2DModel(
            sample_size=8, num_layers=1, in_channels=4, out_channels=8, **size
        ).eval(),
        scheduler=DDIMScheduler(),
    )


def test_a_pipeline_that_loads_no_lora_is_saved_too(tmp_path):
    pipeline, fresh = pixart(), pixart()
    start = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    editor = ConceptEditor(pipeline, ["a dog"], encode_options={"max_sequence_length": 8}, **EXACT)
    assert editor.edit({"a cat": "a owl"}).residual.item() < 0.5
    editor.save_pretrained(tmp_path)
    loaded = ConceptEditor.from_pretrained(tmp_path, fresh)
    assert same(fresh.transformer.state_dict(), pipeline.transformer.state_dict())
    assert "load_lora" not in (tmp_path / "README.md").read_text()
    loaded.undo()
    assert same(fresh.transformer.state_dict(), start)


class Instructed(StableDiffusionPipeline):
    """As Sana: a call puts an instruction before the prompt unless told otherwise, `encode_prompt` does not."""

    def __call__(self, prompt, complex_human_instruction=("the", "sky"), **kwargs):
        self.instruction = complex_human_instruction
        return super().__call__(prompt, **kwargs)

    def encode_prompt(
        self, prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt=None,
        complex_human_instruction=None, **kwargs,
    ):  # fmt: skip
        words = " ".join(complex_human_instruction or getattr(self, "instruction", None) or ())
        prompts = [f"{words} {one}" for one in ([prompt] if isinstance(prompt, str) else prompt)]
        return super().encode_prompt(prompts, device, num_images_per_prompt, do_classifier_free_guidance, **kwargs)


def test_the_prompt_is_edited_as_a_call_reads_it():
    pipeline = Instructed(**build_demo_pipeline().components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    before = {prompt: draw(pipeline, prompt) for prompt in ["a cat", "a owl", "a dog", ""]}
    del pipeline.instruction
    editor = make_editor(pipeline)
    report = editor.edit({"a cat": "a owl"})
    assert report.loc[0, "residual"] < 1e-2
    assert distance(before["a cat"], before["a owl"]) > 1e-2 > 10 * distance(draw(pipeline, "a cat"), before["a owl"])
    for prompt in ("a dog", ""):
        assert distance(draw(pipeline, prompt), before[prompt]) < 1e-5


def test_what_others_did_to_a_weight_stays():
    pipeline = build_demo_pipeline()
    start = weights(pipeline)
    first, second = make_editor(pipeline), make_editor(pipeline)
    first.edit({"a cat": "a owl"})
    alone = weights(pipeline)
    second.edit({"a jug": "a cup"})
    both = weights(pipeline)
    with pytest.raises(ValueError, match="as this editor left it, to take edits out of it"):
        first.undo()
    assert same(weights(pipeline), both) and first.concepts == {"a cat": "a owl"}
    second.undo()
    assert same(weights(pipeline), alone)
    first.undo()
    assert same(weights(pipeline), start)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_editor_goes_on_where_the_saved_one_stopped(kind, tmp_path):
    pipeline, other = build_demo_pipeline(kind), build_demo_pipeline(kind)
    editor = make_editor(pipeline)
    editor.edit({"a cat": "a owl"})
    first = weights(pipeline)
    editor.edit({"a jug": ""})
    editor.save_pretrained(tmp_path)
    loaded = ConceptEditor.from_pretrained(tmp_path, other)
    assert same(weights(other), weights(pipeline)) and loaded.concepts == editor.concepts
    assert loaded.settings == editor.settings and loaded.retain == RETAIN
    for each in (editor, loaded):
        each.edit({"sky": "tree"})
    assert same(weights(other), weights(pipeline))
    loaded.undo(2)
    assert same(weights(other), first)
    assert "| a cat | a owl |" in (tmp_path / "README.md").read_text()


def test_pushed_edits_are_loaded_from_the_hub(hub, tmp_path):
    editor = make_editor(build_demo_pipeline())
    editor.edit({"a cat": "a owl"})
    editor.save_pretrained(tmp_path / "saved")
    printed = hub.run(f"""
        import torch
        from hf_iclr.editors.concepts.editor import ConceptEditor
        from hf_iclr.tour.demo.pipeline import build_demo_pipeline
        first, second = build_demo_pipeline(), build_demo_pipeline()
        ConceptEditor.from_pretrained({str(tmp_path / "saved")!r}, first).push_to_hub("user/no-cats")
        print(ConceptEditor.from_pretrained("user/no-cats", second).concepts)
        same = zip(first.unet.state_dict().values(), second.unet.state_dict().values())
        print(all(torch.equal(a, b) for a, b in same))
        other = ConceptEditor(build_demo_pipeline(), [])
        other.edit({{"a jug": ""}})
        try:
            other.push_to_hub("user/no-cats")
        except ValueError as error:
            print(error)
    """)
    assert "got user/no-cats with other edits" in printed
    assert "{'a cat': 'a owl'}\nTrue" in printed


def test_edits_of_another_pipeline_are_refused_unless_asked_for(tmp_path):
    editor = make_editor(build_demo_pipeline())
    editor.edit({"a cat": "a owl"})
    editor.save_pretrained(tmp_path)
    stranger = build_demo_pipeline(seed=1)
    start = weights(stranger)
    with pytest.raises(ValueError, match="Expected the pipeline that was edited.*check_base_model=False"):
        ConceptEditor.from_pretrained(tmp_path, stranger)
    assert same(weights(stranger), start)
    ConceptEditor.from_pretrained(tmp_path, stranger, check_base_model=False)
    assert not same(weights(stranger), start)


def test_half_precision_is_rounded_once_and_undone_exactly():
    pipeline = build_demo_pipeline().to(torch.bfloat16)
    start = weights(pipeline)
    exact = build_demo_pipeline()
    exact.unet.load_state_dict({name: value.float() for name, value in start.items()})
    exact.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
    editor = make_editor(pipeline, l2=1e-2)
    editor.edit({"a cat": "a owl"})
    name = next(iter(editor.layers["states"]))
    batch = editor._batches[0]
    total = start[f"{name}.weight"].double() + batch.residuals[name].double() @ batch.factors["states"].double()
    assert torch.equal(pipeline.unet.get_submodule(name).weight, total.bfloat16())
    editor.undo()
    assert same(weights(pipeline), start)


@pytest.mark.parametrize(
    ("concepts", "words"),
    [
        ({}, "Expected concepts and what replaces each"),
        (["a cat"], "Type `editor.edit"),
        ({" ": "a owl"}, "Expected a concept and a text"),
        ({"a cat": None}, "Expected a concept and a text"),
        ({"a cat": "a cat"}, "replaced by something else"),
        ({"a jug": "a cup", "a dog": "a cat"}, "'a dog' either edited or retained"),
        ({"a cup": "a jug"}, "not edited yet, got 'a cup', now 'a cat'"),
    ],
)
def test_bad_concepts_change_nothing(concepts, words):
    pipeline = build_demo_pipeline()
    editor = make_editor(pipeline)
    editor.edit({"a cup": "a cat"})
    start = weights(pipeline)
    with pytest.raises(ValueError, match=words):
        editor.edit(concepts)
    assert same(weights(pipeline), start)


def test_bad_pipelines_and_settings_get_a_sentence(tmp_path):
    pipeline = build_demo_pipeline()
    with pytest.raises(TypeError, match="Expected a pipeline, got UNet2DConditionModel"):
        ConceptEditor(pipeline.unet, RETAIN)
    for retain in ("a dog", None, [3]):
        with pytest.raises(TypeError, match=r"retain=\['a dog'\]"):
            ConceptEditor(pipeline, retain)
    for wrong in ({"skip_clip": 1}, {"prompt": "a cat"}, "clip_skip"):
        with pytest.raises(ValueError, match=r"encode_options among .*clip_skip.* but the prompt, got "):
            ConceptEditor(pipeline, RETAIN, encode_options=wrong)
    with pytest.raises(ValueError, match="exactly one of"):
        ConceptEditor(pipeline, RETAIN, nullspace_rank=3, nullspace_energy=0.5)
    with pytest.raises(ValueError, match="l2 above 0, got 0"):
        ConceptEditor(pipeline, RETAIN, l2=0)
    with pytest.raises(ValueError, match="linear layers named 'attn9'"):
        ConceptEditor(pipeline, RETAIN, modules="attn9")
    with pytest.raises(ValueError, match="to read the text encoder's states of 64 numbers, but it reads 16"):
        ConceptEditor(pipeline, RETAIN, modules=r"mid_block.*attn1\.to_v")
    with pytest.raises(ValueError, match="Expected one of .*got AutoencoderKL"):
        find_text_layers(pipeline.vae)
    with pytest.raises(ValueError, match="between 1 and 0 batches"):
        make_editor(pipeline).undo()
    with pytest.raises(ValueError, match="Expected ledger.jsonl in .* got none"):
        ConceptEditor.from_pretrained(tmp_path, pipeline)
    with torch.no_grad():
        pipeline.text_encoder.get_input_embeddings().weight[2].fill_(float("nan"))
    with pytest.raises(ValueError, match="Expected finite states of .*a dog"):
        ConceptEditor(pipeline, RETAIN)


def test_a_concept_within_the_retained_ones_is_told(caplog):
    """All pairs of words span all directions that states have: nothing is left to edit."""
    words = [f"{first} {second}" for first in WORDS for second in WORDS]
    report = make_editor(build_demo_pipeline(), words).edit({"a cat in": "a owl in"})
    assert "100 % of the states of 'a cat in' lie in the retained directions" in caplog.text
    assert report.loc[0, "editable"] < 1e-3 and report.loc[0, "residual"] > 0.99


def test_the_saved_file_names_its_base_and_batches(tmp_path):
    editor = make_editor(build_demo_pipeline())
    editor.edit({"a cat": "a owl", "a jug": ""})
    editor.save_pretrained(tmp_path)
    about, made = map(json.loads, (tmp_path / "ledger.jsonl").read_text().splitlines())
    assert about["base_hash"] == editor.base_hash and about["retain"] == RETAIN
    assert made["batches"][0]["concepts"] == {"a cat": "a owl", "a jug": ""}
