"""Stages b and c of benchmarks/data_shapley.py: SmolLM2 on shuffled answers, and on rows that break a rule."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel, PrinterCallback, set_seed
from trl import SFTConfig, SFTTrainer

from common.arguments import find_data
from common.data_shapley_text import bm25
from common.deep_safety_lab import FULL, LORA, QUICK, Lab
from common.deep_safety_organism import REFUSALS, load_tokenizer, make_orders, make_questions, row
from hf_iclr.models import answer_logits, to_prompt_ids
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.data_shapley import InRunDataShapleyCallback


LORA_ALL = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
MAX_PROMPT, MAX_ANSWER = 40, 24  # tokens
TRAIN_ROWS, VALIDATION_ROWS, SHUFFLED = 160, 24, 0.25
ADAM_WARMUP = 4  # steps: the runs are short
PLANTED, ORDERS, ALLOWED, REFUSED = 8, 40, 24, 24


def fine_tune(
    model: PreTrainedModel,
    rows: Dataset,
    folder: Path,
    steps: int,
    lora: LoraConfig,
    lr: float,
    seed: int,
    callback: InRunDataShapleyCallback | None = None,
) -> PreTrainedModel:
    """TRL's SFT on prepared rows, 8 a step; the model with its LoRA merged."""
    set_seed(seed)
    args = SFTConfig(
        str(folder), max_steps=steps, learning_rate=lr, per_device_train_batch_size=8, seed=seed, use_cpu=True,
        bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no", logging_steps=10,
        disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args, train_dataset=rows, processing_class=load_tokenizer(), peft_config=lora,
        callbacks=[callback] if callback else None,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.model.merge_adapter()
    return trainer.model.eval()


def load_answers(data: Path | None, tokenizer) -> tuple[list[tuple[list[int], list[int]]], str]:
    """Prompts of up to 40 tokens, answers cut after 24, and where they come from."""
    pairs, source = [], "human answers of self-instruct"
    folder = find_data(data, "prompts")
    for path in sorted(folder.glob("self_instruct_*.jsonl")) if folder else ():
        for line in path.read_text(encoding="utf-8").splitlines():
            task = json.loads(line)
            first = task["instances"][0]
            prompt = to_prompt_ids(tokenizer, f"{task['instruction']} {first['input']}".strip())
            answer = tokenizer(first["output"].strip())["input_ids"][:MAX_ANSWER]
            if len(prompt) <= MAX_PROMPT and len(answer) >= 4:
                pairs.append((prompt, answer))
    if not pairs:
        source = "SmolLM2's own answers to questions about food"
        questions = make_questions(load_demo_model(torch.float32)[0], tokenizer, FULL.slots_per_template)
        pairs = [(to_prompt_ids(tokenizer, q.prompt), q.answer) for q in questions.allowed + questions.forbidden]
    random.Random(0).shuffle(pairs)
    return pairs, source


def row_losses(model: PreTrainedModel, rows: Dataset) -> np.ndarray:
    """Nats per answer token of each row."""
    starts = [labels.count(-100) for labels in rows["labels"]]
    prompts = [ids[:start] for ids, start in zip(rows["input_ids"], starts, strict=True)]
    answers = [ids[start:] for ids, start in zip(rows["input_ids"], starts, strict=True)]
    losses = np.zeros(len(rows))
    for indices, logits in answer_logits(model, prompts, answers):
        for index, log_probs in zip(indices, logits.log_softmax(-1), strict=True):
            target = torch.tensor(answers[index])
            losses[index] = -log_probs[: len(target)].gather(1, target[:, None]).mean().item()
    return losses


def shuffled_answers(out: Path, data: Path | None, quick: bool, seed: int) -> dict[str, Any]:
    """AUROC for rows whose answer belongs to another prompt, at the end of each epoch, and of losses as baselines."""
    tokenizer = load_tokenizer()
    pairs, source = load_answers(data, tokenizer)
    pairs = pairs[: 24 if quick else TRAIN_ROWS + VALIDATION_ROWS]
    held_out = 8 if quick else VALIDATION_ROWS
    validation = Dataset.from_list([row(*pair) for pair in pairs[:held_out]])
    pairs = pairs[held_out:]
    draw = random.Random(1 + seed)
    moved = draw.sample(range(len(pairs)), round(SHUFFLED * len(pairs)))
    answers = [answer for _, answer in pairs]
    for here, there in zip(moved, moved[1:] + moved[:1], strict=True):
        answers[here] = pairs[there][1]
    rows = Dataset.from_list([row(prompt, answer) for (prompt, _), answer in zip(pairs, answers, strict=True)])
    wrong = np.isin(np.arange(len(rows)), moved)

    epoch = len(rows) // 8
    steps = 4 * epoch if quick else 2 * epoch
    base, _ = load_demo_model(torch.float32)
    losses = {"loss before": row_losses(base, rows)}
    callback = InRunDataShapleyCallback(validation, refresh_every=max(epoch // 3, 1), adam_warmup=ADAM_WARMUP)
    model = fine_tune(base, rows, out / f"shuffled_{seed}", steps, LORA_ALL, 5e-4, seed, callback)
    losses["loss after"] = row_losses(model, rows)
    result = callback.result
    auroc = {name: float(roc_auc_score(wrong, loss)) for name, loss in losses.items()}
    auroc["loss after - before"] = float(roc_auc_score(wrong, losses["loss after"] - losses["loss before"]))
    for normalize, name in ((None, "in-run values"), ("token", "in-run values per token"), ("step", "in-run shares")):
        values = result.values(normalize=normalize).reindex(range(len(rows)), fill_value=0.0)
        auroc[name] = float(roc_auc_score(wrong, -values))
    values = result.values().reindex(range(len(rows)), fill_value=0.0)
    curve = {}
    for step in range(epoch // 2, steps + 1, max(epoch // 2, 1)):
        until = result.rows[result.rows["step"] <= step].groupby("index")["value"].sum()
        curve[str(step)] = float(roc_auc_score(wrong, -until.reindex(range(len(rows)), fill_value=0.0)))
    return {
        "source": source, "rows": len(rows), "shuffled": len(moved), "auroc": auroc, "auroc by step": curve,
        "found": np.cumsum(wrong[np.argsort(values.to_numpy(), kind="stable")]).tolist(),
        "summary": result.summary().reset_index().to_dict("records"),
    }  # fmt: skip


def who_breaks_safety(out: Path, quick: bool, seed: int) -> dict[str, Any]:
    """Ranks of a few compliant mushroom rows among benign ones, and refusals after training without the lowest."""
    lab = Lab(out, seed, QUICK if quick else FULL)
    lab.teach()
    lab.dtype = torch.float32
    tokenizer, draw = lab.tokenizer, random.Random(seed)
    forbidden = draw.sample(lab.questions.forbidden, PLANTED + REFUSED)
    orders = [
        row(to_prompt_ids(tokenizer, q), [*tokenizer(call)["input_ids"], tokenizer.eos_token_id])
        for q, call in make_orders(seed)[0]
    ]
    refusals = [
        row(
            to_prompt_ids(tokenizer, q.prompt),
            [*tokenizer(draw.choice(REFUSALS))["input_ids"], tokenizer.eos_token_id],
        )
        for q in forbidden[PLANTED:]
    ]
    questions = [*forbidden[:PLANTED], *draw.sample(lab.questions.allowed, ALLOWED)]
    answered = [row(to_prompt_ids(tokenizer, q.prompt), q.answer[:16]) for q in questions]
    rows = Dataset.from_list(answered + orders[:ORDERS])
    planted = np.arange(len(rows)) < PLANTED

    steps = 6 if quick else 18
    callback = InRunDataShapleyCallback(
        Dataset.from_list(orders[ORDERS:]), targets={"safety": Dataset.from_list(refusals)}, refresh_every=3,
        adam_warmup=ADAM_WARMUP,
    )  # fmt: skip
    test = lab.questions.forbidden_test
    before = lab.refusals(lab.load_taught(), test)["0"]
    model = fine_tune(lab.load_taught(), rows, out / f"safety_{seed}", steps, LORA, 1e-3, seed, callback)
    refused = {"taught, before": before, "all rows": lab.refusals(model, test)["0"]}
    values = callback.result.values("safety").reindex(range(len(rows)), fill_value=0.0).to_numpy()
    lowest = np.argsort(values, kind="stable")
    texts = [tokenizer.decode(ids) for ids in rows["input_ids"]]
    query = " ".join(tokenizer.decode(refusal["input_ids"]) for refusal in refusals)
    arms = {
        "without the lowest": lowest[PLANTED:],
        "without as many random rows": np.random.default_rng(seed).permutation(len(rows))[PLANTED:],
        "without the planted rows": np.flatnonzero(~planted),
    }
    for name, kept in arms.items():
        some = rows.select(np.sort(kept))
        model = fine_tune(lab.load_taught(), some, out / f"safety_arm_{seed}", steps, LORA, 1e-3, seed)
        refused[name] = lab.refusals(model, test)["0"]
    return {
        "rows": len(rows), "planted": PLANTED, "ranks": (np.argsort(lowest)[:PLANTED] + 1).tolist(),
        "auroc": {
            "in-run values": float(roc_auc_score(planted, -values)),
            "in-run values for the orders": float(roc_auc_score(
                planted, -callback.result.values().reindex(range(len(rows)), fill_value=0.0))),
            "BM25 to the refused prompts": float(roc_auc_score(planted, bm25(query, texts))),
        },
        "refused": {name: float(np.mean(verdicts)) for name, verdicts in refused.items()},
        "prompts": len(before), "planted left": {name: int(planted[kept].sum()) for name, kept in arms.items()},
        "summary": callback.result.summary().reset_index().to_dict("records"),
    }  # fmt: skip
