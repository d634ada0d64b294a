"""The records of work that can be continued: what is written is read, and other settings are refused by name."""

import json

import pytest

from scorematch.core.records import as_stored, differences, hash_of, read_record, refuse, write_record
from scorematch.core.schema import Field

SCHEMA = {"settings": Field(dict, required=True)}


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "record.json"
    assert read_record(path, SCHEMA) is None
    settings = {"shape": (1, 4, 4), "sampler": {"levels": 3}, "seed": None}
    write_record(path, {"settings": settings})
    assert read_record(path, SCHEMA) == {"settings": as_stored(settings)}
    assert path.read_bytes() == (json.dumps({"settings": settings}, indent=2) + "\n").encode()
    assert not differences(read_record(path, SCHEMA)["settings"], as_stored(settings))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", "lacks settings. Pass another folder"),
        ('{"settings": 3}', "an object, got 3"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, text, message):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"record\.json.*{message}"):
        read_record(path, SCHEMA)


def test_differences_name_the_settings():
    before = {"b": 1, "a": {"x": 1, "y": {"z": 2}}, "c": [1], "old": 0}
    now = {"b": 2, "a": {"x": 1, "y": {"z": 3}}, "c": [1, 2], "new": {}}
    assert differences(before, now) == [
        "a.y.z was 2 and is 3",
        "b was 1 and is 2",
        "c was [1] and is [1, 2]",
        "new was None and is {}",
        "old was 0 and is None",
    ]
    assert differences(before, now, free=["a", "c", "old"], first=["new"]) == [
        "new was None and is {}",
        "b was 1 and is 2",
    ]
    assert differences(before, before) == []


def test_differing_settings_are_refused_with_what_to_do():
    refuse("here is something else", [], "Do this.")
    with pytest.raises(ValueError, match=r"^here is something else: a; b; c; and 2 more. Do this.$"):
        refuse("here is something else", list("abcde"), "Do this.")
    with pytest.raises(ValueError, match=r"^here is something else: a; b. Do this.$"):
        refuse("here is something else", ["a", "b"], "Do this.")


def test_a_hash_does_not_depend_on_the_order_of_keys():
    assert hash_of({"a": 1, "b": [2]}) == hash_of({"b": [2], "a": 1}) == "1b36ecfad9b0d632f0b6735d244545de"
    assert hash_of({"a": 1, "b": [2]}, size=8) == "67d73adc0ad6ab3e"
