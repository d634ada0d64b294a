"""The options that a network of another project was trained with, from a file."""

from __future__ import annotations

import ast
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scorematch.pretrained.configuration import read_json
from scorematch.schema import Field, check


def read_options(path: Path) -> dict[str, Any]:
    """The options in a file.

    Args:
        path: of a JSON file (``.json``), a YAML file (``.yml``, ``.yaml``), or a text file of another name. A text file
            has one option per line, ``section.key = value``, with Python's notation for numbers, strings, lists and
            tuples and ``#`` before comments; or options of a command, ``--key value``.

    Returns:
        The options by key, those of a section as a dict.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if the file is in YAML and PyYAML is not installed.
        ValueError: if the file cannot be read safely.
    """
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".py":
        raise ValueError(
            f"{path} is a Python program, which is not run: write its options as lines like model.nf = 128 into a text "
            "file, without imports, and pass that file."
        )
    content = _read_yaml(path) if path.suffix in (".yml", ".yaml") else _read_text(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration: it must hold options by key.")
    return content


def named_options(config: str | os.PathLike[str], known: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The options of a published configuration, or in a file.

    Args:
        config: the name of the configuration, or the path of the file.
        known: the published configurations by name.

    Raises:
        FileNotFoundError: if it is neither.
        ImportError, ValueError: as for ``read_options``.
    """
    if isinstance(config, str) and config in known:
        return known[config]
    if not Path(config).is_file():
        raise FileNotFoundError(
            f"{str(config)!r} is neither a file nor the name of a published configuration: {', '.join(known)}."
        )
    return read_options(Path(config))


def checked_options(given: Any, fields: Mapping[str, Field], where: str) -> dict[str, Any]:
    """The options of a schema, after a check of each.

    Args:
        given: a dict of options, or something else for none. Those that the schema lacks are left out, and so are those
            that are None.
        fields: the schema, by key.
        where: the name of the options in messages.

    Raises:
        ValueError: for a value that is missing or wrong.
    """
    given = given if isinstance(given, dict) else {}
    options = {key: _number(given[key], field) for key, field in fields.items() if given.get(key) is not None}
    check(options, fields, where)
    return options


def _number(value: Any, field: Field) -> Any:
    """Converts a number that YAML 1.1 reads as a string, such as 5e-6."""
    if field.kind is float and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read_yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError(f'reading {path.name} needs PyYAML: pip install "scorematch[convert]".') from error

    class Loader(yaml.SafeLoader):
        """A safe loader that reads the Python tags of the authors' files, a namespace and a tuple, as plain values."""

    def namespace(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        return loader.construct_mapping(node, deep=True)

    def sequence(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
        return loader.construct_sequence(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:python/object:argparse.Namespace", namespace)
    Loader.add_constructor("tag:yaml.org,2002:python/tuple", sequence)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a configuration that can be read safely: {error}") from error


def _read_text(path: Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise ValueError(f"{path} is not a text file with options ({error}).") from error
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
            if words and words[0].startswith("--"):
                if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
                    raise ValueError("a value is missing")
                options |= {key[2:]: _value(word) for key, word in zip(words[::2], words[1::2], strict=True)}
            elif words:
                key, equals, value = line.partition("=")
                if not equals:
                    raise ValueError("an equals sign is missing")
                _set(options, key.split("."), ast.literal_eval(value.strip()))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: an option is written section.key = value, or --key value ({error})."
            ) from error
    return options


def _set(options: dict[str, Any], keys: list[str], value: Any) -> None:
    """Sets an option of a section, such as ``config.model.nf``; the word config may be left out."""
    keys = [key.strip() for key in keys]
    for key in keys[keys[0] == "config" : -1]:
        options = options.setdefault(key, {})
        if not isinstance(options, dict):
            raise ValueError(f"{key} is an option and a section")
    options[keys[-1]] = list(value) if isinstance(value, tuple) else value


def _value(word: str) -> Any:
    """A word of a command as a number or a flag, if it is one."""
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word
    return value if isinstance(value, int | float) else word
