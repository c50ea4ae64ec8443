"""Extension of griffe: docstrings in Hugging Face's form as mkdocstrings reads them."""

import re
from typing import Any

import griffe


# `name (`type`, *optional*, defaults to `3`):` with the description in the lines below
_ARGUMENT = re.compile(r"^( {4,})(\*{0,2}\w[\w.]*(?:, \*{0,2}\w[\w.]*)*) ?\((.*)\):[ ]*(.*)$")
_REFERENCE = re.compile(r"\[`([~\w.]+)`\]")
_EXAMPLE = re.compile(r"^( *)Examples?:$", re.MULTILINE)


class HuggingFaceDocstrings(griffe.Extension):
    """Arguments keep their types as text; `[`Name`]` becomes `Name`; a fenced example stays a fenced example."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is None or obj.is_alias:
            return
        text = _REFERENCE.sub(lambda match: f"`{match[1].lstrip('~').rpartition('.')[2]}`", obj.docstring.value)
        text = _EXAMPLE.sub(r"\1**Example**", text)
        lines: list[str] = []
        for line in text.splitlines():
            match = _ARGUMENT.match(line)
            if match is None:
                lines.append(line)
                continue
            indent, names, kind, rest = match.groups()
            lines.append(f"{indent}{names.split(',')[0].strip('*')}: {kind}. {rest}".rstrip())
        obj.docstring.value = "\n".join(lines)
