"""Calibrating this machine: rates of matrix products, attention and memory, and what one small operation takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..core.memory import total_memory
from .hardware import Hardware, find_hardware

__all__ = ["measure"]

_TOKENS = 1024
_SHAPES = ((1024, 1024), (1024, 4096), (4096, 1024))  # (in, out) of linear layers
_COPY_BYTES = 256 * 2**20
_SECONDS = 1.5  # of each measurement; with the first, unmeasured calls all take less than 30 seconds


def measure() -> Hardware:
    """The profile of this machine: its accelerator where there is one, else its processor. Under 30 seconds."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    rates = {name: _products(device, dtype) for name, dtype in dtypes.items()}
    attention = _attention(device)
    if on_gpu:
        name, memory = torch.cuda.get_device_name(), total_memory("cuda")
    else:
        name, memory = f"this processor, {torch.get_num_threads()} threads", total_memory()
    rates["float16"] = rates["bfloat16"] if on_gpu else rates["float32"]
    return Hardware(
        name="measured",
        device=device.type,
        memory_gb=memory / 1e9,
        tflops={key: rate / 1e12 for key, rate in rates.items()},
        bandwidth_gbs=_bandwidth(device) / 1e9,
        share=1.0,
        attention_share=min(1.0, attention / rates["float32"]),
        bandwidth_share=1.0,
        call_us=1e6 * _call(device),
        slack=0.05,
        heap=0.0 if on_gpu else find_hardware("cpu").heap,
        mapping_gbs=0.0 if on_gpu else _mapping() / 1e9,
        framework_gb=0.6,
        watts=0.0,
        source=f"measured on {name}, torch {torch.__version__}",
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _time(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median over at least three, after one that is not counted."""
    run()
    _wait(device)
    begin, found = time.perf_counter(), list[float]()
    while len(found) < 3 or (time.perf_counter() - begin < _SECONDS and len(found) < 200):
        start = time.perf_counter()
        run()
        _wait(device)
        found.append(time.perf_counter() - start)
        if time.perf_counter() - begin > 3 * _SECONDS:
            break
    return statistics.median(found)


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second over products of linear layers' shapes."""
    pairs = [(torch.randn(_TOKENS, i), torch.randn(i, o)) for i, o in _SHAPES]
    moved = [(x.to(device, dtype), w.to(device, dtype)) for x, w in pairs]
    flops = sum(2 * _TOKENS * i * o for i, o in _SHAPES)
    return flops / _time(lambda: [x @ w for x, w in moved], device)


def _attention(device: torch.device) -> float:
    q = torch.randn(4, 16, 512, 64, device=device)
    flops = 4 * q.numel() * q.shape[2]
    return flops / _time(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True), device)


def _bandwidth(device: torch.device) -> float:
    source = torch.zeros(_COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _time(lambda: target.copy_(source), device)


def _mapping() -> float:
    """Bytes a second of fresh pages: a large tensor is made, written and freed."""
    return _COPY_BYTES / _time(lambda: torch.ones(_COPY_BYTES // 4), torch.device("cpu"))


def _call(device: torch.device) -> float:
    x = torch.zeros(64, device=device)

    def many() -> None:
        for _ in range(200):
            x.add_(1.0)

    return _time(many, device) / 200
