r"""Networks of NVlabs/edm: EDM's own, and networks of score_sde and guided diffusion in the same format.

A file is a pickle of a dict, whose entry ``ema`` is the moving average of a network. The network consists of nested
records. Each has the name of a class, its attributes, and the source code of its Python module, which the authors'
loader executes. This reader executes nothing: it uses the names and the attributes only. It derives the architecture
from the names and shapes of the weights and from the attributes of the modules. In the table, ``row`` is the row of the
table in ``scorematch.nets.precondition``.

===============  ========  =====================================================================================
class            row       noise levels, in units of images in [0, 1]
===============  ========  =====================================================================================
EDMPrecond       karras    those of the published sampler, from 40 to 0.001
VPPrecond        vp        the same
VEPrecond        ncsnpp    the same, from 40 to 0.01
iDDPMPrecond     ddpm      half of its table ``u``, without the zero at its end
===============  ========  =====================================================================================

The sampler settings are the published ones: Heun's method between the levels of Karras et al. with rho = 7, from 40 to
0.001 or to the ends of a narrower range. For EDM's ImageNet network they include the churn with which its FID was
measured. For iDDPMPrecond the authors round each level to the nearest one in ``u``; here a level between two of them
has a fractional time step. The part of a network for augmented images, ``map_augment``, is not used in sampling and is
left out; a training with ``augment=["nonleaking"]`` begins with a new one.

References:
    Karras et al., 2022, Elucidating the Design Space of Diffusion-Based Generative Models, arXiv:2206.00364, Table 5.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scorematch.core.arguments import argument
from scorematch.core.messages import about, quote
from scorematch.core.schema import Field, check
from scorematch.nets.unet_blocks import block_types
from scorematch.noise import NoiseSchedule
from scorematch.pretrained.configuration import Stored, translated
from scorematch.pretrained.interpreter import Globals, RefusedError
from scorematch.pretrained.pickles import NUMBERS, TENSORS, load_tensors, storage_of_bytes
from scorematch.pretrained.renaming import module_names, renamed
from scorematch.sampling.settings import SamplerSettings

NAMES: tuple[str, ...] = ("EDM",)
_NETWORKS = ("SongUNet", "DhariwalUNet")
_PRECONDITIONED = ("EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond")
_CLASSES = {
    *_PRECONDITIONED,
    *_NETWORKS,
    *("UNetBlock", "Conv2d", "Linear", "GroupNorm", "PositionalEmbedding", "FourierEmbedding"),
    *("EDMLoss", "VPLoss", "VELoss", "AugmentPipe"),  # stored next to the network, and not used
}


class _Module:
    """A module as the file describes it.

    Attributes:
        kind: the name of its class.
        state: its attributes.
    """

    def __init__(self, kind: str, state: Any) -> None:
        self.kind = kind
        self.set_state(state)

    def set_state(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise RefusedError(f"holds a {self.kind} without attributes.")
        self.state: dict[Any, Any] = state


def _object(description: Any) -> _Module:
    """Stands for ``torch_utils.persistence._reconstruct_persistent_obj``; the source code is ignored."""
    kind = description["class_name"]
    if description["type"] != "class" or not isinstance(kind, str) or kind not in _CLASSES:
        raise RefusedError(f"holds an object of the class {quote(kind)}, which no network of EDM has.")
    return _Module(kind, description["state"])


def _modules_by_name() -> _Module:
    """Stands for ``torch.nn.modules.container.ModuleDict``."""
    return _Module("ModuleDict", {})


GLOBALS: Globals = {
    **{name: made for name, made in TENSORS.items() if not isinstance(made, torch.dtype)},
    **{name: made for name, made in NUMBERS.items() if name != "_codecs.encode"},
    "torch.storage._load_from_bytes": storage_of_bytes,
    "torch_utils.persistence._reconstruct_persistent_obj": _object,
    "torch.nn.modules.container.ModuleDict": _modules_by_name,
}


def recognizes(content: Any) -> bool:
    """Whether the content of a file has this format."""
    return isinstance(content, dict) and isinstance(content.get("ema"), _Module)


def read(content: Any, path: Path, config: str | os.PathLike[str] | None = None, *, raw: bool = False) -> Stored:
    """Reads the network of a file, for ``read_checkpoint``.

    Args:
        content: the content of the checkpoint.
        path: the path of the checkpoint, for error messages.
        config: must be None; the file holds the options.
        raw: must be False; the file contains only the moving average of the weights.
    """
    if config is not None:
        raise ValueError(f"{path} is a file of EDM, which holds its own options: leave out {argument('config')}.")
    if raw:
        raise ValueError(
            f"{path} is a file of EDM, which contains only the moving average of the weights: leave out "
            f"{argument('raw')}."
        )
    return _Reader(content["ema"], path).stored()


# -- From a record to a network ---------------------------------------------------------------------------------------

_COUNT = Field(int, required=True, low=1, high=65_536)
_NUMBER = Field(float, required=True, low=-1e30, high=1e30)
_FLAG = Field(bool, required=True)
_FILTERS = ([1, 1], [1, 3, 3, 1])
_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}
_ATTENTION = {"norm2": "group_norm", "qkv": "to_qkv", "proj": "to_out.0"}
_LOWEST, _HIGHEST = 0.002, 80.0  # the noise levels of the published sampler, for images in [-1, 1]
# S_churn, S_min, S_max and S_noise of the ImageNet network; S_min and S_max are 0.05 and 50 in the authors' units.
_CHURN: dict[str, Any] = {"churn": 40.0, "churn_min": 0.025, "churn_max": 25.0, "churn_noise": 1.003}
_LONGEST_NAME = 200  # of a parameter or module
_LEVELS = 256  # in the schedule of a network that accepts any noise level


class _Reader:
    """Translates one network to our configuration and names.

    Attributes:
        modules: the modules by their full names; the outermost module has the name "".
        tensors: the parameters and buffers by their full names, without those of ``map_augment``.
        sizes: the resolutions of the scales in pixels, from high to low.
        blocks: the number of residual blocks per scale, on the way down.
        song: whether the network is a SongUNet; it is a DhariwalUNet otherwise.
    """

    def __init__(self, root: _Module, path: Path) -> None:
        self.path = path
        self.modules = dict(self._walk(root))
        self.root, self.model = root, self.modules.get("model", root)
        if root.kind not in _PRECONDITIONED or self.model.kind not in _NETWORKS:
            raise ValueError(
                f"{path} holds a network of the class {root.kind}: expected one of {', '.join(_PRECONDITIONED)} with "
                f"one of {', '.join(_NETWORKS)} in it."
            )
        stored = {
            key: tensor
            for name, module in self.modules.items()
            for part in ("_parameters", "_buffers")
            for key, tensor in self._parts(name, module, part)
            if not key.startswith("model.map_augment.")
        }
        self.tensors = load_tensors(stored, path)
        self.song = self.model.kind == "SongUNet"
        self.resolution = self._attribute("", "img_resolution", _COUNT)
        self.channels = self._attribute("", "img_channels", _COUNT)
        self.sizes = [self.resolution >> i for i in range(17) if f"model.enc.{self._at(i)}_block0" in self.modules]
        self.blocks = sum(f"model.enc.{self._at(0)}_block{j}" in self.modules for j in range(65))
        if not self.sizes:
            raise ValueError(f"{path} holds a network without blocks at its resolution, {self.resolution}.")

    def _walk(self, root: _Module) -> Iterator[tuple[str, _Module]]:
        pending, seen = [("", root)], set()
        while pending:
            name, module = pending.pop()
            if not isinstance(module, _Module) or id(module) in seen:
                raise ValueError(f"{self.path} has no module at {quote(name)}, or the same module twice.")
            seen.add(id(module))
            yield name, module
            pending += self._parts(name, module, "_modules")

    def _parts(self, name: str, module: _Module, kind: str) -> Iterator[tuple[str, Any]]:
        """Yields the parameters, buffers or modules of a module by their full names, except those that are None."""
        parts = module.state.get(kind)
        for key, part in (parts if isinstance(parts, dict) else {}).items():
            if not isinstance(key, str) or len(name) + len(key) > _LONGEST_NAME:
                raise ValueError(f"{self.path} holds a part with a name of more than {_LONGEST_NAME} characters.")
            if part is not None:
                yield f"{name}.{key}" if name else key, part

    def _at(self, scale: int) -> str:
        """The resolution of a scale as in the names of modules, such as ``32x32``."""
        return f"{self.resolution >> scale}x{self.resolution >> scale}"

    def _attribute(self, name: str, key: str, field: Field) -> Any:
        state = self.modules[name].state if name in self.modules else {}
        check(state, {key: field}, f"{self.path}: {name or 'ema'}")
        return state[key]

    def _common(self, kind: str, key: str, field: Field, expected: Any = None) -> Any:
        """Returns the value of an attribute that must be the same in all modules of a class."""
        values = {self._attribute(name, key, field) for name, module in self.modules.items() if module.kind == kind}
        if len(values) != 1 or (expected is not None and values != {expected}):
            wanted = "the same value in all" if expected is None else f"{expected} in all"
            raise ValueError(
                f"{self.path}: {key} must have {wanted} modules of the class {kind} in a {self.model.kind}, got "
                f"{quote(sorted(values))}."
            )
        return values.pop()

    def _shape(self, name: str) -> tuple[int, ...]:
        if f"model.{name}.weight" not in self.tensors or self.tensors[f"model.{name}.weight"].ndim < 2:
            raise ValueError(f"{self.path} lacks the weight of {name}.")
        return tuple(self.tensors[f"model.{name}.weight"].shape)

    def stored(self) -> Stored:
        """Returns our configuration of the network, and its weights with our names."""
        classes = self._classes()
        schedule, precondition = self._noise()
        config = {
            **(self._ncsnpp() if self.song else self._unet()),
            **({} if classes is None else {"num_class_embeds": classes, "null_class": True}),
            **precondition,
            "sample_shape": [self.channels, self.resolution, self.resolution],
            "predicts_variance": self.root.kind == "iDDPMPrecond",
        }
        config = translated(config, schedule, self._settings(schedule, classes), self.path)
        return Stored(config, self._weights(), self.path)

    def _classes(self) -> int | None:
        classes = self._attribute("", "label_dim", Field(int, required=True, low=0, high=10_000_000))
        if (self._shape("map_label")[1] if "model.map_label" in self.modules else 0) != classes:
            raise ValueError(f"{self.path}: label_dim is {classes}, which is not the width of map_label.")
        return classes or None

    def _settings(self, schedule: NoiseSchedule, classes: int | None) -> SamplerSettings:
        """The published sampler settings of networks of this kind, in our units."""
        imagenet = self.resolution > 32 and classes == 1000
        return SamplerSettings(
            "ode",
            levels=18 if self.resolution <= 32 else 256 if imagenet else 40,
            method="heun",
            # None keeps the ends of a schedule within this range.
            sigma_max=_HIGHEST / 2 if schedule.sigma_max > _HIGHEST / 2 else None,
            sigma_min=_LOWEST / 2 if schedule.sigma_min < _LOWEST / 2 else None,
            **(_CHURN if imagenet and self.root.kind == "EDMPrecond" else {}),
        )

    def _noise(self) -> tuple[NoiseSchedule, dict[str, Any]]:
        """Returns the noise levels, and the part of the configuration that interprets the output."""
        kind = self.root.kind
        if kind == "iDDPMPrecond":
            steps = self._attribute("", "M", _COUNT)
            table = self.tensors.get("u", torch.empty(0))
            with about(f"{self.path}: its table u does not hold valid noise levels"):
                return NoiseSchedule(table.double()[:steps] / 2), {"precondition": "ddpm"}
        bounds = [
            value if isinstance(value, int | float) and math.isfinite(value) else default
            for value, default in ((self.root.state.get("sigma_max"), 1e30), (self.root.state.get("sigma_min"), 0.0))
        ]
        with about(f"{self.path}: sigma_max and sigma_min do not define valid noise levels"):
            schedule = NoiseSchedule.karras(min(_HIGHEST, bounds[0]) / 2, max(_LOWEST, bounds[1]) / 2, _LEVELS)
        if kind == "EDMPrecond":
            options = {"sigma_data": self._attribute("", "sigma_data", _NUMBER)}
            return schedule, {"precondition": "karras", "precondition_options": options}
        if kind == "VEPrecond":
            return schedule, {"precondition": "ncsnpp"}
        low, steps = self._attribute("", "beta_min", _NUMBER), self._attribute("", "M", _COUNT)
        options = {"beta_min": low, "beta_max": low + self._attribute("", "beta_d", _NUMBER), "time_scale": steps - 1}
        return schedule, {"precondition": "vp", "precondition_options": options}

    def _shared(self) -> dict[str, Any]:
        """Returns the options that both architectures have, after checking the attributes in which they differ."""
        self._common("UNetBlock", "adaptive_scale", _FLAG, not self.song)
        self._common("GroupNorm", "eps", _NUMBER, 1e-6 if self.song else 1e-5)
        for name, module in self.modules.items():
            if module.kind == "GroupNorm":
                width = len(self.tensors.get(f"{name}.weight", ()))
                if self._attribute(name, "num_groups", _COUNT) != min(32, width // 4):
                    raise ValueError(f"{self.path}: num_groups of {name} must be the smaller of 32 and {width} / 4.")
        last = self.blocks - 1
        return {
            "in_channels": self.channels,
            "out_channels": self.channels * (2 if self.root.kind == "iDDPMPrecond" else 1),
            "block_out_channels": [self._shape(f"enc.{r}x{r}_block{last}.conv1")[0] for r in self.sizes],
            "layers_per_block": self.blocks,
            "time_proj_dim": self._shape("map_layer0")[1],
            "time_embedding_dim": self._shape("map_layer0")[0],
            "dropout": self._common("UNetBlock", "dropout", _NUMBER),
            "center_input_sample": self.root.kind == "VEPrecond",
        }

    def _attention(self) -> list[int | None]:
        """The number of heads at each scale, and in the middle; None where there is no attention."""
        places = [f"model.enc.{r}x{r}_block0" for r in self.sizes] + [f"model.dec.{self._lowest()}_in0"]
        return [
            self._attribute(place, "num_heads", _COUNT) if f"{place}.qkv" in self.modules else None for place in places
        ]

    def _lowest(self) -> str:
        return f"{self.sizes[-1]}x{self.sizes[-1]}"

    def _embedding(self, *, endpoint: bool) -> str:
        kind = self.modules["model.map_noise"].kind if "model.map_noise" in self.modules else None
        if kind == "FourierEmbedding" and self.song:
            return "fourier"
        self._common("PositionalEmbedding", "endpoint", _FLAG, endpoint)
        self._common("PositionalEmbedding", "max_positions", _COUNT, 10_000)
        return "positional"

    def _ncsnpp(self) -> dict[str, Any]:
        """The configuration of NCSN++ for a SongUNet."""
        heads, scales = self._attention(), len(self.sizes)
        if set(heads) - {None, 1} or heads[-1] is None:
            raise ValueError(f"{self.path}: a SongUNet has attention of one head, got {heads} heads.")
        scale = self._common("UNetBlock", "skip_scale", _NUMBER)
        if not (scale == 1 or math.isclose(scale, math.sqrt(0.5), rel_tol=1e-6)):
            raise ValueError(f"{self.path}: skip_scale must be 1 or the square root of 1/2, got {scale}.")
        inputs = {name.rpartition("_")[2] for name in self.modules if re.fullmatch(r"model\.enc\.\w+_aux_\w+", name)}
        output = scales > 1 and f"model.dec.{self._lowest()}_aux_conv" in self.modules
        return {
            "family": "ncsnpp",
            **self._shared(),
            "model_channels": self._shape(f"enc.{self._at(0)}_conv")[0],
            "attention": [count is not None for count in heads[:-1]],
            "time_embedding_type": self._embedding(endpoint=True),
            "resample_filter": self._filter(),
            "input_pyramid": "residual" if "residual" in inputs else "skip" if "skip" in inputs else "none",
            "output_pyramid": "skip" if output else "none",
            "skip_rescale": scale != 1,
        }

    def _unet(self) -> dict[str, Any]:
        """The configuration of the U-Net for a DhariwalUNet."""
        heads = self._attention()
        self._common("UNetBlock", "skip_scale", _NUMBER, 1)
        if self._filter() != [1, 1]:
            raise ValueError(f"{self.path}: resample_filter of a DhariwalUNet must be [1, 1], got {self._filter()}.")
        shared = self._shared()
        return {
            "family": "unet",
            **shared,
            **block_types([count is not None for count in heads[:-1]], residual=True),
            "norm_num_groups": None,
            "attn_norm_num_groups": min(32, shared["block_out_channels"][-1] // 4),
            "norm_eps": 1e-5,
            "resnet_time_scale_shift": "scale_shift",
            "time_embedding_type": self._embedding(endpoint=False),
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "add_attention": heads[-1] is not None,
            "attention_heads": [count or 1 for count in (*heads[:-2], heads[-2] or heads[-1])],
        }

    def _filter(self) -> list[int]:
        """The resampling filter; each module that resamples has a copy of it."""
        copies = [tensor for name, tensor in self.tensors.items() if name.endswith(".resample_filter")]
        for line in _FILTERS:
            values = torch.tensor(line, dtype=torch.float64, device="cpu")
            kernel = (torch.outer(values, values) / values.sum() ** 2)[None, None]
            if all(copy.shape == kernel.shape and torch.allclose(copy.double(), kernel) for copy in copies):
                return line
        raise ValueError(f"{self.path}: resample_filter must be one of {_FILTERS} in all modules.")

    # -- Weights ------------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, Tensor]:
        """The tensors by their names in our network."""
        modules = {f"model.{name}": ours for name, ours in module_names(self._places(), _BLOCK, _ATTENTION).items()}
        special = r"u|.*\.resample_filter|model\.map_label\..*|model\.map_noise\.freqs"
        tensors = {name: tensor for name, tensor in self.tensors.items() if not re.fullmatch(special, name)}
        # The rows of q, k and v are interleaved.
        weights = renamed(tensors, modules, self.path, lambda rows, _: [rows[i::3] for i in range(3)])
        if "model.map_noise.freqs" in self.tensors:
            weights["time_proj.weight"] = self.tensors["model.map_noise.freqs"]
        if "model.map_label.weight" in self.tensors:
            weights["class_embedding.weight"] = self._class_embedding()
        return weights

    def _places(self) -> Iterator[tuple[str, str]]:
        """Yields the authors' name and our name of each module; a block may have attention in it."""
        yield "map_layer0", "time_embedding.linear_1"
        yield "map_layer1", "time_embedding.linear_2"
        yield f"enc.{self._at(0)}_conv", "conv_in"
        yield "out_norm", "conv_norm_out"
        yield "out_conv", "conv_out"
        yield f"dec.{self._lowest()}_in0", "mid_block.resnets.0"
        yield f"dec.{self._lowest()}_in0", "mid_block.attentions.0"
        yield f"dec.{self._lowest()}_in1", "mid_block.resnets.1"
        resampling = ("resnet_down", "resnet_up") if self.song else ("downsamplers.0", "upsamplers.0")
        for i, r in enumerate(self.sizes):
            down, up, size = f"down_blocks.{i}", f"up_blocks.{len(self.sizes) - 1 - i}", f"{r}x{r}"
            for j in range(self.blocks + 1):
                yield f"enc.{size}_block{j}", f"{down}.resnets.{j}"
                yield f"enc.{size}_block{j}", f"{down}.attentions.{j}"
                yield f"dec.{size}_block{j}", f"{up}.resnets.{j}"
                yield f"dec.{size}_block{j}", f"{up}.attentions.{0 if self.song else j}"
            yield f"dec.{size}_aux_norm", "conv_norm_out" if i == 0 else f"{up}.skip_norm"
            yield f"dec.{size}_aux_conv", "conv_out" if i == 0 else f"{up}.skip_conv"
            # A module that resamples has the resolution of its output.
            yield f"enc.{size}_down", f"down_blocks.{i - 1}.{resampling[0]}"
            yield f"enc.{size}_aux_skip", f"down_blocks.{i - 1}.skip_conv"
            yield f"enc.{size}_aux_residual", f"down_blocks.{i - 1}.skip_conv"
            yield f"dec.{size}_up", f"up_blocks.{len(self.sizes) - 2 - i}.{resampling[1]}"

    def _class_embedding(self) -> Tensor:
        """A row for each class, and one for samples without a class, whose input is zero.

        In a SongUNet the input of a class is the square root of the number of classes.
        """
        weight = self.tensors["model.map_label.weight"].double().transpose(0, 1)
        rows = torch.cat([weight * math.sqrt(len(weight)) if self.song else weight, torch.zeros_like(weight[:1])])
        bias = self.tensors.get("model.map_label.bias")
        return (rows if bias is None else rows + bias.double()).float()
