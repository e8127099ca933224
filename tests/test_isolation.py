"""Packed rows are to a model what its rows are alone, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from families import FAMILIES, VOCAB, build
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    MambaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RwkvConfig,
)

from thrifty.core.errors import ThriftyError
from thrifty.data import PackedRows, collate, pack
from thrifty.objective import LossPlan, check_packing, install, label_count, prepare, sum_loss

LENGTHS = [9, 4, 14, 1, 6, 11, 2, 8]


def rows() -> list[dict[str, list[int]]]:
    """Rows with a prompt of one to three tokens."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        prompt = min(length, 1 + number % 3)
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return made


def packed_batch() -> tuple[dict[str, Tensor], list[list[int]]]:
    packs = pack(LENGTHS, capacity=20, seed=0)
    assert 1 < len(packs) < len(LENGTHS)
    batch = collate(list(PackedRows(rows(), packs)), pad_token_id=0)
    del batch["tokens"]
    return batch, packs


def noisy(config: PreTrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.2 * noise if parameter.dim() > 1 else parameter.detach() + 0.1 * noise
    return model.train()


_SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
REFUSED: dict[str, Callable[[], PreTrainedConfig]] = {
    "bloom": lambda: BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),  # ALiBi
    "mamba": lambda: MambaConfig(**_SMALL, state_size=4),  # a state runs through
    "rwkv": lambda: RwkvConfig(**_SMALL, attention_hidden_size=32),
    "recurrent_gemma": lambda: RecurrentGemmaConfig(
        **_SMALL | {"num_hidden_layers": 3}, num_attention_heads=4, intermediate_size=48
    ),
    "opt": lambda: OPTConfig(**_SMALL, ffn_dim=48, num_attention_heads=4, word_embed_proj_dim=32),  # its own positions
}


def watched(model: nn.Module) -> Iterator[tuple[str, object]]:
    for name, parameter in model.named_parameters():
        yield name, (parameter.requires_grad, parameter.detach().clone(), parameter.grad)
    for name, module in model.named_modules():
        yield name, (module.training, len(module._forward_hooks))


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "eager") for family in FAMILIES), *((family, "sdpa") for family in FAMILIES if family != "gemma2")],
)  # Gemma-2's cap on the attention scores is not for sdpa
def test_packed_loss_and_gradients_equal_the_unpacked(family: str, attention: str) -> None:
    """In float64, logits, the loss and all gradients of one batch with and without packing."""
    model = build(family).double().eval()
    model.set_attn_implementation(attention)
    if family == "mixtral":
        model.set_experts_implementation("eager")  # grouped products know no float64
    plan = prepare(model)
    install(model, plan)
    check_packing(model)

    packed, packs = packed_batch()
    # One by one: padded rows of a sliding window are NaN in float64, whose lowest number is -inf to a float32 softmax.
    alone = [collate([row], pad_token_id=0) for row in rows()]
    assert label_count(packed) == sum(label_count(one) for one in alone)
    with torch.no_grad():
        logits = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
        for number, members in enumerate(packs):
            start = 0
            for row in members:
                own = model(input_ids=alone[row]["input_ids"]).logits[0]
                # Rotary tables and some softmaxes are float32 in any model.
                torch.testing.assert_close(logits[number, start : start + LENGTHS[row]], own, rtol=1e-5, atol=1e-5)
                start += LENGTHS[row]

    sums, gradients = [], []
    for batches in (alone, [packed]):
        model.zero_grad()
        losses = [sum_loss(model, batch)[0] for batch in batches]
        total = torch.stack(losses).sum()
        total.backward()
        sums.append(total.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(sums[1], sums[0], rtol=1e-6, atol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6 * scale + 1e-9)


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_mix_packed_rows_are_refused(family: str) -> None:
    model = noisy(REFUSED[family]())
    install(model, prepare(model))
    with pytest.raises(ThriftyError, match=rf"^packing: model type '{family}' cannot .* set packing: false$") as caught:
        check_packing(model)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_half_precision_is_no_reason(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype)
    install(model, prepare(model))
    check_packing(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_in_the_loss_alone_is_seen(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own forward keeps a cache in its loss, and then its rows are mixed, though the logits agree."""
    model = build("llama", dtype=dtype)
    install(model, LossPlan(path="own_loss", reason="asked for"))
    check_packing(model)
    monkeypatch.setattr("thrifty.objective.next_token._own_loss", lambda forward, given: forward(**given))
    with pytest.raises(ThriftyError, match="a row's loss depends on the rows beside it"):
        check_packing(model)


def test_a_model_that_takes_no_positions_is_refused() -> None:
    model = build("llama")
    install(model, prepare(model))
    real = model.model.forward

    def forward(*args: object, position_ids: object = None, **kwargs: object) -> object:
        if position_ids is not None:
            raise TypeError("it takes no position_ids")
        return real(*args, **kwargs)

    model.model.forward = forward
    with pytest.raises(ThriftyError, match=r"\(TypeError: it takes no position_ids\): set packing: false"):
        check_packing(model)


def test_the_model_is_left_as_it_was() -> None:
    model = build("gpt2")
    install(model, prepare(model))
    next(model.parameters()).requires_grad_(False)
    before = dict(watched(model))
    check_packing(model)
    after = dict(watched(model))
    assert before.keys() == after.keys()
    for name, value in before.items():
        for one, other in zip(value, after[name], strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other, name
