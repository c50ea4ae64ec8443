"""
A JSON object written through a cascade: a grammar that keeps a state from token to token, and can be copied.

    python examples/structured_output.py                        # SmolLM2 and a draft made of its first layers
    python examples/structured_output.py large-repo small-repo  # any pair that shares a tokenizer

A cascade takes rejected drafts back, so a logits processor that remembers what it was called with must go back, too.
All it needs is a method `clone()`. With xgrammar (`pip install xgrammar`), whose processor has none, it is this class:

    class JsonProcessor(xgrammar.contrib.hf.LogitsProcessor):
        def clone(self):
            other = copy.copy(self)
            other.matchers = [matcher.fork() for matcher in self.matchers]
            return other
"""

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

from hf_iclr import enable_cascade


LITERALS = {"t": "rue", "f": "alse", "n": "ull"}


def step(state: tuple[str, str], character: str) -> tuple[str, str] | None:
    """
    One character more of a JSON text without spaces around its values, numbers being whole: the state after it, `None`
    where it can't stand. A state is what may come next and the brackets that are open; `("next", "")` is a whole text.
    """
    mode, open_ = state
    if mode in ("text", "key text"):
        if character == '"':
            return ("colon" if mode == "key text" else "next"), open_
        if character == "\\":
            return f"{mode} \\", open_
        return state if character.isprintable() else None
    if mode.endswith("\\"):
        return (mode[:-2], open_) if character in '"\\/bfnrt' else None
    if mode.startswith("rest "):  # of true, false or null
        rest = mode[5:]
        return (f"rest {rest[1:]}" if rest[1:] else "next", open_) if character == rest[0] else None
    if mode == "minus":
        return ("digits" if character in "123456789" else "next", open_) if character in "0123456789" else None
    if mode == "digits" and character in "0123456789":
        return state
    if mode in ("digits", "next"):
        if character == "," and open_:
            return ("key" if open_[-1] == "{" else "value"), open_
        return ("next", open_[:-1]) if open_ and character == {"{": "}", "[": "]"}[open_[-1]] else None
    if mode == "colon":
        return ("value", open_) if character == ":" else None
    if mode in ("key", "first key"):
        if character == "}" and mode == "first key":
            return "next", open_[:-1]
        return ("key text", open_) if character == '"' else None
    if character == "]" and mode == "first value":
        return "next", open_[:-1]
    if character in "{[":
        return ("first key" if character == "{" else "first value"), open_ + character
    if character in LITERALS:
        return f"rest {LITERALS[character]}", open_
    return {'"': ("text", open_), "-": ("minus", open_), "0": ("next", open_)}.get(
        character, ("digits", open_) if character in "123456789" else None
    )


def steps(state, text: str):
    for character in text:
        state = state and step(state, character)
    return state


class JsonProcessor(LogitsProcessor):
    """Allows only tokens after which the text still begins a JSON object, and its end only where that is whole."""

    def __init__(self, tokenizer):
        special = set(tokenizer.all_special_ids)
        self.texts = ["" if i in special else tokenizer.decode([i]) for i in range(len(tokenizer))]
        self.eos, self.allowed = tokenizer.eos_token_id, {}  # for each state which tokens may follow: found once
        self.state = None

    def clone(self) -> "JsonProcessor":
        return copy.copy(self)  # a state is never changed in place, and what is allowed holds for all copies

    def __call__(self, input_ids, scores):
        """Takes the newest token in, so each call is one step, as in grammar libraries."""
        if self.state is None:
            self.state = ("value", "")
        elif int(input_ids[0, -1]) != self.eos:
            self.state = steps(self.state, self.texts[int(input_ids[0, -1])])
        if self.state not in self.allowed:
            fits = [bool(text) and self.continues(text) for text in self.texts]
            fits[self.eos] = self.state in (("next", ""), ("digits", ""))
            self.allowed[self.state] = torch.tensor(fits + [False] * (scores.shape[-1] - len(fits)))
        return scores.masked_fill(~self.allowed[self.state].to(scores.device), -torch.inf)

    def continues(self, text: str) -> bool:
        if self.state == ("value", ""):  # the whole text is an object
            return text.startswith("{") and steps(self.state, text) is not None
        return steps(self.state, text) is not None


def main():
    if len(sys.argv) == 3:
        tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        large, small = (AutoModelForCausalLM.from_pretrained(name, dtype="auto") for name in sys.argv[1:])
    else:
        from hf_iclr.tour.demo.draft import load_demo_draft
        from hf_iclr.tour.demo.language_model import fastest_dtype, load_demo_model

        large, tokenizer = load_demo_model(fastest_dtype())
        small = load_demo_draft("quick", large.dtype)
    cascade = enable_cascade(large, small)
    chat = [{"role": "user", "content": "Describe the city of Paris as JSON with the keys name, country and river."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    call = {"do_sample": False, "max_new_tokens": 60, "logits_processor": [JsonProcessor(tokenizer)]}
    for rule in ("spec", "token_v3"):
        output = cascade.generate(**inputs, **call, cascade_rule=rule)
        print(f"\n--- {rule}\n{tokenizer.decode(output[0, inputs['input_ids'].shape[1] :], skip_special_tokens=True)}")
        statistics = cascade.cascade_statistics.to_dict()
        print(f"[{statistics['new_tokens']} tokens, {statistics['tokens_per_large_forward']:.2f} per large forward]")


if __name__ == "__main__":
    main()
