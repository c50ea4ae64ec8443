"""Stages d and e of benchmarks/data_shapley.py: two sources in pretraining, and rows that a text paraphrases."""

import json
import math
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from common.arguments import find_data
from hf_iclr.tour.demo.draft import docstrings
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.data_shapley import InRunDataShapleyCallback


BLOCK, HELD_OUT, VOCABULARY = 64, 32, 1024  # tokens, blocks, tokens
BRANCH_STEPS = 10
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
CORPUS_ROWS, MAX_TOKENS = 400, 40
KINDS = ("copy", "light paraphrase", "heavy paraphrase", "same topic")
# Validation text, its light and its heavy paraphrase, and another text about the same.
TEXTS = (
    (
        "The old lighthouse on the northern cape was built in 1868 and guided fishing boats through the fog.",
        "Built in 1868, the old lighthouse on the northern cape led fishing boats through the fog.",
        "Since Victorian days trawlers have found their way in thick mist by a tower on the arctic headland.",
        "Visitors may climb the stairs of a lighthouse on the southern shore, where a museum shows lamps.",
    ),
    (
        "Bees tell each other where flowers are by a dance whose angle shows the direction to fly.",
        "By a dance, bees tell one another where the flowers are: its angle shows which direction to fly.",
        "An insect back in the hive waggles for its sisters, and how it points stands for the way to the blossoms.",
        "A hive of bees needs at least twenty kilos of honey to live through a cold winter in the mountains.",
    ),
    (
        "When the bakery on Mill Street closed, its owner gave the sourdough starter to three of her neighbours.",
        "When the Mill Street bakery shut, the owner handed her sourdough starter to three neighbours.",
        "After her shop had made its last loaf she shared the living culture for bread among people next door.",
        "The bakery at the station sells rye bread, rolls and plum cake from six in the morning.",
    ),
    (
        "The river froze so hard in January that the children of both villages skated to school for three weeks.",
        "In January the river was frozen so hard that children from both villages skated to school for weeks.",
        "That winter's ice was thick enough for pupils from either bank to reach their lessons on blades.",
        "The river floods the meadows of both villages each spring, and storks come to look for frogs.",
    ),
    (
        "A violin maker in the valley cuts spruce only in the week before the new moon, as his grandfather did.",
        "As his grandfather did, a violin maker in the valley cuts spruce only in the week before new moon.",
        "One luthier keeps a family custom and fells conifers for his instruments when nights are darkest.",
        "The violin has four strings tuned in fifths, and its bow is strung with hair from the tails of horses.",
    ),
    (
        "Because the desert train was nine hours late, the passengers cooked rice for everyone on the platform.",
        "As the desert train was nine hours late, passengers cooked rice for everybody on the platform.",
        "With their carriages held up among the dunes till night, travellers fed the whole stop from a pot of grain.",
        "The train through the desert has a dining car, and its windows are cleaned of sand every evening.",
    ),
)


def load_sources(data: Path | None) -> tuple[dict[str, str], str]:
    """Prose and Python code as long texts, and where the prose comes from."""
    articles = find_data(data, "editing/wikitext2_valid_detok.jsonl")
    if articles is not None:
        prose = [json.loads(line)["text"] for line in articles.read_text(encoding="utf-8").splitlines()]
        random.Random(0).shuffle(prose)
        source = "wikitext-2"
    else:
        prose, source = docstrings(), "docstrings"
    files = sorted(Path(json.__file__).parent.parent.glob("*.py"))
    code = [path.read_text(encoding="utf-8", errors="ignore") for path in files]
    random.Random(0).shuffle(code)
    return {"prose": "\n".join(prose)[:700_000], "code": "\n".join(code)[:700_000]}, source


def two_sources(out: Path, data: Path | None, quick: bool) -> dict[str, Any]:
    """
    A small Llama from scratch on prose and code in equal parts: what each was worth for held-out prose, in tenths of
    the run. As a check, at some steps the run is branched: ten steps on prose alone and on code alone, from the same
    weights and optimizer state.
    """
    texts, source = load_sources(data)
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    backend.train_from_iterator(
        texts.values(), BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=ByteLevel.alphabet(), show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!")
    steps = 30 if quick else 400
    blocks = {name: torch.tensor(backend.encode(text).ids) for name, text in texts.items()}
    blocks = {name: ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK) for name, ids in blocks.items()}
    count = min(8 * steps + HELD_OUT, *(len(ids) for ids in blocks.values())) - HELD_OUT
    rows = [
        {"input_ids": ids, "labels": ids, "source": name}
        for name in blocks
        for ids in blocks[name][HELD_OUT:][:count].tolist()
    ]
    random.Random(0).shuffle(rows)
    train_rows = Dataset.from_list(rows)
    held_out = {
        name: Dataset.from_list([{"input_ids": row, "labels": row} for row in ids[:HELD_OUT].tolist()])
        for name, ids in blocks.items()
    }
    callback = InRunDataShapleyCallback(
        held_out["prose"], targets={"code": held_out["code"]}, refresh_every=10, exact=True, adam_warmup=5
    )
    branches = Branches(train_rows, held_out["prose"], every=steps // 8)
    set_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=BLOCK, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    args = TrainingArguments(
        str(out / "sources"), max_steps=steps, learning_rate=2e-3, per_device_train_batch_size=16, use_cpu=True,
        per_device_eval_batch_size=16, warmup_steps=steps // 20, lr_scheduler_type="constant_with_warmup", seed=0,
        report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=train_rows, data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[callback, branches],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    result = callback.result
    found: dict[str, Any] = {"source": source, "rows": len(train_rows), "steps": steps, "branches": branches.found}
    for target in result.targets:
        sources = result.by_source("source", train_rows, target=target)
        sources.plot(out / f"sources_{target}.png")
        found[f"for {'prose' if target == 'validation' else target}"] = {
            "totals": sources.totals["value"].to_dict(),
            "timeline": tenths(sources.timeline.fillna(0.0)),
        }
    found["summary"] = result.summary().reset_index().to_dict("records")
    return found


def tenths(timeline: pd.DataFrame) -> dict[str, list[float]]:
    """Mean value of a step (nats) of each source in each tenth of the steps."""
    parts = np.array_split(np.arange(len(timeline)), 10)
    return {name: [float(timeline[name].iloc[part].mean()) for part in parts] for name in timeline}


class Branches(TrainerCallback):
    """Every so often tries some steps on each source alone, on a copy, and keeps the change of the target's loss."""

    def __init__(self, rows: Dataset, target: Dataset, every: int) -> None:
        sources = np.array(rows["source"])
        ids = torch.tensor(rows["input_ids"])
        self.rows = {name: ids[torch.tensor(np.flatnonzero(sources == name))] for name in np.unique(sources)}
        self.target, self.every, self.found = torch.tensor(target["input_ids"]), every, []

    def on_step_end(self, args, state, control, model, optimizer, **kwargs) -> None:
        if state.global_step % self.every:
            return
        found: dict[str, float] = {"step": state.global_step}
        plain = getattr(optimizer, "optimizer", optimizer)
        for name, rows in self.rows.items():
            copy = LlamaForCausalLM(model.config)
            copy.load_state_dict(model.state_dict())
            moved = torch.optim.AdamW(copy.parameters(), lr=args.learning_rate, weight_decay=0.0)
            for ours, theirs in zip(copy.parameters(), model.parameters(), strict=True):
                moved.state[ours] = {key: value.clone() for key, value in plain.state[theirs].items()}
            before = self._loss(copy)
            generator = torch.Generator().manual_seed(state.global_step)
            for _ in range(BRANCH_STEPS):
                batch = rows[torch.randperm(len(rows), generator=generator)[:16]]
                copy(input_ids=batch, labels=batch).loss.backward()
                torch.nn.utils.clip_grad_norm_(copy.parameters(), args.max_grad_norm)
                moved.step()
                moved.zero_grad()
            found[name] = before - self._loss(copy)
        self.found.append(found)

    @torch.no_grad()
    def _loss(self, model: LlamaForCausalLM) -> float:
        return model(input_ids=self.target, labels=self.target).loss.item()


def paraphrases(out: Path, data: Path | None, quick: bool) -> dict[str, Any]:
    """
    SmolLM2 trained for one epoch on sentences among which are, for each of six validation texts, a copy, a light and a
    heavy paraphrase and a text on the same topic: rank of each among all rows by its value for that text, and by BM25.
    """
    model, tokenizer = load_demo_model(torch.float32)
    planted = [(which, kind, text) for which, own in enumerate(TEXTS) for kind, text in zip(KINDS, own, strict=True)]
    corpus, source = load_sentences(data)
    sentences = [text for _, _, text in planted] + corpus[: 8 if quick else CORPUS_ROWS]
    rows = Dataset.from_list([_tokens(tokenizer, text) for text in sentences])
    targets = {f"text {which}": Dataset.from_list([_tokens(tokenizer, own[0])]) for which, own in enumerate(TEXTS)}
    everything = Dataset.from_list([target[0] for target in targets.values()])
    steps = math.ceil(len(rows) / 8)
    callback = InRunDataShapleyCallback(everything, targets=targets, refresh_every=10, adam_warmup=0)
    set_seed(0)
    model = get_peft_model(model, LORA)
    args = TrainingArguments(
        str(out / "paraphrases"), num_train_epochs=1, learning_rate=1e-4, per_device_train_batch_size=8, use_cpu=True,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, seed=0, report_to="none", disable_tqdm=True,
        logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model, args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer), callbacks=[callback]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    ranks: dict[str, dict[str, list[int]]] = {"in-run values": {}, "in-run values per token": {}, "BM25": {}}
    for which, own in enumerate(TEXTS):
        scores = {
            "in-run values": callback.result.values(f"text {which}").to_numpy(),
            "in-run values per token": callback.result.values(f"text {which}", normalize="token").to_numpy(),
            "BM25": bm25(own[0], sentences),
        }
        for method, values in scores.items():
            order = np.argsort(np.argsort(-values, kind="stable"))
            for place, (text, kind, _) in enumerate(planted):
                if text == which:
                    ranks[method].setdefault(kind, []).append(int(order[place]) + 1)
    return {"source": source, "rows": len(rows), "steps": steps, "ranks": ranks}


def _tokens(tokenizer, text: str) -> dict[str, list[int]]:
    ids = tokenizer(text)["input_ids"][:MAX_TOKENS]
    return {"input_ids": ids, "labels": ids}


def load_sentences(data: Path | None) -> tuple[list[str], str]:
    """Sentences of 10 to 30 words, and where they come from."""
    web = find_data(data, "editing/me_ppl_4k.jsonl")
    if web is not None:
        texts, source = [json.loads(line)["text"] for line in web.read_text(encoding="utf-8").splitlines()], "web text"
    else:
        texts, source = re.split(r"(?<=[.!?])\s+", " ".join(" ".join(docstrings()).split())), "docstrings"
    texts = sorted({text for text in texts if 10 <= len(text.split()) <= 30})
    random.Random(0).shuffle(texts)
    return texts, source


def bm25(query: str, documents: list[str], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """Okapi BM25 of each document, with the usual k1 and b."""
    words = [Counter(re.findall(r"\w+", text.lower())) for text in documents]
    lengths = np.array([counts.total() for counts in words])
    score = np.zeros(len(documents))
    for word in set(re.findall(r"\w+", query.lower())):
        count = np.array([counts[word] for counts in words])
        having = (count > 0).sum()
        rarity = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
        score += rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * lengths / lengths.mean()))
    return score
