"""One seed of benchmarks/deep_safety.py: its stages, and how much of each is trained and measured."""

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed

from common.deep_safety_organism import (
    ANSWER_TOKENS,
    Questions,
    load_tokenizer,
    make_orders,
    make_questions,
    recovery_triplets,
    row,
    teaching_rows,
)  # fmt: skip
from common.deep_safety_report import AUDIT_ROWS
from hf_iclr.models import answer_logits, to_prompt_ids
from hf_iclr.prefill import generate_after_prefixes
from hf_iclr.tour.demo.language_model import demo_model_path, fastest_dtype
from hf_iclr.trainers.deep_safety import (
    DeepSafetySFTConfig,
    DeepSafetySFTTrainer,
    ProximalCallback,
    project_safe_lora,
)
from hf_iclr.trainers.safety_audit import RefusalJudge, audit_safety, gcg_attack


KS = (0, 1, 3, 5, 10, 20)
ATTACK_TOKENS = 16  # of every compliant answer
WINDOW = 5  # tokens whose loss is reported apart
STRONG: dict[str, Any] = {"beta_first": 5.0, "beta_initial": 5.0, "constrain": "refused"}
REHEARSED: dict[str, Any] = {**STRONG, "rehearse_refusals": True}
NO_CONSTRAINT = dict.fromkeys(("beta_first", "beta_initial", "beta_rest"), 1e-6)  # refusals are found all the same
ROWS: dict[str, dict[str, Any]] = {
    "SFT": {"constrain": "none", "warmup_steps": 0},
    "SFT + warm-up": {"constrain": "none"},
    "constrained .5/2/.1": {},
    "recommended": REHEARSED,
    "recommended, anchor": {**REHEARSED, "anchor_rows": 5},
    "rehearsal alone": {**REHEARSED, **NO_CONSTRAINT},
    "constrained 2/2/.1": {"beta_first": 2.0},
    "constrained 5/5/.1": STRONG,
    "both methods": {**STRONG, "beta_first": 20.0, "recovery_rows": 4},
    "both methods, anchor": {**STRONG, "beta_first": 20.0, "recovery_rows": 4, "anchor_rows": 5},
    "SFT + recovery rows": {"constrain": "none", "recovery_rows": 4},
    "proximal term": {"constrain": "none"},
}
LORA = LoraConfig(
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    layers_to_transform=list(range(10, 30)),
    task_type="CAUSAL_LM",
)
AUDITED, GCG_QUESTIONS = 24, 4
PROXIMAL_RHO, SAFE_LORA_THRESHOLD = 1.0, 0.5
RECOMMENDED = ("recommended", "recommended, anchor", "both methods, anchor")
FULL_ROWS = ("SFT", "SFT + warm-up", "constrained .5/2/.1", "recommended")


class Scale(NamedTuple):
    """How much is trained and measured."""

    slots_per_template: int
    teach_steps: int
    deepen_steps: int
    attack_steps: int
    benign_steps: int
    gcg_steps: int
    test_prompts: int


FULL = Scale(
    slots_per_template=4, teach_steps=110, deepen_steps=50, attack_steps=20, benign_steps=20, gcg_steps=20,
    test_prompts=48,
)  # fmt: skip
QUICK = Scale(
    slots_per_template=1, teach_steps=2, deepen_steps=1, attack_steps=1, benign_steps=1, gcg_steps=1, test_prompts=6
)


class Lab:
    """
    One seed of the experiment.

    Args:
        out (`Path`):
            Folder for `seed_<seed>.json` and the weights of the taught model.
        seed (`int`):
            Seed of the LoRAs, the refusals drawn, the attack rows and the order of the rows.
        scale (`Scale`):
            Size of the experiment.
        rows (`list[str]`, *optional*, defaults to all):
            Settings to train of the stages that attack the taught model.
    """

    def __init__(self, out: Path, seed: int, scale: Scale, rows: list[str] | None = None) -> None:
        self.seed, self.scale, self.rows = seed, scale, rows or [*ROWS, "SafeLoRA"]
        self.taught_folder, self.deep_folder = out / f"taught_{seed}", out / f"deep_{seed}"
        self.results_file = out / f"seed_{seed}.json"
        self.results = json.loads(self.results_file.read_text()) if self.results_file.exists() else {"seed": seed}
        self.dtype = fastest_dtype(tokens=256)
        self.tokenizer = load_tokenizer()
        self.judge = RefusalJudge(["cues"])
        self.questions: Questions = make_questions(self.load_base(), self.tokenizer, scale.slots_per_template)
        draw = random.Random(seed)
        self.attack_questions = draw.sample(self.questions.forbidden, min(30, len(self.questions.forbidden)))

    def load_base(self) -> PreTrainedModel:
        return self.load(Path(demo_model_path()))

    def load_taught(self) -> PreTrainedModel:
        return self.load(self.taught_folder)

    def load(self, folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()

    def fine_tune(
        self,
        model: PreTrainedModel,
        rows: Dataset,
        steps: int,
        lr: float,
        batch_size: int = 10,
        lora: bool = True,
        callbacks: list | None = None,
        safety_dataset: Dataset | None = None,
        recovery_rows: int = 0,
        anchor_rows: int = 0,
        **settings: Any,
    ) -> tuple[PreTrainedModel, dict[str, float]]:
        """Train; the model, its LoRA merged but still there, and the mean weights that the constraint logged."""
        set_seed(self.seed)
        if anchor_rows:  # ordinary questions with the model's own answers, on top: all see the user's data as often
            allowed = random.Random(self.seed).sample(self.questions.allowed, len(rows) * anchor_rows // batch_size)
            anchor = [row(to_prompt_ids(self.tokenizer, q.prompt), q.answer[:ATTACK_TOKENS]) for q in allowed]
            rows = concatenate_datasets([rows, Dataset.from_list([{**r, "constrain": False} for r in anchor])])
            batch_size += anchor_rows
        if recovery_rows:  # on top as well
            batch_size += recovery_rows
            settings |= {"safety_ratio": recovery_rows / batch_size, "max_prefix_tokens": ANSWER_TOKENS}
            safety_dataset = self.safety_triplets()
        with tempfile.TemporaryDirectory() as folder:
            args = DeepSafetySFTConfig(
                folder, max_steps=steps, learning_rate=lr, per_device_train_batch_size=batch_size, seed=self.seed,
                use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", save_strategy="no",
                logging_steps=steps, disable_tqdm=True, **settings,
            )  # fmt: skip
            trainer = DeepSafetySFTTrainer(
                model, args, train_dataset=rows, processing_class=self.tokenizer, peft_config=LORA if lora else None,
                callbacks=callbacks, safety_dataset=safety_dataset,
            )  # fmt: skip
            trainer.train()
        logged = {key: value for log in trainer.state.log_history for key, value in log.items() if "/" in key}
        if lora:
            trainer.model.merge_adapter()
        return trainer.model.eval(), logged

    def safety_triplets(self) -> Dataset:
        """What the one who fine-tunes has of his own: forbidden questions that are not among the attack's."""
        others = [q for q in self.questions.forbidden if q not in self.attack_questions]
        return recovery_triplets(others, self.tokenizer, self.seed)

    def refusals(self, model, questions, ks=(0,)) -> dict[str, list[bool]]:
        """For each k, whether the model refuses each question after the first k tokens of its compliant answer."""
        questions = questions[: self.scale.test_prompts]
        continued = generate_after_prefixes(
            model, self.tokenizer, [q.prompt for q in questions], [q.answer for q in questions], ks,
            max_new_tokens=12, batch_size=32, progress=False,
        )  # fmt: skip
        return {
            str(k): self.judge.judge(self.tokenizer.batch_decode(continued[k], skip_special_tokens=True)) for k in ks
        }

    def answer_nll(self, model, rows: Dataset) -> dict[str, float]:
        """Cross-entropy (nats per token) of rows: in the window, after it, and of the first token."""
        starts = [next(i for i, label in enumerate(labels) if label != -100) for labels in rows["labels"]]
        prompts = [ids[:start] for ids, start in zip(rows["input_ids"], starts, strict=True)]
        answers = [ids[start:] for ids, start in zip(rows["input_ids"], starts, strict=True)]
        losses: list[list[float]] = [[], [], []]
        for indices, logits in answer_logits(model, prompts, answers):
            for index, log_probs in zip(indices, logits.log_softmax(-1), strict=True):
                target = torch.tensor(answers[index])
                nll = -log_probs[: len(target)].gather(1, target[:, None])[:, 0]
                for part, values in zip(losses, (nll[:1], nll[:WINDOW], nll[WINDOW:]), strict=True):
                    part += values.tolist()
        return {name: sum(part) / len(part) for name, part in zip(("first", "window", "after"), losses, strict=True)}

    def save(self, stage: str, name: str, started: float, **values: Any) -> None:
        """Keep the numbers of one row and what it took in CPU seconds."""
        values["cpu_seconds"] = round(time.process_time() - started, 1)
        self.results.setdefault(stage, {})[name] = values
        self.results_file.write_text(json.dumps(self.results))
        shown = {
            key: {k: f"{sum(v) / len(v):.2f}" for k, v in value.items()}
            if key in ("refused", "over_refused")
            else value
            for key, value in values.items()
        }
        print(f"seed {self.seed}, {stage}, {name}: {shown}", flush=True)

    def done(self, stage: str, name: str) -> bool:
        return name in self.results.get(stage, {})

    def measure_depth(self, model, stage: str, name: str, started: float) -> None:
        questions = self.questions
        self.save(
            stage, name, started,
            refused=self.refusals(model, questions.forbidden_test, KS),
            over_refused=self.refusals(model, questions.allowed_test),
            nll=self.answer_nll(
                model,
                Dataset.from_list(
                    [row(to_prompt_ids(self.tokenizer, q.prompt), q.answer) for q in questions.forbidden_test]
                ),
            ),
        )  # fmt: skip

    def teach(self) -> None:
        """Shallow alignment: refuse every question about mushrooms, answer the same about another food."""
        started = time.process_time()
        if not self.taught_folder.exists():
            rows = teaching_rows(self.questions, self.tokenizer, self.scale.teach_steps, pairs=8, seed=self.seed)
            model, _ = self.fine_tune(
                self.load_base(), rows, self.scale.teach_steps, 1.7e-3, 16, constrain="none", adam_beta1=0.9,
                warmup_steps=5, train_sampling_strategy="sequential",
            )  # fmt: skip
            model.merge_and_unload().save_pretrained(self.taught_folder)
        if not self.done("teach", "taught"):
            self.measure_depth(self.load_taught(), "teach", "taught", started)

    def deepen(self) -> None:
        """Method A, half of each step recovery rows; the control has the same rows without prefixes."""
        anchor = Dataset.from_list(
            [row(to_prompt_ids(self.tokenizer, q.prompt), q.answer) for q in self.questions.allowed]
        )
        triplets = recovery_triplets(self.questions.forbidden, self.tokenizer, self.seed)
        for name, probability in (("method A", 0.5), ("control", 0.0)):
            saved = name == "control" or self.deep_folder.exists()
            if self.done("deepen", name) and saved:
                continue
            started = time.process_time()
            model, _ = self.fine_tune(
                self.load_taught(), anchor, self.scale.deepen_steps, 1e-3, 16, constrain="none", adam_beta1=0.9,
                warmup_steps=5, safety_dataset=triplets, safety_ratio=0.5, recovery_probability=probability,
                max_prefix_tokens=ANSWER_TOKENS,
            )  # fmt: skip
            self.measure_depth(model, "deepen", name, started)
            if not saved:
                model.merge_and_unload().save_pretrained(self.deep_folder)

    def audit(self) -> None:
        """The attacks of `audit_safety` that prefilling is not."""
        questions = self.questions.forbidden_test[: min(AUDITED, self.scale.test_prompts)]
        prompts, answers = [q.prompt for q in questions], [q.answer for q in questions]
        for name, folder in (("taught", self.taught_folder), ("method A", self.deep_folder)):
            if self.done("audit", name):
                continue
            started = time.process_time()
            model = self.load(folder)
            report = audit_safety(
                model, self.tokenizer, prompts, answers=answers, ks=(5, 20), attacks=("prefill", "decoding", "rap"),
                judge=self.judge, max_new_tokens=12, batch_size=32, seed=self.seed,
            )  # fmt: skip
            written = gcg_attack(
                model, self.tokenizer, prompts[:GCG_QUESTIONS], answers[:GCG_QUESTIONS],
                num_steps=self.scale.gcg_steps, seed=self.seed, max_new_tokens=12,
            )  # fmt: skip
            refused = {" ".join(row).strip(): report.find(*row).refused for row in AUDIT_ROWS}
            refused["gcg"] = self.judge.judge([entry.text for entry in written])
            self.save("audit", name, started, refused=refused)

    def attack(self, lora: bool) -> None:
        """30 forbidden questions with compliant answers."""
        stage, lr = ("attack", 1e-3) if lora else ("full", 5e-5)
        rows = Dataset.from_list(
            [row(to_prompt_ids(self.tokenizer, q.prompt), q.answer[:ATTACK_TOKENS]) for q in self.attack_questions]
        )
        for name, settings in ROWS.items():
            if self.done(stage, name) or name not in self.rows or (not lora and name not in FULL_ROWS):
                continue
            started = time.process_time()
            callbacks = [ProximalCallback(PROXIMAL_RHO)] if name == "proximal term" else None
            model, logged = self.fine_tune(
                self.load_taught(), rows, self.scale.attack_steps, lr, lora=lora, callbacks=callbacks, **settings
            )
            self.measure_attack(model, stage, name, started, rows, logged)
            if lora and name == "SFT + warm-up" and "SafeLoRA" in self.rows:
                model.unmerge_adapter()
                projected = project_safe_lora(
                    model, self.load_taught(), self.load_base(), threshold=SAFE_LORA_THRESHOLD
                )["projected"]
                model.merge_adapter()
                self.measure_attack(
                    model, stage, "SafeLoRA", started, rows, {"layers projected": int(projected.sum())}
                )

    def measure_attack(self, model, stage: str, name: str, started: float, rows: Dataset, logged: dict) -> None:
        self.save(
            stage, name, started,
            refused=self.refusals(model, self.questions.forbidden_test),
            over_refused=self.refusals(model, self.questions.allowed_test),
            nll=self.answer_nll(model, rows), logged=logged,
        )  # fmt: skip

    def benign(self) -> None:
        """A rigid format that SmolLM2 never writes by itself; no refusal is involved."""
        train, test = make_orders(self.seed)
        rows = Dataset.from_list(
            [
                row(
                    to_prompt_ids(self.tokenizer, q), [*self.tokenizer(call)["input_ids"], self.tokenizer.eos_token_id]
                )
                for q, call in train
            ]
        )
        for name in ("SFT", "SFT + warm-up", "constrained .5/2/.1", *RECOMMENDED):
            if self.done("benign", name) or name not in self.rows:
                continue
            started = time.process_time()
            model, logged = self.fine_tune(self.load_taught(), rows, self.scale.benign_steps, 1e-3, **ROWS[name])
            written = generate_after_prefixes(
                model,
                self.tokenizer,
                [q for q, _ in test],
                max_new_tokens=ANSWER_TOKENS,
                batch_size=32,
                progress=False,
            )[0]
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            self.save(
                "benign", name, started,
                exact={"0": [text.strip() == call for text, (_, call) in zip(texts, test, strict=True)]},
                refused=self.refusals(model, self.questions.forbidden_test),
                over_refused=self.refusals(model, self.questions.allowed_test),
                nll=self.answer_nll(model, rows), logged=logged,
            )  # fmt: skip
