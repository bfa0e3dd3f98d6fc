import pytest
import torch
import transformers
from torch.nn import functional as F

from megafp4.errors import CheckpointError, UnsupportedError
from megafp4.models.hf import from_hf, to_hf
from tests.models.small import batch, build, scatter, small_config

CASES = {
    "gpt2-tied": small_config("gpt"),
    "gpt2-untied-erf": small_config("gpt", tie_embeddings=False, activation="gelu"),
    "llama-gqa": small_config("llama"),
    "llama-mha-tied": small_config("llama", kv_heads=4, tie_embeddings=True),
    "llama-mqa-theta": small_config("llama", kv_heads=1, rope_theta=500.0, norm_eps=1e-3),
    "llama-bias": small_config("llama", bias=True),
    "llama-relu2": small_config("llama", activation="relu2-glu"),
    "bitnet-subln": small_config("llama", subln=True, activation="relu2-glu"),
    "bitnet-subln-silu": small_config("llama", subln=True),
}
CLASSES = {"gpt2": "GPT2", "llama": "Llama", "bitnet": "BitNet"}


def their_model(hf_config, state):
    family = CLASSES[hf_config["model_type"]]
    config = getattr(transformers, f"{family}Config")(**hf_config, attn_implementation="eager")
    model = getattr(transformers, hf_config["architectures"][0])(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert missing == (["lm_head.weight"] if hf_config["tie_word_embeddings"] else [])
    model.tie_weights()
    return model.eval()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def config(request):
    return request.param


def relative_error(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_logits_loss_and_all_gradients_equal_transformers(config):
    ours = build(config).eval()
    scatter(ours)
    theirs = their_model(*to_hf(config, {k: v.clone() for k, v in ours.state_dict().items()}))
    tokens, targets = batch(config)

    their_logits = theirs(tokens).logits
    our_logits = ours(tokens)
    assert our_logits.dtype == torch.float32
    assert relative_error(our_logits, their_logits) < 2e-6

    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    our_loss = ours(tokens, targets)
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-6, atol=0)
    our_loss.backward()
    their_loss.backward()

    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    _, mapped = from_hf(theirs.config.to_dict(), their_gradients)
    our_gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert mapped.keys() == our_gradients.keys()
    for name, gradient in our_gradients.items():
        assert relative_error(gradient, mapped[name]) < 2e-5, name


def test_round_trip_is_exact(config):
    state = build(config).state_dict()
    hf_config, hf_state = to_hf(config, state)
    assert all(tensor.is_contiguous() for tensor in hf_state.values())
    returned, back = from_hf(hf_config, hf_state)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    for field in ("family", "layers", "hidden", "heads", "num_kv_heads", "num_ffn_hidden",
                  "vocab_size", "seq_len", "mlp_activation", "norm_eps", "rope_theta",
                  "ties_embeddings", "has_bias", "subln", "dropout", "init_std"):  # fmt: skip
        assert getattr(returned, field) == getattr(config, field), field


def test_a_model_of_transformers_imports_from_its_own_config_and_state_dict(config):
    """Their config object writes more fields than ours; all must be understood."""
    theirs = their_model(*to_hf(config, build(config).state_dict()))
    returned, state = from_hf(theirs.config.to_dict(), theirs.state_dict())
    ours = build(returned)
    ours.load_state_dict(state)
    tokens, _ = batch(config)
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).logits) < 2e-6


def test_gpt2_files_of_the_hub_have_no_prefix_and_carry_mask_buffers():
    config = small_config("gpt")
    state = build(config).state_dict()
    hf_config, hf_state = to_hf(config, state)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in hf_state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    bare["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    _, back = from_hf(hf_config, bare)
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_rope_base_is_read_from_the_layouts_of_both_major_versions():
    config = small_config("llama", rope_theta=1234.0)
    hf_config, hf_state = to_hf(config, build(config).state_dict())
    for dropped in ("rope_theta", "rope_parameters"):
        partial = {key: value for key, value in hf_config.items() if key != dropped}
        assert from_hf(partial, hf_state)[0].rope_theta == 1234.0


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (small_config("gpt", subln=True), "subln"),
        (small_config("gpt", bias=False), "bias"),
        (small_config("gpt", activation="swiglu"), "activation"),
        (small_config("gpt", kv_heads=2), "kv_heads"),
        (small_config("llama", activation="gelu"), "activation"),
        (small_config("llama", subln=True, bias=True), "subln"),
    ],
)
def test_what_transformers_cannot_compute_is_not_exported(config, named):
    with pytest.raises(UnsupportedError, match=named):
        to_hf(config, build(config).state_dict())


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("gpt", {"model_type": "mistral"}),
        ("gpt", {"activation_function": "relu"}),
        ("gpt", {"scale_attn_weights": False}),
        ("gpt", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 32}),
        ("llama", {"attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("llama", {"quantization_config": {"quant_method": "bitnet"}}),
    ],
)
def test_options_that_change_the_function_are_refused(family, change):
    config = small_config(family)
    hf_config, hf_state = to_hf(config, build(config).state_dict())
    with pytest.raises(UnsupportedError, match=next(iter(change))):
        from_hf(hf_config | change, hf_state)


class TestDamagedState:
    config = small_config("llama", tie_embeddings=True)

    @pytest.fixture
    def exported(self):
        return to_hf(self.config, build(self.config).state_dict())

    def test_missing_parameter(self, exported):
        hf_config, state = exported
        del state["model.layers.1.self_attn.k_proj.weight"]
        with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.self_attn\.k_proj"):
            from_hf(hf_config, state)

    def test_surplus_parameter(self, exported):
        hf_config, state = exported
        state["model.layers.2.mlp.up_proj.weight"] = torch.zeros(1)
        with pytest.raises(CheckpointError, match=r"has model\.layers\.2\.mlp\.up_proj"):
            from_hf(hf_config, state)

    def test_wrong_shape(self, exported):
        hf_config, state = exported
        state["model.norm.weight"] = torch.ones(65)
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(65,\)"):
            from_hf(hf_config, state)

    def test_wrong_rows_of_a_fused_part(self, exported):
        """Swapped sizes whose sum fits must not pass."""
        hf_config, state = exported
        q, k = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
        state[q], state[k] = state[k], state[q]
        with pytest.raises(CheckpointError, match="q_proj"):
            from_hf(hf_config, state)

    def test_tied_head_that_differs(self, exported):
        hf_config, state = exported
        state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
        with pytest.raises(CheckpointError, match="differs from the token embedding"):
            from_hf(hf_config, state)

    def test_tied_head_that_agrees(self, exported):
        hf_config, state = exported
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        assert from_hf(hf_config, state)[0].ties_embeddings

    def test_missing_size(self, exported):
        hf_config, state = exported
        del hf_config["hidden_size"]
        with pytest.raises(CheckpointError, match="hidden_size"):
            from_hf(hf_config, state)

    def test_export_of_another_shape(self):
        state = build(self.config).state_dict()
        with pytest.raises(CheckpointError, match="shape"):
            to_hf(small_config("llama", tie_embeddings=True, ffn_hidden=128), state)
