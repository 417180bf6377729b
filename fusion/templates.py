"""Prompt templates: the sentences that a class name is put into before the text encoder reads it.

    reference  81: the bare name with a full stop, and OpenAI's 80 for ImageNet
    imagenet   the 80 alone (openai/CLIP, Prompt_Engineering_for_ImageNet.ipynb)
    plain      the bare name with a full stop: one prompt a name instead of 81

`reference` equals, as a set, what the authors train and evaluate with (Surrey-UP-Lab/RegionSpot,
prompt_engineering.py). Their order differs, which changes nothing: a class's embedding is the mean over its prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from regionspot.cache.errors import unknown_name

SLOT = "{}"


class _TemplateSets(Mapping[str, tuple[str, ...]]):
    """Filled on use: importing open_clip, where the 80 are kept, takes seconds that most commands need not spend."""

    _NAMES = ("reference", "imagenet", "plain")

    def __getitem__(self, name: str) -> tuple[str, ...]:
        if name == "plain":
            return ("{}.",)
        if name == "imagenet":
            return _openai_imagenet()
        if name == "reference":
            return ("{}.", *_openai_imagenet())
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._NAMES)

    def __len__(self) -> int:
        return len(self._NAMES)


TEMPLATES: Mapping[str, tuple[str, ...]] = _TemplateSets()


def template_set(name: str) -> tuple[str, ...]:
    """The templates of the set `name`, each with one `{}` for the class name.

    Raises InputError, naming the sets there are, for another name.
    """
    try:
        return TEMPLATES[name]
    except KeyError:
        raise unknown_name("templates", name, TEMPLATES) from None


def _openai_imagenet() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template(SLOT) for template in OPENAI_IMAGENET_TEMPLATES)
