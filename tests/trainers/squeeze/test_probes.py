"""The probe set, what is logged of it against the full softmax, and that training never notices."""

import json
import logging
import math

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from hf_iclr.trainers.squeeze.config import SqueezeDPOConfig
from hf_iclr.trainers.squeeze.probe_scoring import repetition_metrics
from hf_iclr.trainers.squeeze.probes import SqueezeProbeCallback, build_probe_set
from hf_iclr.trainers.squeeze.trainer import SqueezeDPOTrainer
from tests.trainers.squeeze.pairs_and_logs import pair_rows
from tests.trainers.tiny import QUICK, tiny_llama


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")


def make(kind, tmp_path, tokenizer, probes=None, peft=False, eval_dataset=None, **settings):
    """A trainer of that kind on the same tiny model, with dropout so that the random state matters."""
    pairs = pair_rows()
    options = ("every", "decode_every", "max_new_tokens", "probe_budget")
    callback = {"max_new_tokens": 4, "probe_budget": 1.0} | {
        name: settings.pop(name) for name in options if name in settings
    }
    settings = {"learning_rate": 1e-3, **QUICK, **settings}
    model = tiny_llama(attention_dropout=0.2)
    kwargs = {"processing_class": tokenizer, "eval_dataset": eval_dataset} | ({"peft_config": LORA} if peft else {})
    if kind == "sft":
        rows = pairs.remove_columns("rejected").rename_column("chosen", "completion")
        trainer = trl.SFTTrainer(model, trl.SFTConfig(str(tmp_path), **settings), train_dataset=rows, **kwargs)
    elif kind == "dpo":
        if not peft:
            kwargs["ref_model"] = tiny_llama()
        args = trl.DPOConfig(str(tmp_path), disable_dropout=False, **settings)
        trainer = trl.DPOTrainer(model, args=args, train_dataset=pairs, **kwargs)
    elif kind == "kto":
        rows = trl.unpair_preference_dataset(pairs)
        args = trl.KTOConfig(str(tmp_path), disable_dropout=False, **settings)
        trainer = trl.KTOTrainer(model, tiny_llama(), args=args, train_dataset=rows, **kwargs)
    elif kind == "grpo":
        args = trl.GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=4, **settings)
        rows = pairs.select_columns("prompt")
        trainer = trl.GRPOTrainer(
            model, lambda completions, **_: [float(len(c)) for c in completions], args, rows, **kwargs
        )
    else:
        rows = Dataset.from_list([dict(tokenizer(row["prompt"] + row["chosen"])) for row in pairs])
        settings.pop("activation_checkpointing")
        trainer = Trainer(
            model,
            TrainingArguments(str(tmp_path), **settings),
            DataCollatorForLanguageModeling(tokenizer, mlm=False),
            rows,
            processing_class=tokenizer,
        )
    if probes is not None:
        trainer.add_callback(SqueezeProbeCallback(probes, trainer=trainer, **callback))
    return trainer


def records(trainer, key="probe/chosen/logp"):
    return [entry for entry in trainer.state.log_history if key in entry]


# --- the probe set


def test_kinds_are_what_they_say():
    pairs, test_pairs = pair_rows(12), pair_rows(6, seed=9)
    pairs = pairs.add_column("chosen_paraphrase", [f"w{i} again" for i in range(12)])
    probes = build_probe_set(pairs, num_probes=8, seed=3, test_pairs=test_pairs, rephrases=["chosen_paraphrase"])
    assert probes.column_names == [
        *("prompt", "chosen", "rejected", "other_train", "other_test", "permuted", "random_words"),
        "chosen_paraphrase",
    ]
    assert len(probes) == 8 and len(set(probes["prompt"])) == 8
    by_prompt = {row["prompt"]: row for row in pairs}
    words_of_test = {tuple(sorted(row["chosen"].split())) for row in test_pairs}
    for row in probes:
        source = by_prompt[row["prompt"]]
        assert (row["chosen"], row["rejected"]) == (source["chosen"], source["rejected"])
        assert row["chosen_paraphrase"] == source["chosen_paraphrase"]
        assert row["other_train"] in set(pairs["chosen"]) - {row["chosen"]}
        assert row["other_test"] in test_pairs["chosen"]
        assert sorted(row["permuted"].split()) == sorted(row["chosen"].split())
        assert row["permuted"].split() != row["chosen"].split() or len(set(row["chosen"].split())) == 1
        assert tuple(sorted(row["random_words"].split())) in words_of_test
    assert (
        probes.to_list()
        == build_probe_set(
            pairs, num_probes=8, seed=3, test_pairs=test_pairs, rephrases=["chosen_paraphrase"]
        ).to_list()
    )
    assert probes["prompt"] != build_probe_set(pairs, num_probes=8, seed=4)["prompt"]
    assert len(build_probe_set(pairs)) == 12


def test_white_space_in_front_is_that_of_the_chosen_answer():
    rows = [{"prompt": f"p{i}", "chosen": f" a{i} b c", "rejected": "x", "chosen_other": "so it is"} for i in range(3)]
    for row in build_probe_set(Dataset.from_list(rows), rephrases=["chosen_other"]):
        assert all(row[kind].startswith(" ") for kind in ("permuted", "random_words", "chosen_other"))
        assert row["rejected"] == "x"  # as it is trained on


def test_chats_and_implicit_prompts():
    def chat(*texts):
        return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=False)]

    rows = [{"chosen": chat(f"q{i}", f"a{i} b c"), "rejected": chat(f"q{i}", "no way")} for i in range(4)]
    for row in build_probe_set(Dataset.from_list(rows)):
        assert row["prompt"][0]["content"][0] == "q"
        assert all(row[kind][0]["role"] == "assistant" for kind in ("other_train", "permuted", "random_words"))
        assert sorted(row["permuted"][0]["content"]) == sorted(row["chosen"][0]["content"])


def test_empty_answers_are_left_out_and_counted(caplog):
    rows = [{"prompt": f"w{i}", "chosen": "w1 w2", "rejected": "" if i == 2 else "w3"} for i in range(5)]
    with caplog.at_level(logging.WARNING):
        assert len(build_probe_set(Dataset.from_list(rows))) == 4
    assert "1 of 5 prompts are left out of the probes" in caplog.text


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"prompt": "a", "answer": "b", "rejected": "c"}],
            {},
            "pairs should hold the columns prompt, chosen, rejected",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {}, "all rows have the same prompt"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {"rephrases": ["nice"]}, "Leave out nice, or rename"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "nice": "d"}], {"rephrases": ["nice"]}, "`chosen_nice`"),
        ([{"prompt": p, "chosen": "b", "rejected": ""} for p in "ab"], {}, "None of the 2 pairs has all its answers"),
        (
            [{"prompt": "a", "chosen": "b", "rejected": "c"}],
            {"num_probes": 0},
            "num_probes must be a whole number from 1 on, got 0",
        ),
    ],
)
def test_bad_pairs(rows, options, message):
    with pytest.raises(ValueError, match=message):
        build_probe_set(Dataset.from_list(rows), **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b", "score": 1.0}], r"got score. Rename .* `remove_columns\(\['score'\]\)`"),
        ([{"prompt": "a", "rejected": "b"}], "the columns prompt, chosen and a row, got prompt, rejected"),
    ],
)
def test_bad_probe_sets(rows, message):
    with pytest.raises(ValueError, match=message):
        SqueezeProbeCallback(Dataset.from_list(rows))


def test_bad_options():
    probes = build_probe_set(pair_rows())
    for options in (
        {"every": 0},
        {"decode_every": -1},
        {"max_new_tokens": 0},
        {"probe_budget": 0.0},
        {"probe_budget": "x"},
    ):
        with pytest.raises(ValueError, match="must be (at least 1|in)"):
            SqueezeProbeCallback(probes, **options)


# --- what is logged


def full_softmax(model, tokenizer, prompt, answer):
    """Per-token log-probabilities, largest log-probabilities and pressures, from all the logits, in double."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    ids = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(prompt_ids) - 1 : -1]
    log_p = logits.double().log_softmax(-1)
    own = log_p.gather(1, torch.tensor(ids[len(prompt_ids) :])[:, None])[:, 0]
    return own, log_p.amax(-1), log_p.exp().square().sum(-1) - own.exp(), log_p.exp()


@pytest.mark.parametrize("kind", ["sft", "dpo", "plain"])
def test_logged_values_are_those_of_the_full_softmax(tmp_path, word_tokenizer, kind):
    probes = build_probe_set(pair_rows(), num_probes=5)
    trainer = make(kind, tmp_path, word_tokenizer, probes, every=2, max_steps=3, learning_rate=1e-2)
    models = []

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            models.append({k: v.clone() for k, v in model.state_dict().items()})

        def on_step_end(self, args, state, control, model, **kwargs):
            models.append({k: v.clone() for k, v in model.state_dict().items()})

    trainer.add_callback(Keep())
    trainer.train()
    entries = records(trainer)
    assert [entry["step"] for entry in entries] == [0, 2, 3]
    mean = {}
    for entry, weights in zip(entries, (models[0], models[2], models[3]), strict=True):
        trainer.model.load_state_dict(weights)
        for column in ("chosen", "rejected", "other_train", "permuted", "random_words"):
            tokens = [full_softmax(trainer.model, word_tokenizer, row["prompt"], row[column]) for row in probes]
            own, top, pressure, _ = (torch.cat(values) for values in zip(*tokens, strict=True))
            mean[entry["step"], column] = own.mean().item()
            assert entry[f"probe/{column}/logp"] == pytest.approx(own.mean().item(), abs=1e-5)
            change = mean[entry["step"], column] - mean[0, column]
            assert entry[f"probe/{column}/delta0"] == pytest.approx(change, abs=1e-5)
            if column in ("chosen", "rejected"):
                assert entry[f"probe/{column}/logp_argmax"] == pytest.approx(top.mean().item(), abs=1e-5)
            if column == "rejected":
                assert entry["probe/rejected/pressure"] == pytest.approx(pressure.mean().item(), abs=1e-5)
                assert entry["probe/rejected/valley_frac"] == pytest.approx((pressure > 0).double().mean().item())
    last = entries[-1]
    falls = [last[f"probe/{column}/delta0"] for column in ("other_train", "permuted", "random_words")]
    rise = last["probe/chosen/logp_argmax"] - entries[0]["probe/chosen/logp_argmax"]
    assert last["squeeze/index"] == pytest.approx(rise - np.mean(falls), abs=1e-5)


def test_share_of_chosen_answers_below_their_start_and_crosstalk(tmp_path, word_tokenizer):
    probes = build_probe_set(pair_rows(), num_probes=6, test_pairs=pair_rows(5, seed=8))
    trainer = make("dpo", tmp_path, word_tokenizer, probes, every=3, max_steps=3, learning_rate=1e-2)

    def chosen():
        return torch.tensor(
            [full_softmax(trainer.model, word_tokenizer, r["prompt"], r["chosen"])[0].sum() for r in probes]
        )

    start = chosen()
    trainer.train()
    entry = records(trainer)[-1]
    share = (chosen() < start).double().mean().item()
    assert 0 < share < 1
    assert entry["probe/chosen/frac_down"] == pytest.approx(share)
    expected = entry["probe/other_train/delta0"] - entry["probe/other_test/delta0"]
    assert entry["crosstalk/other_train"] == pytest.approx(expected)


def test_what_the_loss_pushes_down_is_no_bystander(tmp_path, word_tokenizer):
    pairs = pair_rows(6).add_column("rejected_rephrased", list(pair_rows(6, seed=5)["rejected"]))
    probes = build_probe_set(pairs, rephrases=["rejected_rephrased"])
    trainer = make("dpo", tmp_path, word_tokenizer, probes, max_steps=3, decode_every=0)
    trainer.train()
    first, *_, last = records(trainer)
    others = ("other_train", "permuted", "random_words")
    rise = last["probe/chosen/logp_argmax"] - first["probe/chosen/logp_argmax"]
    assert last["squeeze/index"] == pytest.approx(rise - np.mean([last[f"probe/{kind}/delta0"] for kind in others]))


def test_initial_greedy_is_frozen(tmp_path, word_tokenizer):
    """y* is decoded by the model as it was; later steps score the same tokens, which were each the most likely."""
    probes = build_probe_set(pair_rows(), num_probes=4)
    trainer = make("sft", tmp_path, word_tokenizer, probes, every=1, decode_every=9, max_new_tokens=6, max_steps=2)
    prompts = [word_tokenizer(row["prompt"], return_tensors="pt") for row in probes]
    answers = [trainer.model.eval().generate(**prompt, max_new_tokens=6, do_sample=False) for prompt in prompts]
    trainer.train()
    total = count = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.no_grad():
            log_p = trainer.model.eval()(input_ids=answer).logits[0, :-1].double().log_softmax(-1)
        own = log_p.gather(1, answer[0, 1:, None])[prompt["input_ids"].shape[1] - 1 :]
        total, count = total + own.sum().item(), count + len(own)
    entries = records(trainer, "probe/initial_greedy/logp")
    assert [entry["step"] for entry in entries] == [0, 1, 2]
    assert entries[-1]["probe/initial_greedy/logp"] == pytest.approx(total / count, abs=1e-5)
    assert [entry["step"] for entry in records(trainer, "repeat/rep_4")] == [0, 2]


def test_pressure_of_own_samples_is_about_zero(tmp_path, word_tokenizer):
    """E[S] = 0 for samples of the model; its standard error here is below .01."""
    probes = build_probe_set(pair_rows(64, seed=5), num_probes=64)
    trainer = make(
        "sft", tmp_path, word_tokenizer, probes, max_new_tokens=24, max_steps=1, per_device_eval_batch_size=64
    )
    trainer.train()
    entry = records(trainer)[0]
    assert abs(entry["onpolicy/pressure_own"]) < 0.03
    assert entry["probe/random_words/logp"] < -3
    assert entry["probe/rejected/pressure"] > 0.1


def test_repetition_by_hand():
    """
    End = 9. First answer: 1 2 1 2 1 2 1 2 has 4-grams 1212 2121 1212 2121 1212: 3 of 5 repeated. Second: 1 2 1 2 3,
    4-grams 1212 2123: none repeated, one of two also in the first answer, which shares one of its two. 2-grams
    12 21 12 21 12 21 12 | 12 21 12 23 | 77 77: 4 different of 13.
    """
    metrics = repetition_metrics([[1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 1, 2, 3, 9], [7, 7, 7, 9]], ends=[9])
    assert metrics == pytest.approx(
        {
            "rep_4": (3 / 5 + 0) / 2,
            "dup_across_prompts": (1 / 2 + 1 / 2) / 2,
            "distinct_2": 4 / 13,
            "eos_rate": 2 / 3,
        }
    )
    empty = repetition_metrics([[9], [9]], ends=[9])
    assert empty["distinct_2"] == empty["eos_rate"] == 1 and empty["rep_4"] == 0


def test_named_sets_and_trackers(tmp_path, word_tokenizer):
    """Two sets; trackers, which run before user callbacks, see every key."""
    seen = {}

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.update(logs)

    sets = {"in": build_probe_set(pair_rows(), num_probes=3), "out": build_probe_set(pair_rows(6, seed=4))}
    trainer = make("dpo", tmp_path, word_tokenizer, sets, max_steps=1)
    trainer.add_callback(
        SqueezeProbeCallback({"third": build_probe_set(pair_rows(4, seed=6))}, trainer=trainer, decode_every=0)
    )
    trainer.callback_handler.callbacks.insert(0, Tracker())
    trainer.train()
    assert {"in_probe/chosen/logp", "out_probe/chosen/logp", "out_squeeze/index", "in_repeat/rep_4"} <= set(seen)
    assert "third_probe/chosen/logp" in seen and "third_probe/initial_greedy/logp" not in seen
    assert seen["in_probe/chosen/logp"] != seen["out_probe/chosen/logp"]


# --- in every trainer, unnoticed


def history(trainer):
    timings = ("runtime", "per_second", "flos", "step_time", "probe", "repeat", "onpolicy", "squeeze", "crosstalk")
    kept = [{k: v for k, v in e.items() if not any(t in k for t in timings)} for e in trainer.state.log_history]
    return [entry for entry in kept if set(entry) - {"epoch", "step"}]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("sft", {}),
        ("sft", {"peft": True}),
        ("sft", {"bf16": True, "gradient_accumulation_steps": 2}),
        ("sft", {"activation_checkpointing": True}),
        ("dpo", {}),
        ("dpo", {"peft": True}),
        ("dpo", {"logging_steps": 3, "precompute_ref_log_probs": True}),
        ("kto", {}),
        ("grpo", {}),
        ("plain", {}),
    ],
)
def test_training_is_bit_identical_with_and_without(tmp_path, word_tokenizer, kind, settings):
    """Losses, every other log and its place, weights, and the random state that is left; in eval mode inside."""
    settings = {"max_steps": 4, **settings}
    outcomes = []
    for probes in (None, build_probe_set(pair_rows(), num_probes=3)):
        options = {} if probes is None else {"every": 1, "decode_every": 2, "max_new_tokens": 4}
        trainer = make(kind, tmp_path, word_tokenizer, probes, **options, **dict(settings))
        trainer.train()
        outcomes.append(
            (history(trainer), [p.detach().clone() for p in trainer.model.parameters()], torch.get_rng_state())
        )
        forward = vars(trainer.accelerator.unwrap_model(trainer.model)).get("forward")
    (plain, weights, state), (probed, probed_weights, probed_state) = outcomes
    assert len(records(trainer)) == 5 and len(records(trainer, "onpolicy/pressure_own")) == 3
    assert plain == probed
    assert all(torch.equal(a, b) for a, b in zip(weights, probed_weights, strict=True))
    assert torch.equal(state, probed_state)
    assert trainer.model.training and not trainer.model._forward_hooks
    assert kind != "plain" or forward is None  # the head it had for a while is gone


def test_squeeze_trainer_probes_by_itself(tmp_path, word_tokenizer):
    """Its own metrics of a step are not split by a probe in between, and agree with those of the probes."""
    pairs = pair_rows(4)
    args = SqueezeDPOConfig(
        str(tmp_path),
        probe_every=1,
        probe_budget=1.0,
        squeeze_metrics="full",
        argmax_every=1,
        **{**QUICK, "logging_steps": 2},
    )
    trainer = SqueezeDPOTrainer(
        tiny_llama(),
        tiny_llama(),
        args,
        train_dataset=pairs,
        processing_class=word_tokenizer,
        probe_dataset=build_probe_set(pairs),
    )
    trainer.train()
    assert [entry["step"] for entry in records(trainer)] == [0, 1, 2, 3]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logged] == [2]
    start, first = records(trainer)[:2]
    for side in ("chosen", "rejected"):
        for name, key in (("logp", "logp_tok"), ("logp_argmax", "logp_argmax")):
            mean = (start[f"probe/{side}/{name}"] + first[f"probe/{side}/{name}"]) / 2
            assert logged[0][f"squeeze/{key}_{side}"] == pytest.approx(mean, abs=1e-5)


def test_resumed_changes_are_since_the_first_start(tmp_path, word_tokenizer):
    probes = build_probe_set(pair_rows(), num_probes=3)
    settings = {"every": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "max_new_tokens": 4}
    whole = make("dpo", tmp_path, word_tokenizer, probes, **settings)
    whole.train()
    resumed = make("dpo", tmp_path, word_tokenizer, probes, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    keys = [key for key in records(whole)[-1] if key.startswith(("probe", "squeeze", "repeat"))]
    last, again = records(whole)[-1], records(resumed)[-1]
    assert "probe/initial_greedy/delta0" in keys and last["probe/chosen/delta0"] != 0
    assert {key: again[key] for key in keys} == pytest.approx({key: last[key] for key in keys}, abs=1e-6)
    state = json.loads((tmp_path / "checkpoint-2" / "squeeze_probes.json").read_text())
    assert len(state["sets"][""]["greedy"]) == 3
    (tmp_path / "checkpoint-2" / "squeeze_probes.json").unlink()


def test_stopped_training_is_probed_at_its_end(tmp_path, word_tokenizer):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    probes = build_probe_set(pair_rows(), num_probes=3)
    trainer = make("dpo", tmp_path, word_tokenizer, probes, every=2, max_steps=9, max_new_tokens=4)
    trainer.add_callback(Stop())
    trainer.train()
    assert [entry["step"] for entry in records(trainer)] == [0, 2, 3]
    assert "repeat/rep_4" in records(trainer)[-1]


def test_prompts_that_do_not_fit(tmp_path, word_tokenizer, caplog):
    long = {"prompt": " ".join(["w1"] * 9) + " ", "chosen": "w2 "}
    short = {"prompt": "w1 ", "chosen": "w2 "}
    with caplog.at_level(logging.WARNING):
        make("sft", tmp_path, word_tokenizer, Dataset.from_list([long, short]), max_length=8, max_steps=1).train()
    assert "1 of 2 prompts are left out of the probes" in caplog.text
    with pytest.raises(ValueError, match="fills max_length=8 tokens"):
        make("sft", tmp_path, word_tokenizer, Dataset.from_list([long]), max_length=8, max_steps=1).train()


def test_errors_say_what_to_do(tmp_path, word_tokenizer):
    probes = build_probe_set(pair_rows(), num_probes=3)
    trainer = make("sft", tmp_path, word_tokenizer, max_steps=2)
    trainer.add_callback(SqueezeProbeCallback(probes))
    with pytest.raises(ValueError, match=r"trainer=trainer\)"):
        trainer.train()

    class Diverge(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            model.lm_head.weight.data.fill_(math.nan)

    trainer = make("sft", tmp_path, word_tokenizer, max_steps=1)
    trainer.add_callback(Diverge())
    trainer.add_callback(SqueezeProbeCallback(probes, trainer=trainer, probe_budget=1.0))
    with pytest.raises(ValueError, match="those of chosen, initial_greedy, other_train, permuted, .* are not"):
        trainer.train()
