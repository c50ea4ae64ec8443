"""
Speed of speculative cascades on SmolLM2 with its built draft, against transformers in the same process.

    python benchmarks/cascade.py

Six claims, each a table: what a user gets by default, and without a small model, on four kinds of text, alone and in a
batch, against plain `generate` and against prompt lookup and assisted decoding of transformers; what copies and
candidates bring; the loop's overhead per round against the
assisted loop of transformers; exact speculative sampling against plain sampling; every rule's speed beside the
likelihood its text has under the large model; eight ragged prompts against plain batched `generate`. Methods take
turns, prompt by prompt, and medians over rounds are compared, so that a machine that slows down slows down all of
them. Beside each speed-up stands what bounds it: the cost of one round, and acceptance.

On a processor without bfloat16 instructions a bfloat16 forward of several tokens costs several times that of one, so
verification does not pay there; `--dtype float32` shows what it does where it is nearly flat.
"""

import argparse
import gzip
import json
import statistics as stat
import sys
import time
from pathlib import Path

from common.arguments import find_data, make_parser, parse, write_json


SAMPLING = {
    "T=1": {"do_sample": True, "temperature": 1.0, "top_k": 0},
    "T=0.7,k=50": {"do_sample": True, "temperature": 0.7, "top_k": 50},  # the default of the pipeline
}
METHODS = ("default", "token_v3", "no small model", "prompt lookup", "assisted")
TABLES = {
    "parts": "Cost of the parts",
    "defaults": "What a user gets by default",
    "features": "With and without copies and candidates",
    "overhead": "Loop overhead per round",
    "exact": "Exact speculative sampling",
    "rules": "Rules",
    "ragged": "Eight ragged prompts",
}


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--draft", help="folder of a feature draft (default: built once in minutes)")
    parser.add_argument(
        "--layers-draft",
        help="folder of a draft of layers for the assisted loop of transformers (default: two layers)",
    )
    parser.add_argument("--data", type=Path, help="folder with lm/wikitext2_valid.txt.gz; without it no wikitext row")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48, help="new tokens a prompt")
    parser.add_argument("--rounds", type=int, default=2, help="times every prompt is run")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows of the first table")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="columns of that table")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument(
        "--prompts", choices=["chat", "docs"], default="chat", help="questions, or docstrings to go on with"
    )
    parser.add_argument("--sampling", nargs="+", choices=SAMPLING, default=list(SAMPLING))
    return parse(parser, tokens=8, rounds=1, sampling=["T=1"])


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import pandas as pd
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from hf_iclr import enable_cascade
from hf_iclr.cache_argument import cache_inputs, find_cache
from hf_iclr.generation.assisted_cascade import ForwardMeter, own_copy
from hf_iclr.generation.drafting.draft_model import build_draft_model
from hf_iclr.generation.proposals import DraftLength, TextLookup
from hf_iclr.models import answer_logits
from hf_iclr.tour.demo.draft import docstrings, load_demo_draft
from hf_iclr.tour.demo.language_model import load_demo_model


# None of these is among the prompts that the draft is made from.
PROMPTS = (
    "How do bees find their way back to the hive?",
    "Write a polite note to a neighbour whose dog barks at night.",
    "Summarize the plot of a film about a lost umbrella.",
    "What should I pack for a week of hiking in the Alps?",
    "Explain why the sky turns red in the evening.",
    "Write a limerick about a forgetful clockmaker.",
    "Describe how a library decides which books to lend.",
    "Give me a recipe for a soup with lentils and lemon.",
)
RULES = {
    "spec": [0.0],
    "chow": [0.5],
    "diff": [0.1],
    "opt": [0.1, 0.3, 0.5],
    "token_v2": [0.1],
    "token_v3": [0.3, 0.5, 0.7, 0.9],
    "lossy": [0.4],
    "ensemble": [0.4],
}


def main(args: argparse.Namespace) -> None:

    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    large, tokenizer = load_demo_model(dtype)
    small = (
        AutoModelForCausalLM.from_pretrained(args.draft, dtype=dtype).eval()
        if args.draft
        else load_demo_draft("quick" if args.quick else "full", dtype)
    )
    layers = (
        AutoModelForCausalLM.from_pretrained(args.layers_draft, dtype=dtype).eval()
        if args.layers_draft
        else build_draft_model(large.float(), tokenizer, docstrings()[:12], num_layers=2).to(dtype)
    )
    large.to(dtype)
    bench = Bench(large, small, layers, tokenizer, args)
    results = {"threads": args.threads, "dtype": args.dtype, "prompts": args.prompts, "torch": torch.__version__}
    for sampling in args.sampling:
        for table in args.tables:
            begin = time.perf_counter()
            show(results, f"{TABLES[table]}, {sampling}", getattr(bench, table)(SAMPLING[sampling]))
            print(f"({time.perf_counter() - begin:.0f} s)")
    write_json(args.out / "cascade.json", results)


def show(results: dict, title: str, table: pd.DataFrame) -> None:
    print(f"\n{title}\n{table.to_string(index=False, float_format=lambda value: f'{value:.3f}')}", flush=True)
    results[title] = json.loads(table.to_json(orient="records"))


class Bench:
    def __init__(self, large, small, layers, tokenizer, args):
        self.large, self.small, self.layers, self.tokens, self.rounds = large, small, layers, args.tokens, args.rounds
        self.cascade, self.alone, self.batches = enable_cascade(large, small), enable_cascade(large), args.batches
        self.methods = args.methods
        last = docstrings()[-len(PROMPTS) :]
        questions = [*PROMPTS, *(f"Repeat this text word for word.\n\n{text[:300]}" for text in last)]
        chats = [[{"role": "user", "content": question}] for question in questions]
        chats = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        # none of these is among the texts that the draft is made from
        kinds = {
            "chat": chats[: len(PROMPTS)],
            "docs": [text[: 160 + 20 * index] for index, text in enumerate(last)],
            "repeats": chats[len(PROMPTS) :],
        }
        if args.data is not None:
            with gzip.open(find_data(args.data, "lm/wikitext2_valid.txt.gz"), "rt") as file:
                texts = [line for line in file if len(line) > 600][: len(PROMPTS)]
            kinds["wikitext"] = [text[: 160 + 20 * index] for index, text in enumerate(texts)]
        self.kinds = {
            kind: (
                [tokenizer(prompt, return_tensors="pt") for prompt in prompts],
                tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left"),
            )
            for kind, prompts in kinds.items()
        }
        self.prompts, self.batch = self.kinds[args.prompts]

    def generate(self, inputs, sampling, rule=None, alpha=0.0, gamma=2, **more):
        """One timed call; all rows run to full length, so that methods do the same work."""
        length = {"max_new_tokens": self.tokens, "eos_token_id": None, "pad_token_id": 2}
        begin = time.perf_counter()
        if rule is None:
            output = self.large.generate(**inputs, **sampling, **length)
        else:
            output = self.cascade.generate(
                **inputs, **sampling, **length, cascade_rule=rule, cascade_alpha=alpha, num_assistant_tokens=gamma,
                **more,
            )  # fmt: skip
        seconds = time.perf_counter() - begin
        if rule is not None and self.cascade.cascade_statistics.backend != "batched":
            raise RuntimeError("The batched loop refused this pair: the figures would be of another loop.")
        return output, seconds

    def defaults(self, sampling) -> pd.DataFrame:
        """Arguments left out, on each kind of text; one call of each method comes first and is not counted."""
        length = {"max_new_tokens": self.tokens, "eos_token_id": None, "pad_token_id": 2}
        methods = {
            "plain": lambda inputs: self.large.generate(**inputs, **sampling, **length),
            "default": lambda inputs: self.cascade.generate(**inputs, **sampling, **length),
            "token_v3": lambda inputs: self.cascade.generate(**inputs, **sampling, **length, cascade_rule="token_v3"),
            "no small model": lambda inputs: self.alone.generate(**inputs, **sampling, **length),
            "prompt lookup": lambda inputs: self.large.generate(
                **inputs, **sampling, **length, prompt_lookup_num_tokens=3
            ),
            "assisted": lambda inputs: self.large.generate(
                **inputs, **sampling, **length, assistant_model=self.layers
            ),
        }  # fmt: skip
        methods = {name: method for name, method in methods.items() if name in ("plain", *self.methods)}
        rows = []
        for kind, (prompts, batch) in self.kinds.items():
            for size, calls in ((1, prompts), (len(prompts), [batch])):
                if size not in self.batches:
                    continue
                times, ours = {name: [] for name in methods}, {"default": [], "no small model": []}
                for seed in tqdm(range(-1, self.rounds if size == 1 else 2 * self.rounds), desc=kind, leave=False):
                    for inputs in calls[: 1 if seed < 0 else None]:
                        for name, method in methods.items():
                            if size > 1 and name in ("prompt lookup", "assisted"):  # one prompt at a time
                                continue
                            torch.manual_seed(seed)
                            begin = time.perf_counter()
                            method(inputs)
                            if seed >= 0:
                                times[name].append(time.perf_counter() - begin)
                                if name in ours:
                                    model = self.cascade if name == "default" else self.alone
                                    ours[name].append(model.cascade_statistics.to_dict())
                ratios = {
                    name: stat.median(plain / own for plain, own in zip(times["plain"], values, strict=True))
                    for name, values in times.items()
                    if values and name != "plain"
                }
                accepted = {
                    f"{name} acceptance": stat.mean(call["acceptance_rate"] or 0 for call in calls_made)
                    for name, calls_made in ours.items()
                    if calls_made
                }
                lengths: dict[int, int] = {}
                for call in ours["default"]:
                    for gamma, count in call["draft_lengths"].items():
                        lengths[gamma] = lengths.get(gamma, 0) + count
                chosen = " ".join(f"{gamma}:{count}" for gamma, count in sorted(lengths.items()))
                rows.append({"text": kind, "batch": size, **ratios, **accepted, "rounds by drafts": chosen})
                tqdm.write(str(rows[-1]), file=sys.stderr)  # should the run be stopped
        return pd.DataFrame(rows)

    def features(self, sampling) -> pd.DataFrame:
        """Speed of exact sampling of one prompt without a feature, over that with all: medians of pairs."""
        length = {"max_new_tokens": self.tokens, "eos_token_id": None, "pad_token_id": 2}
        settings = {"all": (4, TextLookup.SIZES), "no candidates": (0, TextLookup.SIZES), "no copies": (4, {})}
        rows = []
        for kind, (prompts, _) in self.kinds.items():
            times, tokens = {name: [] for name in settings}, {name: [] for name in settings}
            for seed in tqdm(range(-1, 2 * self.rounds), desc=kind, leave=False):
                for inputs in prompts[: 1 if seed < 0 else None]:
                    for name, (siblings, sizes) in settings.items():
                        if seed >= 0:  # what rounds cost is measured with all features, in the first calls
                            DraftLength.MOST_SIBLINGS, TextLookup.SIZES = siblings, sizes
                        torch.manual_seed(seed)
                        begin = time.perf_counter()
                        self.cascade.generate(**inputs, **sampling, **length)
                        if seed >= 0:
                            times[name].append(time.perf_counter() - begin)
                            tokens[name].append(self.cascade.cascade_statistics.to_dict()["tokens_per_large_forward"])
                        DraftLength.MOST_SIBLINGS, TextLookup.SIZES = settings["all"]
            row = {"text": kind}
            for name in settings:
                ratios = [whole / own for whole, own in zip(times["all"], times[name], strict=True)]
                row |= {f"{name}: speed": stat.median(ratios), f"{name}: tokens a forward": stat.mean(tokens[name])}
            rows.append(row)
        return pd.DataFrame(rows)

    def parts(self, sampling) -> pd.DataFrame:
        """Milliseconds of one forward behind 128 tokens of context, minimum of 15."""
        rows = []
        with torch.no_grad():
            for name, model in (("large", self.large), ("draft of layers", self.layers)):
                for length in (1, 2, 3, 5, 9):
                    times = []
                    for _ in range(15):
                        cache = find_cache(model(torch.randint(3, 999, (1, 128)), use_cache=True))
                        ids = torch.randint(3, 999, (1, length))
                        begin = time.perf_counter()
                        model(ids, logits_to_keep=length, **cache_inputs(model, cache))
                        times.append(time.perf_counter() - begin)
                    rows.append({"model": name, "new tokens": length, "ms": 1000 * min(times)})
        return pd.DataFrame(rows)

    def overhead(self, sampling) -> pd.DataFrame:
        """Time outside both models' forwards, per round: our loop, and the assisted loop of transformers as it is."""
        rows = []
        for gamma in (2, 4):
            config = self.layers.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = gamma, "constant"
            config.assistant_confidence_threshold = 0.0
            ours, theirs = [], []
            for seed in range(self.rounds):
                for inputs in self.prompts[:3]:
                    torch.manual_seed(seed)
                    self.generate(inputs, sampling, "spec", gamma=gamma, assistant_model=self.layers)
                    stats = self.cascade.cascade_statistics
                    ours.append(1000 * stats.overhead_seconds / stats.rounds[0])
                    torch.manual_seed(seed)
                    theirs.append(self._stock_overhead(inputs, sampling))
            ours_ms, theirs_ms = stat.median(ours), stat.median(theirs)
            rows.append(
                {
                    "gamma": gamma,
                    "ours ms": ours_ms,
                    "transformers ms": theirs_ms,
                    "ratio": ours_ms / theirs_ms,
                    "bar": 0.5,
                }
            )
        return pd.DataFrame(rows)

    def _stock_overhead(self, inputs, sampling) -> float:
        large, layers = own_copy(self.large), own_copy(self.layers)  # these get hooks
        meters = ForwardMeter(large), ForwardMeter(layers)
        begin = time.perf_counter()
        large.generate(
            **inputs, **sampling, assistant_model=layers, max_new_tokens=self.tokens, eos_token_id=None, pad_token_id=2
        )
        seconds = time.perf_counter() - begin - sum(meter.seconds for meter in meters)
        return 1000 * seconds / meters[0].forwards

    def exact(self, sampling) -> pd.DataFrame:
        """Plain sampling and exact speculative sampling at several draft lengths."""
        gammas = (1, 2, 3, 4)
        times = {gamma: [] for gamma in (0, *gammas)}
        acceptance = {gamma: [] for gamma in gammas}
        for seed in tqdm(range(self.rounds), desc="exact", leave=False):
            for inputs in self.prompts:
                for gamma, measured in times.items():
                    torch.manual_seed(seed)
                    measured.append(self.generate(inputs, sampling, "spec" if gamma else None, gamma=gamma)[1])
                    if gamma:
                        acceptance[gamma].append(self.cascade.cascade_statistics.to_dict())
        plain = stat.median(times[0])
        rows = [{"gamma": "plain", "ms per token": 1000 * plain / self.tokens, "speed-up": 1.0}]
        for gamma in gammas:
            calls = acceptance[gamma]
            rows.append(
                {
                    "gamma": gamma,
                    "ms per token": 1000 * stat.median(times[gamma]) / self.tokens,
                    "speed-up": plain / stat.median(times[gamma]),
                    "acceptance": stat.mean(call["acceptance_rate"] for call in calls),
                    "tokens per large forward": stat.mean(call["tokens_per_large_forward"] for call in calls),
                    "ms per round": stat.median(1000 * call["total_seconds"] / call["rounds"] for call in calls),
                    "draft share": stat.mean(call["draft_seconds"] / call["total_seconds"] for call in calls),
                    "overhead share": stat.mean(call["overhead_seconds"] / call["total_seconds"] for call in calls),
                }
            )
        return pd.DataFrame(rows)

    def rules(self, sampling) -> pd.DataFrame:
        """
        Every rule at γ = 2: speed on one prompt at a time, and the negative log-likelihood (nats a token) that batches
        of its texts have under the large model at the sampling temperature, with its standard error over texts.
        """
        methods = [(None, 0.0)] + [(rule, alpha) for rule, alphas in RULES.items() for alpha in alphas]
        times, calls = ({method: [] for method in methods} for _ in range(2))
        for inputs in tqdm(self.prompts, desc="rules, speed", leave=False):
            for method in methods:
                torch.manual_seed(0)
                times[method].append(self.generate(inputs, sampling, *method)[1])
                if method[0]:
                    calls[method].append(self.cascade.cascade_statistics.to_dict())
        nlls = {}
        for method in tqdm(methods, desc="rules, likelihood", leave=False):
            torch.manual_seed(0)
            output, _ = self.generate(self.batch, {**sampling, "num_return_sequences": 4}, *method)
            nlls[method] = self._nll(output, sampling["temperature"])
        plain, plain_nll = stat.median(times[methods[0]]), nlls[methods[0]].mean().item()
        rows = []
        for method in methods:
            nll = nlls[method]
            row = {
                "rule": method[0] or "plain",
                "alpha": method[1],
                "speed-up": plain / stat.median(times[method]),
                "NLL": nll.mean().item(),
                "NLL se": nll.std().item() / len(nll) ** 0.5,
                "NLL change %": 100 * (nll.mean().item() / plain_nll - 1),
            }
            if method[0]:
                row["acceptance"] = stat.mean(call["acceptance_rate"] for call in calls[method])
                row["deferral"] = stat.mean(call["deferral_rate"] for call in calls[method])
                row["TV from large"] = stat.mean(call["drift"] / call["new_tokens"] for call in calls[method])
            rows.append(row)
        return pd.DataFrame(rows)

    def _nll(self, output, temperature) -> torch.Tensor:
        """Mean negative log-likelihood of the new tokens of each row."""
        answers, nll = output[:, -self.tokens :], torch.empty(len(output))
        columns = self.batch["input_ids"], self.batch["attention_mask"]
        prompts = [ids[mask.bool()].tolist() for ids, mask in zip(*columns, strict=True)]
        prompts = [prompt for prompt in prompts for _ in range(len(output) // len(prompts))]
        for rows, logits in answer_logits(self.large, prompts, answers.tolist(), batch_size=8):
            log_probs = (logits / temperature).log_softmax(-1)
            nll[rows] = -log_probs.gather(2, answers[rows][..., None])[..., 0].mean(1)
        return nll

    def ragged(self, sampling) -> pd.DataFrame:
        """Eight prompts of different lengths in one batch; a γ that is `None` is chosen by the call."""
        methods = [(None, 0.0, 0), ("spec", 0.0, None), ("spec", 0.0, 1), ("spec", 0.0, 2)]
        methods += [("token_v3", 0.5, None), ("token_v3", 0.5, 2), ("opt", 0.3, 2), ("opt", 0.5, 2)]
        times, forwards = ({method: [] for method in methods} for _ in range(2))
        for seed in tqdm(range(-1, 2 * self.rounds), desc="ragged", leave=False):
            for method in methods:
                torch.manual_seed(seed)
                seconds = self.generate(self.batch, sampling, *method)[1]
                if seed < 0:  # the first calls measure what rounds cost
                    continue
                times[method].append(seconds)
                if method[0]:
                    forwards[method].append(self.cascade.cascade_statistics.large_forwards)
        return pd.DataFrame(
            {
                "rule": method[0] or "plain",
                "alpha": method[1],
                "gamma": "chosen" if method[2] is None else method[2],
                "tokens per second": 8 * self.tokens / stat.median(times[method]),
                "speed-up": stat.median(one / own for one, own in zip(times[methods[0]], times[method], strict=True)),
                "large forwards": stat.median(forwards[method]) if method[0] else self.tokens,
            }
            for method in methods
        )


if __name__ == "__main__":
    main(ARGUMENTS)
