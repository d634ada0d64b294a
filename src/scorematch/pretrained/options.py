"""Reads the training options of a network of another project from a JSON or YAML file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scorematch.core.messages import reason
from scorematch.core.schema import Field, check
from scorematch.pretrained.configuration import read_json

_LARGEST_FILE = 2**18  # bytes of a YAML file; those of the authors have fewer than 10,000


def read_options(path: Path) -> dict[str, Any]:
    """Reads the options in a file.

    Args:
        path: the path of a JSON file (``.json``), or of a YAML file with any other suffix except ``.py``.

    Returns:
        A dict of the options by key. The options of a section are a nested dict.

    Raises:
        FileNotFoundError: if the file does not exist.
        ImportError: if the file is in YAML and PyYAML is not installed.
        ValueError: if the file is a Python program, cannot be read safely, or is a YAML file larger than 256 KiB.
    """
    if path.suffix == ".json":
        return read_json(path)
    if path.suffix == ".py":
        raise ValueError(
            f"{path} is a Python program, which is not run: write its options into a YAML file, as lines like nf: 128 "
            "in sections like model:, and pass that file."
        )
    size = path.stat().st_size
    if size > _LARGEST_FILE:
        raise ValueError(f"{path} has {size:,} bytes, and a file of options has at most {_LARGEST_FILE:,}.")
    content = _read_yaml(path)
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
