"""The record of work that can be continued: a JSON file beside the results, with the settings that made them.

A training run, a folder of samples and a table of measured settings each have such a record. The first call writes it.
A later call reads it, compares its settings with those that are asked for, and continues only if they are the same:

    before = read_record(path, schema)                       # None if there is no record yet
    if before is not None:
        differing = differences(before["settings"], as_stored(settings))
        refuse(f"{folder} has samples with other settings", differing, "Pass those settings, or another folder.")
    write_record(path, {"format_version": 1, "settings": settings})
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from scorematch.core.files import write_whole
from scorematch.core.json_files import read_object
from scorematch.core.messages import quote
from scorematch.core.schema import Field, check


def read_record(path: Path, schema: Mapping[str, Field]) -> dict[str, Any] | None:
    """The content of a record; None if there is no such file.

    Args:
        path: the path of the record.
        schema: a ``Field`` for each key.

    Raises:
        ValueError: if the record is damaged or does not fit the schema.
    """
    try:
        content = read_object(path)
        check(content, schema, str(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{error} Pass another folder.") from error
    return content


def write_record(path: Path, content: Mapping[str, Any], *, durable: bool = False) -> None:
    """Writes a record atomically; with ``durable`` it is on the disk when the call returns."""
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode(), durable=durable)


def as_stored(content: Any) -> Any:
    """Values for JSON as a record has them after it is read: lists instead of tuples, and strings as keys."""
    return json.loads(json.dumps(content))


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], *, free: Collection[str] = (), first: Sequence[str] = ()
) -> list[str]:
    """The settings that differ between a record and a call, as in "seed was 0 and is 1".

    Args:
        before: the settings in the record.
        now: the settings of the call, as ``as_stored`` returns them. A setting inside another one is named with dots.
        free: the settings that may differ.
        first: the settings to list before the others, which are listed in the order of their names.

    Example:
        >>> differences({"seed": 0, "sampler": {"levels": 3}}, {"seed": 1, "sampler": {"levels": 4}}, first=["seed"])
        ['seed was 0 and is 1', 'sampler.levels was 3 and is 4']
    """
    before, now = (_flat({key: value for key, value in each.items() if key not in free}) for each in (before, now))
    return [
        f"{key} was {quote(before.get(key))} and is {quote(now.get(key))}"
        for key in sorted({*before, *now}, key=lambda key: (key not in first, key))
        if before.get(key) != now.get(key)
    ]


def refuse(what: str, differing: Sequence[str], advice: str, *, most: int = 3) -> None:
    """Raises ValueError if settings differ.

    Args:
        what: the beginning of the message, such as "samples/ has samples with other settings".
        differing: what differs, from ``differences``.
        advice: the end of the message: what to do.
        most: the largest number of differences in the message.
    """
    if differing:
        more = f"; and {len(differing) - most} more" if len(differing) > most else ""
        raise ValueError(f"{what}: {'; '.join(differing[:most])}{more}. {advice}")


def hash_of(values: Any, *, size: int = 16) -> str:
    """A hash of values for JSON with ``size`` bytes, in hexadecimal digits; the order of keys has no effect."""
    return hash_of_bytes(json.dumps(values, sort_keys=True).encode(), size=size)


def hash_of_bytes(content: bytes | memoryview, *, size: int = 16) -> str:
    """A hash of a content with ``size`` bytes, in hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=size).hexdigest()


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update({f"{key}.{inner}": entry for inner, entry in _flat(value).items()})
        else:
            flat[key] = value
    return flat
