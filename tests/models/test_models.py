import math

import pytest
import torch

from megafp4.errors import ConfigError
from megafp4.models import DenseFactory, build_model
from megafp4.models.layers import RMSNorm, rotary_tables, rotate
from tests.models.small import batch, build, scatter, small_config

FAMILIES = ("gpt", "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_loss_is_that_of_a_uniform_guess(family):
    config = small_config(family, vocab_size=384)
    loss = build(config)(*batch(config))
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert abs(loss.item() - math.log(384)) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_the_future(family):
    config = small_config(family)
    model = build(config).eval()
    scatter(model)
    tokens, _ = batch(config)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.isclose(before[:, 9:], after[:, 9:]).all(-1).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_sequence_works_and_one_more_token_is_refused(family):
    config = small_config(family, seq_len=8)
    model = build(config)
    assert model(torch.zeros(1, 8, dtype=torch.int64)).shape == (1, 8, config.vocab_size)
    with pytest.raises(ConfigError, match=r"9 tokens.*model\.seq_len 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_targets_of_minus_one_are_ignored():
    config = small_config()
    model = build(config).eval()
    tokens, targets = batch(config, rows=2)
    masked = targets.clone()
    masked[1] = -1
    torch.testing.assert_close(model(tokens, masked), model(tokens[:1], targets[:1]))
    assert model(tokens, torch.full_like(targets, -1)).isnan()


def test_all_activations_but_the_loss_have_the_runs_type():
    config = small_config("llama", subln=True)
    model = build(config, dtype=torch.bfloat16)
    seen = set()
    for block in model.blocks:
        for module in block.modules():
            module.register_forward_hook(lambda _m, _i, output: seen.add(output.dtype))
    tokens, targets = batch(config)
    assert model(tokens).dtype == torch.bfloat16
    assert seen == {torch.bfloat16}
    loss = model(tokens, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_activations_stay_close_to_fp32(family):
    config = small_config(family)
    exact, rounded = build(config), build(config, dtype=torch.bfloat16)
    tokens, targets = batch(config)
    assert abs(exact(tokens, targets) - rounded(tokens, targets)).item() < 5e-3


def test_dropout_acts_in_training_only():
    config = small_config(dropout=0.5)
    model, plain = build(config), build(small_config())
    tokens, _ = batch(config)
    with torch.no_grad():
        assert not torch.allclose(model(tokens), model(tokens))
        assert torch.equal(model.eval()(tokens), plain(tokens))


def test_a_tied_head_has_no_weight_of_its_own():
    tied, untied = (build(small_config(tie_embeddings=tie)) for tie in (True, False))
    assert "head.weight" not in tied.state_dict()
    assert untied.state_dict()["head.weight"].shape == (101, 64)


class TestSubLN:
    def test_adds_exactly_one_norm_before_each_output_projection(self):
        plain = dict(build(small_config("llama")).named_parameters())
        subln = dict(build(small_config("llama", subln=True)).named_parameters())
        added = {name: tuple(subln[name].shape) for name in subln.keys() - plain.keys()}
        assert plain.keys() <= subln.keys()
        assert added == {
            f"blocks.{block}.{part}.sub_norm.weight": (width,)
            for block in range(2)
            for part, width in (("attention", 64), ("mlp", 192))
        }

    def test_output_projections_receive_unit_rms(self):
        model = build(small_config("llama", subln=True))
        inputs = []
        for block in model.blocks:
            for linear in (block.attention.out, block.mlp.down):
                linear.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
        model(batch(model.config)[0])
        assert len(inputs) == 4
        for x in inputs:
            torch.testing.assert_close(
                x.square().mean(-1), torch.ones(x.shape[:-1]), rtol=0.2, atol=0
            )

    def test_works_for_gpt_too(self):
        model = build(small_config(subln=True))
        assert isinstance(model.blocks[0].mlp.sub_norm, RMSNorm)


class TestRotary:
    def test_scores_depend_on_distance_only(self):
        cos_sin = rotary_tables(torch.arange(16), 8, 10000.0)
        q, k = torch.randn(2, 8, dtype=torch.float32).unsqueeze(1).expand(2, 16, 8)
        q, k = (rotate(t[None, None], cos_sin)[0, 0] for t in (q, k))
        scores = q @ k.T
        for offset in (-5, 0, 3):
            diagonal = scores.diagonal(offset)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5,
                                       rtol=1e-5)  # fmt: skip

    def test_pairs_are_rotated_as_complex_numbers(self):
        """Independent form: (x_i, x_{i + D/2}) is one complex number times e^{i angle}."""
        x = torch.randn(2, 3, 5, 8)
        angle = torch.outer(torch.arange(5.0), 100.0 ** (-torch.arange(4) / 4))
        turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(5, 4), angle)
        expected = torch.cat((turned.real, turned.imag), -1)
        rotated = rotate(x, rotary_tables(torch.arange(5), 8, 100.0))
        torch.testing.assert_close(rotated, expected)

    def test_odd_head_width_is_refused(self):
        with pytest.raises(ConfigError, match="even head width"):
            build_model(small_config("llama", hidden=12, heads=4), DenseFactory())


def test_unknown_activation_and_family_suggest_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'swiglu'"):
        build_model(small_config(activation="swiglo"), DenseFactory())
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        build_model(small_config(family="lama"), DenseFactory())


def test_a_model_builds_on_the_meta_device_without_memory():
    with torch.device("meta"):
        model = build_model(small_config("llama"), DenseFactory())
    assert all(p.is_meta for p in model.parameters())
    assert list(model.buffers()) == []
