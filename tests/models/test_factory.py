import re
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

import megafp4
from megafp4.errors import ConfigError
from megafp4.models import DenseFactory, QuantizedFactory, build_model
from megafp4.models.factory import SLOTS, SLOTS_PER_BLOCK, layer_id, set_recipe
from megafp4.precision import Precision
from megafp4.recipes import GemmSpec, OperandSpec, Recipe, get_recipe
from tests.models.small import batch, build, scatter, small_config

FP32 = GemmSpec(OperandSpec("fp32"), OperandSpec("fp32"))
EXACT = Recipe("fp32", fprop=FP32, dgrad=FP32, wgrad=FP32)


def quantized(config, recipe, seed=5, dtype=torch.float32, exempt=()):
    precision = Precision(seed=1)
    factory = QuantizedFactory(recipe, "reference", precision, config.layers, exempt)
    return build(config, factory, seed=seed, dtype=dtype), precision


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, megafp4.Linear)}


def test_slots_keep_their_number_for_ever():
    """Renumbering would change every stochastic rounding of existing runs."""
    assert SLOTS == ("attention.qkv", "attention.out", "mlp.up", "mlp.gate_up", "mlp.down")
    assert SLOTS_PER_BLOCK == 16
    assert layer_id(0, "attention.qkv") == 0
    assert layer_id(3, "mlp.down") == 52
    with pytest.raises(ConfigError, match=r"did you mean 'mlp\.down'"):
        layer_id(0, "mlp.dwn")


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_every_linear_of_a_block_is_quantized_and_named_by_its_path(family):
    model, _ = quantized(small_config(family), "mxfp4")
    up = "mlp.up" if family == "gpt" else "mlp.gate_up"
    slots = ("attention.qkv", "attention.out", up, "mlp.down")
    expected = {f"blocks.{b}.{s}": layer_id(b, s) for b in range(2) for s in slots}
    assert {path: linear.op.layer for path, linear in linears(model).items()} == expected
    assert all(linear.op.name == path for path, linear in linears(model).items())
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == len(expected)


def test_fused_matrices_carry_their_segments():
    model, _ = quantized(small_config("llama"), "bitnet")
    assert tuple(linears(model)["blocks.0.attention.qkv"].op.segments) == (64, 32, 32)
    assert tuple(linears(model)["blocks.0.mlp.gate_up"].op.segments) == (192, 192)
    assert linears(model)["blocks.0.mlp.down"].op.segments is None


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_the_exact_recipe_equals_plain_linears(family):
    config = small_config(family, subln=family == "llama")
    (exact, precision), dense = quantized(config, EXACT), build(config)
    scatter(exact)
    scatter(dense)
    tokens, targets = batch(config, rows=4, length=32)
    losses = [model(tokens, targets) for model in (exact, dense)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for loss in losses:
        loss.backward()
    references = dict(dense.named_parameters())
    for name, parameter in exact.named_parameters():
        reference = references[name].grad
        error = (parameter.grad - reference).norm() / reference.norm()
        assert error < 1e-5, name
    assert precision.ledger.by_format() == {"fp32 x fp32": 3 * 4 * config.layers}


@pytest.mark.parametrize("recipe", ["bf16", "mxfp4", "fp4", "bitnet"])
def test_published_recipes_train_close_to_the_plain_model(recipe):
    config = small_config("llama")
    (model, _), dense = quantized(config, recipe), build(config)
    tokens, targets = batch(config, rows=4, length=32)
    loss, reference = model(tokens, targets), dense(tokens, targets)
    assert loss.item() == pytest.approx(reference.item(), abs=0.02)
    loss.backward()
    reference.backward()
    for (name, ours), (_, theirs) in zip(
        sorted(model.named_parameters()), sorted(dense.named_parameters()), strict=True
    ):
        cosine = torch.cosine_similarity(ours.grad.flatten(), theirs.grad.flatten(), dim=0)
        assert cosine > (0.999 if recipe == "bf16" else 0.5), name


@pytest.mark.parametrize("recipe", ["mxfp4", "fp4", "dqt8", "bitnet", "nvfp4"])
def test_all_recipes_start_from_identical_weights(recipe):
    config = small_config("llama", layers=8)
    expected = build(config).state_dict()
    actual = quantized(config, recipe)[0].state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


class TestExemptBlocks:
    recipe = Recipe("edges", fprop=get_recipe("mxfp4").dgrad, skip_first=1, skip_last=2)

    def names(self, model):
        return [linear.recipe.name for linear in linears(model).values()]

    def test_first_and_last_blocks_run_bf16(self):
        model, precision = quantized(small_config(layers=5), self.recipe)
        assert self.names(model) == ["bf16"] * 4 + ["edges"] * 8 + ["bf16"] * 8
        model(*batch(model.config, rows=2, length=32))
        assert precision.ledger.by_format() == {"bf16 x bf16": 12, "mxfp4 x mxfp4": 8}

    def test_set_recipe_honours_them_too(self):
        model, _ = quantized(small_config(layers=5), "mxfp4")
        assert self.names(model) == ["mxfp4"] * 20
        set_recipe(model, self.recipe, 5)
        assert self.names(model) == ["bf16"] * 4 + ["edges"] * 8 + ["bf16"] * 8
        set_recipe(model, "bf16", 5)
        assert self.names(model) == ["bf16"] * 20

    def test_a_recipe_that_exempts_all_blocks_is_refused(self):
        with pytest.raises(
            ConfigError, match="last 2 blocks stay BF16, which are all of a model with 3"
        ):
            quantized(small_config(layers=3), self.recipe)


class TestExemptLinears:
    patterns = ("blocks.1.*", "*.mlp.down")
    expected: ClassVar = {
        "blocks.0.attention.qkv": "mxfp4",
        "blocks.0.attention.out": "mxfp4",
        "blocks.0.mlp.up": "mxfp4",
        "blocks.0.mlp.down": "bf16",
        "blocks.1.attention.qkv": "bf16",
        "blocks.1.attention.out": "bf16",
        "blocks.1.mlp.up": "bf16",
        "blocks.1.mlp.down": "bf16",
    }

    def names(self, model):
        return {path: linear.recipe.name for path, linear in linears(model).items()}

    def test_they_run_bf16_and_the_ledger_says_so(self):
        model, precision = quantized(small_config(), "mxfp4", exempt=self.patterns)
        assert self.names(model) == self.expected
        model(*batch(model.config, rows=2, length=32)).backward()
        rows = precision.ledger.rows()
        low = {row["layer"] for row in rows if row["a"] == "mxfp4"}
        assert low == {name for name, recipe in self.expected.items() if recipe == "mxfp4"}
        assert {row["layer"] for row in rows} == set(self.expected)

    def test_set_recipe_honours_them_too(self):
        model, _ = quantized(small_config(), "bf16", exempt=self.patterns)
        set_recipe(model, "mxfp4", 2, self.patterns)
        assert self.names(model) == self.expected

    def test_they_add_to_the_blocks_that_the_recipe_exempts(self):
        recipe = replace(get_recipe("mxfp4"), skip_first=1)
        model, _ = quantized(small_config(layers=3), recipe, exempt=("blocks.2.mlp",))
        low = [name for name, used in self.names(model).items() if used != "bf16"]
        assert len(low) == 6
        assert low[-1] == "blocks.2.attention.out"

    def test_a_width_that_the_recipe_cannot_cut_may_be_exempt(self):
        config = small_config(ffn_hidden=72)
        with pytest.raises(ConfigError, match="exempt it"):
            quantized(config, "mxfp4")
        quantized(config, "mxfp4", exempt=("*.mlp.*",))

    @pytest.mark.parametrize("pattern", ["*.mlp.gate_up", "blocks.2.*", "mlp.down"])
    def test_a_pattern_that_matches_nothing_is_refused(self, pattern):
        with pytest.raises(ConfigError, match=rf"exempt pattern '{re.escape(pattern)}' matches no"):
            quantized(small_config(), "mxfp4", exempt=(pattern,))
        model, _ = quantized(small_config(), "bf16")
        with pytest.raises(ConfigError, match="none of the model's 8 linears"):
            set_recipe(model, "mxfp4", 2, (pattern,))
        assert set(self.names(model).values()) == {"bf16"}

    def test_exempting_everything_is_refused(self):
        match = r"exempt blocks\.1 and the first 1 and last 0 blocks stay BF16, which are all of"
        recipe = replace(get_recipe("mxfp4"), skip_first=1)
        with pytest.raises(ConfigError, match=match):
            quantized(small_config(), recipe, exempt=("blocks.1",))
        model, _ = quantized(small_config(), "bf16")
        with pytest.raises(ConfigError, match=match):
            set_recipe(model, recipe, 2, ("blocks.1",))


def test_unknown_recipe_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'mxfp4'"):
        QuantizedFactory("mxpf4", "reference", Precision(), 2)


def test_bf16_activations_leave_parameters_and_gradients_fp32():
    model, _ = quantized(small_config(), "mxfp4", dtype=torch.bfloat16)
    tokens, targets = batch(model.config, rows=4, length=32)
    assert model(tokens).dtype == torch.bfloat16
    model(tokens, targets).backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_the_factory_checks_norm_names():
    with pytest.raises(ConfigError, match="did you mean 'rmsnorm'"):
        DenseFactory().norm("rms-norm", 8, 1e-5)


def test_models_run_without_any_quantization_machinery():
    model = build_model(small_config(), DenseFactory())
    assert linears(model) == {}
