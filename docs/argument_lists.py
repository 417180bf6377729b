"""Renders the lists of arguments in docstrings, which are lines of a name, two spaces and a text, as Markdown lists."""

import inspect
import re
from typing import Any

import griffe

ENTRY = re.compile(r"(\S.*?)\s{2,}(\S.*)")


class ArgumentLists(griffe.Extension):
    """A griffe extension, which zensical.toml names."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            paragraphs = inspect.cleandoc(obj.docstring.value).split("\n\n")
            obj.docstring.value = "\n\n".join(map(as_list, paragraphs))


def as_list(paragraph: str) -> str:
    """The paragraph, or a Markdown list if it is a list of arguments; further lines of an entry are indented."""
    lines = paragraph.splitlines()
    if not all(line.startswith(" ") or ENTRY.fullmatch(line) for line in lines):
        return paragraph
    items = []
    for line in lines:
        entry = ENTRY.fullmatch(line) if line[:1].strip() else None
        items.append(f"- `{entry[1]}`: {entry[2]}" if entry else f"  {line.strip()}")
    return "\n".join(items)
