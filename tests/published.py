"""Small networks like those of score_sde, EDM and improved-diffusion, and their files, for tests of the readers.

The networks are written from the definitions, in plain torch, with the authors' names of modules and their numbers of
groups. Only what the readers need is here: no training, no dropout. ``randomize`` gives them weights.
"""

import math
import pickle
import sys
import types

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def randomize(net, seed=0):
    """Random weights, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.6 + 0.3 * values if parameter.ndim == 1 else values / parameter[0].numel() ** 0.5)
    return net.eval()


def _quarter(channels):
    return min(32, channels // 4)


def _attend(q, k, v, heads):
    """Attention over pixels, of (N, C, H, W)."""
    n, c, h, w = q.shape
    q, k, v = (part.reshape(n, heads, c // heads, h * w) for part in (q, k, v))
    weights = (torch.einsum("nhcp,nhcq->nhpq", q, k) / math.sqrt(c // heads)).softmax(3)
    return torch.einsum("nhpq,nhcq->nhcp", weights, v).reshape(n, c, h, w)


def _sines(values, count, half):
    """Sines and cosines at ``half`` frequencies, the exponent going to 1 after ``count`` steps."""
    frequencies = torch.tensor([10_000 ** (-i / count) for i in range(half)])
    argument = values[:, None] * frequencies
    return argument.sin(), argument.cos()


def _filtered(x, taps, *, stride=1, padding=(0, 0), gain=1.0):
    kernel = torch.outer(torch.tensor(taps), torch.tensor(taps)).to(x.dtype) / sum(taps) ** 2 * gain
    x = F.pad(x, (*padding, *padding))
    return F.conv2d(x, kernel.expand(x.shape[1], 1, *kernel.shape), stride=stride, groups=x.shape[1])


def _halved(x, taps):
    return _filtered(x, taps, stride=2, padding=(len(taps) // 2 - 1,) * 2)


def _doubled(x, taps):
    apart = torch.zeros(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3], dtype=x.dtype)
    apart[..., ::2, ::2] = x
    return _filtered(apart, taps, padding=(len(taps) // 2, len(taps) // 2 - 1), gain=4.0)


# -- score_sde --------------------------------------------------------------------------------------------------------


class _NIN(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.W, self.b = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.empty(outputs))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", x, self.W) + self.b[:, None, None]


class _Block(nn.Module):
    def __init__(self, net, inputs, outputs=None, resample=None):
        super().__init__()
        outputs = outputs or inputs
        self.resample, self.scale = resample or nn.Identity(), net.scale
        self.GroupNorm_0 = nn.GroupNorm(net.groups(inputs), inputs, 1e-6)
        self.Conv_0 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.Dense_0 = nn.Linear(4 * net.nf, outputs)
        self.GroupNorm_1 = nn.GroupNorm(net.groups(outputs), outputs, 1e-6)
        self.Conv_1 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if net.name == "ncsnpp" and (inputs != outputs or resample):
            self.Conv_2 = nn.Conv2d(inputs, outputs, 1)
        elif inputs != outputs:
            self.NIN_0 = _NIN(inputs, outputs)

    def forward(self, x, embedding):
        h = self.Conv_0(self.resample(F.silu(self.GroupNorm_0(x))))
        h = h + self.Dense_0(F.silu(embedding))[:, :, None, None]
        h = self.Conv_1(F.silu(self.GroupNorm_1(h)))
        shortcut = getattr(self, "Conv_2", getattr(self, "NIN_0", nn.Identity()))
        return (shortcut(self.resample(x)) + h) / self.scale


class _Attention(nn.Module):
    def __init__(self, net, channels):
        super().__init__()
        self.scale = net.scale
        self.GroupNorm_0 = nn.GroupNorm(net.groups(channels), channels, 1e-6)
        for i in range(4):
            self.add_module(f"NIN_{i}", _NIN(channels, channels))

    def forward(self, x):
        h = self.GroupNorm_0(x)
        return (x + self.NIN_3(_attend(self.NIN_0(h), self.NIN_1(h), self.NIN_2(h), 1))) / self.scale


class _Inner(nn.Module):
    """A module with one convolution in it, and perhaps something before it."""

    def __init__(self, name, conv, before=lambda x: x):
        super().__init__()
        self.name, self.before = name, before
        self.add_module(name, conv)

    def forward(self, x):
        return getattr(self, self.name)(self.before(x))


class _Fourier(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.W = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, values):
        argument = values[:, None] * self.W * 2 * math.pi
        return torch.cat([argument.sin(), argument.cos()], 1)


class ScoreSDE(nn.Module):
    """``ncsnpp`` and ``ddpm``; the forward pass is that of the network, without the division by sigma.

    Args:
        config: the sections ``model`` and ``data`` of the authors' configuration.
    """

    def __init__(self, config):
        super().__init__()
        model, data = config["model"], config["data"]
        self.config, self.name, self.nf = config, model["name"], model["nf"]
        plus = self.name == "ncsnpp"
        self.scale = math.sqrt(2) if plus and model["skip_rescale"] else 1.0
        self.groups = _quarter if plus else lambda channels: 32
        self.register_buffer("sigmas", torch.logspace(1, -2, model["num_scales"], dtype=torch.float64))
        self.taps = (1, 3, 3, 1) if plus and model["fir"] else (1, 1)
        self.fourier = plus and model["embedding_type"] == "fourier"
        self.before = model["progressive_input"] if plus else "none"
        self.after = model["progressive"] if plus else "none"
        self.widths = [self.nf * factor for factor in model["ch_mult"]]
        self.attention = [data["image_size"] // 2**i in model["attn_resolutions"] for i in range(len(self.widths))]
        self.blocks, channels = model["num_res_blocks"], data["num_channels"]
        add = self._add = []
        if self.fourier:
            add.append(_Fourier(self.nf))
        add += [nn.Linear(self.nf * (1 + self.fourier), 4 * self.nf), nn.Linear(4 * self.nf, 4 * self.nf)]
        add.append(nn.Conv2d(channels, self.nf, 3, padding=1))
        width, kept, image = self.nf, [self.nf], channels
        for i, outputs in enumerate(self.widths):
            for _ in range(self.blocks):
                add.append(_Block(self, width, outputs))
                width = outputs
                kept.append(width)
                if self.attention[i]:
                    add.append(_Attention(self, width))
            if i < len(self.widths) - 1:
                add.append(self._resampling(width, "down"))
                if self.before == "input_skip":
                    add.append(_Inner("Conv_0", nn.Conv2d(image, width, 1)))
                if self.before == "residual":
                    name = "Conv2d_0" if model["fir"] else "Conv_0"
                    add.append(_Inner(name, nn.Conv2d(image, width, 3, stride=2)))
                    image = width
                kept.append(width)
        add += [_Block(self, width), _Attention(self, width), _Block(self, width)]
        for i in reversed(range(len(self.widths))):
            below = width
            for _ in range(self.blocks + 1):
                add.append(_Block(self, width + kept.pop(), self.widths[i]))
                width = self.widths[i]
            if self.attention[i]:
                add.append(_Attention(self, width))
            lowest = i == len(self.widths) - 1
            if self.after == "output_skip" or (self.after == "residual" and lowest):
                add.append(nn.GroupNorm(self.groups(width), width, 1e-6))
                add.append(nn.Conv2d(width, channels if self.after == "output_skip" else width, 3, padding=1))
            elif self.after == "residual":
                add.append(_Inner("Conv_0", nn.Conv2d(below, width, 3, padding=1)))
            if i:
                add.append(self._resampling(width, "up"))
        if self.after != "output_skip":
            add += [nn.GroupNorm(self.groups(width), width, 1e-6), nn.Conv2d(width, channels, 3, padding=1)]
        del self._add
        self.all_modules = nn.ModuleList(add)

    def _resampling(self, width, kind):
        if self.name == "ncsnpp":
            resample = {"down": _halved, "up": _doubled}[kind]
            return _Block(self, width, resample=lambda x: resample(x, self.taps))
        if kind == "down":
            return _Inner("Conv_0", nn.Conv2d(width, width, 3, stride=2), lambda x: F.pad(x, (0, 1, 0, 1)))
        return _Inner("Conv_0", nn.Conv2d(width, width, 3, padding=1), lambda x: _doubled(x, (1, 1)))

    def forward(self, x, labels):
        modules = iter(self.all_modules)
        if self.fourier:
            embedding = next(modules)(labels.log())
        else:
            embedding = torch.cat(_sines(labels, self.nf // 2 - 1, self.nf // 2), 1)
        embedding = next(modules)(embedding)
        embedding = next(modules)(F.silu(embedding))
        image = h = x if self.config["data"]["centered"] else 2 * x - 1
        kept = [next(modules)(h)]
        scales = len(self.widths)
        for i in range(scales):
            for _ in range(self.blocks):
                h = next(modules)(kept[-1], embedding)
                kept.append(next(modules)(h) if self.attention[i] else h)
            if i < scales - 1:
                block = next(modules)
                h = block(kept[-1], embedding) if self.name == "ncsnpp" else block(kept[-1])
                if self.before == "input_skip":
                    image = _halved(image, self.taps)
                    h = h + next(modules)(image)
                if self.before == "residual":
                    wide = F.pad(image, (0, 1, 0, 1))
                    if self.config["model"]["fir"]:
                        wide = _filtered(image, self.taps, padding=(2, 2))
                    image = h = (next(modules)(wide) + h) / self.scale
                kept.append(h)
        h = next(modules)(kept[-1], embedding)
        h = next(modules)(h)
        h = next(modules)(h, embedding)
        picture = None
        for i in reversed(range(scales)):
            for _ in range(self.blocks + 1):
                h = next(modules)(torch.cat([h, kept.pop()], 1), embedding)
            if self.attention[i]:
                h = next(modules)(h)
            if self.after == "output_skip" or (self.after == "residual" and picture is None):
                norm, conv = next(modules), next(modules)
                own = conv(F.silu(norm(h)))
                picture = own if picture is None else _doubled(picture, self.taps) + own
            elif self.after == "residual":
                picture = h = (next(modules)(_doubled(picture, self.taps)) + h) / self.scale
            if i:
                block = next(modules)
                h = block(h, embedding) if self.name == "ncsnpp" else block(h)
        if self.after == "output_skip":
            return picture
        norm, conv = next(modules), next(modules)
        return conv(F.silu(norm(h)))


def save_score_sde(net, path, average=None, **options):
    """As ``save_checkpoint``, with the state of an optimizer whose learning rate is a number of NumPy.

    Args:
        net: the network.
        path: of the file.
        average: the network whose weights are the moving average; None is ``net``.
        **options: for ``torch.save``.
    """
    trained = [parameter.detach() for parameter in (average or net).parameters() if parameter.requires_grad]
    group = {"lr": np.float64(2e-4), "betas": (0.9, 0.999), "amsgrad": False, "params": list(range(len(trained)))}
    moments = {0: {"step": 3, "exp_avg": torch.zeros(4)}}
    content = {
        "optimizer": {"state": moments, "param_groups": [group]},
        "model": nn.DataParallel(net).state_dict(),
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": trained},
        "step": 3,
    }
    torch.save(content, path, **options)


# -- EDM --------------------------------------------------------------------------------------------------------------


class Persistent(nn.Module):
    """A module that is pickled as EDM's are: its class, its attributes, and a source text that must not be run."""

    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)

    def __reduce__(self):
        text = "raise RuntimeError('the source text in a pickle was executed')"
        description = {"type": "class", "version": 6, "module_src": text, "class_name": type(self).__name__.strip("_")}
        return _reconstruct_persistent_obj, ({**description, "state": self.__dict__},)


def _reconstruct_persistent_obj(description):
    raise RuntimeError("the authors' function was called")


def save_edm(net, path, **beside):
    """As the training loop, in protocol 4."""
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    modules = {"torch_utils": types.ModuleType("torch_utils")}
    modules["torch_utils.persistence"] = types.ModuleType("torch_utils.persistence")
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = _reconstruct_persistent_obj
    sys.modules.update(modules)
    try:
        path.write_bytes(pickle.dumps({"ema": net, **beside}, protocol=4))
    finally:
        for name in modules:
            del sys.modules[name]


class Linear(Persistent):
    def __init__(self, inputs, outputs, *, bias=True):
        super().__init__(in_features=inputs, out_features=outputs)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Conv2d(Persistent):
    def __init__(self, inputs, outputs, kernel, *, taps=None, up=False, down=False):
        super().__init__(in_channels=inputs, out_channels=outputs, up=up, down=down)
        self.taps = taps
        self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel)) if kernel else None
        self.bias = nn.Parameter(torch.empty(outputs)) if kernel else None
        line = None if taps is None else torch.tensor(taps, dtype=torch.float32)
        self.register_buffer(
            "resample_filter",
            None if taps is None or not (up or down) else (torch.outer(line, line) / line.sum() ** 2)[None, None],
        )

    def forward(self, x):
        x = _doubled(x, self.taps) if self.up else _halved(x, self.taps) if self.down else x
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class _Residual(Conv2d):
    """EDM's convolution of the residual input pyramid: the filter, then the convolution of stride two."""

    def forward(self, x):
        wide = _filtered(x, self.taps, padding=(len(self.taps) // 2,) * 2)
        return F.conv2d(wide, self.weight, self.bias, stride=2)


_Residual.__name__ = "Conv2d"


class GroupNorm(Persistent):
    def __init__(self, channels, eps):
        super().__init__(num_groups=_quarter(channels), eps=eps)
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))

    def forward(self, x):
        return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class PositionalEmbedding(Persistent):
    """Cosines, then sines."""

    def forward(self, values):
        half = self.num_channels // 2
        sines, cosines = _sines(values, half - self.endpoint, half)
        return torch.cat([cosines, sines], 1)


class FourierEmbedding(Persistent):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", torch.linspace(-3, 4, width // 2))

    def forward(self, values):
        argument = torch.outer(values, 2 * math.pi * self.freqs)
        return torch.cat([argument.cos(), argument.sin()], 1)


class UNetBlock(Persistent):
    def __init__(self, net, inputs, outputs, *, heads=0, up=False, down=False):
        super().__init__(
            in_channels=inputs,
            out_channels=outputs,
            num_heads=heads,
            dropout=0.1,
            skip_scale=np.sqrt(0.5) if net.song else 1,  # the first is a number of NumPy
            adaptive_scale=not net.song,
        )
        options = {"taps": net.taps, "up": up, "down": down}
        eps = 1e-6 if net.song else 1e-5
        self.norm0 = GroupNorm(inputs, eps)
        self.conv0 = Conv2d(inputs, outputs, 3, **options)
        self.affine = Linear(net.emb, outputs * (1 if net.song else 2))
        self.norm1 = GroupNorm(outputs, eps)
        self.conv1 = Conv2d(outputs, outputs, 3)
        self.skip = None
        if inputs != outputs or up or down:
            kernel = 1 if net.song or inputs != outputs else 0
            self.skip = Conv2d(inputs, outputs, kernel, **options)
        if heads:
            self.norm2 = GroupNorm(outputs, eps)
            self.qkv = Conv2d(outputs, 3 * outputs, 1)
            self.proj = Conv2d(outputs, outputs, 1)

    def forward(self, x, embedding):
        h = self.conv0(F.silu(self.norm0(x)))
        level = self.affine(embedding)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = level.chunk(2, 1)
            h = F.silu(self.norm1(h) * (1 + scale) + shift)
        else:
            h = F.silu(self.norm1(h + level))
        x = (self.conv1(h) + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.num_heads:
            q, k, v = (self.qkv(self.norm2(x))[:, i::3] for i in range(3))
            x = (self.proj(_attend(q, k, v, self.num_heads)) + x) * self.skip_scale
        return x


class SongUNet(Persistent):
    """The forward pass takes the noise level as the network is given it, and one-hot classes or None."""

    song = True

    def __init__(
        self,
        size,
        *,
        outputs=3,
        classes=0,
        model_channels=8,
        channel_mult=(1, 2),
        num_blocks=1,
        attn_resolutions=(4,),
        embedding_type="positional",
        channel_mult_noise=1,
        encoder_type="standard",
        decoder_type="standard",
        taps=(1, 1),
        augment_dim=0,
        heads=None,
    ):
        super().__init__(size=size, taps=taps, kinds=(encoder_type, decoder_type), emb=4 * model_channels)
        self.label_dropout = 0
        widths = [model_channels * factor for factor in channel_mult]
        noise = model_channels * channel_mult_noise
        if embedding_type == "fourier":
            self.map_noise = FourierEmbedding(noise)
        else:
            self.map_noise = PositionalEmbedding(num_channels=noise, max_positions=10_000, endpoint=self.song)
        label = noise if self.song else self.emb
        self.map_label = Linear(classes, label, bias=self.song) if classes else None
        self.map_augment = Linear(augment_dim, noise, bias=False) if augment_dim else None
        self.map_layer0, self.map_layer1 = Linear(noise, self.emb), Linear(self.emb, self.emb)
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()

        def count(width, resolution, *, always=False):
            if self.song:
                return int(always or resolution in attn_resolutions)
            return width // heads if (always or resolution in attn_resolutions) else 0

        width, image, kept = model_channels if self.song else widths[0], 3, []
        for i, outer in enumerate(widths):
            r = size >> i
            if i == 0:
                self.enc[f"{r}x{r}_conv"] = Conv2d(3, width, 3)
            else:
                self.enc[f"{r}x{r}_down"] = UNetBlock(self, width, width, down=True)
                if encoder_type == "skip":
                    self.enc[f"{r}x{r}_aux_down"] = Conv2d(image, image, 0, taps=taps, down=True)
                    self.enc[f"{r}x{r}_aux_skip"] = Conv2d(image, width, 1)
                if encoder_type == "residual":
                    self.enc[f"{r}x{r}_aux_residual"] = _Residual(image, width, 3, taps=taps, down=True)
                    image = width
            kept.append(width)
            for j in range(num_blocks):
                self.enc[f"{r}x{r}_block{j}"] = UNetBlock(self, width, outer, heads=count(outer, r))
                width = outer
                kept.append(width)
        for i in reversed(range(len(widths))):
            r = size >> i
            if i == len(widths) - 1:
                self.dec[f"{r}x{r}_in0"] = UNetBlock(self, width, width, heads=count(width, r, always=True))
                self.dec[f"{r}x{r}_in1"] = UNetBlock(self, width, width)
            else:
                self.dec[f"{r}x{r}_up"] = UNetBlock(self, width, width, up=True)
            for j in range(num_blocks + 1):
                here = count(widths[i], r) if j == num_blocks or not self.song else 0
                self.dec[f"{r}x{r}_block{j}"] = UNetBlock(self, width + kept.pop(), widths[i], heads=here)
                width = widths[i]
            if self.song and (decoder_type == "skip" or i == 0):
                if decoder_type == "skip" and i < len(widths) - 1:
                    self.dec[f"{r}x{r}_aux_up"] = Conv2d(outputs, outputs, 0, taps=taps, up=True)
                self.dec[f"{r}x{r}_aux_norm"] = GroupNorm(width, 1e-6)
                self.dec[f"{r}x{r}_aux_conv"] = Conv2d(width, outputs, 3)
        if not self.song:
            self.out_norm, self.out_conv = GroupNorm(width, 1e-5), Conv2d(width, outputs, 3)

    def embed(self, noise, classes):
        cosines, sines = self.map_noise(noise).chunk(2, 1)
        h = torch.cat([sines, cosines], 1)
        if self.map_label is not None:
            classes = torch.zeros(len(noise), self.map_label.in_features) if classes is None else classes
            h = h + self.map_label(classes * math.sqrt(classes.shape[1]))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(h))))

    def forward(self, x, noise, classes=None):
        embedding, image, kept, picture = self.embed(noise, classes), x, [], None
        for name, module in self.enc.items():
            if "aux_down" in name:
                image = module(image)
            elif "aux_skip" in name:
                x = kept[-1] = x + module(image)
            elif "aux_residual" in name:
                image = x = kept[-1] = (x + module(image)) / math.sqrt(2)
            else:
                x = module(x, embedding) if isinstance(module, UNetBlock) else module(x)
                kept.append(x)
        for name, module in self.dec.items():
            if "aux_up" in name:
                picture = module(picture)
            elif "aux_norm" in name:
                own = F.silu(module(x))
            elif "aux_conv" in name:
                picture = module(own) if picture is None else picture + module(own)
            else:
                x = torch.cat([x, kept.pop()], 1) if "block" in name else x
                x = module(x, embedding)
        return picture if self.song else self.out_conv(F.silu(self.out_norm(x)))


class DhariwalUNet(SongUNet):
    song = False

    def embed(self, noise, classes):
        h = self.map_layer1(F.silu(self.map_layer0(self.map_noise(noise))))
        if self.map_label is not None and classes is not None:
            h = h + self.map_label(classes)
        return F.silu(h)


class Preconditioned(Persistent):
    """A network of EDM in its wrapper, of the class ``kind``."""

    def __init__(self, kind, model, **attributes):
        super().__init__(img_resolution=model.size, img_channels=3, use_fp16=False, **attributes)
        self.kind, self.label_dim = kind, 0 if model.map_label is None else model.map_label.in_features
        self.model = model

    def __reduce__(self):
        function, (description,) = super().__reduce__()
        return function, ({**description, "class_name": self.kind},)


# -- improved-diffusion -----------------------------------------------------------------------------------------------


class _ImprovedBlock(nn.Module):
    def __init__(self, net, inputs, outputs, resample=None):
        super().__init__()
        self.scale_shift, self.resample = net.options["use_scale_shift_norm"], resample or nn.Identity()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(net.emb, outputs * (1 + self.scale_shift)))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outputs), nn.SiLU(), nn.Identity(), nn.Conv2d(outputs, outputs, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, embedding):
        level = self.emb_layers(embedding)[:, :, None, None]
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        x = self.resample(x)
        if self.scale_shift:
            scale, shift = level.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + level)
        return self.skip_connection(x) + h


class _ImprovedAttention(nn.Module):
    def __init__(self, options, channels, heads):
        super().__init__()
        width = options["num_head_channels"]
        self.heads, self.new_order = heads if width == -1 else channels // width, options["use_new_attention_order"]
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x, embedding):
        n, c, h, w = x.shape
        rows = self.qkv(self.norm(x).flatten(2))
        if self.new_order:
            q, k, v = (part.reshape(n, c, h, w) for part in rows.chunk(3, 1))
        else:
            rows = rows.reshape(n, self.heads, 3, c // self.heads, h, w)
            q, k, v = (rows[:, :, i].reshape(n, c, h, w) for i in range(3))
        return x + self.proj_out(_attend(q, k, v, self.heads).flatten(2)).view(x.shape)


class _Down(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x, embedding):
        return self.op(x)


class _Up(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, embedding):
        return self.conv(_doubled(x, (1, 1)))


class _First(nn.Conv2d):
    def forward(self, x, embedding):
        return super().forward(x)


class ImprovedUNet(nn.Module):
    """The network of improved-diffusion and guided-diffusion.

    Args:
        options: the authors', with ``channel_mult``, a list for ``attention_resolutions``, and ``num_classes`` or None.
    """

    def __init__(self, options):
        super().__init__()
        self.options, width = options, options["num_channels"]
        self.emb, self.first = 4 * width, width
        updown = options["resblock_updown"]
        heads = options["num_heads"]
        heads_up = heads if options["num_heads_upsample"] == -1 else options["num_heads_upsample"]
        self.time_embed = nn.Sequential(nn.Linear(width, self.emb), nn.SiLU(), nn.Linear(self.emb, self.emb))
        if options["num_classes"]:
            self.label_emb = nn.Embedding(options["num_classes"], self.emb)
        widths = [int(width * factor) for factor in options["channel_mult"]]
        attention = [options["image_size"] // 2**i in options["attention_resolutions"] for i in range(len(widths))]
        width = widths[0]
        self.input_blocks = nn.ModuleList([nn.ModuleList([_First(3, width, 3, padding=1)])])
        kept = [width]
        for i, outputs in enumerate(widths):
            for _ in range(options["num_res_blocks"]):
                block = [_ImprovedBlock(self, width, outputs)]
                width = outputs
                self.input_blocks.append(
                    nn.ModuleList(block + [_ImprovedAttention(options, width, heads)] * bool(attention[i]))
                )
                kept.append(width)
            if i < len(widths) - 1:
                down = _ImprovedBlock(self, width, width, lambda x: _halved(x, (1, 1))) if updown else _Down(width)
                self.input_blocks.append(nn.ModuleList([down]))
                kept.append(width)
        self.middle_block = nn.ModuleList(
            [
                _ImprovedBlock(self, width, width),
                _ImprovedAttention(options, width, heads),
                _ImprovedBlock(self, width, width),
            ]
        )
        self.output_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            for j in range(options["num_res_blocks"] + 1):
                block = [_ImprovedBlock(self, width + kept.pop(), widths[i])]
                width = widths[i]
                if attention[i]:
                    block.append(_ImprovedAttention(options, width, heads_up))
                if i and j == options["num_res_blocks"]:
                    up = _ImprovedBlock(self, width, width, lambda x: _doubled(x, (1, 1))) if updown else _Up(width)
                    block.append(up)
                self.output_blocks.append(nn.ModuleList(block))
        outputs = 6 if options["learn_sigma"] else 3
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, x, steps, classes=None):
        sines, cosines = _sines(steps, self.first // 2, self.first // 2)
        embedding = self.time_embed(torch.cat([cosines, sines], 1))
        if classes is not None:
            embedding = embedding + self.label_emb(classes)
        kept = []
        for block in self.input_blocks:
            for module in block:
                x = module(x, embedding)
            kept.append(x)
        for module in self.middle_block:
            x = module(x, embedding)
        for block in self.output_blocks:
            x = torch.cat([x, kept.pop()], 1)
            for module in block:
                x = module(x, embedding)
        return self.out(x)


def save_improved(net, path, **options):
    """As the training loop, which saves parameters."""
    torch.save({name: nn.Parameter(tensor) for name, tensor in net.state_dict().items()}, path, **options)
