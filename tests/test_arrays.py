"""Files of arrays: what is read, and what is refused before memory is taken."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from scorematch.data import arrays
from scorematch.data.arrays import read_arrays, read_shape

ARRAYS = {
    "integers": np.arange(6, dtype=np.uint8).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "swapped": np.array([1.5, -2.0], ">f4"),
    "words": np.array(["a", "bcd"]),
    "bytes": np.array([b"a", b"bcd"]),
    "flag": np.array(True),
    "empty": np.zeros((0, 3)),
    "empty words": np.array(["", ""]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_by_numpy(save, tmp_path):
    save(tmp_path / "a.npz", **ARRAYS)
    found = read_arrays(tmp_path / "a.npz")
    assert list(found) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert np.array_equal(found[name], array) and found[name].dtype == array.dtype.newbyteorder("="), name
        assert found[name].flags.writeable
    assert set(read_arrays(tmp_path / "a.npz", ("flag", "other"))) == {"flag"}
    assert read_shape(tmp_path / "a.npz", "fortran") == (2, 3)
    with pytest.raises(ValueError, match=r"a\.npz cannot be read as an \.npz file of arrays: it has no array other"):
        read_shape(tmp_path / "a.npz", "other")


def _entry(header, values=b"", version=1):
    text = header if isinstance(header, bytes) else repr(header).encode()
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + values


def _header(**changes):
    return {"descr": "<f8", "fortran_order": False, "shape": (2,), **changes}


def _object():
    data = io.BytesIO()
    np.save(data, np.array([{}, 1], dtype=object))
    return data.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_object(), r"a\.npy must hold numbers, bools or strings, got the type '\|O'"),
        (_entry(_header(), bytes(15)), r"a\.npy has 15 bytes of values for the shape \(2,\) and type float64"),
        (_entry(_header(shape=(10**12,)), bytes(8)), "has 8 bytes of values for the shape"),
        (_entry(_header(shape=(2**48,) * 32), bytes(8)), "has 8 bytes of values for the shape"),
        (_entry(_header(shape=(1,) * 33), bytes(8)), "the shape of a.npy must be a list with at most 32 entries"),
        (_entry(_header(shape=(-1,)), bytes(8)), "must be a list with at most 32 entries, each an integer of at"),
        (_entry(_header(shape=(True,)), bytes(8)), "the shape of a.npy must be a list"),
        (_entry(_header(descr="<f3"), bytes(6)), r"the header of a\.npy is damaged"),
        (_entry(_header(descr="<M8[s]"), bytes(16)), "must hold numbers, bools or strings, got the type '<M8"),
        (_entry(_header(descr=[("a", "<f8")]), bytes(16)), "must hold numbers, bools or strings, got the type '.V8'"),
        (_entry({"descr": "<f8"}), r"the header of a\.npy is damaged, not that of an array"),
        (_entry(b"__import__('os').system('true')"), r"the header of a\.npy is damaged"),
        (_entry(b"{'descr': '<f8', 'fortran_order': False, 'shape': (1L,)}", bytes(8)), "is damaged"),  # Python 2
        (_entry(_header(descr="|S0", shape=(10**12,))), "must hold numbers, bools or strings"),
        (_entry(_header(shape=(2**40, 2**40, 0))), "cannot reshape array of size 0"),
        (_entry(b"(" * 5000), r"the header of a\.npy is damaged"),
        (_entry(b" " * 20_000, version=2), "or longer than 10,000 bytes"),
        (b"\x93NUMPY\1\0\xff\xff", "or longer than 10,000 bytes"),
        (b"\x93NUM", r"the header of a\.npy is damaged, not that of an array, or longer"),
    ],
)
def test_other_arrays_are_refused(content, message, tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content)
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=rf"a\.npz cannot be read as an \.npz file of arrays: .*{message}"
        ) as caught:
            read_arrays(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000 and "\n" not in str(caught.value)
    finally:
        tracemalloc.stop()


def test_a_header_of_version_2_is_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", _entry(_header(), struct.pack("<2d", 1.5, 2.5), version=2))
    assert read_arrays(tmp_path / "a.npz")["a"].tolist() == [1.5, 2.5]


def test_other_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError, match=r"a\.npz"):
        read_arrays(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"cannot be read as an \.npz file of arrays: File is not a zip file"):
        read_arrays(path)
    np.savez(path, a=np.zeros(1000))
    path.write_bytes(path.read_bytes().replace(bytes(8000), b"1" * 8000))
    with pytest.raises(ValueError, match=r"Bad CRC-32 for file 'a\.npy'"):
        read_arrays(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", _entry(_header(), bytes(16)))
    with pytest.raises(ValueError, match=r"a\.npy is compressed by another method than deflate"):
        read_arrays(path)
    monkeypatch.setattr(arrays, "_SMALL", 1000)
    np.savez_compressed(path, a=np.zeros(1_000_000, np.uint8))
    with pytest.raises(ValueError, match="it unpacks to more than 50 times its size"):
        read_arrays(path)
