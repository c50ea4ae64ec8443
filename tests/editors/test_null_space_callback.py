"""Fine-tuning in the null space: equal to plain training without directions, exact with them, in any trainer."""

from functools import cache

import pytest
import torch
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from hf_iclr.editors.alpha_edit.statistics import KeyStatistics
from hf_iclr.editors.null_space_callback import NullSpaceCallback, project_weight
from hf_iclr.models import hash_weights
from tests.trainers.distributed import run_in_two
from tests.trainers.tiny import QUICK, losses, tiny_llama, word_rows


ROWS = Dataset.from_dict({"input_ids": [[1, 2, 3, 20, 21, 22], [4, 20, 21, 22, 23, 24]] * 8})
ROWS = ROWS.map(lambda row: {"labels": row["input_ids"]})
PLAIN = {key: value for key, value in QUICK.items() if key != "activation_checkpointing"} | {"weight_decay": 0.1}
DOWN = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
NAMES = {"llama": DOWN, "gpt2": ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]}


def make_model(kind="llama"):
    set_seed(0)
    if kind == "llama":
        return tiny_llama()
    config = GPT2Config(
        vocab_size=50, n_embd=16, n_head=2, n_layer=2, n_inner=32, initializer_range=0.2,
        bos_token_id=None, eos_token_id=49, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def make_statistics(model, names=tuple(DOWN)):
    """Keys of six kinds: the second moment has rank 6 of 32."""
    generator = torch.Generator().manual_seed(3)
    sums = {layer: torch.randn(32, 6, generator=generator, dtype=torch.float64) for layer in range(len(names))}
    return KeyStatistics(
        sums={layer: keys @ keys.T for layer, keys in sums.items()},
        module_names=dict(enumerate(names)),
        tokens=6,
        rows=6,
        model_name="tiny",
        model_revision=None,
        weights_hash=hash_weights(model),
    )


def train(model, folder, *callbacks, resume=None, **options):
    args = TrainingArguments(output_dir=str(folder), **{**PLAIN, **options})
    trainer = Trainer(model, args, train_dataset=ROWS, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """`trained(kind, steps, rank)`: a finished trainer, without the callback where the rank is `None`, made once."""
    folder = tmp_path_factory.mktemp("trained")

    @cache
    def run(kind, steps, rank):
        model = make_model(kind)
        statistics = make_statistics(model, NAMES[kind])
        callbacks = [] if rank is None else [NullSpaceCallback(statistics, nullspace_rank=rank)]
        return train(model, folder, *callbacks, max_steps=steps)

    return run


def state(trainer):
    moments = [value for group in trainer.optimizer.state.values() for value in group.values()]
    return [*trainer.model.state_dict().values(), *moments]


def equal(ours, theirs):
    assert len(ours) == len(theirs)
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def down(model, layer):
    return model.state_dict()[f"{DOWN[layer]}.weight"]


def test_projection_by_hand():
    """U is the first axis: the first column returns to `kept`, the second keeps its new value."""
    weight, preserved, kept = torch.tensor([[5.0, 2.0], [7.0, 4.0]]), torch.eye(2)[:, :1], torch.tensor([[1.0], [3.0]])
    assert project_weight(weight, preserved, kept).tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_without_directions_training_is_bit_identical(trained):
    plain, ours = trained("llama", 3, None), trained("llama", 3, 0)
    assert equal(state(ours), state(plain)) and losses(ours) == losses(plain)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_preserved_outputs_stay_and_the_rest_moves(kind, trained):
    """The projected update is the plain step's update times P, which one step of plain training shows."""
    statistics = make_statistics(make_model(kind), NAMES[kind])

    def weight(model, layer):
        stored = model.state_dict()[f"{NAMES[kind][layer]}.weight"].double()
        return stored.T.clone() if kind == "gpt2" else stored.clone()

    before = [weight(make_model(kind), layer) for layer in range(2)]
    plain, stepped, model = (trained(kind, steps, rank).model for steps, rank in ((1, None), (1, 6), (8, 6)))
    for layer in range(2):
        preserved = statistics.preserved(layer, rank=6)
        null = torch.eye(32).double() - preserved @ preserved.T
        update = (weight(plain, layer) - before[layer]) @ null
        assert torch.allclose(weight(stepped, layer) - before[layer], update, atol=1e-6)
        assert ((weight(plain, layer) - before[layer]) @ preserved).abs().max() > 1e-3
        moved = weight(model, layer) - before[layer]
        assert (moved @ preserved).abs().max() < 1e-6 and moved.abs().max() > 1e-2


def test_only_the_chosen_layers_are_projected(tmp_path):
    statistics = make_statistics(make_model())
    model = train(make_model(), tmp_path, NullSpaceCallback(statistics, [1], nullspace_energy=1.0)).model
    moved = [(down(model, layer) - down(make_model(), layer)).double() for layer in range(2)]
    assert (moved[1] @ statistics.preserved(1, rank=6)).abs().max() < 1e-6
    assert (moved[0] @ statistics.preserved(0, rank=6)).abs().max() > 1e-3


def test_the_optimizer_gets_the_gradients_it_would_get(trained):
    """After one step the moments are those of plain training: the projection comes after the step."""
    plain, ours = trained("llama", 1, None), trained("llama", 1, 6)
    (callback,) = (each for each in ours.callback_handler.callbacks if isinstance(each, NullSpaceCallback))
    count = len(plain.model.state_dict())
    assert equal(state(ours)[count:], state(plain)[count:]) and not equal(state(ours)[:count], state(plain)[:count])
    assert callback._targets == []


def test_accumulated_gradients_are_one_step(trained, tmp_path, caplog):
    statistics = make_statistics(make_model())
    callback = NullSpaceCallback(statistics, nullspace_rank=6)
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    models = [trained("llama", 3, 6).model, train(make_model(), tmp_path, callback, **halves).model]
    assert (
        "trained parameters besides the projected ones move freely, the first is model.embed_tokens.weight"
        in caplog.text
    )
    assert all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(*(m.state_dict().values() for m in models), strict=True)
    )
    moved = (down(models[1], 0) - down(make_model(), 0)).double()
    assert (moved @ statistics.preserved(0, rank=6)).abs().max() < 1e-6


def test_a_resumed_run_ends_where_the_whole_one_does(tmp_path):
    statistics = make_statistics(make_model())
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = train(make_model(), tmp_path, NullSpaceCallback(statistics, nullspace_rank=6), **options)
    resumed = train(
        make_model(), tmp_path, NullSpaceCallback(statistics, nullspace_rank=6),
        resume=str(tmp_path / "checkpoint-2"), **options,
    )  # fmt: skip
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(state(resumed), state(whole), strict=True))
    moved = (down(resumed.model, 1) - down(make_model(), 1)).double()
    assert (moved @ statistics.preserved(1, rank=6)).abs().max() < 1e-6


def lora(model, **options):
    return get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM", **options))


def test_an_adapter_moves_no_preserved_output(tmp_path):
    statistics = make_statistics(make_model())
    model = train(lora(make_model()), tmp_path, NullSpaceCallback(statistics, nullspace_rank=6), max_steps=6).model
    for layer in range(2):
        update = model.get_base_model().get_submodule(DOWN[layer]).get_delta_weight("default").double()
        assert (update @ statistics.preserved(layer, rank=6)).abs().max() < 1e-6 and update.abs().max() > 1e-3
    callback = NullSpaceCallback(statistics, nullspace_rank=6)
    again = train(model, tmp_path, callback)  # no warning: it was trained so
    empty = train(lora(make_model()), tmp_path, NullSpaceCallback(statistics, nullspace_rank=0))
    assert equal(state(empty), state(train(lora(make_model()), tmp_path))) and losses(again)


def test_statistics_of_another_model_are_refused_under_an_adapter_too(tmp_path):
    statistics = make_statistics(make_model())
    other = make_model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match="statistics of this model"):
        train(lora(other), tmp_path, NullSpaceCallback(statistics))


def test_saved_adapter_keeps_the_promise(tmp_path):
    statistics = make_statistics(make_model())
    trainer = train(lora(make_model()), tmp_path, NullSpaceCallback(statistics, nullspace_rank=6))
    trainer.save_model(str(tmp_path / "a"))
    merged = PeftModel.from_pretrained(make_model(), tmp_path / "a").merge_and_unload()
    moved = (down(merged, 0) - down(make_model(), 0)).double()
    assert (moved @ statistics.preserved(0, rank=6)).abs().max() < 1e-6 and moved.abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_trl(kind, tmp_path, word_tokenizer):
    statistics = make_statistics(make_model())
    callback = NullSpaceCallback(statistics, nullspace_rank=6)
    rows, model = word_rows(8), make_model()
    if kind == "sft":
        trainer_class, models, args = SFTTrainer, [model], SFTConfig(str(tmp_path), **QUICK)
    else:
        rows = rows.rename_column("completion", "chosen").add_column("rejected", rows["completion"][::-1])
        trainer_class, models, args = DPOTrainer, [model, make_model()], DPOConfig(str(tmp_path), **QUICK)
    trainer = trainer_class(
        *models, args=args, train_dataset=rows, processing_class=word_tokenizer, callbacks=[callback]
    )
    trainer.train()
    for layer in range(2):
        moved = (down(trainer.model, layer) - down(make_model(), layer)).double()
        assert (moved @ statistics.preserved(layer, rank=6)).abs().max() < 1e-6 and moved.abs().max() > 1e-3


def train_and_return(folder, batch_size):
    model = make_model()
    callback = NullSpaceCallback(make_statistics(model), nullspace_rank=6)
    return train(model, folder, callback, per_device_train_batch_size=batch_size).model.state_dict()


def test_two_processes_equal_one(trained, tmp_path):
    first, second = run_in_two(train_and_return, tmp_path, str(tmp_path), 2)
    one = trained("llama", 3, 6).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in one)
    assert all(torch.allclose(first[name], one[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nullspace_rank": 2, "nullspace_energy": 0.5}, "exactly one of"),
        ({"nullspace_rank": 2, "layers": [0, 7]}, r"layers among \[0, 1\].*got \[0, 7\]"),
        ({"nullspace_rank": 2, "layers": []}, r"layers among \[0, 1\]"),
        ({"nullspace_rank": 2, "layers": 1}, r"layers among \[0, 1\].*got 1"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        NullSpaceCallback(make_statistics(make_model()), **options)
    with pytest.raises(TypeError, match="Expected KeyStatistics, got str: 'statistics'"):
        NullSpaceCallback("statistics")


def test_what_cannot_be_projected_is_refused_before_training(tmp_path):
    statistics = make_statistics(make_model())
    callback = NullSpaceCallback(statistics, nullspace_rank=6)
    with pytest.raises(ValueError, match="weights differ"):
        train(tiny_llama(seed=1), tmp_path, callback)
    frozen = make_model()
    for name in DOWN:
        frozen.get_submodule(name).weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Expected a trained weight among .*target_modules=\['down_proj'\]"):
        train(frozen, tmp_path, callback)
    with pytest.raises(ValueError, match="use_dora=False"):
        train(lora(make_model(), use_dora=True), tmp_path, callback)
    ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ValueError, match="Expected a plain LoRA adapter"):
        train(get_peft_model(make_model(), ia3), tmp_path, callback)
    with pytest.raises(ValueError, match="merge_and_unload"):
        train(lora(make_model(), init_lora_weights=False), tmp_path, callback)
    other = NullSpaceCallback(make_statistics(make_model("gpt2"), DOWN), nullspace_rank=6)
    with pytest.raises(ValueError, match="module 'model.layers.0.mlp.down_proj'.*got GPT2LMHeadModel"):
        train(make_model("gpt2"), tmp_path, other)
