"""ZeRO's first two stages give the values of one process: under DeepSpeed where it is installed, and a stand-in."""

import itertools
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, is_deepspeed_available
from transformers import default_data_collator, training_args

from hf_iclr.trainers.data_shapley.directions import EngineSettings
from hf_iclr.trainers.data_shapley.engine import ShapleyEngine
from hf_iclr.trainers.data_shapley.gradients.zero import ZeroOptimizer
from tests.trainers.data_shapley.test_callback import callback, lora, make, token_rows
from tests.trainers.distributed import reset_accelerate, run_in_two
from tests.trainers.tiny import tiny_llama


needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="needs DeepSpeed")


def train(processes, folder, stage, full, settings, resume=None):
    """Rows and steps of clipped AdamW steps after one without values; by DeepSpeed if there is a stage."""
    defaults = {"max_steps": 4, "max_grad_norm": 0.5, "learning_rate": 1e-4, "optim": "adamw_torch"}
    if stage is not None:
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        auto |= {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
        defaults |= {"deepspeed": {"zero_optimization": {"stage": stage}, **auto}, "use_cpu": False}
        # accelerate takes DeepSpeed for devices only: as if there were one, with gloo
        os.environ.pop("ACCELERATE_USE_CPU", None)
        reset_accelerate()
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
        training_args.is_torch_bf16_gpu_available = lambda: True
    shapley = callback(adam_warmup=1, targets={"other": token_rows(3, seed=4)}, batch_size=2, token_values_for=[0, 3])
    model = tiny_llama() if full else lora(tiny_llama())
    settings = {"per_device_train_batch_size": 4 // processes, **defaults, **settings}
    trainer = make(folder, model, [shapley], **settings)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.accelerator.num_processes == processes
    assert "step" not in vars(trainer.model_wrapped)
    if trainer.accelerator.process_index:
        return None
    assert (stage is None) == (trainer.deepspeed is None)
    return shapley.result.rows.sort_values(["step", "index"]), shapley.result.steps


@needs_deepspeed
@pytest.mark.parametrize(
    ("stage", "full", "settings"),
    [
        (2, True, {}),
        (1, True, {"max_grad_norm": 0.0}),
        (2, False, {"gradient_accumulation_steps": 2}),
        (2, True, {"optim": "sgd"}),
    ],
)
def test_two_processes_under_zero_are_one(stage, full, settings, tmp_path):
    """In single precision, as DeepSpeed trains at most, of which Adam's first steps leave three digits."""
    alone, steps = train(1, tmp_path / "one", None, full, settings)
    (tmp_path / "two").mkdir()
    (together, of_steps), _ = run_in_two(train, tmp_path / "two", 2, tmp_path / "two" / "out", stage, full, settings)
    known = ["step", "index", "tokens"]
    assert alone[known].to_numpy().tolist() == together[known].to_numpy().tolist()
    for column in ("value", "value_other"):
        scale = alone[column].abs().max()
        found, expected = (table[column].to_numpy() / scale for table in (together, alone))
        assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    for column in ("clip_factor", "scored_share", "lr", "sum_validation"):
        assert of_steps[column].dropna().tolist() == pytest.approx(steps[column].dropna().tolist(), rel=1e-3)
    of_tokens = (table["token_values"].dropna() for table in (together, alone))
    for found, expected in zip(*of_tokens, strict=True):
        assert sum(found) == pytest.approx(sum(expected), rel=2e-3) and len(found) == len(expected) == 8


@needs_deepspeed
def test_in_half_precision_all_is_scored_and_a_resumed_run_goes_on(tmp_path):
    settings = {"bf16": True, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    out = tmp_path / "out"
    (whole, steps), _ = run_in_two(train, tmp_path / "whole", 2, out, 2, True, settings)
    assert steps["scored_share"].dropna().tolist() == pytest.approx([1.0], abs=1e-6)
    assert (steps["clip_factor"].dropna() < 0.5).all() and steps["step"].tolist() == [2, 3, 4, 5]
    checkpoint = str(out / "checkpoint-2")
    (resumed, _), _ = run_in_two(train, tmp_path / "resumed", 2, out, 2, True, settings, checkpoint)
    assert resumed["value"].tolist() == pytest.approx(whole["value"].tolist(), rel=1e-6)


class Engine:
    """
    A stand-in for DeepSpeed's, of one process: parameters have neither gradients nor moments of their own, which are
    in one flat tensor a group. It links the first group's moments alone, as DeepSpeed does after a step.
    """

    def __init__(self, groups, clip):
        self.clip, self.norm, self.gradients = clip, None, {}
        own = [group["params"] for group in groups]
        flat = [torch.cat([p.detach().flatten() for p in params]).requires_grad_() for params in own]
        adam = torch.optim.AdamW([{**group, "params": [part]} for group, part in zip(groups, flat, strict=True)])
        self.optimizer = SimpleNamespace(
            optimizer=adam, bit16_groups=own, single_partition_of_fp32_groups=flat, linked={}
        )
        for parameter in itertools.chain(*own):
            parameter.get_full_hp_grad = True  # by which such parameters are known

    def gradient_clipping(self):
        return self.clip

    def zero_optimization_stage(self):
        return 2

    def fp16_enabled(self):
        return False

    def zero_offload_optimizer(self):
        return None

    def get_global_grad_norm(self):
        return self.norm

    def backward(self, loss):
        """With the step at its end, as accelerate calls it."""
        loss.backward()
        for parameter in itertools.chain(*self.optimizer.bit16_groups):
            self.gradients[parameter], parameter.grad = parameter.grad, None
        self.step()

    def step(self):
        own, flat = self.optimizer.bit16_groups, self.optimizer.single_partition_of_fp32_groups
        for params, part in zip(own, flat, strict=True):
            part.grad = torch.cat([self.gradients.pop(p).flatten() for p in params])
        self.norm = torch.nn.utils.clip_grad_norm_(flat, self.clip)
        self.optimizer.optimizer.step()
        with torch.no_grad():
            for params, part in zip(own, flat, strict=True):
                for p, new in zip(params, part.split([p.numel() for p in params]), strict=True):
                    p.copy_(new.view_as(p))
        if not self.optimizer.linked:
            link(own[0], flat[0], self.optimizer.optimizer.state, self.optimizer.linked)


def link(parameters, flat, state, linked):
    """Views of a group's flat moments, which stay those of the present step."""
    for name in ("exp_avg", "exp_avg_sq"):
        parts = state[flat][name].split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            linked.setdefault(parameter, {})[name] = part.view_as(parameter)


def steps_of(zero, monkeypatch):
    """Values, and what is said of them, of four clipped steps of AdamW with two groups, whose rate falls."""
    model = tiny_llama().double().train()
    decayed = [[p for p in model.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    groups = [{"params": params, "lr": 1e-3, "weight_decay": w} for params, w in zip(decayed, (0.1, 0.0), strict=True)]
    adam = torch.optim.AdamW(groups)
    if zero:
        engine = Engine(groups, clip=0.5)
        adam = ZeroOptimizer(engine)
        module = SimpleNamespace(
            safe_get_full_grad=lambda p: engine.gradients[p],
            safe_get_full_optimizer_state=lambda p, name: engine.optimizer.linked[p][name],
            lazy_init_hp_params_optimizer_state=lambda *group: link(*group, engine.optimizer.linked),
        )
        monkeypatch.setitem(sys.modules, "deepspeed.utils", module)
    batches = [default_data_collator(list(token_rows(4, seed=seed))) for seed in range(5)]
    settings = EngineSettings(refresh_every=1, adam_warmup=1, token_values_for=[2])
    loss_of = lambda model, batch: model(**batch).loss  # noqa: E731
    shapley = ShapleyEngine(model, adam, {"validation": [(batches[4], 4)]}, loss_of, settings)
    found = []
    for step, batch in enumerate(batches[:4], start=1):
        shapley.begin_step(step)
        shapley.begin_micro_batch(range(4))
        shapley.attach()
        loss = loss_of(model, batch)
        if zero:
            engine.backward(loss)
            assert "step" not in vars(engine)
        else:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            shapley.finish_step()
            adam.step()
            adam.zero_grad()
        for group in (engine.optimizer.optimizer if zero else adam).param_groups:
            group["lr"] *= 0.5
        found.append(shapley.commit())
    return found


def test_moments_and_gradients_that_others_hold_are_put_together(monkeypatch):
    plain, divided = steps_of(False, monkeypatch), steps_of(True, monkeypatch)
    assert plain[0] is divided[0] is None and all(plain[1:])
    for mine, theirs in zip(divided[1:], plain[1:], strict=True):
        assert mine.values[:, 0].tolist() == pytest.approx(theirs.values[:, 0].tolist(), rel=1e-6)
        assert mine.record == pytest.approx(theirs.record, rel=1e-6) and mine.record["clip_factor"] < 0.9
        assert mine.token_values[2][0].tolist() == pytest.approx(theirs.token_values[2][0].tolist(), rel=1e-5)


def test_eight_bits_under_deepspeed_are_refused():
    parameter = torch.nn.Parameter(torch.zeros(3))
    engine = Engine([{"params": [parameter], "lr": 0.1}], 1.0)
    adam = engine.optimizer.optimizer
    adam.state[adam.param_groups[0]["params"][0]] = {"step": 1, "state2": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="Expected 32-bit moments under DeepSpeed, got those of AdamW"):
        ZeroOptimizer(engine).state.get(parameter)


@pytest.mark.parametrize(
    ("method", "answer", "reason"),
    [
        ("zero_optimization_stage", 3, "DeepSpeed but in ZeRO's stages 1 and 2.*stage.: 2"),
        ("zero_optimization_stage", 0, "DeepSpeed but in ZeRO's stages 1 and 2"),
        ("fp16_enabled", True, "fp16 under DeepSpeed.*bf16=True"),
        ("zero_offload_optimizer", {"device": "cpu"}, "an optimizer that DeepSpeed keeps elsewhere"),
    ],
)
def test_what_else_deepspeed_does_is_refused(method, answer, reason, monkeypatch):
    engine = Engine([{"params": [torch.nn.Parameter(torch.zeros(3))], "lr": 0.1}], 1.0)
    monkeypatch.setattr(engine, method, lambda: answer)
    with pytest.raises(ValueError, match=reason):
        ZeroOptimizer(engine)
