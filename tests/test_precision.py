"""The choice of bfloat16 or float32."""

import contextlib

import pytest
import torch

from scorematch import ScoreNet, dsm_loss
from scorematch.core import precision


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["emulated", "native"])
def native(request, monkeypatch):
    """Runs a test without and with native bfloat16."""
    monkeypatch.setattr(precision, "native_dtype", lambda device: request.param)
    return request.param


def _dtype(device, *arguments):
    """The dtype of a matrix product within ``precision.autocast``."""
    with precision.autocast(device, *arguments):
        a = torch.ones(2, 2, device=device)
        return (a @ a).dtype


def test_autocast_is_bfloat16_if_it_is_native(native):
    assert _dtype("cpu") == _dtype(torch.device("cpu"), "auto") == native


def test_a_precision_can_be_chosen(native):
    assert _dtype("cpu", "bfloat16") == torch.bfloat16
    assert _dtype("cpu", "float32") == torch.float32


@pytest.mark.parametrize("choice", ["auto", "float32"])
def test_without_native_bfloat16_the_users_autocast_applies(choice, monkeypatch):
    monkeypatch.setattr(precision, "native_dtype", lambda device: torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert _dtype("cpu", choice) == torch.bfloat16


@pytest.mark.parametrize("names", [(), ("avx512_bf16",), ("amx_tile",), ("avx512_bf16", "amx_tile")])
def test_native_dtype_of_a_cpu_depends_on_its_instructions(names, monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in names, raising=False)
    assert precision.native_dtype("cpu") == (torch.bfloat16 if names else torch.float32)


def test_native_dtype_is_float32_if_torch_cannot_name_the_instructions(monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
    assert precision.native_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype"), [((6, 1), torch.float32), ((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_native_dtype_of_a_gpu_depends_on_its_capability(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.native_dtype("cuda") == precision.native_dtype(torch.device("cuda", 1)) == dtype
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype: contextlib.nullcontext(dtype))
    with precision.autocast("cuda") as chosen:  # training in float16 would need loss scaling
        assert chosen == (torch.bfloat16 if dtype == torch.bfloat16 else None)


def test_other_devices_use_float32():
    assert precision.native_dtype("mps") == precision.native_dtype("meta") == torch.float32
    with precision.autocast("meta"):  # this device has no autocast
        pass


def test_a_training_step_under_autocast_has_float32_gradients(native):
    net = ScoreNet.unet(1, 16, widths=(4, 8), layers_per_block=1)
    with precision.autocast("cpu"):
        loss = dsm_loss(net, torch.rand(2, 1, 16, 16))
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_an_unknown_precision_raises():
    with pytest.raises(ValueError, match=r"precision must be one of 'auto', .* 'float16', got 'float64'"):
        precision.autocast("cpu", "float64")
