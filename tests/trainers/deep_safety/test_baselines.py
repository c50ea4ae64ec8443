import copy
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D
from trl import SFTConfig, SFTTrainer

from hf_iclr.trainers.deep_safety.baselines import ProximalCallback, project_safe_lora
from tests.trainers.tiny import QUICK, losses, tiny_llama, word_rows


LORA = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


class ProximalTrainer(SFTTrainer):
    """The proximal term where the paper has it, in the loss."""

    def compute_loss(self, model, *args, **kwargs):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not hasattr(self, "start"):
            self.start = [parameter.detach().clone() for parameter in trained]
        drift = sum(((new - old) ** 2).sum() for new, old in zip(trained, self.start, strict=True))
        return super().compute_loss(model, *args, **kwargs) + 3.0 / 2 * drift


def trained(trainer_class, tmp_path, word_tokenizer, callbacks=(), lora=False, **settings):
    plain = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    trainer = trainer_class(
        tiny_llama(),
        args=SFTConfig(str(tmp_path), **{**QUICK, **plain, "max_steps": 4, **settings}),
        train_dataset=word_rows(),
        processing_class=word_tokenizer,
        peft_config=LORA if lora else None,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("lora", [False, True])
def test_lisas_gradient_is_that_of_the_proximal_term(lora, tmp_path, word_tokenizer):
    ours = trained(SFTTrainer, tmp_path, word_tokenizer, [ProximalCallback(rho=3.0)], lora)
    theirs = trained(ProximalTrainer, tmp_path, word_tokenizer, lora=lora)
    free = trained(SFTTrainer, tmp_path, word_tokenizer, lora=lora)
    for (name, new), old in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-5, msg=name)
    distances = [
        sum((new - old).norm().item() for new, old in zip(a.model.parameters(), b.model.parameters(), strict=True))
        for a, b in ((ours, theirs), (ours, free))
    ]
    assert distances[1] > 100 * distances[0]
    assert losses(ours)[1] < losses(theirs)[1]  # the logged loss is that of the data


def test_the_term_is_added_once_per_optimizer_step(tmp_path, word_tokenizer):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = trained(SFTTrainer, tmp_path, word_tokenizer, [ProximalCallback(rho=3.0)])
    parts = trained(SFTTrainer, tmp_path, word_tokenizer, [ProximalCallback(rho=3.0)], **settings)
    for new, old in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(new, old, atol=1e-6, rtol=1e-5)


def test_lisa_refuses_what_has_no_start(tmp_path, word_tokenizer):
    for rho in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="`rho` to be a positive number"):
            ProximalCallback(rho)
    trainer = trained(SFTTrainer, tmp_path, word_tokenizer, [ProximalCallback()], save_strategy="steps", save_steps=2)
    with pytest.raises(ValueError, match="a run resumed at step 2"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def organism(model, lora, seed=1):
    """A model, the same aligned by a merged LoRA on its first layer alone, and an adapter trained on top of that."""
    base = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def fill(peft_model):
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        return peft_model

    first = copy.deepcopy(lora)
    first.layers_to_transform = [0]
    aligned = fill(get_peft_model(model, first)).merge_and_unload()
    return base, copy.deepcopy(aligned), fill(get_peft_model(aligned, copy.deepcopy(lora)))


def gpt2():
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))


CONV1D = LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")


@pytest.mark.parametrize(("model", "lora"), [(tiny_llama(), LORA), (gpt2(), CONV1D)])
def test_projection_is_that_of_the_full_matrices(model, lora):
    """C = V V^T / ||V||, C B A, and its cosine with B A, from the matrices themselves."""
    base, aligned, peft_model = organism(copy.deepcopy(model), lora)
    before = copy.deepcopy(peft_model)
    table = project_safe_lora(peft_model, aligned, base.state_dict(), threshold=1.0)
    assert len(table) == 2 * len(lora.target_modules)
    for name, similarity, projected in table.itertuples(index=False):
        old, new = (model.get_submodule(f"base_model.model.{name}") for model in (before, peft_model))
        up, down = old.lora_B["default"].weight, old.lora_A["default"].weight
        torch.testing.assert_close(new.lora_A["default"].weight, down, atol=0, rtol=0)
        difference = aligned.get_submodule(name).weight - base.get_submodule(name).weight
        if isinstance(aligned.get_submodule(name), Conv1D):
            difference = difference.T
        if not difference.any():  # the second layer has no alignment
            assert not projected and math.isnan(similarity)
            torch.testing.assert_close(new.lora_B["default"].weight, up, atol=0, rtol=0)
            continue
        assert projected
        projection = difference @ difference.T / difference.norm()
        torch.testing.assert_close(new.lora_B["default"].weight, projection @ up)
        cosine = torch.cosine_similarity((projection @ up @ down).flatten(), (up @ down).flatten(), dim=0)
        assert similarity == pytest.approx(cosine.item(), abs=1e-5)
    assert table["projected"].any() and not table["projected"].all()


def test_only_layers_below_the_threshold_or_the_lowest_are_projected_once():
    base, aligned, peft_model = organism(tiny_llama(), LORA)
    models = [copy.deepcopy(peft_model) for _ in range(3)]
    every = project_safe_lora(models[0], aligned, base, threshold=1.0)
    lowest = every["similarity"].idxmin()
    between = every["similarity"].sort_values().iloc[:2].mean()
    by_threshold = project_safe_lora(models[1], aligned, base, threshold=between)
    by_number = project_safe_lora(models[2], aligned, base, num_layers=1)
    for table in (by_threshold, by_number):
        assert table.index[table["projected"]].tolist() == [lowest]
        assert table["similarity"].equals(every["similarity"])
    state, full, original = models[2].state_dict(), models[0].state_dict(), peft_model.state_dict()
    chosen = f"base_model.model.{every['layer'][lowest]}.lora_B.default.weight"
    for name, value in models[1].state_dict().items():
        torch.testing.assert_close(value, state[name], atol=0, rtol=0)
        torch.testing.assert_close(value, (full if name == chosen else original)[name], atol=0, rtol=0)


def test_the_projected_adapter_is_saved_and_merged_as_a_lora(tmp_path):
    base, aligned, peft_model = organism(tiny_llama(), LORA)
    ids = torch.tensor([[1, 2, 3, 4]])
    before = peft_model(ids).logits
    project_safe_lora(peft_model, aligned, base, threshold=1.0)
    after = peft_model(ids).logits
    assert not torch.allclose(before, after)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(aligned), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, after)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, after, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_projected_is_refused():
    base, aligned, peft_model = organism(tiny_llama(), LORA)
    for settings in ({}, {"threshold": 0.5, "num_layers": 1}):
        with pytest.raises(ValueError, match="one of `threshold` and `num_layers`"):
            project_safe_lora(peft_model, aligned, base, **settings)
    with pytest.raises(ValueError, match="between -1 and 1 as `threshold`, got 2"):
        project_safe_lora(peft_model, aligned, base, threshold=2)
    with pytest.raises(ValueError, match="between 0 and the adapter's 4, got 5"):
        project_safe_lora(peft_model, aligned, base, num_layers=5)
    with pytest.raises(ValueError, match="they are equal there"):
        project_safe_lora(peft_model, aligned, aligned, threshold=0.5)
    with pytest.raises(ValueError, match="in the weights of `aligned`.*merge_and_unload"):
        project_safe_lora(peft_model, peft_model, base, threshold=0.5)
    with pytest.raises(ValueError, match="of shape .* in `base`"):
        project_safe_lora(peft_model, aligned, tiny_llama(hidden_size=32), threshold=0.5)
    with pytest.raises(TypeError, match="Expected a `PeftModel`"):
        project_safe_lora(aligned, aligned, base, threshold=0.5)
    dora = get_peft_model(copy.deepcopy(aligned), LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="DoRA"):
        project_safe_lora(dora, aligned, base, threshold=0.5)
    embedding = get_peft_model(copy.deepcopy(aligned), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="linear layers"):
        project_safe_lora(embedding, aligned, base, threshold=0.5)
