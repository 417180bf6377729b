"""`--config run.toml` and `--print-config`: the options of a command in a file.

The file has a table for each command; a key is the name of an option or argument, as in `--help`:

    [extract]
    name = "coco"
    data = "my_images"
    cache = "my.zarr"

    [train]
    cache = ["my.zarr"]
    head-option = ["layers=2"]

    [cache.subset]
    every = 10

The command line has priority over the file, and relative paths start at the current folder in both.
"""

from __future__ import annotations

import functools
import inspect
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from regionspot.cache.errors import InputError, unknown_name

_CONTEXT = "config_context"


def configurable(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options --config and --print-config."""

    signature = inspect.signature(command, eval_str=True)
    parameters = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in signature.parameters.values()]
    parameters += inspect.signature(_options, eval_str=True).parameters.values()
    # Typer fills one context only.
    context_name = next((name for name, own in signature.parameters.items() if own.annotation is typer.Context), None)
    if context_name is None:
        parameters.append(inspect.Parameter(_CONTEXT, inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))

    @functools.wraps(command)
    def run(config: Path | None, print_config: bool, **values: Any) -> None:
        context = values[context_name] if context_name else values.pop(_CONTEXT)
        if print_config:
            typer.echo(_as_toml(context, values))
        else:
            command(**values)

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _use_file(context: typer.Context, path: Path | None) -> Path | None:
    """Make the values of the file the defaults of the command. Raises InputError if the file does not fit it."""
    if path is not None and not context.resilient_parsing:
        context.default_map = {**(context.default_map or {}), **_read(path, context)}
    return path


def _options(
    *,
    config: Annotated[
        Path | None,
        typer.Option(
            callback=_use_file, is_eager=True, help="TOML file with options of this command in a table of its name"
        ),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="print the options in force, as such a file, and do nothing else")
    ] = False,
) -> None:
    """Only the signature is used."""


def _read(path: Path, context: typer.Context) -> dict[str, Any]:
    try:
        content: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not TOML: {error}") from error
    table = _table_name(context)
    for name in table:
        known = [key for key, value in content.items() if isinstance(value, dict)]
        if outside := content.keys() - set(known):
            raise InputError(f"{path}: {min(outside)} stands outside of a table; write [{'.'.join(table)}] above it")
        content = content.get(name, {})
    parameters = _parameters(context)
    values = {}
    for key, value in content.items():
        name = key.replace("_", "-")
        if name not in parameters:
            raise unknown_name(f"{path}: option of [{'.'.join(table)}]", key, parameters)
        values[parameters[name].name] = _checked(parameters[name], value, context, f"{path}: {key}")
    return values


def _checked(parameter: Any, value: Any, context: typer.Context, where: str) -> Any:
    """The value as the command line would give it; its type and range are checked now, so that errors name the file."""
    several = getattr(parameter, "multiple", False) or parameter.nargs == -1
    flag = getattr(parameter, "is_flag", False)
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and not several:
        raise InputError(f"{where} is a list, expected one value")
    if any(isinstance(item, bool) != flag or not isinstance(item, str | int | float) for item in items):
        raise InputError(f"{where} is {value!r}, expected {'true or false' if flag else 'a text or a number'}")
    given = [item if isinstance(item, bool) else str(item) for item in items]
    try:
        parameter.process_value(context, given if several else given[0])
    except Exception as error:
        if not hasattr(error, "message"):  # of click's usage errors, of which typer has its own copy
            raise
        raise InputError(f"{where}: {' '.join(str(error.message).split())}") from error
    return given if several else given[0]


def _table_name(context: typer.Context) -> list[str]:
    """The words of the command without the program's name: ["cache", "subset"]."""
    names: list[str] = []
    at: Any = context
    while at.parent is not None:
        names, at = [at.info_name, *names], at.parent
    return names


def _parameters(context: typer.Context) -> dict[str, Any]:
    """The parameters of the command by their names on the command line, without the dashes in front."""
    named = {}
    for parameter in context.command.params:
        long = [option for option in parameter.opts if option.startswith("--")]
        named[(long or [parameter.name])[0].removeprefix("--").replace("_", "-")] = parameter
    return {name: parameter for name, parameter in named.items() if name not in ("config", "print-config", "help")}


def _as_toml(context: typer.Context, values: Mapping[str, Any]) -> str:
    """The options in force as a config file; those without a value are comments."""
    lines = [f"[{'.'.join(_table_name(context))}]"]
    for name, parameter in _parameters(context).items():
        value = values[parameter.name]
        unset = value is None or value == []
        lines.append(f"# {name} =" if unset else f"{name} = {json.dumps(value, default=str, ensure_ascii=False)}")
    return "\n".join(lines)
