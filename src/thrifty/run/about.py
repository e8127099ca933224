"""What `thrifty methods NAME` and `thrifty env` say."""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import platform
from pathlib import Path

from thrifty.core.registry import MethodRecord

__all__ = ["describe", "environment"]

_CORE = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "gguf",
    "numpy",
    "huggingface_hub",
)
_EXTRAS = {
    "peft": (("peft",), "any PEFT method as a peer: method: {peft: {peft_type: LORA, r: 16}}"),
    "trl": (("trl",), "objective: dpo, kto or grpo, and TRL's trainers with an attached model"),
    "harness": (("lm_eval",), "thrifty eval --harness: the tasks of lm_eval"),
    "liger": (("liger-kernel",), "Liger's fused loss on CUDA devices"),
    "report": (("tensorboard", "trackio"), "report_to: tensorboard or trackio"),
    "triton": (("triton",), "fused kernels of the regions' gradients on CUDA devices (Linux)"),
    "quantized": (("torchao",), "quantize: int8, int4 or nf4, a quantized base"),
    "plots": (
        ("matplotlib", "plotly", "kaleido"),
        "pictures: thrifty delta show --plot, the report of thrifty compare",
    ),
    "search": (("optuna",), "thrifty compare: settings found by search"),
    "ray": (("ray",), "thrifty compare --ray: a study's runs on a cluster"),
    "completion": (("shtab",), "thrifty completion: the shell completes commands"),
}


def describe(record: MethodRecord) -> str:
    """A method's documentation, options and cost."""
    lines = [record.name, "", inspect.getdoc(record.build) or "", "", "Options:"]
    for name, parameter in inspect.signature(record.build, eval_str=True).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            lines.append(f"  {name}: any other")
        else:
            default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
            lines.append(f"  {name}: {inspect.formatannotation(parameter.annotation)}{default}")
    if lines[-1] == "Options:":
        lines[-1] = "Options: none"
    lines += [
        "",
        f"Family: {record.family}",
        f"Paper: {record.paper}",
        f"Probe: {_probe(record)}",
        f"Learning rate: {record.learning_rate:g} unless given",
        f"Cost: {record.cost}",
    ]
    return "\n".join(lines)


def _probe(record: MethodRecord) -> str:
    if not record.needs_probe:
        return "not needed"
    general = "text" in inspect.signature(record.build).parameters
    return f"needs a few batches {'of general text' if general else 'of the task'} before training"


def environment() -> str:
    """Versions, devices, threads, folders, and which extras are missing and what they would add."""
    import psutil
    import torch

    import thrifty

    from .embedded import cache_folder

    lines = [f"thrifty {thrifty.__version__} ({Path(thrifty.__file__).parent})"]
    lines.append(f"python {platform.python_version()} on {platform.platform()}")
    lines += [f"{name} {_version(name) or 'missing: pip install -U thrifty'}" for name in _CORE]
    memory = psutil.virtual_memory()
    lines.append(
        f"cpu: {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads; memory {memory.total / 2**30:.1f} "
        f"GiB, {memory.available / 2**30:.1f} GiB of it free"
    )
    for index in range(torch.cuda.device_count()):
        name, memory = torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory
        lines.append(f"cuda:{index}: {name}, {memory / 2**30:.1f} GiB")
    if not torch.cuda.is_available():
        lines.append("cuda: none" + ("" if torch.version.cuda else " (this torch is built for the CPU)"))
    if torch.backends.mps.is_available():
        lines.append("mps: available")
    cache = cache_folder()
    lines.append(f"cache: {cache} ({'exists' if cache.is_dir() else 'not made yet'})")
    lines.append(f"hub: {'offline (HF_HUB_OFFLINE)' if _offline() else 'allowed'}")
    for extra, (packages, purpose) in _EXTRAS.items():
        found = [f"{name} {version}" for name in packages if (version := _version(name))]
        missing = [name for name in packages if not _version(name)]
        state = [", ".join(found)] if found else []
        state += [f"missing {', '.join(missing)} (pip install 'thrifty[{extra}]')"] if missing else []
        lines.append(f"extra {extra}: {purpose}: {'; '.join(state)}")
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _offline() -> bool:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return HF_HUB_OFFLINE
