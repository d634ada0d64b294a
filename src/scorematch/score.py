r"""ScoreNet: a neural network that is called as a score, ``net(x, sigma)``.

The score of noisy data is :math:`\nabla_x \log p_\sigma(x)`, where :math:`p_\sigma` is the distribution of the data
convolved with a Gaussian of standard deviation sigma. Tweedie's formula turns it into the denoised image, the mean of
the clean images given x, :math:`\mathbb{E}[x_0 | x] = x + \sigma^2 \nabla_x \log p_\sigma(x)`.

Each family of networks has its own units and conventions. A ScoreNet combines a backbone with the noise levels that it
was trained on and with its preconditioning (``scorematch.nets.precondition``), and has the same interface for all
families: it takes noisy images (N, C, H, W) in the units of images in [0, 1] and sigma in the same units, and returns
the score. Networks of k-diffusion and azula return the denoised image instead, which is ``net.denoise(x, sigma)`` here,
and ``net.as_denoiser()`` as a module.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scorematch.core.arguments import check_choice, check_sizes
from scorematch.core.batches import as_sigma, check_data
from scorematch.core.conditions import Condition, as_condition
from scorematch.core.json_files import native
from scorematch.core.messages import quote
from scorematch.core.scores import Given, NetworkScore
from scorematch.nets import family_of
from scorematch.nets.builders import Builders
from scorematch.nets.data_units import DataUnits, Range
from scorematch.nets.inference import InferenceScore, is_plain
from scorematch.nets.precondition import ROWS, Preconditioning, check_options
from scorematch.noise import NoiseSchedule, check_schedule
from scorematch.pretrained.configuration import FORMAT_VERSION, FREE_KEYS, Stored, architecture
from scorematch.pretrained.convert import read_checkpoint
from scorematch.pretrained.diffusers import read_objects
from scorematch.pretrained.hub import upload
from scorematch.pretrained.loading import build, load
from scorematch.pretrained.model_card import model_card
from scorematch.pretrained.names import locate
from scorematch.pretrained.saving import save
from scorematch.sampling.settings import SamplerSettings

__all__ = ["ScoreNet"]

Size = int | tuple[int, int]
AnySize = int | Sequence[int]


class ScoreNet(Builders, DataUnits, NetworkScore, nn.Module):
    """A network that returns the score of noisy data: a backbone with its noise levels and its preconditioning.

    ``ScoreNet.ncsn``, ``ScoreNet.ncsnv2``, ``ScoreNet.unet`` and ``ScoreNet.ncsnpp`` build networks to train,
    ``ScoreNet.from_pretrained`` loads trained ones, and the constructor wraps a network of your own.

    Args:
        backbone: a ``torch.nn.Module``, called as ``backbone(x, c_noise)``, or as ``backbone(x, c_noise, condition)``
            if a condition is given. The preconditioning scales x and computes ``c_noise`` (N,) from sigma; it is
            float32, or float64 for a float64 network. The backbone returns a tensor of the shape of x. If it has an
            attribute ``conditioning``, a ``scorematch.nets.Condition``, conditions are checked, and ``train`` passes
            the labels of the data: ``Condition(classes=10)``, or ``Condition(channels=3)`` for an image.
        schedule: the noise levels that the backbone is trained on.
        precondition: the formulas for the backbone's input, and for the score as a function of its output: the name of
            a row of the table in ``scorematch.nets.precondition``, such as "karras", "ddpm", "ncsnv2" or "ncsn".
        sample_shape: the shape of one sample without the batch axis, (C, H, W) for images. Samplers draw samples of
            this shape by default; the network itself may take other shapes.
        value_range: (low, high) of the data. Samplers clamp their samples to this range, and some preconditionings
            (see the table) map it to [-1, 1]. None is for data without a fixed range. "auto" is (0, 1) if
            ``sample_shape`` is the shape of an image, (C, H, W), and None otherwise.
        predicts_variance: whether the backbone returns twice as many channels as x has. The second half predicts the
            variance of ancestral sampling (``score_and_variance``); the score does not use it.
        precondition_options: the options of the row that differ from their defaults, by name, such as
            ``{"sigma_data": 0.25}`` for "karras"; None is the defaults.

    Attributes:
        sampler_settings: the SamplerSettings recommended for this network, or None; saved with the weights.
        class_names: the names of the classes of a class-conditional network, a tuple of strings, or None; saved with
            the weights. Class k is ``class_names[k]``, and ``net.class_names.index("cat")`` is the class "cat".
        axes: the names of the axes of the data, the first of which is that of the samples, or None; saved with the
            weights.
        is_new: whether ``train`` may give the network the units of its data (``fit_units``): True for a network that
            ``ScoreNet.unet`` and the other builders made, and False for one that was loaded or trained.

    Example:
        >>> import torch
        >>> net = ScoreNet.ncsnv2(channels=1, image_size=28, width=8)
        >>> net(torch.rand(2, 1, 28, 28), 0.1).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: NoiseSchedule,
        *,
        precondition: str = "karras",
        sample_shape: tuple[int, ...] | None = None,
        value_range: Range | Literal["auto"] | None = "auto",
        predicts_variance: bool = False,
        precondition_options: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, nn.Module):
            hint = "Pass an instance, YourModule()." if isinstance(backbone, type) else "Wrap it in a torch.nn.Module."
            raise TypeError(f"backbone must be a torch.nn.Module, got {backbone!r}. {hint}")
        check_schedule(schedule)
        check_choice("precondition", precondition, ROWS)
        precondition_options = {key: native(value) for key, value in dict(precondition_options or {}).items()}
        check_options(precondition, precondition_options, "precondition_options")
        if sample_shape is not None:
            sample_shape = check_sizes("sample_shape", sample_shape, "a tuple such as (3, 32, 32)")
        if isinstance(value_range, str) and value_range == "auto":
            value_range = (0, 1) if sample_shape is not None and len(sample_shape) == 3 else None
        self.value_range = value_range
        self.family = family_of(backbone)
        if self.family is not None:
            self.family.check(backbone, levels=len(schedule), precondition=precondition)
        self.backbone = backbone
        self.schedule = schedule
        self.precondition, self.precondition_options = precondition, precondition_options
        self.sample_shape = sample_shape
        self.predicts_variance = native(predicts_variance)
        self.units = None
        self.sampler_settings = None
        self.class_names = None
        self.axes: tuple[str, ...] | None = None
        self.is_new = False
        self._architecture: dict[str, Any] = {"family": "custom"}
        self._scheduler: dict[str, Any] | None = None  # that of diffusers, for ``save_pretrained``

    def extra_repr(self) -> str:
        """The noise levels, the row of the preconditioning table and the shape of a sample, which ``print`` shows."""
        return f"{self.schedule}, precondition={self.precondition!r}, sample_shape={self.sample_shape}"

    @property
    def sampler_settings(self) -> SamplerSettings | None:
        """The sampler settings recommended for this network, or None."""
        return self._sampler_settings

    @sampler_settings.setter
    def sampler_settings(self, settings: SamplerSettings | None) -> None:
        if not isinstance(settings, SamplerSettings | None):
            raise TypeError(
                f"sampler_settings must be a SamplerSettings or None, got {type(settings).__name__}. Write "
                "scorematch.sampling.SamplerSettings(levels=..., ...)."
            )
        self._sampler_settings = settings

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of the classes, or None."""
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        if names is not None:
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise TypeError(f"class_names must be a sequence of strings or None, got {quote(names)}.")
            takes = self.conditioning
            if takes is None or takes.classes is None:
                raise ValueError("class_names is for class-conditional networks, and this network is not one.")
            if len(names) != takes.classes:
                raise ValueError(f"class_names must have {takes.classes} names, one per class, got {len(names)}.")
        self._class_names = None if names is None else tuple(names)

    # -- The score ----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, sigma: float | Tensor, condition: Given = None) -> Tensor:
        """The score of the noisy data at x.

        Args:
            x: noisy data (N, ...), images in [0, 1] plus noise, floating point.
            sigma: the noise level, a float or a tensor () or (N,), positive, in the units of x. Networks that receive
                the position of sigma in the schedule (NCSN, DDPM) clamp a sigma outside the schedule to its ends.
            condition: for conditional networks: classes, int64 (N,), or an int, the class of all samples; or a vector
                (N, K); or an image (N, K, H, W) in [0, 1], which is mapped to [-1, 1] if x is; or for a network that
                takes several, a dict of these, {"class": ..., "features": ..., "image": ...}.

        Returns:
            The score, with the shape and dtype of x.
        """
        return self._outputs(x, sigma, condition)[0]

    def _outputs(
        self, x: Tensor, sigma: float | Tensor, condition: Given, *, variance: bool = False
    ) -> tuple[Tensor, ...]:
        check_data(x)
        shape = self.sample_shape  # networks of the package check x themselves
        if self.family is None and shape is not None and len(shape) == 3 and (x.ndim != 4 or x.shape[1] != shape[0]):
            raise ValueError(f"x must be images (N, {shape[0]}, H, W), got shape {tuple(x.shape)}.")
        condition = as_condition(condition, x, self.conditioning)
        preconditioning = self.preconditioning
        coefficients = preconditioning.coefficients(as_sigma(sigma, x))
        return preconditioning.outputs(self.backbone, x, coefficients, condition, variance=variance)

    @property
    def preconditioning(self) -> Preconditioning:
        """The row of the preconditioning table with the values of this network, such as its noise levels."""
        options = self.precondition_options
        return Preconditioning(
            self.precondition, self.schedule, self.value_range, self.predicts_variance, options, self.units
        )

    @property
    def conditioning(self) -> Condition | None:
        """The condition that the network takes; None for a backbone of your own without ``conditioning``."""
        if self.family is None:
            own = getattr(self.backbone, "conditioning", None)
            return own if isinstance(own, Condition) else None
        return self.family.condition(self.backbone, predicts_variance=self.predicts_variance)

    def inference_copy(self, *, compile: bool = False) -> InferenceScore | ScoreNet:  # noqa: A002  (torch's word)
        """Returns a copy that is optimized for inference; its samples are statistically the same.

        Any sampler accepts it in place of the network. It uses a faster memory layout, bfloat16 inside the network
        where the processor multiplies it natively, and computes what depends on sigma alone once per noise level
        (``scorematch.nets.inference``). The method returns the network itself if its backbone is your own, its weights
        are not float32, or it was changed after it was built, for example by hooks or adapters.

        Args:
            compile: whether to compile the copy with ``torch.compile`` at its first call, with CUDA graphs on CUDA. If
                compilation fails, the copy warns and runs uncompiled. Pass the compiled copy to a sampler to compile
                once and sample often.

        Returns:
            The copy, which is called in the same way as this network. Later changes of this network's weights do not
            affect it.
        """
        if self.family is None or type(self) is not ScoreNet or not is_plain(self, self.backbone):
            return self
        copied = InferenceScore(
            self.family,
            self.backbone,
            self.preconditioning,
            sample_shape=self.sample_shape,
            sampler_settings=self.sampler_settings,
            compile=compile,
        )
        copied.axes, copied.class_names = self.axes, self.class_names
        return copied

    # -- Files --------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as a plain dict: all that is needed to rebuild this network without its weights.

        ``save_pretrained`` writes it to config.json.
        """
        return {
            "format_version": FORMAT_VERSION,
            **copy.deepcopy(self._architecture),
            "precondition": self.precondition,
            "sample_shape": None if self.sample_shape is None else list(self.sample_shape),
            "value_range": None if self.value_range is None else list(self.value_range),
            "predicts_variance": self.predicts_variance,
            **({} if self.units is None else {"units": self.units.to_dict()}),
            **({"precondition_options": dict(self.precondition_options)} if self.precondition_options else {}),
            "sampler_settings": None if self.sampler_settings is None else self.sampler_settings.to_dict(),
            **({} if self.class_names is None else {"class_names": list(self.class_names)}),
            **({} if self.axes is None else {"axes": list(self.axes)}),
            **({} if self._scheduler is None else {"scheduler": copy.deepcopy(self._scheduler)}),
            "schedule": self.schedule.to_dict(),
        }

    def definition(self) -> list[Any]:
        """The parts of the configuration that affect the score, and the weights."""
        config = {key: value for key, value in self.config.items() if key not in FREE_KEYS}
        return [config, dict(self.state_dict())]

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        backbone: nn.Module | None = None,
        condition_encoder: nn.Module | None = None,
    ) -> ScoreNet:
        """Loads a trained network by its name, from a folder, or from a repository of the Hugging Face Hub.

        Args:
            name_or_folder: a short name (networks such as "mnist" and "cifar10-small" ship with the package; ``python
                -m scorematch models`` lists all names); or a folder, given as a path or as a string with a slash
                ("./cifar10"); or a repository of the Hub, ``owner/name``. Folders and repositories hold the files of
                ``save_pretrained``, or a U-Net of diffusers, alone or in a pipeline.

            Rarely needed:

            revision: the branch, tag or commit of a repository. None is the commit that this package lists for the
                network (``models``), or the main branch. A commit in the cache is loaded without a request.
            token: an access token for private and gated repositories; None is the token of the current login.
            cache_dir: the folder for downloads; None is the cache of huggingface_hub.
            local_files_only: whether to load from the cache only, without requests.
            backbone: for a saved network whose backbone is your own: a module of the same class, into which the weights
                are loaded.
            condition_encoder: the same for a network that was built with one.

        Returns:
            The network in eval mode, on the CPU, in float32 whatever the dtype of the stored weights.

        Raises:
            FileNotFoundError: if there is no such name, folder, repository or revision, or a file is missing in it; or
                the Hub cannot be reached and the network is not in the cache.
            PermissionError: if the repository is gated and the token has no access.
            ValueError: if a file is damaged or has an unknown format, the weights do not fit the configuration, or
                ``backbone`` or ``condition_encoder`` is missing or not needed.
            OSError: if the download fails for another reason.

        Example:
            >>> ScoreNet.from_pretrained("mnist").sample_shape
            (1, 28, 28)
        """
        with torch.inference_mode(False):  # the weights of a network that is loaded inside it can be trained later
            place = locate(
                name_or_folder, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
            )
            return cls.from_stored(load(place), backbone, condition_encoder)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None, raw: bool = False
    ) -> ScoreNet:
        """Reads a checkpoint of another project; ``save_pretrained`` then writes it in the format of this package.

        The projects are NCSN, NCSNv2, adversarial consistent score matching, score_sde, EDM, improved-diffusion and
        guided-diffusion. No code in the file is run. The result is a score in the units of this package, with the
        published noise levels and sampler settings. The command ``scorematch convert`` reads and saves.

        Args:
            checkpoint: the authors' file: ``checkpoint_<step>.pth`` (NCSN, NCSNv2, score_sde), ``.pkl`` (EDM), or
                ``.pt`` (improved-diffusion, guided-diffusion).
            config: the configuration that the network was trained with. For score_sde, improved-diffusion and
                guided-diffusion it is required: the name of a published one, such as "ve/cifar10_ncsnpp_continuous" or
                "cifar10_uncond_50M_500K", or a JSON or YAML file with the authors' options. For NCSN and NCSNv2 it is
                config.yml, which is required unless the checkpoint contains its noise levels or is an NCSN with 10
                levels. A file of EDM contains its options.
            raw: whether to read the weights of the last step instead of their moving average. For EDM,
                improved-diffusion and guided-diffusion True is an error.

        Returns:
            The network in eval mode, in float32, on the CPU.

        Raises:
            IsADirectoryError: if ``checkpoint`` is a folder.
            FileNotFoundError: if a file is missing, or there is no published configuration with this name.
            ImportError: if ``config`` is a YAML file and PyYAML is not installed.
            ValueError: if the file is damaged, has an unknown format, refers to anything but tensors and plain values,
                or needs an option that is not supported; or if the configuration is missing or does not fit.
        """
        return cls.from_stored(read_checkpoint(checkpoint, config=config, raw=raw))

    @classmethod
    def from_diffusers(cls, unet: nn.Module, scheduler: Any) -> ScoreNet:
        """A ScoreNet with the weights of a UNet2DModel of diffusers.

        Args:
            unet: a ``UNet2DModel``. Its weights are copied.
            scheduler: the scheduler that it was trained with, such as a ``DDPMScheduler``. It defines what the network
                predicts, and the noise levels.

        Returns:
            The network in eval mode, in float32, on the CPU.
        """
        return cls.from_stored(read_objects(unet, scheduler))

    @classmethod
    def from_stored(
        cls, stored: Stored, backbone: nn.Module | None = None, condition_encoder: nn.Module | None = None
    ) -> ScoreNet:
        """Builds the network of a checked configuration and its weights, which the readers of file formats return.

        Args:
            stored: the configuration and the weights. The weights are moved out of it into the network.
            backbone: for a backbone that is your own: a module of the same class, into which the weights are loaded.
            condition_encoder: for a network with an encoder of its condition, in the same way.

        Returns:
            The network in eval mode, in float32, on the CPU; on the meta device if there are no weights.
        """
        config = stored.config
        net = cls(
            build(stored, backbone, condition_encoder),
            NoiseSchedule.from_dict(config["schedule"]),
            precondition=config["precondition"],
            sample_shape=config["sample_shape"],
            value_range=config["value_range"],
            predicts_variance=config["predicts_variance"],
            precondition_options=config.get("precondition_options"),
        )
        net._architecture, net._scheduler = architecture(config), copy.deepcopy(config.get("scheduler"))
        settings = config["sampler_settings"]
        net.sampler_settings = None if settings is None else SamplerSettings.from_dict(settings)
        try:
            net.class_names = config.get("class_names")
            net.axes = tuple(config["axes"]) if "axes" in config else None
            net.take_units(config)
        except ValueError as error:
            raise ValueError(f"{stored.source}: {error}") from error
        return net.float().eval()

    def save_pretrained(self, folder: str | os.PathLike[str], *, diffusers: bool = False) -> None:
        """Writes config.json and the weights into a folder, for ``from_pretrained``.

        The weights are stored in their own dtype. Other files in an existing folder are kept, and a network in it is
        replaced only when the new one is completely written. If the process is killed at any time,
        ``from_pretrained`` loads either the previous network or the new one, and the next call deletes incomplete
        files. Except on Windows, other processes may load from the folder and save to it at the same time.

        A U-Net that diffusers can run is written in the layout of diffusers, with the weights in
        diffusion_pytorch_model.safetensors; the weights of every other network are in model.safetensors.
        ``DDPMPipeline.from_pretrained`` of diffusers also loads the folder of a U-Net with the preconditioning of a
        DDPM ("ddpm", "ddpm_v" or "ddpm_x0"), without a condition. Its number of time steps is the number of the
        network's noise levels. With ``diffusers=True`` a U-Net with the preconditioning "karras" is written as a
        pipeline with ``EDMEulerScheduler``.

        Args:
            folder: created if it does not exist.
            diffusers: whether to raise an error if no pipeline of diffusers can run the network, and to save one
                with the preconditioning "karras" for diffusers.

        Raises:
            ValueError: if ``diffusers`` is True and no pipeline can run the network; the message says why. Or
                if the backbone was wrapped or parametrized, so that the network could not be loaded.
            FileExistsError: if the folder holds another network in unet/, or is the folder of a training run.
            OSError: if the folder cannot be written; it is then as it was.
        """
        backbone = getattr(self.backbone, "_orig_mod", self.backbone)  # without torch.compile
        encoder = None if self._vectors is None else self._vectors.encoder
        save(folder, self.config, backbone.state_dict(), diffusers=diffusers, condition_encoder=encoder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        license: str | None = None,  # noqa: A002  (the Hub's word)
        datasets: Sequence[str] | None = None,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a score network",
    ) -> str:
        """Uploads the network to the Hugging Face Hub, for ``from_pretrained(repo_id)``.

        One commit adds the files that ``save_pretrained`` writes, and a model card if the repository has none. It
        deletes the weights of another network in the repository and keeps all other files.

        Args:
            repo_id: ``owner/name``; the repository is created if it does not exist.
            license: the license in the model card, by its identifier on the Hub ("mit", "apache-2.0").
            datasets: the names of the training data on the Hub, for the model card.

            Rarely needed:

            private: whether a new repository is private; None is the owner's default.
            revision: the branch, created if it does not exist; None is the main branch.
            token: an access token with write permission; None is the token of the current login.
            commit_message: the message of the commit.

        Returns:
            The URL of the commit.

        Raises:
            ValueError: if ``repo_id`` is not ``owner/name``.
            PermissionError: if the token may not write to the repository.
            OSError: if the upload fails for another reason.
        """
        count = sum(parameter.numel() for parameter in self.parameters())
        card = model_card(
            repo_id, self.config, count, conditioning=self.conditioning, license=license, datasets=datasets
        )
        return upload(
            self.save_pretrained,
            repo_id,
            card,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
        )
