"""Where bfloat16 is used."""

import pytest
import torch

from scorematch import ScoreNet, dsm_loss, precision


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["emulated", "native"])
def native(request, monkeypatch):
    """A machine without and with native bfloat16."""
    monkeypatch.setattr(precision, "native_dtype", lambda device: request.param)
    return request.param


def _dtype(device, *arguments):
    """The precision of a product under the context."""
    with precision.autocast(device, *arguments):
        a = torch.ones(2, 2, device=device)
        return (a @ a).dtype


def test_autocast_is_bfloat16_where_it_is_native(native):
    assert _dtype("cpu") == _dtype(torch.device("cpu"), "auto") == native


def test_a_precision_can_be_chosen(native):
    assert _dtype("cpu", "bfloat16") == torch.bfloat16
    assert _dtype("cpu", "float32") == torch.float32


@pytest.mark.parametrize("choice", ["auto", "float32"])
def test_without_autocast_the_contexts_of_the_user_hold(choice, monkeypatch):
    monkeypatch.setattr(precision, "native_dtype", lambda device: torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert _dtype("cpu", choice) == torch.bfloat16


@pytest.mark.parametrize("names", [(), ("avx512_bf16",), ("amx_tile",), ("avx512_bf16", "amx_tile")])
def test_a_cpu_is_asked_for_its_instructions(names, monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in names, raising=False)
    assert precision.native_dtype("cpu") == (torch.bfloat16 if names else torch.float32)


def test_a_torch_that_cannot_tell_means_float32(monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
    assert precision.native_dtype(torch.device("cpu")) == torch.float32


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_is_asked_for_its_capability(capability, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert precision.native_dtype("cuda") == precision.native_dtype(torch.device("cuda", 1)) == dtype


def test_other_devices_use_float32():
    assert precision.native_dtype("mps") == precision.native_dtype("meta") == torch.float32
    with precision.autocast("meta"):  # has no autocast
        pass


def test_a_training_step(native):
    net = ScoreNet.unet(1, 16, widths=(4, 8), layers_per_block=1)
    with precision.autocast("cpu"):
        loss = dsm_loss(net, torch.rand(2, 1, 16, 16))
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_a_precision_that_is_not_known():
    with pytest.raises(ValueError, match="precision must be one of 'auto', 'float32', 'bfloat16', got 'float16'"):
        precision.autocast("cpu", "float16")
