"""The label-only loss of whole models against their own loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, VOCAB, batches, build, classifier_batches, config
from test_label_loss import Sizes
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from thrifty.kernels import label_loss
from thrifty.objective import (
    label_count,
    label_only,
    loss_of,
    prepare,
    sum_loss,
)

PATHS = dict.fromkeys(FAMILIES, "plain_head") | {"gemma2": "own_head", "granite": "own_head"}
PRECISIONS = {
    "float32": (torch.float32, False, 1e-5),
    "float32_autocast": (torch.float32, True, 2e-2),
    "bfloat16": (torch.bfloat16, False, 2e-2),
}


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_loss, "CHUNK_BYTES", 8 * VOCAB * 4)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        # Against the largest gradient too: a key bias has none but rounding.
        scale = max(want.float().norm().item(), 1e-3)
        assert (ours[name] - want).float().norm() <= tolerance * scale, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_loss(family: str, precision: str) -> None:
    dtype, autocast, tolerance = PRECISIONS[precision]
    model = build(family, dtype, layers=2)
    batch = batches(1, 3, 14)[0]
    for extra in ({}, {"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 50}):
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            theirs = model(**batch, **extra).loss
            with label_only(model, sample_batch=batch) as plan:
                assert plan.path == PATHS[family], plan.reason
                output = model(**batch, **extra)
        assert output.logits is None
        assert output.loss.dtype == torch.float32
        torch.testing.assert_close(output.loss, theirs, rtol=1e-6 if dtype == torch.float32 else 1e-5, atol=0)
        assert_same(gradients(model, output.loss), gradients(model, theirs), tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_all_tokens_never_exist(family: str) -> None:
    model = build(family, layers=1)
    batch = batches(1, 4, 20)[0]
    batch["labels"] = batch["input_ids"]
    tokens = batch["labels"].numel()

    class Logits(Sizes):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dim() and out.shape[-1] == VOCAB and out.shape != (40, VOCAB):  # not W.T
                self.largest = max(self.largest, out.numel())
            return out

    with label_only(model):
        with Logits() as training:
            model(**batch).loss.backward()
        with Logits() as evaluation, torch.no_grad():
            model(**batch)
    with Logits() as everything:
        model(**batch)
    assert everything.largest == tokens * VOCAB
    assert training.largest == evaluation.largest == 8 * VOCAB


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_accumulation_is_token_normalised(family: str) -> None:
    model = build(family, layers=2)
    big = batches(1, 6, 12)[0]
    items = label_count(big)
    whole = gradients(model, model(**big).loss)
    model.zero_grad()
    with label_only(model):
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
            model(**{name: value[rows] for name, value in big.items()}, num_items_in_batch=items).loss.backward()
    assert_same({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, whole, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "router", "classifier"])
def test_a_batch_without_labels_runs_backward(family: str) -> None:
    if family == "classifier":
        model, batch = build("bert_classifier", layers=1), classifier_batches(1, 2, 8)[0]
    else:
        model, batch = build("mixtral" if family == "router" else family, layers=1), batches(1, 2, 8)[0]
        model.config.output_router_logits = family == "router"
    with label_only(model):
        trained = {n for n, g in gradients(model, model(**batch).loss).items() if g is not None}
        batch["labels"] = torch.full_like(batch["labels"], -100)
        loss = model(**batch).loss
    assert loss.item() == 0.0
    found = gradients(model, loss)
    assert found.keys() == trained
    assert all(g.abs().max() == 0.0 for g in found.values())


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_gradient_checkpointing(family: str) -> None:
    model, batch = build(family, layers=2), batches(1, 2, 10)[0]
    theirs = gradients(model, model(**batch).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with label_only(model):
        assert_same(gradients(model, loss_of(model, batch)), theirs, 1e-5)


def test_router_loss_is_kept() -> None:
    model, batch = build("mixtral", layers=2), batches(1, 2, 10)[0]
    plain = model(**batch).loss
    model.config.output_router_logits = True
    with label_only(model) as plan:
        assert plan.path == "own_loss"
        assert "router" in plan.reason
        assert model(**batch).loss > plain


def odd_models() -> Iterator[tuple[str, nn.Module, str]]:
    torch.manual_seed(0)  # with stock weights every loss is near log(vocabulary): it proves little
    bert = BertConfig(**{**config("bert_encoder", layers=1).to_dict(), "is_decoder": True})
    yield "bert decoder", BertLMHeadModel(bert), "own_head"
    opt = OPTConfig(
        vocab_size=VOCAB, hidden_size=40, ffn_dim=72, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=24
    )
    yield "opt", AutoModelForCausalLM.from_config(opt), "plain_head"
    t5 = T5Config(vocab_size=VOCAB, d_model=40, d_kv=10, d_ff=72, num_layers=1, num_heads=4, decoder_start_token_id=0)
    yield "t5", T5ForConditionalGeneration(t5), "own_loss"
    yield "classifier", build("bert_classifier", layers=1), "own_loss"


@pytest.mark.parametrize(
    ("name", "model", "path"), odd_models(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_odd_models_keep_their_own_loss(name: str, model: nn.Module, path: str) -> None:
    batch = (classifier_batches if name == "classifier" else batches)(1, 3, 10)[0]
    model.eval()
    theirs = model(**batch).loss
    with label_only(model, sample_batch=batch) as plan:
        assert plan.path == path, plan.reason
        torch.testing.assert_close(loss_of(model, batch), theirs, rtol=1e-5, atol=0)


def test_sum_and_count() -> None:
    model, batch = build("llama", layers=1), batches(1, 3, 8)[0]
    with label_only(model), torch.no_grad():
        total, count = sum_loss(model, batch)
        assert count == int((batch["labels"][:, 1:] != -100).sum())
        torch.testing.assert_close(total, model(**batch, num_items_in_batch=1).loss)


def test_prepare_leaves_the_model_alone() -> None:
    model = build("llama", layers=1)
    model.model.layers[0].eval()
    prepare(model)
    assert model.training
    assert not model.model.layers[0].training
    assert all(p.grad is None for p in model.parameters())
