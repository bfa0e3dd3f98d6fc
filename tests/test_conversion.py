"""Any model's linears become quantized ones: which, how shared, and with what result."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import megafp4
from megafp4.errors import ConfigError, UnsupportedError
from megafp4.precision import Precision
from megafp4.recipes import GemmSpec, OperandSpec, Recipe
from megafp4.recipes.library import nvfp4

FP32 = OperandSpec("fp32")
EXACT = Recipe(
    "exact", fprop=GemmSpec(FP32, FP32), dgrad=GemmSpec(FP32, FP32), wgrad=GemmSpec(FP32, FP32)
)

CONV1D_WEIGHTS = ("c_attn.weight", "c_proj.weight", "c_fc.weight")


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=64, n_head=2, vocab_size=128, n_positions=32,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=128, num_attention_heads=2,
        vocab_size=128, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def tokens() -> Tensor:
    return torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(1))


def converted_names(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, megafp4.Linear)]


def mlp(**kwargs: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 64, **kwargs), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 64)
    )


@pytest.mark.parametrize("build", [gpt2, llama])
def test_hugging_face_models_compute_the_same(build: object) -> None:
    """With FP32 operands conversion must change nothing: transposes, biases, gradients."""
    model, twin = build(), build()  # type: ignore[operator]
    megafp4.convert(twin, EXACT)
    losses = []
    for m in (model, twin):
        loss = m(tokens(), labels=tokens()).loss
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    expected = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        grad = expected[name].grad
        assert grad is not None
        if name.endswith(CONV1D_WEIGHTS):
            grad = grad.t()
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)


def test_hugging_face_models_train_in_mxfp4() -> None:
    model = megafp4.convert(gpt2(), "mxfp4", seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    assert model.precision.ledger.by_gemm() == {
        "fprop": {"bf16 x bf16": 64},
        "dgrad": {"mxfp4 x mxfp4": 64},
        "wgrad": {"mxfp4 x mxfp4": 64},
    }
    assert (model.precision.step, model.precision.seed) == (8, 3)


def test_output_head_is_skipped_by_default() -> None:
    model = megafp4.convert(llama(), "bf16")
    assert len(converted_names(model)) == 14
    assert "lm_head" not in converted_names(model)
    assert type(model.lm_head) is nn.Linear


def test_nothing_is_skipped_in_other_models() -> None:
    assert converted_names(megafp4.convert(mlp(), "bf16")) == ["0", "2", "3"]


def test_tied_weights_stay_tied() -> None:
    model = gpt2()
    embedding = model.transformer.wte.weight
    megafp4.convert(model, "mxfp4", skip=())
    assert isinstance(model.lm_head, megafp4.Linear)
    assert model.lm_head.weight is embedding
    model(tokens(), labels=tokens()).loss.backward()
    assert embedding.grad is not None


def test_shared_modules_and_shared_transposed_weights_stay_shared() -> None:
    shared = nn.Linear(32, 32)
    one, other = Conv1D(32, 32), Conv1D(32, 32)
    other.weight = one.weight
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": one, "d": other})
    megafp4.convert(model, "bf16")
    assert model["a"] is model["b"][0]
    assert isinstance(model["a"], megafp4.Linear)
    assert model["c"].weight is model["d"].weight


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("2", ["0", "3"]),
        (["0", "3"], ["2"]),
        (["[23]"], ["0"]),
        ((), ["0", "2", "3"]),
    ],
)
def test_skip(skip: object, left: list[str]) -> None:
    model = mlp()
    kept = [m for name, m in model.named_children() if name not in left]
    assert converted_names(megafp4.convert(model, "bf16", skip=skip)) == left  # type: ignore[arg-type]
    assert all(m in list(model.children()) for m in kept)


def test_skip_by_parent_and_by_wildcard() -> None:
    found = converted_names(megafp4.convert(gpt2(), "bf16", skip=["lm_head", "transformer.h.0"]))
    assert len(found) == 4
    assert all(name.startswith("transformer.h.1.") for name in found)
    found = converted_names(megafp4.convert(llama(), "bf16", skip=["*.mlp.*", "lm_head"]))
    assert len(found) == 8
    assert all("self_attn" in name for name in found)


def test_stream_ids_do_not_depend_on_what_is_skipped() -> None:
    everything, some = megafp4.convert(mlp(), "bf16"), megafp4.convert(mlp(), "bf16", skip="0")
    assert [everything[i].op.layer for i in (0, 2, 3)] == [0, 1, 2]
    assert [some[i].op.layer for i in (2, 3)] == [1, 2]
    assert [some[i].op.name for i in (2, 3)] == ["2", "3"]


def test_exempt_blocks_stay_as_they_are() -> None:
    found = converted_names(megafp4.convert(llama(), nvfp4(skip_last=1)))
    assert len(found) == 7
    assert all(name.startswith("model.layers.0.") for name in found)
    with pytest.raises(ConfigError, match="no linear of the model has a number in its name"):
        megafp4.convert(nn.ModuleDict({"a": nn.Linear(16, 16)}), nvfp4(skip_last=1))


def test_parameters_modes_and_flags_are_kept() -> None:
    model = mlp(bias=False).eval()
    model[0].weight.requires_grad_(False)
    before = dict(model.named_parameters())
    megafp4.convert(model, "mxfp4-rtn")
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert not model[0].weight.requires_grad
    assert not model[0].training
    assert model[0].bias is None
    assert all(m.op.precision is model.precision for m in model.modules() if hasattr(m, "op"))


def test_step_advances_in_training_only() -> None:
    model = megafp4.convert(mlp(), "bf16")
    assert isinstance(model.precision, Precision)
    for _ in range(3):
        model(torch.zeros(2, 64))
    model.eval()
    model(torch.zeros(2, 64))
    assert model.precision.step == 3


def test_grid_recipes_move_the_weights() -> None:
    model = megafp4.convert(mlp(), "dqt8")
    assert model[0].weight.grid is model[0].grid
    assert "0.weight" not in model.state_dict()
    model(torch.ones(4, 64)).sum().backward()
    assert model[0].weight.grad.shape == (64, 64)


def test_tied_weights_have_no_place_on_a_grid() -> None:
    """Each module would round a copy of its own: refused, not untied behind the user's back."""
    model = mlp()
    model.append(nn.Linear(64, 64))
    model[4].weight = model[0].weight
    with pytest.raises(ConfigError, match=r"weight of '0' is tied .*'dqt8' .*: skip it, or untie"):
        megafp4.convert(model, "dqt8")
    assert converted_names(model) == []
    megafp4.convert(model, "bitnet")
    assert model[4].weight is model[0].weight


@pytest.mark.parametrize("recipe", ["bf16", "dqt8"])
def test_a_module_used_twice_in_one_parent_is_replaced_in_both_places(recipe: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU())
    model.append(model[0])
    megafp4.convert(model, recipe)
    assert isinstance(model[0], megafp4.Linear)
    assert model[2] is model[0]


def test_linears_with_hooks_are_refused() -> None:
    hooked, normed = mlp(), mlp()
    hooked[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    normed[2].register_forward_pre_hook(lambda module, inputs: None)
    for model in (hooked, normed):
        with pytest.raises(UnsupportedError, match=r"'2' has hooks .*: convert first"):
            megafp4.convert(model, "bf16")
    placed = mlp()
    placed[3].forward = placed[3].forward
    with pytest.raises(UnsupportedError, match="'3' has hooks or a forward of its own"):
        megafp4.convert(placed, "bf16")
    assert converted_names(megafp4.convert(placed, "bf16", skip="3")) == ["0", "2"]


def test_copies_and_pickles_work() -> None:
    model = megafp4.convert(mlp(), "fp4").eval()
    x = torch.randn(4, 64)
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), expected)
        assert twin[0].op.precision is twin.precision is not model.precision


def test_errors() -> None:
    with pytest.raises(
        ConfigError, match=r"skip pattern 'heads' matches none .* 3 linears \(0, 2,"
    ):
        megafp4.convert(mlp(), "bf16", skip=["0", "heads"])
    with pytest.raises(ConfigError, match="unknown recipe 'mxfp44'"):
        megafp4.convert(mlp(), "mxfp44")
    with pytest.raises(ConfigError, match="unknown backend 'cuda'"):
        megafp4.convert(mlp(), "bf16", backend="cuda")
    with pytest.raises(ConfigError, match=r"use megafp4\.Linear in its place"):
        megafp4.convert(nn.Linear(4, 4), "bf16")
    with pytest.raises(ConfigError, match="has 0 linears, of which 0 are skipped: nothing"):
        megafp4.convert(nn.Sequential(nn.ReLU()), "bf16")
    with pytest.raises(ConfigError, match=r"dgrad of '2' contracts over 32 output features.*64"):
        megafp4.convert(mlp(), "mxfp4")
    model = megafp4.convert(mlp(), "bf16")
    with pytest.raises(ConfigError, match=r"'0' is a megafp4\.Linear already: use its set_recipe"):
        megafp4.convert(model, "fp8")


def test_a_failed_conversion_leaves_the_model_alone() -> None:
    model = mlp()
    with pytest.raises(ConfigError):
        megafp4.convert(model, "mxfp4")
    assert converted_names(model) == []


def test_linears_of_unknown_classes_are_refused() -> None:
    """nn.MultiheadAttention never calls its out_proj: replacing it would have no effect."""
    model = nn.TransformerEncoderLayer(32, 2, 64)
    with pytest.raises(
        UnsupportedError, match=r"'self_attn\.out_proj' is a NonDynamically.*: skip it"
    ):
        megafp4.convert(model, "bf16")
    assert converted_names(megafp4.convert(model, "bf16", skip="self_attn")) == [
        "linear1",
        "linear2",
    ]
