"""What a user asks an editor to change."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EditRequest:
    """
    One fact to be written into a model.

    Args:
        prompt (`str`):
            Text with `{}` where the subject stands, to be continued by the target: "The mother tongue of {} is".
        subject (`str`):
            What the fact is about; its last token is where the model is edited.
        target_new (`str`):
            What the model shall answer.
        target_true (`str`, *optional*):
            What it answered before; only measured.
        paraphrases (`tuple[str]`, *optional*):
            Other prompts that should get the new answer; only measured.
        neighborhood (`tuple`, *optional*):
            Prompts about other subjects whose answer should stay `target_true`, or pairs of a prompt and its own
            answer; only measured.
        id (`str`, *optional*):
            Name in the ledger. Left out: derived from prompt, subject and target.
        source (`str`, *optional*):
            Where the fact comes from, for the ledger and the model card.
        license (`str`, *optional*):
            Licence of the source.

    Raises:
        ValueError: when the prompt has no `{}` or several, or the subject or the target is empty.
        TypeError: when one of them is not text.
    """

    prompt: str
    subject: str
    target_new: str
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str | tuple[str, str], ...] = ()
    id: str = ""
    source: str | None = None
    license: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"Expected {name} to be text, got {type(value).__name__}: {value!r}.")
            if not value.strip():
                raise ValueError(f"Expected {name} of an edit to say something, got {value!r}.")
        if self.prompt.count("{}") != 1:
            hint = f": {self.prompt.replace(self.subject, '{}', 1)!r}" if self.subject in self.prompt else ""
            raise ValueError(
                f"Expected a prompt with {{}} once, where the subject {self.subject!r} stands, got {self.prompt!r}. "
                f"Write the subject's place as {{}}{hint}."
            )
        object.__setattr__(self, "paraphrases", tuple(self.paraphrases))
        object.__setattr__(self, "neighborhood", tuple(self.neighborhood))
        if not self.id:
            text = json.dumps([self.prompt, self.subject, self.target_new])
            object.__setattr__(self, "id", hashlib.sha256(text.encode()).hexdigest()[:12])

    @property
    def text(self) -> str:
        """The prompt with its subject."""
        return self.prompt.replace("{}", self.subject)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the optional ones only when given."""
        values = dataclasses.asdict(self) | {
            "paraphrases": list(self.paraphrases),
            "neighborhood": list(self.neighborhood),
        }
        return {name: value for name, value in values.items() if value not in (None, [])}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EditRequest":
        """
        The request that [`~EditRequest.to_dict`] gave; also one line of a `.jsonl` file.

        Args:
            values (`dict`):
                Arguments of [`EditRequest`] by name.

        Returns:
            [`EditRequest`]

        Raises:
            ValueError: when an argument is unknown or one of prompt, subject and target_new is missing.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing = {"prompt", "subject", "target_new"} - set(values)
        if missing or set(values) - known:
            raise ValueError(
                f"Expected an edit with prompt, subject and target_new and maybe {sorted(known)}, got "
                f"{sorted(values)}."
            )
        return cls(**values)
