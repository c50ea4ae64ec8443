"""Hook of mkdocs: of links to files that are no pages of the site their names stay, as code."""

import re


def on_page_markdown(markdown: str, **kwargs: object) -> str:
    return re.sub(r"\[`?([^\]`]+)`?\]\(\.\./[^)]+\)", r"`\1`", markdown)
