import pytest
import torch
import transformers

from megafp4.errors import ConfigError
from megafp4.models import build_model, get_preset, parameter_count, preset_names
from megafp4.models.factory import DenseFactory
from megafp4.models.hf import to_hf
from megafp4.models.presets import preset_summary

# Published: 345M is Megatron's 354,871,296; Llama 2's 6,738,415,616 and 13,015,864,320.
PARAMETERS = {
    "gpt-tiny": 858_880,
    "gpt-30m": 30_357_504,
    "gpt-125m": 125_262_336,
    "gpt-345m": 354_871_296,
    "gpt-1.3b": 1_315_819_520,
    "gpt-6.7b": 6_658_596_864,
    "gpt-13b": 12_853_626_880,
    "llama-tiny": 885_888,
    "llama-130m": 134_142_720,
    "llama-320m": 317_322_240,
    "llama-1b": 986_941_440,
    "llama-1.3b": 1_345_423_360,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
}


class Recorder(DenseFactory):
    """Notes the shape of every linear of a block."""

    def __init__(self):
        self.shapes = set()

    def linear(self, in_features, out_features, *, segments=None, **kwargs):
        self.shapes.add((in_features, out_features))
        assert segments is None or sum(segments) == out_features
        return super().linear(in_features, out_features, **kwargs)


def test_the_list_is_complete():
    assert preset_names() == tuple(PARAMETERS)


@pytest.mark.parametrize("name", preset_names())
def test_exact_parameter_count(name):
    assert parameter_count(get_preset(name).model) == PARAMETERS[name]


@pytest.mark.parametrize("name", preset_names())
def test_transformers_counts_the_same(name):
    config = get_preset(name).model
    with torch.device("meta"):
        ours = build_model(config, DenseFactory())
        hf_config, _ = to_hf(config, ours.state_dict())
        kind = transformers.AutoConfig.for_model(**hf_config)
        theirs = transformers.AutoModelForCausalLM.from_config(kind)
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[name]
    assert theirs.num_parameters() == PARAMETERS[name]


@pytest.mark.parametrize("name", preset_names())
def test_every_contraction_fits_the_blocks_and_the_hadamard_transform(name):
    run = get_preset(name)
    factory = Recorder()
    with torch.device("meta"):
        build_model(run.model, factory)
    assert all(rows % 64 == 0 and columns % 64 == 0 for rows, columns in factory.shapes)
    assert run.train.micro_batch * run.model.seq_len % 64 == 0


@pytest.mark.parametrize("name", preset_names())
def test_names_and_defaults_agree(name):
    run = get_preset(name)
    assert run.name == name
    assert run.out == f"runs/{name}"
    assert run.recipe == "bf16"
    assert run.model.family == name.split("-")[0]
    assert 0 < run.optim.warmup_steps < (run.optim.decay_steps or run.train.steps)
    assert (run.optim.decay_steps or 0) <= run.train.steps
    summary = preset_summary(name)
    assert summary.endswith(".")
    assert "\n" not in summary


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("gpt-125m", 100e9),
        ("gpt-345m", 32.8e9),
        ("gpt-1.3b", 41.9e9),
        ("gpt-6.7b", 21.0e9),
        ("gpt-13b", 300e9),
        ("llama-1.3b", 100e9),
        ("llama-7b", 100e9),
        ("llama-13b", 100e9),
    ],
)
def test_tokens_add_up_to_what_the_papers_say(name, tokens):
    run = get_preset(name)
    seen = run.train.steps * run.train.global_batch * run.model.seq_len
    assert seen == pytest.approx(tokens, rel=0.005)


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'gpt-345m'"):
        get_preset("gpt-354m")
    with pytest.raises(ConfigError, match="unknown preset"):
        preset_summary("bert")
