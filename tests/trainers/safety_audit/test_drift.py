"""The drift callback: what it measures, that it disturbs nothing, and what it does when refusals fade."""

import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.deep_safety.config import DeepSafetySFTConfig
from hf_iclr.trainers.deep_safety.trainer import DeepSafetySFTTrainer
from hf_iclr.trainers.safety_audit.drift import SafetyDriftCallback


PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]
OPTIONS = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
ROWS = {"input_ids": [[1, 2, 3, 20, 21, 22], [4, 20, 21, 22, 23, 24]] * 8}


def odd(texts):
    """A refusal is a text whose first word is odd."""
    return [int(text.split()[0][1:]) % 2 == 1 for text in texts]


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.4, bos_token_id=None, eos_token_id=49, pad_token_id=0,
            attention_dropout=0.3,
        )
    )  # fmt: skip


def make_trainer(kind, tmp_path, tokenizer, **options):
    labels = [[-100, *row[1:]] for row in ROWS["input_ids"]]
    rows = Dataset.from_dict({**ROWS, "labels": labels})
    trainer_class, config = {
        "plain": (Trainer, TrainingArguments),
        "sft": (SFTTrainer, SFTConfig),
        "deep": (DeepSafetySFTTrainer, DeepSafetySFTConfig),
    }[kind]
    settings = {"max_steps": 6, "logging_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings |= {**OPTIONS, **options}
    if kind != "plain":
        settings["activation_checkpointing"] = False
    return trainer_class(
        tiny_llama(), args=config(output_dir=str(tmp_path), **settings), train_dataset=rows, processing_class=tokenizer
    )


def add(trainer, **options):
    callback = SafetyDriftCallback(PROMPTS, trainer=trainer, **{"judge": odd, "every": 2, **options})
    trainer.add_callback(callback)
    return callback


def drift(trainer):
    return [entry for entry in trainer.state.log_history if "safety/refusal_rate" in entry]


@pytest.mark.parametrize("kind", ["plain", "sft"])
def test_training_is_bit_identical(tmp_path, word_tokenizer, kind):
    seen = {}
    for watched in (False, True):
        trainer = make_trainer(kind, tmp_path, word_tokenizer)
        if watched:
            add(trainer, harmless_prompts=["w30"])
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        seen[watched] = trainer.model.state_dict(), logs, trainer.model.training
    assert all(torch.equal(value, seen[True][0][name]) for name, value in seen[False][0].items())
    assert len(seen[True][1]) == len(seen[False][1]) == 2 and seen[True][2] == seen[False][2]
    for with_it, without in zip(seen[True][1], seen[False][1], strict=True):
        assert with_it == without  # TRL's own metrics too


def test_values(tmp_path, word_tokenizer):
    """Rates and KL at the start and at the end, from plain `generate` and fresh forwards."""
    trainer = make_trainer("plain", tmp_path, word_tokenizer)
    add(trainer, harmless_prompts=["w30", "w31"], max_new_tokens=5, kl_tokens=3)
    start = tiny_llama().eval()
    trainer.train()
    records = drift(trainer)
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    assert records[0]["safety/kl"] == 0.0

    end = trainer.model.eval()
    for model, record in ((start, records[0]), (end, records[-1])):
        kl, first = [], []
        for prompt in PROMPTS:
            row = torch.tensor([[int(word[1:]) for word in prompt.split()]])
            first.append(answer(model, row)[0])
            for token in range(len(tokens := answer(start, row)[:3])):
                context = torch.cat([row, torch.tensor([tokens[:token]], dtype=torch.long)], 1)
                with torch.no_grad():
                    p, q = (each(context).logits[0, -1].log_softmax(-1).double() for each in (model, start))
                kl.append((p.exp() * (p - q)).sum().item())
        assert record["safety/refusal_rate"] == sum(token % 2 for token in first) / 4
        assert record["safety/kl"] == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-6)
    assert records[-1]["safety/kl"] > 0.01 and 0 <= records[-1]["safety/over_refusal_rate"] <= 1


def answer(model, row):
    new = model.generate(row, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, row.shape[1] :].tolist()
    return new[: new.index(49)] if 49 in new else new


def test_asks_as_the_training_does(tmp_path, word_tokenizer, caplog):
    """The system prompt and the template's arguments are in every prompt; thoughts are no part of an answer."""
    tokenizer = word_tokenizer.__class__(
        tokenizer_object=word_tokenizer.backend_tokenizer, unk_token="w0", pad_token="w0", eos_token="w49",
        chat_template="{% for m in messages %}{{ 'w40 ' if m.role == 'system' else 'w41 ' }}{{ m.content }} "
        "{% endfor %}"
        "{% if add_generation_prompt %}w42{% if quiet %} w43{% endif %}{% endif %}",
    )  # fmt: skip
    trainer, prompts = make_trainer("plain", tmp_path, tokenizer, max_steps=1), []

    def note(module, args, kwargs):
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        prompts.extend(row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True) if ids.shape == mask.shape)

    trainer.model.register_forward_pre_hook(note, with_kwargs=True)
    add(trainer, system="w7", chat_template_kwargs={"quiet": True}, judge=lambda texts: [True] * len(texts))
    trainer.train()
    start = [[40, 7, 41, *(int(word[1:]) for word in prompt.split()), 42, 43] for prompt in PROMPTS]
    assert all(any(row[: len(ids)] == ids for row in prompts) for ids in start)
    assert not any(row[:1] == [41] for row in prompts)

    tokenizer.add_tokens(["<think>"])
    said = [tokenizer("<think>")["input_ids"]] * 4
    trainer = make_trainer("plain", tmp_path, tokenizer, max_steps=1)
    callback = add(trainer, max_new_tokens=1)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("hf_iclr.trainers.safety_audit.asking.ask.continue_rows", lambda *_, **__: {0: said})
        patch.setattr(callback, "_answer_logits", lambda *_: iter(()))
        logs = callback._measure(trainer.args)
    assert math.isnan(logs["safety/refusal_rate"]) and "4 of 4 answers ended in the middle" in caplog.text


def test_trackers_see_it(tmp_path, word_tokenizer):
    class Tracker(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen += [state.global_step] * ("safety/kl" in logs)

    trainer, tracker = make_trainer("sft", tmp_path, word_tokenizer), Tracker()
    trainer.add_callback(tracker)  # before ours, as the reporting callbacks are
    add(trainer, every=4)
    trainer.train()
    assert tracker.seen == [0, 4, 6]


def test_stop(tmp_path, word_tokenizer, caplog):
    trainer = make_trainer("plain", tmp_path, word_tokenizer)
    judge = iter([[True] * 4, [True] * 4, [True, False, False, False], [False] * 4])
    add(trainer, judge=lambda texts: next(judge), min_refusal=0.5, action="stop")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 4 and [record["step"] for record in drift(trainer)] == [0, 2, 4]
    assert "Step 4: the refusal rate is 0.250, below 0.5." in caplog.text


def test_max_kl(tmp_path, word_tokenizer, caplog):
    trainer = make_trainer("plain", tmp_path, word_tokenizer)
    add(trainer, max_kl=1e-4)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert trainer.state.global_step == 6 and caplog.text.count("above 0.0001") == 3  # logged only; not at step 0


def test_raise_beta(tmp_path, word_tokenizer):
    trainer = make_trainer("deep", tmp_path, word_tokenizer)
    judge = iter([[True] * 4, [False] * 4, [True] * 4, [False] * 4])
    add(trainer, judge=lambda texts: next(judge), min_refusal=0.5, action="raise_beta", beta_factor=3.0)
    trainer.train()
    assert [record["safety/beta_scale"] for record in drift(trainer)] == [1.0, 3.0, 3.0, 9.0]
    args = trainer.args
    assert (args.beta_first, args.beta_initial, args.beta_rest) == pytest.approx((4.5, 18.0, 0.9))


def test_resume_measures_from_the_start(tmp_path, word_tokenizer):
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer("deep", tmp_path, word_tokenizer, **options)
    judge = {"judge": lambda texts: [False] * len(texts), "min_refusal": 0.5, "action": "raise_beta"}
    add(whole, **judge)
    whole.train()
    resumed = make_trainer("deep", tmp_path, word_tokenizer, **options)
    add(resumed, **judge)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [record["step"] for record in drift(resumed)] == [0, 2, 4, 6]  # the first three from the checkpoint
    last, again = drift(whole)[-1], drift(resumed)[-1]
    assert again["safety/kl"] == pytest.approx(last["safety/kl"], rel=1e-4) and last["safety/kl"] > 0.01
    assert [record["safety/beta_scale"] for record in drift(whole)] == [1.0, 2.0, 4.0, 8.0]
    assert again["safety/beta_scale"] == 8.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"action": "shout"}, "got 'shout'"),
        ({"action": "stop"}, r"`min_refusal=0.8`"),
        ({"every": 0}, "every=0"),
        ({"min_refusal": 80}, "between 0 and 1, got 80"),
        ({"beta_factor": 0.5}, "above 1, got 0.5"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        SafetyDriftCallback(**{"prompts": PROMPTS, **options})


def test_what_the_training_lacks(tmp_path, word_tokenizer):
    trainer = make_trainer("plain", tmp_path, word_tokenizer)
    trainer.add_callback(callback := SafetyDriftCallback(PROMPTS))
    with pytest.raises(ValueError, match="trainer=trainer"):
        trainer.train()
    trainer.remove_callback(callback)
    add(trainer, action="raise_beta", min_refusal=0.5)
    with pytest.raises(ValueError, match="needs a DeepSafetySFTTrainer.*got TrainingArguments"):
        trainer.train()
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="sharded by FSDP"):
        SafetyDriftCallback(PROMPTS, trainer=trainer).on_train_begin(trainer.args, trainer.state, trainer.control)
