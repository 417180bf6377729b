"""Prompt templates: sentences with a slot for a class name, the input of the text encoder.

    reference  81: the name with a full stop, and OpenAI's 80 templates for ImageNet
    imagenet   the 80 alone (openai/CLIP, Prompt_Engineering_for_ImageNet.ipynb)
    plain      the name with a full stop: one prompt per name instead of 81

`reference` is the set that the authors train and evaluate with (Surrey-UP-Lab/RegionSpot, prompt_engineering.py). Its
order differs, without any effect: the embedding of a class is the mean over its prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from regionspot.cache.errors import unknown_name

SLOT = "{}"


class _TemplateSets(Mapping[str, tuple[str, ...]]):
    """Loads open_clip, which defines the 80 templates, only on access: its import takes seconds."""

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
    """The templates of the set `name`, each with one `{}` for the class name. Raises InputError for an unknown name."""
    try:
        return TEMPLATES[name]
    except KeyError:
        raise unknown_name("templates", name, TEMPLATES) from None


def _openai_imagenet() -> tuple[str, ...]:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    return tuple(template(SLOT) for template in OPENAI_IMAGENET_TEMPLATES)
