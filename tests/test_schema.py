"""JSON files within limits, values of the right types and ranges, and values in messages."""

import json

import numpy as np
import pytest

from scorematch.core import json_files
from scorematch.core.json_files import read_object
from scorematch.core.messages import plain, quote, reason
from scorematch.core.schema import Field, check
from scorematch.sampling import SamplerSettings


def _nested(depth):
    """An object with this many levels of objects and lists."""
    value = 1
    for i in range(depth):
        value = {"a": value} if i % 2 == (depth - 1) % 2 else [2, value]
    return json.dumps(value)


def test_objects_are_nested_at_most_32_levels(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(_nested(32))
    assert set(read_object(path)) == {"a"}
    for depth in (33, 34, 900, 50_000):
        path.write_text(_nested(depth) if depth < 900 else '{"a":' * depth + "1" + "}" * depth)
        with pytest.raises(ValueError, match=r"a\.json is nested too deeply: at most 32 levels of lists and objects"):
            read_object(path)


def test_files_have_a_largest_size(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    monkeypatch.setattr(json_files, "_LARGEST_FILE", 8)
    assert read_object(path) == {"a": 1}
    monkeypatch.setattr(json_files, "_LARGEST_FILE", 7)
    with pytest.raises(ValueError, match=r"a\.json has more than 7 bytes, which is too large for a JSON file"):
        read_object(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", r"a\.json is not valid JSON \(Expecting property name .*\)\.$"),
        (b"\xff", r"a\.json is not valid JSON \('utf-8' codec"),
        (b'{"a": %s}' % (b"9" * 5000), r"a\.json is not valid JSON \(Exceeds the limit"),
        (b"[1]", r"a\.json must hold a JSON object, got \[1\]"),
    ],
)
def test_files_without_an_object_raise(content, message, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_object(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_object(tmp_path / "nothing.json")


def test_numbers_must_fit_into_a_float():
    field = Field(float, low=0)
    assert field.fits(10**308) and not field.fits(10**309) and not field.fits(float("inf")) and field.fits(1)
    with pytest.raises(ValueError, match=r"a: step must be a number of at least 0, got 1000000.*\.\.\.0000"):
        check({"step": 10**400}, {"step": field}, "a")


def test_numbers_above_a_bound():
    field = Field(float, above=0, high=1)
    assert field.fits(1) and field.fits(1e-300) and not field.fits(0) and not field.fits(-1.0)
    assert str(field) == "a number of more than 0 and at most 1"
    field = Field(float, above=0, below=1)
    assert field.fits(0.999) and not field.fits(1) and not field.fits(0)
    assert str(field) == "a number of more than 0 and less than 1"
    with pytest.raises(ValueError, match=r"step_size must be a number of more than 0, got 0\.0\."):
        SamplerSettings(step_size=0.0)


def test_one_value_or_a_list_of_values():
    field = Field(int, low=1, high=64, or_list=16)
    for value in (1, 64, [3], (2, 2, 1), [1] * 16):
        assert field.fits(value)
    for value in (0, 65, True, 1.0, "2", None, [], [0], [1, True], [[1]], [1] * 17, {"a": 1}):
        assert not field.fits(value)
    assert str(field) == "an integer of at least 1 and at most 64, or a list of such values"


def test_values_in_messages_are_short():
    assert quote(np.eye(2)) == "array([[1., 0.], [0., 1.]])"
    assert quote(16**10_000) == "a number of thousands of digits"
    assert len(quote([["x" * 1000] * 1000])) <= 60
    assert plain("conv_in.weight") == "conv_in.weight" and plain("a\nb") == r"'a\nb'" and len(plain("x" * 999)) <= 60
    assert reason(ValueError("one\n  two\0.")) == "one two?" and len(reason(ValueError("x" * 999))) == 240
