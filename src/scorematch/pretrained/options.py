"""Reads the training options of a network of another project from a file."""

from __future__ import annotations

import ast
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scorematch.core.messages import reason
from scorematch.core.schema import Field, check
from scorematch.pretrained.configuration import read_json

_LARGEST_FILE = 2**18  # bytes of a YAML or text file; those of the authors have fewer than 10,000


def read_options(path: Path) -> dict[str, Any]:
    """Reads the options in a file.

    Args:
        path: the path of a JSON file (``.json``), a YAML file (``.yml``, ``.yaml``), or a text file with any other
            suffix except ``.py``. A line of a text file contains one option, ``section.key = value``, or command-line
            options, ``--key value``. Values are numbers, strings, lists and tuples in Python's notation, and comments
            begin with ``#``.

    Returns:
        A dict of the options by key. The options of a section are a nested dict.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImportError: if the file is in YAML and PyYAML is not installed.
        ValueError: if the file is a Python program, cannot be read safely, or is larger than 256 KiB (YAML and text).
    """
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".py":
        raise ValueError(
            f"{path} is a Python program, which is not run: write its options as lines like model.nf = 128 into a text "
            "file, without imports, and pass that file."
        )
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise ValueError(f"{path} has {size:,} bytes, and a file of options has at most {_LARGEST_FILE:,}.")
    content = _read_yaml(path) if path.suffix in (".yml", ".yaml") else _read_text(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a configuration: it must hold options by key.")
    return content


def named_options(config: str | os.PathLike[str], known: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the options of a published configuration, or reads them from a file.

    Args:
        config: the name of the configuration, or the path of the file.
        known: the published configurations by name.

    Raises:
        FileNotFoundError: if ``config`` is neither a known name nor a file.
        ImportError, ValueError: as for ``read_options``.
    """
    if isinstance(config, str) and config in known:
        return known[config]
    path = Path(config).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(config)!r} is neither a file nor the name of a published configuration: {', '.join(known)}."
        )
    return read_options(path)


def checked_options(given: Any, fields: Mapping[str, Field], where: str) -> dict[str, Any]:
    """Returns the options that a schema defines, after checking each of them.

    Args:
        given: a dict of options; any other value counts as an empty dict. Options that are None or not in the schema
            are ignored.
        fields: the schema, by key.
        where: what the options are called in error messages.

    Raises:
        ValueError: if a required option is missing, or a value is not valid.
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
        """A safe loader that reads two Python tags of the authors' files: namespaces as dicts, tuples as lists."""

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            """Merges no mappings: ``<<`` is an error, since nested merges take exponential time."""

    def namespace(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        return loader.construct_mapping(node, deep=True)

    def sequence(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
        return loader.construct_sequence(node, deep=True)

    Loader.add_constructor("tag:yaml.org,2002:python/object:argparse.Namespace", namespace)
    Loader.add_constructor("tag:yaml.org,2002:python/tuple", sequence)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  (a SafeLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        cause = reason(error) if where is None else f"{reason(getattr(error, 'problem', ''))} in line {where.line + 1}"
        raise ValueError(f"{path} is not a configuration that can be read safely: {cause}.") from error


def _read_text(path: Path) -> dict[str, Any]:
    options: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()  # with or without the byte order mark of Windows
    except ValueError as error:
        raise ValueError(f"{path} is not a text file with options ({reason(error)}).") from error
    for number, line in enumerate(lines, 1):
        try:
            words = shlex.split(line, comments=True)
            variable = re.fullmatch(r"\w+=(--.*)", words[0]) if len(words) == 1 else None
            if variable is not None:  # a variable of a shell, MODEL_FLAGS="--image_size 64 ..."
                words = shlex.split(variable[1])
            if words and words[0].startswith("--"):
                # --key=value is the same as --key value.
                words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
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
                f"{path}, line {number}: an option is written section.key = value, or --key value ({reason(error)})."
            ) from error
    return options


def _set(options: dict[str, Any], keys: list[str], value: Any) -> None:
    """Sets an option of a section, such as ``config.model.nf``; the word config may be left out."""
    keys = [key.strip() for key in keys]
    for key in keys[keys[0] == "config" : -1]:
        options = options.setdefault(key, {})
        if not isinstance(options, dict):
            raise ValueError(f"{key} is used both as an option and as a section")
    options[keys[-1]] = list(value) if isinstance(value, tuple) else value


def _value(word: str) -> Any:
    """Converts a command-line value to a number or a bool if it is one; the authors' bools have any case."""
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    try:
        value = ast.literal_eval(word)
    except (ValueError, SyntaxError):
        return word
    return value if isinstance(value, int | float) else word
