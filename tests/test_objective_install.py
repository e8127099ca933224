"""The label-only loss inside wrappers, and a model that is given back as it was."""

from __future__ import annotations

import copy
import inspect
import io

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import VOCAB, batches, build
from test_objective import assert_same, gradients
from torch import Tensor, nn

from thrifty.kernels import label_loss
from thrifty.objective import install, installed_plan, label_only, loss_of, next_token, prepare, uninstall


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_loss, "CHUNK_BYTES", 8 * VOCAB * 4)


PEERS = {
    "lora": (peft.LoraConfig(r=2, target_modules="all-linear"), "plain_head"),
    "lora_on_the_head": (peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"]), "own_head"),
    "saved_head": (peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]), "own_head"),
    "prompt": (peft.PromptTuningConfig(num_virtual_tokens=3), "plain_head"),
    "prefix": (peft.PrefixTuningConfig(num_virtual_tokens=3), "plain_head"),
    "own_loss_of_the_wrapper": (
        peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[5, 6], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 4]),
        "own_loss",
    ),
}


@pytest.mark.parametrize("peer", PEERS)
def test_under_peft(peer: str) -> None:
    peer_config, path = PEERS[peer]
    peer_config = copy.deepcopy(peer_config)
    peer_config.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(build("llama", layers=2), peer_config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)  # at zero, a forgotten adapter could not be seen
    batch = batches(1, 3, 10)[0]
    theirs = model(**batch).loss
    with label_only(model, sample_batch=batch) as plan:
        assert plan.path == path, plan.reason
        ours = loss_of(model, batch)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
        assert_same(gradients(model, ours), gradients(model, theirs), 1e-4)
    assert "forward" not in model.get_base_model().__dict__


def test_an_adapter_put_on_the_head_later_is_trained() -> None:
    model, batch = build("llama", layers=1), batches(1, 2, 8)[0]
    plan = prepare(model)
    assert plan.path == "plain_head"
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    install(wrapped, plan)
    assert any("lm_head.lora_B" in name for name in gradients(wrapped, loss_of(wrapped, batch)))


def test_dropout_in_the_head_is_the_same_when_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = peft.LoraConfig(r=2, lora_dropout=0.5, target_modules=["lm_head"], init_lora_weights=False)
    model, batch = peft.get_peft_model(build("llama", layers=1), adapter).train(), batches(1, 3, 10)[0]
    with label_only(model):
        torch.manual_seed(0)
        recomputed = gradients(model, loss_of(model, batch))
        monkeypatch.setattr(next_token, "checkpoint", lambda function, *args, **_: function(*args))
        torch.manual_seed(0)
        assert_same(recomputed, gradients(model, loss_of(model, batch)), 1e-5)


def test_head_weight_that_is_computed() -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model, batch = build("gpt2", layers=1), batches(1, 2, 8)[0]
    nn.utils.parametrize.register_parametrization(model.lm_head, "weight", Doubled(), unsafe=True)
    theirs = model(**batch).loss
    with label_only(model) as plan:
        assert plan.path == "plain_head", plan.reason
        ours = model(**batch).loss
    assert_same(gradients(model, ours), gradients(model, theirs), 1e-5)


def test_ddp_root_sees_every_gradient(tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for family in ("llama", "gemma2"):
            model, batch = build(family, layers=1), batches(1, 2, 8)[0]
            theirs = gradients(model, model(**batch).loss)
            with label_only(model):
                root = nn.parallel.DistributedDataParallel(model)
                assert_same(gradients(model, root(**batch).loss), theirs, 1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_install_is_undone_exactly() -> None:
    model, batch = build("llama", layers=1), batches(1, 2, 8)[0]
    before, attributes = model.forward, set(model.__dict__)
    install(model, prepare(model))
    assert inspect.signature(model.forward) == inspect.signature(before)
    assert model(input_ids=batch["input_ids"]).logits is not None
    assert model(**batch, output_hidden_states=True).logits is not None
    assert model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).logits is None
    assert model.generate(batch["input_ids"][:, :4], max_new_tokens=2).shape == (2, 6)
    uninstall(model)
    assert model.forward == before
    assert set(model.__dict__) == attributes
    uninstall(model)


def test_install_is_undone_over_a_replaced_forward_and_under_accelerate() -> None:
    model, batch = build("llama", layers=1), batches(1, 2, 8)[0]
    stock = model.forward
    model.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    replaced = model.forward
    with label_only(model):
        AcceleratorState._reset_state(reset_partial_state=True)  # of a trainer that ran before in this process
        Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
        assert model(**batch).logits is None
        assert installed_plan(model) is not None
    AcceleratorState._reset_state(reset_partial_state=True)
    assert model.forward is replaced
    assert "_original_forward" not in model.__dict__


def test_copies_and_pickles_stay_usable() -> None:
    model, batch = build("llama", layers=1), batches(1, 2, 8)[0]
    with label_only(model):
        loss = loss_of(model, batch)
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert loss_of(twin, batch) == loss
    assert twin(**batch).logits is None
    uninstall(twin)
    assert twin(**batch).logits is not None
    file.seek(0)
    read = torch.load(file, weights_only=False)
    assert installed_plan(read) is None
    assert read(**batch).logits is not None
