"""Does each part do here what it was written to do? One function a part on tiny random models, offline, in seconds."""

import copy
import itertools
import math
import tempfile
from typing import Any


# Title of each part -> its check, which raises when something is wrong.
PARTS = {
    "speculative cascades": "hf_iclr.doctor.self_check:check_cascades",
    "deep safety": "hf_iclr.doctor.self_check:check_deep_safety",
    "squeeze": "hf_iclr.doctor.self_check:check_squeeze",
    "data Shapley": "hf_iclr.doctor.self_check:check_data_shapley",
    "knowledge editing": "hf_iclr.doctor.self_check:check_knowledge_editing",
    "video segmentation": "hf_iclr.doctor.self_check:check_video_segmentation",
}
TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
}
QUESTION = "w1 w2 w3"
GREEDY = {"do_sample": False, "max_new_tokens": 12}


class WrongResultError(Exception):
    """A part ran to its end and gave what it must not give."""


def check_cascades() -> None:
    """
    Greedy cascades in both loops say what the large model says, also saved, loaded and asked for by `pipeline`.

    Raises:
        WrongResultError: if a text differs from the large model's.
    """
    from transformers import AutoModelForCausalLM, pipeline

    from hf_iclr import SpeculativeCascadeForCausalLM, enable_cascade
    from hf_iclr.tiny_models import tiny_llama, word_tokenizer

    large, small, tokenizer = tiny_llama(), tiny_llama(noise=0.05), word_tokenizer()
    inputs = tokenizer([QUESTION], return_tensors="pt")
    plain = large.generate(**inputs, **GREEDY)
    cascade = enable_cascade(large, small)
    for backend in ("batched", "assisted"):
        decoded = cascade.generate(**inputs, **GREEDY, cascade_rule="spec", cascade_backend=backend)
        expect(decoded.equal(plain), f"the {backend} loop to decode as the large model alone")
        statistics = cascade.cascade_statistics
        expect(statistics.backend == backend, f"the {backend} loop, got the {statistics.backend} one")
        expect(0 < sum(statistics.accepted) < sum(statistics.drafted), "some drafts, but not all, to be accepted")

    with tempfile.TemporaryDirectory() as folder:
        both = SpeculativeCascadeForCausalLM.from_cascade_pretrained(large, small, cascade_rule="spec")
        both.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        expect(isinstance(loaded, SpeculativeCascadeForCausalLM), "a saved composite to be loaded as one")
        expect(loaded.generate(**inputs, **GREEDY).equal(plain), "a loaded composite to decode as its large model")
        (decoded,) = pipeline("speculative-cascade", model=folder, device="cpu")(QUESTION, **GREEDY)
        (said,) = pipeline("text-generation", model=large, tokenizer=tokenizer, device="cpu")(QUESTION, **GREEDY)
        expect(decoded["generated_text"] == said["generated_text"], f"the pipeline to say {said}, got {decoded}")
        rate = decoded["cascade"]["acceptance_rate"]
        expect(0 < rate < 1, f"the pipeline to count some drafts, but not all, as accepted, got {rate}")


def check_deep_safety() -> None:
    """
    Without its constraint the trainer is TRL's bit for bit, with it it is not; an audit counts what the model says.

    Raises:
        WrongResultError: if a weight, a loss or an answer is another.
    """
    from trl import SFTConfig, SFTTrainer

    from hf_iclr import DeepSafetySFTConfig, DeepSafetySFTTrainer, audit_safety
    from hf_iclr.tiny_models import tiny_llama, word_tokenizer

    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 9} w{i + 20} "} for i in range(1, 7)]
    plain = {"adam_beta1": 0.9, "warmup_steps": 0}
    theirs = train(SFTTrainer, SFTConfig, rows)
    ours = train(DeepSafetySFTTrainer, DeepSafetySFTConfig, rows, constrain="none", **plain)
    expect_same_run(ours, theirs, "DeepSafetySFTTrainer without its constraint", "SFTTrainer")
    held = train(DeepSafetySFTTrainer, DeepSafetySFTConfig, rows, **plain)
    first, second = ([entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (held, theirs))
    expect(math.isclose(first[0], second[0], abs_tol=1e-4), "the constrained loss to begin at plain cross-entropy")
    expect(first[1:] != second[1:], "the constraint to change the loss after the first step")

    model, tokenizer = tiny_llama(), word_tokenizer()
    answered = model.generate(**tokenizer([QUESTION], return_tensors="pt"), do_sample=False, max_new_tokens=4)
    report = audit_safety(
        model, tokenizer, [QUESTION], answers=["w20 w21"], ks=(0, 1), attacks=("prefill", "gcg"), max_new_tokens=4,
        gcg_steps=2, judge=lambda texts: [True for _ in texts],
    )  # fmt: skip
    text = tokenizer.decode(answered[0, 3:], skip_special_tokens=True)
    unattacked = report.find("none")
    expect(unattacked is not None and unattacked.texts == [text], f"the audit to note {text!r}, got {unattacked}")
    for attack, setting in (("prefill", "1"), ("gcg", "")):
        found = report.find(attack, setting)
        expect(found is not None and found.refused == [True], f"an answer under {attack}, got {found}")


def check_squeeze() -> None:
    """
    The trainer is TRL's DPO bit for bit and logs which answers go up and down.

    Raises:
        WrongResultError: if a weight or a loss is another, or a metric is missing.
    """
    from trl import DPOConfig, DPOTrainer

    from hf_iclr import SqueezeDPOConfig, SqueezeDPOTrainer
    from hf_iclr.tiny_models import tiny_llama

    rows = [{"prompt": f"w{i} ", "chosen": f"w{i + 1} w{i + 7} ", "rejected": f"w{i + 20} "} for i in range(1, 7)]
    theirs = train(DPOTrainer, DPOConfig, rows, ref_model=tiny_llama())
    ours = train(
        SqueezeDPOTrainer, SqueezeDPOConfig, rows, ref_model=tiny_llama(), squeeze_metrics="full", argmax_every=1
    )
    expect_same_run(ours, theirs, "SqueezeDPOTrainer", "DPOTrainer")
    logged = {name: value for name, value in ours.state.log_history[-2].items() if name.startswith("squeeze/")}
    expect(len(logged) > 5 and any(logged.values()), f"metrics of the squeeze in the log, got {logged}")
    expect(all(map(math.isfinite, logged.values())), f"finite metrics of the squeeze, got {logged}")


def check_data_shapley() -> None:
    """
    The values of one step are the Shapley values of all subsets of its rows.

    Raises:
        WrongResultError: if a value is another.
    """
    import torch
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    from hf_iclr import InRunDataShapleyCallback
    from hf_iclr.tiny_models import tiny_llama

    rate = 1e-4  # the values are of first order: what they leave out shrinks with it
    tokens = [{"input_ids": row, "labels": row} for row in ([1, 5, 9, 2], [7, 7, 3, 30], [4, 8, 15, 16], [2, 3, 5, 7])]
    rows, held_out = tokens[:3], tokens[3:]
    shapley = InRunDataShapleyCallback(Dataset.from_list(held_out), refresh_every=1)
    model = tiny_llama().double()
    start = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TRAINING | {"max_steps": 1, "per_device_train_batch_size": 3, "learning_rate": rate}
        arguments = TrainingArguments(folder, **settings, optim="sgd", max_grad_norm=0.0)
        trainer = Trainer(
            model, arguments, train_dataset=Dataset.from_list(rows), data_collator=default_data_collator,
            callbacks=[shapley],
        )  # fmt: skip
        trainer.train()
        values = shapley.result.rows.set_index("index")["value"]

    def loss_after(subset: tuple[int, ...]) -> float:
        stepped = copy.deepcopy(start).eval()
        for row in subset:
            (stepped(**default_data_collator([rows[row]])).loss / 3).backward()
        with torch.no_grad():
            for parameter in stepped.parameters() if subset else ():
                parameter -= rate * parameter.grad
            return stepped(**default_data_collator(held_out)).loss.item()

    losses = {subset: loss_after(subset) for size in range(4) for subset in itertools.combinations(range(3), size)}
    for row in range(3):
        others = [number for number in range(3) if number != row]
        subsets = [subset for size in range(3) for subset in itertools.combinations(others, size)]
        exact = sum(
            (losses[subset] - losses[tuple(sorted({*subset, row}))]) / (3 * math.comb(2, len(subset)))
            for subset in subsets
        )
        expect(math.isclose(values[row], exact, rel_tol=0.02), f"row {row} to be worth {exact}, got {values[row]}")


def check_knowledge_editing() -> None:
    """
    An edit makes its answer likelier and is taken back bit for bit.

    Raises:
        WrongResultError: if it does not.
    """
    from datasets import Dataset

    from hf_iclr import AlphaEditConfig, AlphaEditor, EditRequest, KeyStatistics
    from hf_iclr.tiny_models import tiny_llama, word_tokenizer

    model, tokenizer = tiny_llama(), word_tokenizer()
    text = Dataset.from_dict({"text": [f"w{i} w{i * 7 % 50} w{i * 3 % 50} w{i + 1}" for i in range(40)]})
    statistics = KeyStatistics.from_dataset(model, tokenizer, text, layers=[0, 1], progress=False)
    config = AlphaEditConfig(
        context_templates=["{}"], num_steps=15, nullspace_rank=8, layers=[0, 1], clamp_factor=20.0, kl_factor=0.0,
        weight_decay=0.0, l2=1e-4,
    )  # fmt: skip
    editor = AlphaEditor(model, tokenizer, config, statistics)
    before = copy.deepcopy(model.state_dict())
    report = editor.edit([EditRequest("w1 w2 {}", "w3 w4", "w5")], progress=False)
    expect(len(report.edits) == 1, f"one edit to be made, got {report}")
    edit = report.edits[0]
    expect(edit["p_after"] > 2 * edit["p_before"], f"the edit to make its answer likelier, got {edit}")
    changed = {name for name, weight in model.state_dict().items() if not weight.equal(before[name])}
    names = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    expect(changed == names, f"an edit of {sorted(names)}, got one of {sorted(changed)}")
    editor.undo()
    left = [name for name, weight in model.state_dict().items() if not weight.equal(before[name])]
    expect(not left, f"an edit taken back to leave nothing, got {left}")


def check_video_segmentation() -> None:
    """
    A clicked object has the masks of transformers' own loop, and a correction stays in later passes.

    Raises:
        WrongResultError: if a mask is another.
    """
    import numpy as np
    from transformers import pipeline

    import hf_iclr  # noqa: F401  registers the task
    from hf_iclr.tiny_models import tiny_segmenter

    model, processor = tiny_segmenter()
    video = np.random.default_rng(0).integers(0, 160, (4, 48, 80, 3), dtype=np.uint8)
    for number in range(4):
        video[number, 12:30, 8 + 2 * number : 28 + 2 * number] = (250, 60, 30)
    pipe = pipeline("promptable-video-segmentation", model=model, processor=processor, device="cpu")
    session = pipe.session(video, output="logits")
    session.add(0, 1, points=[[20, 20]])
    ours = {frame.frame: frame.masks[1] for frame in session.propagate()}

    theirs = processor.init_video_session(video=video, dtype=model.dtype)
    click = {"input_points": [[[[20, 20]]]], "input_labels": [[[1]]]}
    processor.add_inputs_to_inference_session(theirs, 0, 1, **click)
    model(theirs, frame_idx=0)
    for output in model.propagate_in_video_iterator(theirs):
        mask = processor.post_process_masks([output.pred_masks], [[48, 80]], binarize=False)[0][0, 0].numpy()
        expect(np.array_equal(ours[output.frame_idx], mask), f"frame {output.frame_idx} to have transformers' mask")

    corrected = session.correct(2, 1, points=[[60, 30]], labels=[1]).masks[1]
    expect(not np.array_equal(corrected, ours[2]), "a correction to change its mask")
    after = {frame.frame: frame.masks[1] for frame in session.propagate("both")}
    expect(np.array_equal(after[2], corrected), "a correction to stay in later passes")
    expect(not np.array_equal(after[3], ours[3]), "a correction to change the frames after it")


def expect(right: bool, sentence: str) -> None:
    """Raise [`WrongResultError`] with "Expected `sentence`" unless `right`."""
    if not right:
        raise WrongResultError(f"Expected {sentence}.")


def expect_same_run(ours: Any, theirs: Any, name: str, other: str) -> None:
    """Raise [`WrongResultError`] unless two trainers ended with the same weights and losses, bit for bit."""
    for (weight, value), parameter in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        expect(value.equal(parameter), f"{name} to train as {other} bit for bit, got other values in {weight}")
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (ours, theirs)]
    expect(losses[0] == losses[1] and len(losses[0]) == 3, f"{name} to have the losses {losses[1]}, got {losses[0]}")


def train(trainer_class: type, config_class: type, rows: list[dict], ref_model: Any = None, **settings: Any) -> Any:
    """Three steps of a trainer of TRL's kind on a [`tiny_llama`]."""
    from datasets import Dataset

    from hf_iclr.tiny_models import tiny_llama, word_tokenizer

    others = {} if ref_model is None else {"ref_model": ref_model}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            tiny_llama(), args=config_class(folder, **TRAINING, **settings), train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer(), **others,
        )  # fmt: skip
        trainer.train()
    return trainer
