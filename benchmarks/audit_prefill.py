"""
What one prefill for every k saves in an audit: the prefilling attack against `generate` called once for each k.

    python benchmarks/audit_prefill.py --prompts 8 --max-new-tokens 32

Both take turns, so that a change of the machine's speed meets both, on the same batches of SmolLM2-135M in float32, on
one thread, with prompts and beginnings that come along. Printed: seconds of processor time of each turn, the
ratio of the medians, and how many answers are the same.
"""

import argparse
import statistics
import time

from common.arguments import make_parser, parse, write_json


def arguments() -> argparse.Namespace:
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--prompts", type=int, default=8, help="prompts, in one batch")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="length of an answer")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each")
    return parse(parser, prompts=2, max_new_tokens=4, repeats=1)


if __name__ == "__main__":  # before the imports that take seconds
    ARGUMENTS = arguments()

import torch

from common.report import print_table
from hf_iclr.models import end_tokens, generate_rows, to_prompt_ids
from hf_iclr.prefill import continue_rows
from hf_iclr.tour.demo.language_model import load_demo_model
from hf_iclr.trainers.safety_audit.asking.prompt_sets import HARMLESS_ORDERS, NEUTRAL_BEGINNINGS


KS = (0, 1, 2, 5, 10, 20, 40)
BAR = 0.7


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(torch.float32)
    model.eval()
    rows = [to_prompt_ids(tokenizer, prompt) for prompt in HARMLESS_ORDERS[: args.prompts]]
    beginnings = [NEUTRAL_BEGINNINGS[row % 20] for row in range(len(rows))]
    prefixes = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in beginnings]
    ends = end_tokens(model, tokenizer)

    def by_generate() -> dict[int, list[list[int]]]:
        options = {"batch_size": len(rows), "max_new_tokens": args.max_new_tokens, "do_sample": False, "padding": 0}
        found = {}
        for k in KS:
            asked = [row + prefix[:k] for row, prefix in zip(rows, prefixes, strict=True)]
            with torch.no_grad():
                new = list(generate_rows(model, asked, ends, repetition_penalty=1.0, **options))
            found[k] = [[token for token in row if token not in ends] for row in new]
        return found

    def by_one_prefill() -> dict[int, list[list[int] | None]]:
        options = {"batch_size": len(rows), "max_new_tokens": args.max_new_tokens}
        return continue_rows(model, rows, prefixes, KS, ends=ends, **options)

    seconds: dict[str, list[float]] = {"generate for each k": [], "one prefill": []}
    answers = {}
    for _ in range(args.repeats):
        for name, turn in zip(seconds, (by_generate, by_one_prefill), strict=True):
            start = time.process_time()
            answers[name] = turn()
            seconds[name].append(time.process_time() - start)
    first, second = answers.values()
    same = [a == b for k in KS for a, b in zip(first[k], second[k], strict=True)]
    medians = [statistics.median(values) for values in seconds.values()]
    ratio = medians[1] / medians[0]
    rows_of_table = [
        (name, ", ".join(f"{value:.1f}" for value in seconds[name]), f"{median:.1f}")
        for name, median in zip(seconds, medians, strict=True)
    ]
    print_table(("", "seconds", "median"), rows_of_table)
    print(f"{ratio:.2f} x generate's time ({'reached' if ratio <= BAR else 'missed'}: at most {BAR}); {sum(same)} of "
          f"{len(same)} answers are the same.")  # fmt: skip
    found = {"seconds": seconds, "ratio": ratio, "same": sum(same), "n": len(same)}
    write_json(args.out / "audit_prefill.json", found)


if __name__ == "__main__":
    main(ARGUMENTS)
