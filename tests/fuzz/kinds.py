"""The kinds of cases: small undamaged files, which of them are damaged, and the function that reads them."""

import functools
import io
import json
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save

from scorematch import NoiseSchedule, ScoreNet
from scorematch.core.records import hash_of, hash_of_bytes
from scorematch.data import open_images, read_image, read_mask, read_samples
from scorematch.evaluation import Extractor, Statistics, tune
from scorematch.nets import FAMILIES
from scorematch.sampling import ODESampler, SamplerSettings, sample_to
from scorematch.training import train
from tests import published as theirs
from tests.fuzz import mutators
from tests.helpers import convert

Files = dict[str, Any]  # the content of each file by its path: bytes, or a Saved


class Saved(NamedTuple):
    """A file of ``torch.save`` or of EDM, whose objects can be changed before they are written.

    Attributes:
        make: a function that returns new objects.
        write: a function that writes them to a path.
    """

    make: Callable[[], Any]
    write: Callable[[Any, Path], None]

    def __bytes__(self):
        return _folder(lambda folder: self.write(self.make(), folder / "a"))["a"]


class Kind(NamedTuple):
    """One kind of case.

    Attributes:
        files: a function that returns undamaged files to choose from.
        damaged: the patterns of the names of the files that are damaged.
        read: a function that reads the files of a folder, and may write to its subfolder ``out``.
        sign: a function that corrects the hashes in damaged files, which is called for half of the cases; or None.
    """

    files: Callable[[], list[Files]]
    damaged: tuple[str, ...]
    read: Callable[[Path], object]
    sign: Callable[[Files], None] | None = None


def damage(case, rng):
    """Undamaged files of a kind, of which one is then damaged."""
    files, patterns = dict(rng.choice(case.files())), case.damaged
    name = rng.choice([name for name in files if any(fnmatch(name, pattern) for pattern in patterns)])
    content, kind = files[name], rng.random()
    if isinstance(content, Saved):
        files[name] = _change_saved(content, rng)
    elif kind < 0.02:
        del files[name]
    elif kind < 0.04:
        files[name] = b""
    elif kind < 0.06:
        files[name] = rng.choice([bytes(other) for other in files.values()])
    else:
        files[name] = _mutator(name, content, rng)(content, rng)
    if case.sign is not None and rng.random() < 0.5:
        case.sign(files)
    return files


def _mutator(name, content, rng):
    suffix = name.rpartition(".")[2]
    if suffix == "json" and rng.random() < 0.93:
        return mutators.change_json
    if suffix in ("yml", "txt"):
        return mutators.change_text
    if suffix == "safetensors" and rng.random() < 0.9:
        return mutators.change_safetensors
    if content.startswith(b"PK") and rng.random() < 0.85:
        return mutators.change_zip
    return mutators.change_bytes


def _change_saved(saved, rng):
    """The bytes of a file of torch.save or of EDM, with changed objects or changed operations."""
    if rng.random() < 0.5:
        data = bytes(saved)
        return (mutators.change_zip if data[:2] == b"PK" and rng.random() < 0.8 else mutators.change_pickle)(data, rng)
    content = saved.make()
    tensors = [torch.zeros(0), torch.zeros(3), torch.zeros(2, 3, 4, 5), torch.tensor(1), torch.full((4,), torch.nan)]
    pool = [*mutators.POOL, *tensors, *tensors, np.float64(1), (1, 2), (), b"\0"]
    if isinstance(content, torch.nn.Module):
        module = rng.choice(list(content.modules()))
        plain = [key for key in vars(module) if key[0] != "_"]
        parts = {**module._parameters, **module._buffers}
        if parts and rng.random() < 0.5:
            module._buffers[rng.choice(sorted(parts))] = rng.choice(tensors)
        elif plain:
            setattr(module, rng.choice(plain), rng.choice([value for value in pool if not torch.is_tensor(value)]))
    else:
        mutators.change_tree(content, rng, pool)
    try:
        return bytes(Saved(lambda: content, saved.write))
    except (ValueError, TypeError, RecursionError):  # an object that cannot be written
        return b""


def _folder(write):
    """The files that a function writes into a folder, by their paths in it."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# -- Networks ---------------------------------------------------------------------------------------------------------

_UNET = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4, 4],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 2,
}
_NETWORKS = {
    "ncsn": ("ncsn", {"channels": 1, "width": 2, "depth": "standard"}),
    "ncsnv2": ("ncsnv2", {"channels": 1, "width": 2, "depth": "standard"}),
    "unet": ("ddpm", {**_UNET, "num_class_embeds": 2, "null_class": True, "attention_heads": [1, 2], "patch": 2}),
    "ncsnpp": (
        "vp",
        {
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": [4],
            "layers_per_block": 1,
            "attention": [True],
            "resample_filter": [1, 1],
            "time_embedding_type": "positional",
            "num_class_embeds": 2,
        },
    ),
}


_SETTINGS = (
    {"sampler": "langevin", "levels": 3, "step_size": 1e-5, "steps_per_level": 2},
    {"sampler": "ode", "levels": 3, "method": "heun", "churn": 0.1, "churn_max": 1.0, "sigma_max": 2.0},
    {"sampler": "ancestral", "variance": "small", "clamp_denoised": True},
    {"sampler": "predictor-corrector", "predictor": "ancestral", "corrector_steps": 1, "snr": 0.1},
)


def _weights(family):
    precondition, architecture = _NETWORKS[family]
    torch.manual_seed(0)
    return FAMILIES[family].build(architecture, levels=3, precondition=precondition).state_dict()


@functools.cache
def networks():
    """Folders of this package, one for each family."""
    found = []
    for settings, (family, (precondition, architecture)) in zip(_SETTINGS, _NETWORKS.items(), strict=True):
        config = {
            "format_version": 1,
            "family": family,
            **architecture,
            "precondition": precondition,
            "sample_shape": [1, 8, 8],
            "value_range": [0.0, 1.0],
            "predicts_variance": False,
            "sampler_settings": settings,
            "schedule": {"sigmas": [2.0, 0.2, 0.01]},
        }
        if precondition == "vp":
            config |= {"precondition_options": {"beta_min": 0.1, "beta_max": 12.0}}
        files = {"config.json": _text(config), "model.safetensors": save(_weights(family))}
        if family == "unet":
            files |= {"config.json": _text({**config, "schedule": "schedule.json"})}
            files |= {"schedule.json": _text(config["schedule"])}
        found.append(files)
    return found


def _text(value):
    return json.dumps(value).encode()


_BETAS = {"_class_name": "DDPMScheduler", "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_SCHEDULERS = (
    {**_BETAS, "num_train_timesteps": 20, "prediction_type": "epsilon", "clip_sample": True, "trained_betas": None},
    {**_BETAS, "num_train_timesteps": 20, "prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    {"_class_name": "DDPMScheduler", "trained_betas": [0.01, 0.02, 0.05], "predict_epsilon": True},
)
_EXPLODING = {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 10.0, "sigma_min": 0.01, "num_train_timesteps": 20}


@functools.cache
def _unets():
    """The configuration and the weights of networks of diffusers, with their schedulers."""
    found = []
    fourier = {"time_embedding_type": "fourier", "mid_block_scale_factor": 1.4, "act_fn": "silu"}
    skip = {
        "down_block_types": ["SkipDownBlock2D"] * 2,
        "up_block_types": ["SkipUpBlock2D"] * 2,
        "norm_num_groups": None,
    }
    for keys, schedulers in (({}, _SCHEDULERS), ({**fourier, **skip}, (_EXPLODING,))):
        architecture = {**_UNET, **keys}
        torch.manual_seed(0)
        weights = FAMILIES["unet"].build(architecture, levels=20, precondition="ddpm").state_dict()
        config = {"_class_name": "UNet2DModel", "_diffusers_version": "0.30.0", "sample_size": 8, **architecture}
        defaults = {"flip_sin_to_cos": True, "freq_shift": 0, "dropout": 0.0, "add_attention": True, "norm_eps": 1e-5}
        found += [({**config, **defaults}, weights, scheduler) for scheduler in schedulers]
    return found


@functools.cache
def pipelines():
    """Folders of diffusers: flat ones, and pipelines."""
    found = []
    for config, weights, scheduler in _unets():
        files = {
            "config.json": _text(config),
            "scheduler_config.json": _text(scheduler),
            "diffusion_pytorch_model.safetensors": save(weights),
        }
        parts = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
        found += [files, {"model_index.json": _text({**parts, "scheduler": ["diffusers", scheduler["_class_name"]]})}]
        found[-1] |= {f"unet/{name}": content for name, content in files.items() if name != "scheduler_config.json"}
        found[-1]["scheduler/scheduler_config.json"] = files["scheduler_config.json"]
    return found


def _write_split(weights, suffix, write, folder):
    """Weights in two files with an index."""
    names = list(weights)
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    index = {}
    for i, file in enumerate(files):
        part = {name: weights[name] for name in names[i::2]}
        index |= dict.fromkeys(part, file)
        write(part, folder / file)
    index = {"metadata": {"total_size": 1000}, "weight_map": index}
    (folder / f"diffusion_pytorch_model.{suffix}.index.json").write_text(json.dumps(index))


@functools.cache
def split_weights():
    """Folders of diffusers whose weights are in two files."""
    config, weights, scheduler = _unets()[0]
    beside = {"config.json": _text(config), "scheduler_config.json": _text(scheduler)}
    return [
        {**beside, **_folder(functools.partial(_write_split, weights, *how))}
        for how in (("safetensors", lambda part, path: path.write_bytes(save(part))), ("bin", torch.save))
    ]


@functools.cache
def pickled_weights():
    """Folders of diffusers whose weights are pickles."""
    config, weights, scheduler = _unets()[0]
    beside = {"config.json": _text(config), "scheduler_config.json": _text(scheduler)}
    old = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    return [
        {**beside, "diffusion_pytorch_model.bin": Saved(lambda: dict(weights), write)} for write in (torch.save, old)
    ]


def _load(folder):
    return ScoreNet.from_pretrained(folder)


# -- Checkpoints of other projects ------------------------------------------------------------------------------------

_SCORE_SDE = {
    "training": {"sde": "vpsde", "continuous": True},
    "data": {"image_size": 8, "num_channels": 3, "centered": True},
    "model": {
        "name": "ncsnpp",
        "nf": 4,
        "ch_mult": [1],
        "num_res_blocks": 1,
        "attn_resolutions": [8],
        "scale_by_sigma": False,
        "num_scales": 20,
        "sigma_min": 0.01,
        "sigma_max": 50,
        "beta_min": 0.1,
        "beta_max": 20.0,
        "dropout": 0.1,
        "conditional": True,
        "nonlinearity": "swish",
        "resamp_with_conv": True,
        "fir": False,
        "fir_kernel": [1, 3, 3, 1],
        "skip_rescale": True,
        "embedding_type": "positional",
        "progressive": "none",
        "progressive_input": "none",
        "progressive_combine": "sum",
        "resblock_type": "biggan",
    },
    "sampling": {"predictor": "reverse_diffusion", "corrector": "langevin", "n_steps_each": 1, "snr": 0.16},
}
_IMPROVED = {
    "image_size": 8,
    "num_channels": 32,
    "num_res_blocks": 1,
    "num_heads": 2,
    "num_heads_upsample": -1,
    "attention_resolutions": [8],
    "dropout": 0.0,
    "learn_sigma": True,
    "sigma_small": False,
    "class_cond": True,
    "diffusion_steps": 20,
    "noise_schedule": "cosine",
    "predict_xstart": False,
    "rescale_timesteps": True,
    "num_head_channels": 16,
    "resblock_updown": True,
    "use_new_attention_order": True,
    "use_scale_shift_norm": True,
    "channel_mult": [1],
    "num_classes": 2,
}
_NCSN = {
    "model": {"sigma_begin": 1.0, "sigma_end": 0.01, "num_classes": 3, "normalization": "InstanceNorm++"},
    "data": {"image_size": 8, "rescaled": False, "logit_transform": False},
    "sampling": {"n_steps_each": 5, "step_lr": 2e-05},
}


def _as_yaml(tree):
    return "".join(
        f"{section}:\n" + "".join(f"  {key}: {json.dumps(value)}\n" for key, value in part.items())
        for section, part in tree.items()
    )


@functools.cache
def _checkpoints():
    """The checkpoint of each format, with its options in the notations that the format has; None for no options."""
    old = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    flags = "".join(f"{key}: {str(value).strip('[]')}\n" for key, value in _IMPROVED.items())
    net = theirs.randomize(theirs.ScoreSDE(_SCORE_SDE))
    model = dict(torch.nn.DataParallel(net).state_dict())
    average = [parameter.detach() for parameter in net.parameters() if parameter.requires_grad]
    improved = dict(theirs.randomize(theirs.ImprovedUNet(_IMPROVED)).state_dict())
    ncsn = _weights("ncsn")

    def score_sde():
        optimizer = {"state": {}, "lr": np.float64(2e-4)}
        return {"optimizer": optimizer, "model": dict(model), "ema": {"shadow_params": list(average)}, "step": 3}

    def edm():
        inner = theirs.randomize(theirs.SongUNet(8, model_channels=4, channel_mult=(1,), classes=2))
        return theirs.Preconditioned("EDMPrecond", inner, sigma_min=0, sigma_max=float("inf"), sigma_data=0.5)

    return [
        (Saved(score_sde, torch.save), {".json": json.dumps(_SCORE_SDE), ".yml": _as_yaml(_SCORE_SDE)}),
        (Saved(score_sde, old), {".json": json.dumps(_SCORE_SDE)}),
        (Saved(lambda: dict(improved), torch.save), {".json": json.dumps(_IMPROVED), ".yml": flags}),
        (Saved(edm, theirs.save_edm), {}),
        (Saved(lambda: [dict(ncsn), {"state": {}}], old), {".yml": _as_yaml(_NCSN)}),
    ]


@functools.cache
def checkpoints():
    """Checkpoints of every format, and options."""
    return [
        {"checkpoint.pth": saved, **({} if not notations else {f"options{suffix}": text.encode()})}
        for saved, notations in _checkpoints()
        for suffix, text in [*notations.items(), ("", "")][:1]
    ]


@functools.cache
def options():
    """Undamaged checkpoints with options in every notation."""
    found = []
    for saved, notations in _checkpoints():
        if notations:
            content = bytes(saved)
            found += [
                {"checkpoint.pth": content, f"options{suffix}": text.encode()} for suffix, text in notations.items()
            ]
    return found


def _convert(folder):
    config = next(folder.glob("options.*"), None)
    return convert(folder / "checkpoint.pth", folder / "out" / "network", config=config)


# -- Samples, runs and data -------------------------------------------------------------------------------------------


def _score(x, sigma):
    return (0.5 - x) / sigma**2


_score.value_range = (0.0, 1.0)


@functools.cache
def samples():
    """Folders of ``sample_to``."""
    sampler = ODESampler(_score, NoiseSchedule.geometric(1, 0.1, 2))

    def write(kind, folder):
        sample_to(sampler, folder, 2, shape=(1, 4, 4), batch_size=2, format=kind, progress=False)

    return [_folder(functools.partial(write, kind)) for kind in ("png", "npz")]


class _Linear(torch.nn.Module):
    """A network of samples with two values."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def forward(self, x, c_noise):
        return self.layer(x)


def _train(out):
    torch.manual_seed(0)
    net = ScoreNet(_Linear(), NoiseSchedule([2.0, 0.2]), sample_shape=(2,))
    options = {"checkpoint_every": 4, "log_every": 4, "sample_every": 99, "snapshot_every": 99}
    return train(net, torch.zeros(4, 2), out, images=8, batch_size=4, progress=False, **options)


@functools.cache
def runs():
    """The folder of a finished training run, with two checkpoints."""
    return [_folder(lambda folder: _train(folder / "out"))]


def sign(files):
    """Writes the right hashes into the state.json of every checkpoint."""
    for name in [name for name in files if name.endswith("/state.json")]:
        try:
            state = json.loads(files[name])
            beside = {each: name.replace("state.json", each) for each in state["files"]}
            state["files"] = {each: hash_of_bytes(files[path]) for each, path in beside.items() if path in files}
            del state["hash"]
            files[name] = _text({**state, "hash": hash_of(state)})
        except (ValueError, LookupError, TypeError, RecursionError):  # its damage is of another kind
            pass


class _Images(torch.utils.data.Dataset):
    """Images of which one cannot be read."""

    def __len__(self):
        return 3

    def __getitem__(self, i):
        if i == 1:
            raise OSError("damaged")
        return np.full((1, 2, 2), i, np.uint8)


def _open_cached(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an image is left out
        data = open_images(_Images(), cache=folder / "out", workers=1, progress=False)
    images, _ = data.read([0, 1])
    assert images.shape == (2, 1, 2, 2)


@functools.cache
def caches():
    """Caches of decoded training images."""
    return [_folder(_open_cached)]


_TUNED = [SamplerSettings("ode", levels=2), SamplerSettings("ancestral", levels=2, variance="small")]


def _tune(folder):
    torch.manual_seed(0)
    net = ScoreNet.ncsn(1, 4, width=2, schedule=NoiseSchedule([1.0, 0.1]))
    reference = torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    options = {"features": lambda images: images.flatten(1)[:, :2].float(), "settings": _TUNED, "n": 3, "cache": False}
    return tune(net, reference, out=folder / "out", progress=False, **options)


@functools.cache
def tunings():
    """Folders of ``tune``."""
    return [_folder(_tune)]


def _encoded(image, kind, **keywords):
    data = io.BytesIO()
    image.save(data, kind, **keywords)
    return data.getvalue()


@functools.cache
def pictures():
    """Pictures of all formats and modes, some with another suffix than their format."""
    from PIL import Image

    rng = np.random.default_rng(0)
    color = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    gray, deep = color.convert("L"), Image.fromarray(rng.integers(0, 2**16, (6, 8), np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = {
        "a.png": _encoded(color, "PNG"),
        "b.png": _encoded(color.convert("RGBA"), "PNG"),
        "c.png": _encoded(color.quantize(4), "PNG", transparency=0),
        "d.png": _encoded(deep, "PNG"),
        "e.png": _encoded(gray, "PNG", transparency=3),
        "f.jpg": _encoded(color, "JPEG", exif=exif),
        "g.jpg": _encoded(color.convert("CMYK"), "JPEG"),
        "h.gif": _encoded(color, "GIF", save_all=True, append_images=[gray, color]),
        "i.tif": _encoded(deep, "TIFF"),
        "j.tif": _encoded(color, "TIFF", compression="tiff_lzw"),
        "k.bmp": _encoded(color, "BMP"),
        "l.ppm": _encoded(color, "PPM"),
        "m.pgm": b"P5 8 6 65535\n" + np.asarray(deep, ">u2").tobytes(),
        "n.webp": _encoded(color, "WEBP"),
        "o.png": _encoded(color, "JPEG"),
        "p.tif": _encoded(Image.fromarray(rng.random((6, 8), np.float32)), "TIFF"),
        "q.jp2": _encoded(color, "JPEG2000"),
        "r.png": _encoded(color, "PNG", save_all=True, append_images=[gray.convert("RGB")]),
        "s.pbm": b"P1 3 2 1 0 1 0 1 0",
        "t.png": _encoded(Image.new("L", (6, 8)), "PNG"),
    }
    # A bomb of 400 million pixels; the checksum of the header is that of its new values.
    size = struct.pack(">4sIIBBBBB", b"IHDR", 20_000, 20_000, 8, 0, 0, 0, 0)
    found["t.png"] = found["t.png"][:12] + size + struct.pack(">I", zlib.crc32(size)) + found["t.png"][33:]
    return [{name: content} for name, content in found.items()]


@functools.cache
def masks():
    """Masks of black and white pixels."""
    from PIL import Image

    mask = Image.fromarray((np.arange(48).reshape(6, 8) % 3 > 0).astype(np.uint8) * 255)
    kinds = {"png": "PNG", "gif": "GIF", "tif": "TIFF", "pgm": "PPM"}
    return [{f"mask.{suffix}": _encoded(mask, kind)} for suffix, kind in kinds.items()]


def _only(folder):
    """The path of the only file in a folder."""
    return next(folder.iterdir(), folder / "a.png")


def _read_picture(folder):
    path = _only(folder)
    return read_image(path, 3 if path.suffix == ".jpg" else 1)


def _npz(write=np.savez, **arrays):
    data = io.BytesIO()
    write(data, **arrays)
    return {"data.npz": data.getvalue()}


@functools.cache
def arrays():
    """Files of images in arrays, with labels."""
    rng = np.random.default_rng(0)
    gray, labels = rng.integers(0, 256, (6, 4, 4), np.uint8), np.array([0, 1, 2, 0, 1, 2])
    return [
        _npz(x_train=gray, y_train=labels),
        _npz(np.savez_compressed, arr_0=rng.integers(0, 256, (6, 4, 4, 3), np.uint8), arr_1=labels),
        _npz(images=rng.random((6, 1, 4, 4), np.float32), labels=labels.astype(str)),
    ]


def _open_array(folder):
    data = open_images(folder / "data.npz", labels=True, workers=1, progress=False)
    return data.read(range(len(data)))


def _open_pictures(folder):
    data = open_images(folder, workers=1, progress=False)
    return data.read(range(len(data)))


EXTRACTOR = Extractor(lambda images: images.flatten(1), "a function", "0")


@functools.cache
def statistics():
    """Files of statistics: of this package, and of pytorch-fid."""
    features = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    own = _folder(lambda folder: Statistics.of(features, EXTRACTOR).save(folder / "data.npz"))
    return [
        own,
        _npz(mu=np.zeros(3), sigma=np.eye(3)),
        _npz(np.savez_compressed, mu=np.zeros(3, "f4"), sigma=np.eye(3)),
    ]


KINDS = {
    "config": Kind(networks, ("*.json",), _load),
    "diffusers": Kind(pipelines, ("*config.json", "model_index.json"), _load),
    "scheduler": Kind(pipelines, ("*scheduler_config.json",), _load),
    "safetensors": Kind(lambda: networks() + pipelines(), ("*.safetensors",), _load),
    "index": Kind(split_weights, ("*.index.json",), _load),
    "bin": Kind(pickled_weights, ("*.bin",), _load),
    "checkpoint": Kind(checkpoints, ("checkpoint.pth",), _convert),
    "options": Kind(options, ("options.*",), _convert),
    "samples": Kind(samples, ("*",), lambda folder: read_samples(folder, 2)),
    "run": Kind(runs, ("out/config.json", "out/log.jsonl", "out/checkpoints/*"), lambda f: _train(f / "out"), sign),
    "cache": Kind(caches, ("*",), _open_cached),
    "tune": Kind(tunings, ("out/tune.json",), _tune),
    "picture": Kind(pictures, ("*",), _read_picture),
    "pictures": Kind(pictures, ("*",), _open_pictures),
    "mask": Kind(masks, ("*",), lambda folder: read_mask(_only(folder))),
    "npz": Kind(arrays, ("*",), _open_array),
    "statistics": Kind(statistics, ("*",), lambda folder: Statistics.load(folder / "data.npz", EXTRACTOR)),
}
