"""The reader of pickles: what it reads, and what it refuses without running or allocating anything."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from scorematch.core.messages import quote
from scorematch.pretrained import interpreter, pickles
from scorematch.pretrained.edm import GLOBALS as EDM
from scorematch.pretrained.pickles import NUMBERS, TENSORS, load_tensors, read_pickle, storage_of_bytes
from tests.helpers import convert

ALL = {**TENSORS, **NUMBERS, **EDM}
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

BYTES = {**TENSORS, "torch.storage._load_from_bytes": storage_of_bytes}


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def _refused(path, match, known=None):
    """Reading raises one sentence that names the file, prints nothing, and allocates little."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match) as caught:
            read_pickle(path, known)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < len(str(path)) + 400
    assert peak < 300_000 + 10 * path.stat().st_size


# -- What it reads

TENSOR = torch.arange(24.0).view(2, 3, 4)
WEIGHTS = {
    "plain": TENSOR,
    "part": TENSOR[1, :, 1:3],
    "transposed": TENSOR.permute(2, 0, 1),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "double": torch.rand(3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    "bfloat16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "half": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "integers": torch.tensor([[1, -2]]),
    "flags": torch.tensor([True, False]),
}


@pytest.mark.parametrize(
    ("container", "protocol"),
    [("zip", 2), ("zip", 4), ("deflated", 2), ("old", 2), ("old", 4), ("plain", 3), ("plain", 4), ("plain", 5)],
)
def test_it_reads_what_torch_saves(container, protocol, tmp_path):
    path = tmp_path / "weights.pt"
    if container == "plain":
        with path.open("wb") as file:
            pickle.dump(WEIGHTS, file, protocol=protocol)
    else:
        torch.save(WEIGHTS, path, pickle_protocol=protocol, _use_new_zipfile_serialization=container != "old")
    if container == "deflated":
        _rewrite(path, compression=zipfile.ZIP_DEFLATED)
    found = load_tensors(read_pickle(path, BYTES).content, path)
    assert list(found) == list(WEIGHTS)
    for name, tensor in WEIGHTS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def _rewrite(path, compression=zipfile.ZIP_STORED, edit=lambda name, data: data):
    """Writes the entries of a zip file anew."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: edit(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values_are_read(protocol, tmp_path):
    shared = ["a"]
    values = {
        "texts": ["", "é" * 300, "\udc80"],
        "numbers": [0, 255, 256, -1, 2**31, -(2**62), 1.5, -0.0, float("inf")],
        "nothing": [None, True, False, (), (1,), (1, 2), (1, 2, 3), tuple(range(1000)), {}, set(), {"a", "b"}],
        "shared": [shared, shared],
        "ordered": OrderedDict(a=1, b=OrderedDict()),
        7: "an integer as a key",
    }
    if protocol == 2:
        values["nothing"] = values["nothing"][:-2]  # sets have no operation of their own
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(values, protocol=protocol))
    content, used = read_pickle(tmp_path / "a.pkl")
    assert content == values and used == {"collections.OrderedDict"}
    assert content["shared"][0] is content["shared"][1]


@pytest.mark.parametrize("container", ["zip", "plain"])
def test_it_reads_numbers_of_numpy(container, tmp_path):
    values = {"lr": np.float64(2e-4), "scale": np.float32(0.1), "swapped": np.array(1.5, dtype=">f8")[()]}
    if container == "zip":
        torch.save(values, tmp_path / "a.pt")
    else:
        (tmp_path / "a.pt").write_bytes(pickle.dumps(values, protocol=4))
    content, used = read_pickle(tmp_path / "a.pt", {**TENSORS, **NUMBERS})
    assert content == values and all(type(value) is float for value in content.values())
    assert "numpy.dtype" in used
    _refused(tmp_path / "a.pt", "refers to 'numpy")


def test_numbers_stay_in_the_file(tmp_path):
    """Reading takes no memory in proportion to a file whose entries are stored."""
    torch.save({"a": torch.zeros(500_000), "b": torch.zeros(500_000)}, tmp_path / "a.pt")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"a": torch.zeros(1_000_000)}, protocol=4))
    for name in ("a.pt", "a.pkl"):
        tracemalloc.start()
        try:
            found = load_tensors(read_pickle(tmp_path / name, BYTES).content, tmp_path / name)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 500_000 and not any(tensor.untyped_storage().resizable() for tensor in found.values())


# -- Other files


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<!DOCTYPE html><html>Google Drive - Virus scan warning", "is a web page: the download failed"),
        (b"<HTML>\n", "is a web page: the download failed"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, not a PyTorch checkpoint"),
        (b"\x93NUMPY\x01\x00", "is a NumPy array, not a PyTorch checkpoint"),
        (b"\x1f\x8b\x08\x00", "is compressed by gzip"),
        (b"\x84\xa9optimizer\x82", "is a MessagePack file, as JAX writes checkpoints"),
        (b"model:\n  nf: 128\n", "is not a PyTorch checkpoint: it is neither a zip file of torch.save nor a pickle"),
        (b"\x89PNG\r\n\x1a\n", "is not a PyTorch checkpoint: it is neither"),
        (b"(lp0\n.", "is not a PyTorch checkpoint: it is neither"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (struct.pack("<Q", 2) + b"{}" + bytes(20), "is a safetensors file. Load its folder with ScoreNet.from_pretr"),
        (b"", r"\(0 bytes\) is not a complete ckpt file\. Save or download it again"),
        (b"\x80\x04", r"\(2 bytes\) is not a complete ckpt file"),
        (b"PK\x03\x04" + bytes(100), r"\(104 bytes\) is not a complete ckpt file"),
        (b"\x80\x00N.", "holds a pickle of protocol 0, which is not supported"),
    ],
)
def test_a_file_of_another_kind_is_named_for_what_it_is(data, message, tmp_path):
    (tmp_path / "a.ckpt").write_bytes(data)
    _refused(tmp_path / "a.ckpt", message)


def test_archives_of_another_kind_are_named_for_what_they_are(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    _refused(tmp_path / "a.npz", "is a NumPy archive, not a PyTorch checkpoint")
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    _refused(tmp_path / "b.zip", "is a zip file, not a PyTorch checkpoint")
    with zipfile.ZipFile(tmp_path / "c.pt", "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02N.")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
    _refused(tmp_path / "c.pt", "is a TorchScript program, not a checkpoint")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        read_pickle(tmp_path / "nothing.pt")


# -- Calls


@pytest.fixture(params=["zip", "old", "plain"])
def write(request, tmp_path):
    """Writes an object into a container."""

    def write(content):
        path = tmp_path / "a.pth"
        if request.param == "plain":
            path.write_bytes(pickle.dumps(content, protocol=4))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=request.param == "zip")
        return path

    return write


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (print, ("this code ran",)),
        (eval, ("print('this code ran')",)),
        (getattr, (3, "real")),
        (torch.load, ("a.pth",)),
        (torch.zeros, (10**12,)),
        (torch._utils._rebuild_device_tensor_from_numpy, (1,)),
        (bytearray, (10**10,)),
        (np.zeros, (3,)),
    ],
)
def test_other_names_are_refused(function, arguments, write, capsys):
    path = write({"model": Call(function, *arguments), "weights": torch.zeros(3)})
    _refused(path, r"refers to '[\w.]+', which weights do not need; it was not loaded, because a pickle can run c", ALL)
    assert "this code ran" not in capsys.readouterr().out


def _pickle(*parts):
    return b"\x80\x04" + b"".join(parts) + b"."


def _text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _name(full):
    module, _, name = full.rpartition(".")
    return f"c{module}\n{name}\n".encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_pickle(b"]", b"(", _text("a"), b"i", b"os\nsystem\n"), r"with the operation INST, which weights do not need"),
        (_pickle(_text("os"), _text("system"), b"\x93", b")", b"R"), "refers to 'os.system'"),
        (_pickle(_text("os.path"), _text("x" * 10_000), b"\x93"), "refers to 'os.path.xxxx.*xx'"),
        (_pickle(_text("os"), _text("a\nb"), b"\x93"), r"refers to 'os.a\\nb'"),
        (_pickle(_name("torch.FloatStorage"), b")", b"R"), "expected function, got dtype"),
        (_pickle(_text("os"), b")", b"R"), "expected function, got str"),
        (_pickle(_name("collections.OrderedDict"), b"]", b"R"), "expected tuple, got list"),
        (_pickle(_name("collections.OrderedDict"), b"K\x01\x85", b"R"), "is not a complete"),
        (_pickle(b"]", b"K\x01", b"K\x02", b"s"), "expected dict, got list"),
        (_pickle(b"}", b"K\x01", b"a"), "expected list, got dict"),
        (_pickle(b"}", b"(K\x01\x85K\x02u"), "a dict with a key that is not a string, None, or an integer"),
        (_pickle(b"}", b"(\x8a\x20" + b"\x7f" * 32 + b"K\x02u"), "a dict with a key that is not a string, None, or an"),
        (_pickle(b"}", b"(K\x01u"), "is not a complete"),
        (_pickle(b"\x8a\x40" + b"\x7f" * 64), "holds an integer of more than 32 bytes"),
        (_pickle(b"\x8b\xff\xff\xff\x7f"), "is not a complete"),
        (_pickle(b"\x8e" + b"\xff" * 8), "is not a complete"),
        (_pickle(b"B\xff\xff\xff\x7f"), "is not a complete"),
        (_pickle(b"r\xff\xff\xff\x7f"), "is not a complete"),
        (_pickle(b"h\x05"), "is not a complete"),
        (_pickle(b"a"), "is not a complete"),
        (_pickle(b"]e"), "is not a complete"),
        (_pickle(), "is not a complete"),
        (_pickle(b"NN"), "is not a complete"),
        (_pickle(_text("storage"), b"Q"), "expected tuple, got str"),
        (_pickle(b"]b"), "is not a complete"),
        (_pickle(b"N]b"), "is not a complete"),
    ],
)
def test_pickles_that_do_something_else_are_refused(data, message, tmp_path):
    (tmp_path / "a.pkl").write_bytes(data)
    _refused(tmp_path / "a.pkl", message)


def test_a_memo_far_away_takes_no_memory(tmp_path):
    """pickle.load would allocate room for two billion objects."""
    (tmp_path / "a.pkl").write_bytes(_pickle(b"Nr\xff\xff\xff\x7f"))
    assert read_pickle(tmp_path / "a.pkl").content is None


@pytest.mark.parametrize("data", [_pickle(b"N", b"\x85" * 30_000), _pickle(b"]" * 20_000, b"a" * 19_999)])
def test_deep_nesting_ends_in_one_sentence(data, tmp_path):
    (tmp_path / "a.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.pkl is a (tuple|list), not a checkpoint of"):
        convert(tmp_path / "a.pkl", tmp_path / "out")


def test_a_value_that_holds_another_many_times_is_quoted_quickly(tmp_path):
    """Its text would have 2^60 characters."""
    doubled = _pickle(b"]q\x00", *(bytes([*b"0(h", i, *b"h", i, *b"tq", i + 1]) for i in range(60)))
    nested = doubled[2:-1]
    data = _pickle(
        _name("torch._utils._rebuild_tensor_v2"), b"(", _name("torch.FloatStorage"), nested, b"NN", b"t", b"R"
    )
    (tmp_path / "a.pkl").write_bytes(data)
    _refused(tmp_path / "a.pkl", "is not a complete|holds an unsupported tensor")
    (tmp_path / "a.pkl").write_bytes(doubled)
    content = read_pickle(tmp_path / "a.pkl").content
    assert len(quote(content)) <= 60


def test_the_number_of_operations_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(interpreter, "_OPERATIONS", 1000)
    (tmp_path / "a.pkl").write_bytes(_pickle(b"]", b"N0" * 500))
    _refused(tmp_path / "a.pkl", "holds a pickle of more than 1,000 operations")
    # Those of a storage inside count, each time that it is read.
    inner = io.BytesIO()
    torch.save(torch.zeros(3).storage(), inner, _use_new_zipfile_serialization=False)
    stored = b"B" + struct.pack("<I", len(inner.getvalue())) + inner.getvalue()
    once = _name("torch.storage._load_from_bytes") + stored + b"q\x01\x85R0"
    again = _name("torch.storage._load_from_bytes") + b"h\x01\x85R0"
    (tmp_path / "a.pkl").write_bytes(_pickle(once, again, b"N"))
    assert read_pickle(tmp_path / "a.pkl", BYTES).content is None
    (tmp_path / "a.pkl").write_bytes(_pickle(once, again * 60, b"N"))
    _refused(tmp_path / "a.pkl", "holds a pickle of more than 1,000 operations", BYTES)


# -- Tensors


def _tensor(storage, offset, size, stride):
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())


@pytest.mark.parametrize(
    ("offset", "size", "stride", "message"),
    [
        (0, (13,), (1,), "does not fit into its storage of 12 numbers"),
        (1, (12,), (1,), "does not fit into its storage"),
        (0, (3, 4), (5, 1), "does not fit into its storage"),
        (12, (1,), (1,), "does not fit into its storage"),
        (12, (), (), "does not fit into its storage"),
        (0, (10**11,), (0,), "does not fit into its storage"),
        (0, (10**6, 10**6), (0, 0), "does not fit into its storage"),
        (0, (4, 4), (1, 1), "does not fit into its storage"),
        (-1, (1,), (1,), "of an impossible size, -1"),
        (0, (2,), (-1,), "of an impossible size, -1"),
        (0, (2**60, 0), (1, 1), "of an impossible size"),
        (0, (2.5,), (1,), "of an impossible size, 2.5"),
        (0, (True,), (1,), "of an impossible size, True"),
        (0, (1,) * 17, (1,) * 17, "holds an unsupported tensor"),
        (0, (1, 2), (1,), "holds an unsupported tensor"),
        (0, 3, (1,), "is not a complete"),
    ],
)
def test_a_tensor_that_leaves_its_storage_is_refused(offset, size, stride, message, write):
    storage = torch.arange(12.0).storage()
    path = write({"weight": _tensor(storage, offset, size, stride)})
    _refused(path, message, BYTES)


def test_numbers_of_other_types_are_refused(write, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "a.pt")
    message = "holds numbers of an unsupported type. Only float64, float32, float16, bfloat16, int64, int32"
    _refused(tmp_path / "a.pt", message, {**BYTES, "torch.FloatStorage": pickles._dictionary})
    for value, wanted in ((np.int64(3), "'i8'"), (np.bool_(True), "'b1'")):
        _refused(write({"a": value}), f"holds a NumPy number of type {wanted}. Only 'f8' and 'f4' are supported", ALL)


def test_a_tensor_of_something_else_is_refused(write):
    _refused(write(_tensor([1.0, 2.0], 0, (2,), (1,))), "holds an unsupported tensor", BYTES)
    _refused(write(Call(torch._utils._rebuild_parameter, 3, True, None)), "a parameter that is not a tensor", BYTES)


def test_numbers_that_many_tensors_share_are_not_multiplied(tmp_path):
    shared = torch.zeros(1000)
    torch.save({"a": shared, "b": shared}, tmp_path / "a.pt")  # tied weights
    assert len(load_tensors(read_pickle(tmp_path / "a.pt").content, tmp_path / "a.pt")) == 2
    torch.save({str(i): shared for i in range(100)}, tmp_path / "a.pt")
    content = read_pickle(tmp_path / "a.pt").content
    with pytest.raises(ValueError, match=r"a\.pt describes 400,000 bytes of tensors, and holds 4,000 bytes for them"):
        load_tensors(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt does not hold the weights of a network, a mapping of names to tens"):
        load_tensors({"a": content["0"], "b": 3}, tmp_path / "a.pt")


@pytest.mark.parametrize("nested", [Call(print, "this code ran"), [1, 2], {"a": 1}, 3])
def test_only_numbers_are_read_from_the_bytes_of_a_storage(nested, tmp_path, capsys):
    """torch's own _load_from_bytes runs what is in them."""
    inner = io.BytesIO()
    torch.save(nested, inner, _use_new_zipfile_serialization=False)
    outer = {"ema": _tensor(Call(torch.storage._load_from_bytes, inner.getvalue()), 0, (1,), (1,))}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(outer, protocol=4))
    message = "refers to '__builtin__.print'" if isinstance(nested, Call) else "whose bytes are not numbers"
    _refused(tmp_path / "a.pkl", message, BYTES)
    plain = {"ema": _tensor(Call(torch.storage._load_from_bytes, pickle.dumps(nested)), 0, (1,), (1,))}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(plain, protocol=4))
    _refused(tmp_path / "a.pkl", "whose bytes are not numbers|refers to 'builtins.print'", BYTES)
    assert "this code ran" not in capsys.readouterr().out


# -- Containers


def test_entries_of_other_sizes_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    for edit in (lambda data: data[:-4], lambda data: data * 2):
        torch.save({"weight": torch.zeros(100)}, path)
        _rewrite(path, edit=lambda name, data, edit=edit: edit(data) if "/data/" in name else data)
        _refused(path, r"holds (396|800) bytes for 100 numbers of torch.float32")
    torch.save({"weight": torch.zeros(100)}, path)
    _rewrite(path, edit=lambda name, data: data.replace(b"Kd", b"J\x00\x00\x00\x7f") if "pkl" in name else data)
    _refused(path, r"holds 400 bytes for 2,130,706,432 numbers|does not fit into its storage of")


def test_an_older_file_of_other_sizes_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.zeros(100)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    count = struct.pack("<q", 100)
    for value in (2**40, -1, 99, 101):
        path.write_bytes(data.replace(count, struct.pack("<q", value)))
        _refused(path, rf"holds {value:,} numbers for a storage of 100")
    path.write_bytes(data[:-1])
    _refused(path, "is not a complete pt file")


@pytest.mark.parametrize("inner", ["a/data.pkl", "a/data/0"])
def test_a_bomb_is_refused(inner, tmp_path):
    """A thousand times as much as the file holds; nothing of it is unpacked."""
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr(inner.replace("data.pkl", "data/1"), bytes(2_000_000))
        archive.writestr("a/byteorder", "little")
    _refused(path, "unpacks to more than 50 times its size, which trained weights do not")


def test_an_entry_that_says_less_than_it_unpacks_to_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.zeros(1000)}, path)
    _rewrite(path, zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", 4000), struct.pack("<I", 400)))
    _refused(path, "holds 400 bytes for 1,000 numbers")


def test_damaged_numbers_are_found(tmp_path):
    path = tmp_path / "a.pt"
    weights = torch.arange(1000.0)
    torch.save({"weight": weights}, path)
    data = bytearray(path.read_bytes())
    data[data.index(weights.numpy().tobytes()) + 2000] ^= 1
    path.write_bytes(data)
    content = read_pickle(path).content
    with pytest.raises(
        ValueError, match=r"a\.pt is damaged: its entry 'a/data/0' does not have the checksum that is s"
    ):
        load_tensors(content, path)


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="torch always writes checksums")
def test_a_file_without_checksums_is_read(tmp_path):
    path = tmp_path / "a.pt"
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": TENSOR}, path)
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_tensors(read_pickle(path).content, path)["weight"], TENSOR)


def test_entries_in_another_form_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.zeros(10)}, path)
    _rewrite(path, zipfile.ZIP_BZIP2)
    _refused(path, "is encrypted or compressed in an unsupported way. Only entries that are stored")
    torch.save({"weight": torch.zeros(10)}, path)
    _rewrite(path, edit=lambda name, data: b"big" if name.endswith("byteorder") else data)
    _refused(path, "was written on a machine with another byte order")
    torch.save({"weight": torch.zeros(10)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"))
    _refused(path, "was written on a machine with another byte order")


def test_a_storage_without_its_entry_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.zeros(10)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist() if "/data/" not in name}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    _refused(path, "is not a complete pt file")
