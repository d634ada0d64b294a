"""The model card, README.md, of a network on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scorematch.core.conditions import Condition, describe_classes
from scorematch.noise import NoiseSchedule
from scorematch.sampling.settings import SamplerSettings


def model_card(
    repo_id: str,
    config: Mapping[str, Any],
    parameters: int,
    *,
    conditioning: Condition | None,
    license: str | None,  # noqa: A002  (the Hub's word)
    datasets: Sequence[str] | None,
) -> str:
    """The text of the card: metadata for the Hub, code that samples the network, and a table of facts.

    Args:
        repo_id: ``owner/name``.
        config: the configuration of the network, with the keys of ``ScoreNet.config``.
        parameters: the number of parameters.
        conditioning: what the network takes as its condition, or None if that is not known.
        license: the license as the Hub abbreviates it, such as "mit", or None.
        datasets: the names of the training data on the Hub, or None.
    """
    from huggingface_hub import ModelCardData

    shape, schedule = config["sample_shape"], NoiseSchedule.from_dict(config["schedule"])
    settings = config["sampler_settings"]
    is_image = shape is not None and len(shape) == 3
    data_range = _range(config)
    takes_image = conditioning is not None and conditioning.channels > 0
    pipeline = "image-to-image" if takes_image else "unconditional-image-generation"
    metadata = ModelCardData(
        library_name="scorematch",
        license=license,
        datasets=[datasets] if isinstance(datasets, str) else None if datasets is None else list(datasets),
        pipeline_tag=pipeline if is_image else None,
        tags=["score-matching", "langevin-dynamics"],
    )
    recommended = "the defaults of the sampler" if settings is None else SamplerSettings.from_dict(settings)
    return f"""---
{metadata.to_yaml()}
---

# {repo_id.split("/")[-1]}

A score network for scorematch: `net(x, sigma)` is the score of
{"images" if is_image else "data"}{f" in {data_range}" if data_range else ""} with noise of level sigma.

```python
{_code(repo_id, config, conditioning)}
```

| | |
|---|---|
| family | {config["family"]}, preconditioning "{config["precondition"]}" |
| sample shape | {"any" if shape is None else "x".join(map(str, shape))} |
| parameters | {parameters:,} |
{_classes(config)}| noise levels | {len(schedule)}, {schedule.sigma_max:.3g} -> {schedule.sigma_min:.3g} |
| sampler settings | {recommended} |
"""


def _range(config: Mapping[str, Any]) -> str:
    """The range of the data, such as "[0, 1]", or "" without one."""
    ends = config["value_range"]
    return "" if ends is None else f"[{ends[0]:g}, {ends[1]:g}]"


def _classes(config: Mapping[str, Any]) -> str:
    """The row of the table with the names of the classes, or "" if they are not known."""
    names = config.get("class_names")
    if names is None:
        return ""
    text = describe_classes(names).encode(errors="backslashreplace").decode()  # of folder names in another encoding
    return f"| condition | {' '.join(text.split()).replace('|', '&#124;')} |\n"


def _code(repo_id: str, config: Mapping[str, Any], conditioning: Condition | None) -> str:
    """Code that loads the network and samples it."""
    shape = config["sample_shape"]
    backbone = ", backbone=YourModule()" if config["family"] == "custom" else ""
    imports, arguments, note = "", "4", ""
    takes = Condition() if conditioning is None else conditioning
    size = ", ".join(map(str, ["..."] if shape is None else shape[1:]))
    examples = {
        "class": (f"torch.arange(4) % {takes.classes}", "the classes"),
        "features": (f"torch.rand(4, {takes.vector})", "your vectors"),
        "image": (
            f"torch.rand(4, {takes.channels}, {size})",
            "your conditioning images" + (f", in {_range(config)}" if _range(config) else ""),
        ),
    }
    used = {name: examples[name] for name in takes.parts()}
    if used:
        imports = "import torch\n"
        parts = ", ".join(f'"{name}": {code}' for name, (code, _) in used.items())
        arguments += f", condition={f'{{{parts}}}' if len(used) > 1 else next(iter(used.values()))[0]}"
        note = "  # " + " and ".join(text for _, text in used.values())
    if shape is None:
        arguments += ", shape=..."
        note = "  # the shape of one sample, without the batch axis"
    return f"""{imports}from scorematch import ScoreNet
from scorematch.sampling import recommended_sampler

net = ScoreNet.from_pretrained("{repo_id}"{backbone})
images = recommended_sampler(net).sample({arguments}){note}"""
