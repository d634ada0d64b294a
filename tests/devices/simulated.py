"""A simulated CUDA or MPS device, on which every branch of the package for these devices runs without a GPU.

A plugin of pytest, which has to be loaded before torch is imported:

    SIMULATED=cuda python -m pytest -p tests.devices.simulated -o addopts= tests/devices/on_samplers.py

A tensor of the device names it, such as cuda:1, holds a tensor of the CPU, and computes there. ``simulated.cpp`` gives
torch what it needs for autograd, autocast and generators on the device. As on the real one, an operation raises an
error if its tensors are on two devices, if a kernel gets two dtypes, if a generator is of another device, or for
float64 on MPS. Operations for which the host waits for the device are counted. Speed, rounding and memory are not
simulated.
"""

import collections
import contextlib
import copy
import ctypes
import hashlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import pytest

KIND = os.environ["SIMULATED"]


def _compiled():
    """The compiled extension; it is kept in the folder for temporary files."""
    root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    source = Path(__file__).with_name("simulated.cpp")
    parts = source.read_bytes(), (root / "version.py").read_bytes(), os.fsencode(root), KIND.encode()
    name = f"simulated-{KIND}-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}.so"
    path = Path(tempfile.gettempdir()) / str(os.getuid()) / name
    if not path.exists():
        path.parent.mkdir(mode=0o700, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        include = [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}"]
        flags = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC", f"-DSIMULATE_{KIND.upper()}", *include]
        libraries = [f"-L{root / 'lib'}", "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", *flags, str(source), "-o", str(made), *libraries], check=True)  # noqa: S607
        made.replace(path)
    return root, path


if "torch" in sys.modules:
    raise RuntimeError("torch looks for its devices once, when it is imported")
_root, _extension = _compiled()
ctypes.CDLL(str(_root / "lib" / "libtorch_cpu.so"), ctypes.RTLD_GLOBAL)
ctypes.CDLL(str(_extension), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils._mode_utils import no_dispatch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

CPU = torch.device("cpu")
WAITS = collections.Counter()  # operations for which the host waits, by a description with their place in the package
WRONG = collections.Counter()  # operations that raise an error on the device

# Kernels that need tensors of one dtype.
_ONE_DTYPE = (
    "group_norm",
    "convolution",
    "addmm",
    "mm",
    "bmm",
    "baddbmm",
    "linear",
    "scaled_dot_product",
    "layer_norm",
)
_ONE_DTYPE += ("lerp", "embedding")
# Operations with a result or a shape that the host needs.
_READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_unique2", "unique_dim", "unique_consecutive")
_READS += ("masked_select", "repeat_interleave")
_COPIES = ("copy_", "_to_copy")
_INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
# Operations that take numbers on the CPU, in addition to those that torch marks as pointwise.
_TAKE_NUMBERS = ("fill_", "masked_fill", "index_put", "where", "_foreach", "_fused")


def _place():
    frames = [frame for frame in traceback.extract_stack() if "/scorematch/" in frame.filename]
    return f"{frames[-1].filename.split('/scorematch/', 1)[1]}:{frames[-1].lineno}" if frames else "the test"


def _wrong(error, text):
    WRONG[f"{text} at {_place()}"] += 1
    raise error(text)


def _device_of(tensor):
    return tensor.home if isinstance(tensor, Simulated) else CPU


class Simulated(torch.Tensor):
    """A tensor of the device ``home``, with its values in ``held``, a tensor of the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held, home):
        if home.type == "mps" and held.dtype in (torch.float64, torch.complex128):
            _wrong(
                TypeError, "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
            )
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "layout": held.layout}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=home, **layout)
        made.held, made.home = held, home
        return made

    def __repr__(self):
        return f"Simulated({self.held!r}, {self.home})"

    def __format__(self, form):
        return format(self.item() if self.ndim == 0 else str(self), form)

    def tolist(self):
        WAITS[f"tolist at {_place()}"] += 1
        return self.held.detach().tolist()

    def numpy(self, **options):
        raise TypeError(f"can't convert {self.home} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *args, **options):
        return self.numpy()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        return _call(function, arguments, keywords or {})


class OnDevice(TorchDispatchMode):
    """Within this context, tensors can be created on the device and copied to it."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return _call(function, arguments, keywords or {})


def _call(function, arguments, keywords):
    """One operation of torch."""
    name, target = function.overloadpacket.__name__, keywords.get("device")
    leaves = tree_leaves((arguments, keywords))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, Simulated)]
    if "pin_memory" in keywords:
        keywords = {**keywords, "pin_memory": False}
    if not own and (target is None or torch.device(target).type != KIND):
        return function(*arguments, **keywords)
    home = own[0].home if target is None else torch.device(target)
    if home.type == KIND and home.index is None:
        home = torch.device(KIND, 0)
    generator = next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), None)
    if generator is not None and generator.device.type != home.type:
        _wrong(RuntimeError, f"Expected a '{home.type}' device type for generator but found '{generator.device.type}'")
    if name not in _COPIES:
        _check_devices(function, name, arguments, tensors)
    if any(kernel in name for kernel in _ONE_DTYPE) and not name.startswith("_foreach"):
        dtypes = {one.dtype for one in tensors if one.is_floating_point() and (one.ndim or isinstance(one, Simulated))}
        if len(dtypes) > 1:
            _wrong(RuntimeError, f"{name} with {sorted(map(str, dtypes))}")
    _count_waits(name, arguments, keywords, home)
    result = _on_host(function, arguments, keywords, generator)
    if torch.Tag.inplace_view in function.tags:  # such as unsqueeze_: the shape of the tensor itself changes too
        with no_dispatch():
            function(*arguments, **keywords)
        return arguments[0]
    if name == "_local_scalar_dense" or (target is not None and home.type != KIND):
        return result
    if name == "copy_":
        return arguments[0]
    if name == "_to_copy" and not own and result is arguments[0]:
        result = result.clone()
    known = {id(tensor.held): tensor for tensor in own}

    def wrapped(leaf):
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return known[id(leaf)] if id(leaf) in known else Simulated(leaf, home)

    return tree_map(wrapped, result)


def _on_host(function, arguments, keywords, generator):
    """The result on the CPU. A generator of the device continues from its state."""
    shadow = generator
    if generator is not None and generator.device.type == KIND:
        shadow = torch.Generator()
        shadow.set_state(generator.get_state())

    def held(leaf):
        if isinstance(leaf, Simulated):
            return leaf.held
        return shadow if leaf is generator and generator is not None else leaf

    arguments, keywords = tree_map(held, (arguments, keywords))
    if keywords.get("device") is not None:
        keywords = {**keywords, "device": "cpu"}
    result = function(*arguments, **keywords)
    if shadow is not generator:
        generator.set_state(shadow.get_state())
    if function.overloadpacket.__name__ == "native_group_norm":  # CUDA returns no channels_last
        result = (result[0].contiguous(), *result[1:])
    return result


def _check_devices(function, name, arguments, tensors):
    indices = {id(leaf) for leaf in tree_leaves(arguments[1])} if name in _INDEXED else set()
    takes_numbers = torch.Tag.pointwise in function.tags or name.startswith(_TAKE_NUMBERS)
    devices = {
        _device_of(one)
        for one in tensors
        if id(one) not in indices and (isinstance(one, Simulated) or one.ndim or not takes_numbers)
    }
    if len(devices) > 1:
        listed = sorted(map(str, devices))
        _wrong(RuntimeError, f"Expected all tensors to be on the same device, but found {listed} in {name}")


def _count_waits(name, arguments, keywords, home):
    masks = tree_leaves(arguments[1]) if name in ("index", "index_put_") else ()
    masked = any(isinstance(leaf, torch.Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in masks)
    if name in _READS or masked:
        WAITS[f"{name} at {_place()}"] += 1
    if name in _COPIES:
        into = name == "copy_"
        source, goal = _device_of(arguments[into]), _device_of(arguments[0]) if into else home
        waits = not (keywords.get("non_blocking") or (into and len(arguments) > 2 and arguments[2]))
        if waits and source.type != goal.type:
            WAITS[f"copy from {source.type} to {goal.type} at {_place()}"] += 1


# -- What the package asks of torch.cuda and torch.mps ----------------------------------------------------------------


class _Event:
    def record(self, stream=None):
        pass

    def synchronize(self):
        WAITS[f"event at {_place()}"] += 1


def _install():
    module = getattr(torch, KIND)
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    if KIND == "cuda":
        module._lazy_init = lambda: None
        module.get_device_capability = lambda device=None: (9, 0)
        module.get_device_name = lambda device=None: "simulated"
        module.Event = _Event
    torch.Tensor.pin_memory = lambda self, device=None: self
    torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device=) is a copy to the device
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.set_num_threads(1)

    from scorematch import NoiseSchedule

    def table(self, device, dtype, original=NoiseSchedule._table):  # it keeps tables that are plain tensors only
        if (device, dtype) not in self._tables:
            self._tables[device, dtype] = original(self, device, dtype)
        return self._tables[device, dtype]

    NoiseSchedule._table = table
    if KIND == "mps":  # the choice of a kernel for attention is not implemented
        attention, slow = nn.functional.scaled_dot_product_attention, torch.ops.aten._scaled_dot_product_attention_math
        nn.functional.scaled_dot_product_attention = lambda q, k, v, **options: (
            slow(q, k, v)[0] if isinstance(q, Simulated) else attention(q, k, v, **options)
        )


_install()


# -- What the tests use -----------------------------------------------------------------------------------------------


def on_cpu(value):
    return value


def on(device):
    """A function that moves copies of networks, tensors and other objects with ``to`` to the device."""

    def move(value):
        if isinstance(value, nn.Module):
            return copy.deepcopy(value).to(device)
        return value.to(device) if hasattr(value, "to") else value

    return move


def count(kind):
    """The number of waits of the package, not of the test: "reads" of values, or "copies" to the device."""
    own = {text: number for text, number in WAITS.items() if not text.endswith("the test")}
    return sum(number for text, number in own.items() if text.startswith("copy from cpu") == (kind == "copies"))


@pytest.fixture
def compare():
    """A function that compares what a function computes on the CPU and on the device.

    The function to test is called with a function that moves its argument to the device, and returns tensors and
    numbers. ``within`` is the largest relative difference; ``reads`` and ``copies`` are the largest numbers of waits.
    """

    def compare(function, within=1e-4, reads=None, copies=None, index=0):
        expected = tree_leaves(function(on_cpu))
        WAITS.clear()
        WRONG.clear()
        with OnDevice():
            found = tree_leaves(function(on(torch.device(KIND, index))))
            assert not WRONG, dict(WRONG)
            assert reads is None or count("reads") <= reads, dict(WAITS)
            assert copies is None or count("copies") <= copies, dict(WAITS)
            values = [one.detach().cpu() if isinstance(one, torch.Tensor) else one for one in found]
        assert len(values) == len(expected)
        for one, other in zip(values, expected, strict=True):
            if isinstance(other, torch.Tensor):
                assert one.shape == other.shape
                error = (one.double() - other.detach().double()).norm() / other.detach().double().norm().clamp(1e-12)
                assert other.numel() == 0 or error <= within
            elif isinstance(other, float):
                assert math.isclose(one, other, rel_tol=max(within, 1e-6), abs_tol=1e-6)

    return compare


@contextlib.contextmanager
def by_default(device):
    """Makes a device the default of torch."""
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
