"""GGUF files: transformers reads back the same weights and tokens; what is not plain gets llama.cpp's command."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerFast

from thrifty.core.errors import ThriftyError
from thrifty.run.gguf import gguf_command, write_gguf

TEXTS = [
    "The cat sat; it didn't move.",
    "  two  spaces\n\nand lines",
    "naïve Ünïcode 漢字 🙂",
    "<tool>call</tool> <|end|>x",
]
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SPLITS = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def save_tokenizer(folder: Path, split: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, a control token and an added word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = split, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 3, trainers.BpeTrainer(vocab_size=290, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>", pad_token="<|end|>"
    )
    fast.add_tokens(["<tool>"])
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def save(
    folder: Path, family: str = "llama", split: str = "gpt-2", dtype: torch.dtype = torch.float32, **more: Any
) -> Any:
    """A tiny checkpoint whose matrices have rows of 32 numbers or 64."""
    config = families.config(family, layers=2)
    config.update(
        {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "eos_token_id": 0} | more
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = (parameter.data + 0.2 * torch.randn(parameter.shape)).to(dtype)
    model.save_pretrained(folder)
    save_tokenizer(folder, SPLITS[split])
    return model


def load(file: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_reads_the_same_weights(family: str, tied: bool, tmp_path: Path) -> None:
    model = save(tmp_path / "m", family, tie_word_embeddings=tied)
    file = Path(write_gguf(tmp_path / "m", tmp_path / "m.gguf"))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["m.gguf"]
    again = load(file)
    expected = dict(model.named_parameters())
    found = dict(again.named_parameters(remove_duplicate=False))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    ids = torch.arange(24)[None]
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_smaller_types(kind: str, tmp_path: Path) -> None:
    model = save(tmp_path / "m", hidden_act="silu")
    again = load(Path(write_gguf(tmp_path / "m", tmp_path / "m.gguf", outtype=kind)))
    for name, tensor in again.named_parameters():
        own = model.get_parameter(name)
        if (
            kind == "q8_0" and tensor.ndim == 2
        ):  # blocks of 32 share a scale of their largest number over 127, in float16
            blocks = own.reshape(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            assert ((tensor.reshape(-1, 32) - blocks).abs() <= 0.51 * step + 1e-3 * blocks.abs()).all()
        else:
            expected = own if tensor.ndim == 1 else own.to({"f16": torch.float16}.get(kind, torch.bfloat16)).float()
            assert torch.equal(tensor, expected)


def test_by_default_no_bit_is_lost(tmp_path: Path) -> None:
    model = save(tmp_path / "m", dtype=torch.bfloat16)
    again = load(Path(write_gguf(tmp_path / "m", tmp_path / "m.gguf")))
    assert all(torch.equal(t, model.get_parameter(name).float()) for name, t in again.named_parameters())
    assert (tmp_path / "m.gguf").stat().st_size < 1.2 * (tmp_path / "m" / "model.safetensors").stat().st_size + 40_000


def value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


@pytest.mark.parametrize("split", SPLITS)
def test_the_tokenizer_comes_along(split: str, tmp_path: Path) -> None:
    save(tmp_path / "m", "qwen2" if split == "qwen2" else "llama", split)
    file = Path(write_gguf(tmp_path / "m", tmp_path / "m.gguf"))
    reader = GGUFReader(file)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert value(reader, "tokenizer.ggml.pre") == split
    tokens, kinds = value(reader, "tokenizer.ggml.tokens"), value(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == 320
    known = json.loads((tmp_path / "m" / "tokenizer.json").read_text())["model"]["vocab"]
    assert {token: i for i, token in enumerate(tokens) if token in known} == known
    assert (kinds[0], kinds[5], kinds[tokenizer.convert_tokens_to_ids("<tool>")], kinds[-1]) == (3, 1, 4, 5)
    merges = json.loads((tmp_path / "m" / "tokenizer.json").read_text())["model"]["merges"]
    assert value(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in merges]
    assert value(reader, "tokenizer.ggml.eos_token_id") == 0
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.chat_template") == tokenizer.chat_template
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in TEXTS:
        assert again(text).input_ids == tokenizer(text).input_ids


def refused(folder: Path, output: Path, message: str, **options: Any) -> None:
    with pytest.raises(ThriftyError, match=message) as error:
        write_gguf(folder, output, **options)
    assert "\n" not in str(error.value)
    assert not output.exists()
    assert not list(output.parent.glob(".partial*"))


def test_what_is_not_plain_gets_the_command(tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    save(tmp_path / "m")
    tokenizer = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    refused(tmp_path / "m", output, "unknown outtype 'q4_0'", outtype="q4_0")
    for change in ({"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": {"type": "Whitespace"}}):
        (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(tokenizer | change))
        refused(
            tmp_path / "m", output, "in a way that is not known here: convert with llama.cpp: python convert_hf_to_gguf"
        )
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    for change in (scaled, {"hidden_act": "gelu"}, {"attention_bias": True}):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | change))
        refused(tmp_path / "m", output, "not written here: convert with llama.cpp: python convert_hf_to_gguf.py")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    refused(tmp_path / "m", output, "more tokens than the model's 200 rows")
    families.build("gpt2").save_pretrained(tmp_path / "gpt2")
    refused(tmp_path / "gpt2", output, "GPT2LMHeadModel is not written here")
    output.write_text("kept")
    with pytest.raises(ThriftyError, match="exists: name a new file"):
        write_gguf(tmp_path / "m", output)
    assert output.read_text() == "kept"


def test_the_command(tmp_path: Path) -> None:
    base = tmp_path / "a b"
    families.build("llama", layers=1).save_pretrained(base)
    words = shlex.split(gguf_command(base))
    assert words == [
        "python",
        "convert_hf_to_gguf.py",
        str(base),
        "--outfile",
        f"{base}/a b-f32.gguf",
        "--outtype",
        "f32",
    ]
    assert shlex.split(gguf_command(base, outtype="q8_0"))[-3:] == [f"{base}/a b-q8_0.gguf", "--outtype", "q8_0"]
    with pytest.raises(ThriftyError, match=r"holds no config\.json"):
        gguf_command(tmp_path / "none")
