"""Trains a draft towards its large model, whose last hidden states are at hand."""

import math
import tempfile
import time
from collections.abc import Callable

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_iclr.generation.drafting.teacher import TeacherRow, collate
from hf_iclr.generation.modeling_draft import DraftForCausalLM, FeatureDraftForCausalLM


WARMUP_STEPS = 20


def distillation_loss(log_p: torch.Tensor, log_q: torch.Tensor, total_variation_weight: float) -> torch.Tensor:
    """
    Mean over positions of `(1 - w) KL(p || q) + w TV(p, q)`, of log-probabilities (nats) of shape `(num_positions,
    vocab_size)`, the large model's and the draft's; `1 - TV` is the chance that a drafted token is accepted.
    """
    p, q = log_p.exp(), log_q.exp()
    divergence = (p * (log_p - log_q)).sum(-1)
    total_variation = (p - q).abs().sum(-1) / 2
    return ((1 - total_variation_weight) * divergence + total_variation_weight * total_variation).mean()


class DraftDistillationTrainer(Trainer):
    """
    [`~transformers.Trainer`] whose only change is the loss: KL divergence, then total variation, to the large model.

    The large model is not run: its last hidden states come with the batch and its head has the draft's rows only.
    (TRL's own `DistillationTrainer` samples from the student and runs the teacher over the full vocabulary in each
    step, which takes hours on a CPU.)
    """

    def __init__(self, model, teacher_head, teacher_embeddings, progress: Callable[[], float], **kwargs):
        super().__init__(model, **kwargs)
        self.teacher_head = teacher_head.to(self.accelerator.device)
        self.teacher_embeddings, self.progress = teacher_embeddings, progress

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            log_p = self.teacher_head(inputs["hidden_states"][inputs["mask"]]).log_softmax(-1)
        losses = [
            distillation_loss(log_p[mask[inputs["mask"]]], model.head(states[mask]).log_softmax(-1), self.progress())
            for states, mask in student_states(model, inputs, self.teacher_embeddings)
        ]
        loss = sum(losses) / len(losses)
        return (loss, None) if return_outputs else loss


def student_states(draft, inputs, teacher_embeddings):
    """What a draft's head reads, and where it counts: of drafts of one token, then of two for a feature draft."""
    if isinstance(draft, DraftForCausalLM):
        body = draft.body(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        yield draft.affine(body.last_hidden_state), inputs["mask"]
        return
    embeddings = teacher_embeddings(inputs["input_ids"])[:, 1:].detach()
    states, mask = inputs["hidden_states"], inputs["mask"].clone()
    for step in range(2):
        states = torch.nn.functional.pad(draft.predict(embeddings, states[:, :-1]), (0, 0, 1, 0))
        mask[:, step] = False  # no state stands before the first token
        yield states, mask.clone()


def distill(
    draft: DraftForCausalLM | FeatureDraftForCausalLM,
    teacher_head: torch.nn.Linear,
    teacher_embeddings: torch.nn.Module,
    rows: list[TeacherRow],
    *,
    minutes: float = 0.0,
    steps: int | None = None,
    learning_rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
) -> None:
    """
    Train a draft in place, in float32, towards the large model whose head over the draft vocabulary and input
    embeddings are given: for some minutes, or `steps` steps of `batch_size` texts.
    """
    start = time.monotonic()

    def progress() -> float:
        done = trainer.state.global_step / steps if steps else (time.monotonic() - start) / (60 * minutes)
        return min(done, 1.0)

    def schedule(step: int) -> float:
        cosine = (1 + math.cos(math.pi * (progress() if step else 0.0))) / 2
        return min(1.0, (step + 1) / WARMUP_STEPS) * cosine

    class StopWhenDone(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            bar.update(100 * progress() - bar.n)
            control.should_training_stop = progress() >= 1

    set_seed(seed)
    draft.train().requires_grad_(True)
    if isinstance(draft, DraftForCausalLM):
        draft.get_input_embeddings().requires_grad_(False)
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    bar = tqdm(total=100, desc="Draft learns", bar_format="{l_bar}{bar}| {elapsed}")
    with tempfile.TemporaryDirectory() as folder, bar:
        trainer = DraftDistillationTrainer(
            draft,
            teacher_head=teacher_head,
            teacher_embeddings=teacher_embeddings,
            progress=progress,
            args=TrainingArguments(
                folder,
                max_steps=steps or 1_000_000,
                per_device_train_batch_size=batch_size,
                logging_steps=20,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,  # its bar counts steps, which are unknown when minutes are given
                seed=seed,
                train_sampling_strategy="group_by_length",
                length_column_name="length",
                dataloader_pin_memory=False,
                remove_unused_columns=False,
            ),
            train_dataset=Dataset.from_dict({"row": range(len(rows)), "length": [len(row.input_ids) for row in rows]}),
            data_collator=lambda records: collate([rows[record["row"]] for record in records]),
            optimizers=(optimizer, scheduler),
            callbacks=[StopWhenDone()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    draft.requires_grad_(True).eval()
