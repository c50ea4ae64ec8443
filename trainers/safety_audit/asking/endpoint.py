"""A model behind an OpenAI-compatible server: requests with retries, what they cost, and answers after a prefix."""

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from tqdm.auto import tqdm

from hf_iclr.models import to_answer_ids, to_messages

from .thoughts import Spoken, split_thoughts


RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class RefusedError(ValueError):
    """The server doesn't take such a request."""


class OpenAIEndpoint:
    """
    A model that an OpenAI-compatible server offers, vLLM's or TGI's for instance.

    Args:
        url (`str`):
            Where the paths of the interface begin: `"http://localhost:8000/v1"`.
        model (`str`):
            The model's name there.
        api_key (`str`, *optional*):
            Defaults to the environment variable `OPENAI_API_KEY`.
        concurrency (`int`, *optional*, defaults to 8):
            Requests at a time.
        max_retries (`int`, *optional*, defaults to 5):
            How often a request is repeated that failed for a reason that may pass, after 1, 2, 4, ... seconds or when
            the server says.
        timeout (`float`, *optional*, defaults to 300.0):
            Seconds to wait for one answer.
        prices (`tuple[float, float]`, *optional*):
            What a million prompt tokens and a million completion tokens cost, for [`~OpenAIEndpoint.cost_line`].
    """

    def __init__(
        self, url: str, model: str, *, api_key: str | None = None, concurrency: int = 8, max_retries: int = 5,
        timeout: float = 300.0, prices: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"Expected an address such as 'http://localhost:8000/v1', got {url!r}.")
        if concurrency < 1 or max_retries < 0:
            raise ValueError(f"Expected at least one request at a time, got {concurrency=} and {max_retries=}.")
        self.url, self.model, self.concurrency, self.max_retries = url.rstrip("/"), model, concurrency, max_retries
        self.timeout, self.prices = timeout, prices
        self.calls = self.prompt_tokens = self.completion_tokens = 0
        self.refused: dict[str, str] = {}  # what could not be measured here, and the server's first word on it
        self._key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        self._lock = threading.Lock()
        self._by_ids = True

    @property
    def identity(self) -> str:
        """Its address and model's name."""
        return f"{self.url} {self.model}"

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """
        The answer to one request.

        Raises:
            RefusedError: if the server doesn't take it.
            ConnectionError: if it doesn't answer, after all retries.
        """
        headers = {
            "Content-Type": "application/json",
            **({"Authorization": f"Bearer {self._key}"} if self._key else {}),
        }
        data = json.dumps({"model": self.model, **body}).encode()
        for attempt in range(self.max_retries + 1):
            request = urllib.request.Request(f"{self.url}/{path}", data, headers)
            wait: float = 2**attempt * (1 + random.random() / 4)
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                    found = json.loads(answer.read())
                    found["choices"][0]
            except urllib.error.HTTPError as error:
                said = error.read().decode(errors="replace")[:300]
                if error.code not in RETRIED:
                    raise RefusedError(f"Expected {self.url}/{path} to answer, got {error.code}: {said}") from None
                problem, after = f"{error.code}: {said}", error.headers.get("Retry-After", "")
                wait = float(after) if after.replace(".", "", 1).isdigit() else wait
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                usage = found.get("usage") or {}
                with self._lock:
                    self.calls += 1
                    self.prompt_tokens += usage.get("prompt_tokens") or 0
                    self.completion_tokens += usage.get("completion_tokens") or 0
                return found
            if attempt < self.max_retries:
                time.sleep(min(wait, 60.0))
        raise ConnectionError(f"Expected {self.url}/{path} to answer, got none in {attempt + 1} attempts. {problem}")

    def run_all(self, tasks: Sequence[Callable[[], Any]], progress: str | None = None) -> Iterator[tuple[int, Any]]:
        """The index and the value of each task as it ends, several at a time."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pool.submit(task): index for index, task in enumerate(tasks)}
            try:
                for done in tqdm(
                    as_completed(futures), total=len(futures), desc=progress, disable=not progress, leave=False
                ):
                    yield futures[done], done.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def cost_line(self) -> str:
        """Calls and tokens so far, with what they cost where prices are known."""
        line = (
            f"{self.model}: {self.calls:,} calls, {self.prompt_tokens:,} prompt tokens, "
            f"{self.completion_tokens:,} completion tokens"
        )
        if self.prices is None:
            return line
        cost = (self.prompt_tokens * self.prices[0] + self.completion_tokens * self.prices[1]) / 1e6
        return f"{line}, {cost:.4f} at {self.prices[0]:g} and {self.prices[1]:g} a million"

    def chat(self, messages: list[dict], opened: bool = False, **body: Any) -> tuple[Spoken, int | None]:
        """What the model says to a chat, thoughts apart, and how many tokens the server has read."""
        found = self.post("chat/completions", messages=messages, **body)
        choice, message = found["choices"][0], found["choices"][0]["message"]
        content, cut = message.get("content") or "", choice.get("finish_reason") == "length"
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        said = split_thoughts(content, opened=opened and not thoughts, cut=cut)
        if thoughts:  # the server has cut them
            said = Spoken(said.answer, thoughts, bool(content.strip()) or not cut)
        return said, (found.get("usage") or {}).get("prompt_tokens")

    def ask(
        self, tokenizer, prompts, answers, ks, rendered, *, max_new_tokens, system, chat_template_kwargs, journal,
        progress, do_sample=False, temperature=1.0, top_k=None, top_p=None, seed=0,
    ) -> dict[int, list[tuple[list[int], Spoken] | None]]:  # fmt: skip
        """
        What [`~hf_iclr.trainers.safety_audit.asking.ask.ask`] needs: prefix and answer for each k and prompt. Without
        a prefix the server renders the chat; with one it is given the prompt's token ids, or the begun answer to go
        on with (`continue_final_message`). `None` where it takes neither; `refused` says so.
        """
        prefixes = [to_answer_ids(tokenizer, answer or [], []) for answer in answers] if answers else []
        options: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature if do_sample else 0.0}
        options |= {"seed": seed} if do_sample else {}
        options |= {name: value for name, value in (("top_k", top_k), ("top_p", top_p)) if value is not None}
        template = {"chat_template_kwargs": chat_template_kwargs} if chat_template_kwargs else {}
        units = [(row, k) for row in range(len(prompts)) for k in ks if k == 0 or len(prefixes[row]) >= k]

        def say(row: int, k: int) -> list[Any] | None:
            messages = to_messages(prompts[row], system)
            ids, lead, opened = rendered[row] if rendered else ([], [], False)
            try:
                if k == 0:
                    return [*self.chat(messages, opened, **options, **template)[0]]
                return self._continue(tokenizer, messages, ids + lead, prefixes[row][:k], {**options}, template)
            except RefusedError as error:
                if k == 0 and top_k is None:
                    raise
                with self._lock:
                    what = "top_k" if top_k is not None else "an answer that is begun"
                    self.refused.setdefault(what, f"The server doesn't take {what}. {error}")
                return None

        stage = journal.stage("endpoint", self.identity, [*prompts], prefixes, [*ks], system, template, options)
        todo = stage.share([[index] for index in range(len(units))])
        tasks = [lambda unit=units[index]: say(*unit) for (index,) in todo]
        for position, value in self.run_all(tasks, progress):
            stage.add({todo[position][0]: value})
        found: dict[int, list[Any]] = {k: [None] * len(prompts) for k in ks}
        for index, value in stage.collect().items():
            row, k = units[index]
            found[k][row] = None if value is None else (prefixes[row][:k] if k else [], Spoken(*value))
        return found

    def _continue(self, tokenizer, messages, ids, prefix, options, template) -> list[Any]:
        if self._by_ids:
            try:
                found = self.post("completions", prompt=ids + prefix, **options)
            except RefusedError:
                self._by_ids = False
            else:
                choice = found["choices"][0]
                self._check_read((found.get("usage") or {}).get("prompt_tokens"), len(ids) + len(prefix))
                return [*split_thoughts(choice["text"], cut=choice.get("finish_reason") == "length")]
        begun = [*messages, {"role": "assistant", "content": tokenizer.decode(prefix, skip_special_tokens=True)}]
        going_on = {"add_generation_prompt": False, "continue_final_message": True}
        said, read = self.chat(begun, **options, **template, **going_on)
        text = tokenizer.decode(ids + prefix)  # which the server tokenises, perhaps otherwise
        self._check_read(read, len(tokenizer(text, add_special_tokens=False)["input_ids"]))
        return [*said]

    def _check_read(self, read: int | None, expected: int) -> None:
        if read not in (None, expected):
            raise RefusedError(
                f"It has read {read} tokens where the prompt and its prefix are {expected}: it doesn't go on with an "
                "answer that is begun, or has another tokenizer."
            )
