"""Published models in and out (lab/publish.py): each layout against a model that is not ours, and
there and back again bit for bit."""

import math

import pytest
import torch
from helpers import build, difference, save_model, some_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from published import flm_logits, flm_model, in_float64, read_folder, write_bins
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.granite import modeling_granite
from transformers.models.llama import modeling_llama

from checkpoint import load_model, read_info
from flm import FLMConfig, count_parameters, preset
from lab import publish
from sample import generate

several = settings(max_examples=12)


def model_of(folder, to):
    """The model that `load` makes of a published folder, and its weights by name."""
    publish.load(folder, to)
    model, info = load_model(to)
    return model.eval(), info


# --------------------------------------------------------------------------------------------------
# The layout of FLM-101B's code base


@st.composite
def flm_models(draw):
    """Random published models: every switch, sizes that are odd where they may be."""
    D, H = 2 * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return flm_model(
        draw(st.integers(0, 99)),
        n_layer=draw(st.integers(1, 2)),
        n_embd=D * H,
        n_head=H,
        n_inner=draw(st.integers(3, 13)),
        vocab_size=draw(st.integers(5, 19)),
        activation_function=draw(st.sampled_from(["gelu_fast", "gelu", "silu"])),
        layer_norm_epsilon=draw(st.sampled_from([1e-5, 0.1])),
        use_RMSNorm=draw(st.booleans()),
        add_bias_linear=True,
        tie_word_embeddings=draw(st.booleans()),
        rotary_use_xpos=draw(st.booleans()),
        rotary_xpos_scale_base=draw(st.sampled_from([20, 512])),
        rotary_theta=draw(st.sampled_from([100, 10000])),
        use_mup=draw(st.booleans()),
        mup_scale_factor=float(D * H) / draw(st.sampled_from([1, D * H])),
        output_mult=draw(st.sampled_from([0.5, 2.0])),
    )


@several
@given(flm_models())
def test_an_flm_model_computes_what_the_format_says(tmp_path_factory, made):
    """Theirs -> ours: the logits in float64 are those of an independent model to 1e-10, for xPos
    and RoPE, LayerNorm and RMSNorm, both GELUs and the gate. Ours -> theirs: every tensor is back,
    bit for bit, and config.json says the same."""
    values, weights = made
    tmp = tmp_path_factory.mktemp("flm")
    model, info = model_of(write_bins(tmp / "theirs", values, weights), tmp / "ours")
    tokens = some_tokens(model.config, 11)
    exact = flm_logits(values, weights, tokens)
    assert difference(model(tokens[None])[0], exact) < 1e-10
    publish.save(tmp / "ours", tmp / "again", "flm", shard_size=2000)
    again, found = read_folder(tmp / "again")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert difference(flm_logits(again, found, tokens), exact) < 1e-12
    publish.load(tmp / "again", tmp / "third")
    assert FLMConfig.from_dict(read_info(tmp / "third")["config"]) == model.config


@pytest.mark.parametrize("norm, activation", [("layernorm", "gelu_fast"), ("rmsnorm", "silu")])
def test_an_flm_model_without_biases(tmp_path, norm, activation):
    """The 52B chat model has RMSNorm, a gate and no bias. LayerNorm always has one."""
    bias = norm == "layernorm"
    changes = dict(use_RMSNorm=not bias, add_bias_linear=bias, rotary_use_xpos=False)
    values, weights = flm_model(5, activation_function=activation, **changes)
    assert any(name.endswith("bias") for name in weights) == bias
    model, _ = model_of(write_bins(tmp_path / "theirs", values, weights), tmp_path / "ours")
    tokens = some_tokens(model.config, 9)
    assert difference(model(tokens[None])[0], flm_logits(values, weights, tokens)) < 1e-10


def test_a_tied_head_may_be_there_twice(tmp_path):
    """A tied model's shards may hold lm_head.weight too; then it must be the embedding."""
    values, weights = flm_model(0)
    both = weights | {"lm_head.weight": weights["transformer.wte.weight"].clone()}
    model, _ = model_of(write_bins(tmp_path / "theirs", values, both), tmp_path / "ours")
    assert model.head.weight is model.embedding.weight
    other = both | {"lm_head.weight": both["lm_head.weight"] + 1}
    with pytest.raises(ValueError, match="tie_word_embeddings is true"):
        publish.load(write_bins(tmp_path / "bad", values, other), tmp_path / "out")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_the_permutation_keeps_every_pair(half, H, seed):
    """Row 2i of a head's q is what was row i, row 2i+1 what was row i + D/2; v stays. And back."""
    D = 2 * half
    rows = torch.randn(3 * H * D, 2, generator=torch.Generator().manual_seed(seed))
    ours = publish.pairs_from_halves(rows, D)
    for h in range(H):
        for part in range(3):
            for i in range(D):
                old = i if part == 2 else i // 2 + i % 2 * half
                assert ours[(h * 3 + part) * D + i].equal(rows[(part * H + h) * D + old])
    assert publish.halves_from_pairs(ours, D).equal(rows)


# --------------------------------------------------------------------------------------------------
# Granite and Llama, by the library


def tele(**changes) -> FLMConfig:
    """A small Tele-FLM: sizes that do not agree, H*D != C."""
    sizes = dict(n_layers=2, d_model=12, n_heads=3, head_dim=6, d_ff=21, vocab_size=31)
    variant = dict(norm="rmsnorm", activation="swiglu", rotary="rope", bias=False)
    more = dict(tie_embeddings=False, mup_base_width=4, input_mult=1.7, output_mult=0.5)
    return FLMConfig(**{**sizes, "max_seq_len": 32, **variant, **more, **changes})


GRANITE = [{}, {"bias": True}, {"tie_embeddings": True}, {"mup": False, "rotary_theta": 100.0}]
GRANITE += [{"depth_alpha": 0.5, "base_layers": 5}]  # their residual_multiplier


@pytest.mark.parametrize("changes", GRANITE, ids=str)
def test_ours_is_granite(tmp_path, changes):
    """Ours -> Granite -> AutoModelForCausalLM: the logits in float64 agree to 1e-10, and greedy
    generation with the library's cache gives our tokens, one for one. Back in ours, every weight
    and every field is the same."""
    model = build(tele(**changes), seed=3)
    path = save_model(tmp_path / "ours", model, tokenizer="none")
    publish.save(path, tmp_path / "theirs", "granite", shard_size=3000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
    assert type(theirs) is GraniteForCausalLM
    tokens = some_tokens(model.config, 2, 13)
    with in_float64(modeling_granite), torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
        assert difference(theirs(tokens).logits, model(tokens)) < 1e-10
        options = dict(max_new_tokens=15, do_sample=False, eos_token_id=None, use_cache=True)
        said = theirs.generate(tokens[:1, :5], pad_token_id=0, **options)[0, 5:].tolist()
    assert said == generate(model, [tokens[0, :5].tolist()], 15, temperature=0)[0]
    again, info = model_of(tmp_path / "theirs", tmp_path / "again")
    assert again.config == model.config
    assert all(a.equal(b) for a, b in zip(again.parameters(), model.parameters()))


LIBRARY = {
    "granite": (GraniteForCausalLM, GraniteConfig, modeling_granite),
    "llama": (LlamaForCausalLM, LlamaConfig, modeling_llama),
}


@pytest.mark.parametrize("kind", LIBRARY)
def test_theirs_is_ours(tmp_path, kind):
    """A random model of the library -> ours: the logits in float64 agree to 1e-10. -> theirs: every
    tensor is back, bit for bit."""
    model_class, config_class, module = LIBRARY[kind]
    sizes = dict(vocab_size=29, hidden_size=12, intermediate_size=17, num_hidden_layers=2)
    more = dict(num_attention_heads=2, max_position_embeddings=16, rms_norm_eps=1e-5)
    scale = dict(embedding_multiplier=3.0, logits_scaling=4.0, attention_multiplier=6**-0.5)
    torch.manual_seed(1)
    config = config_class(**sizes, **more, **(scale if kind == "granite" else {}))
    theirs = model_class(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    theirs.save_pretrained(tmp_path / "theirs")
    model, info = model_of(tmp_path / "theirs", tmp_path / "ours")
    tokens = some_tokens(model.config, 2, 9)
    with in_float64(module), torch.no_grad():
        wide = model_class.from_pretrained(tmp_path / "theirs", dtype=torch.float64)
        assert difference(wide(tokens).logits, model(tokens)) < 1e-10
    publish.save(tmp_path / "ours", tmp_path / "again", "granite")
    values, found = read_folder(tmp_path / "again")
    assert found.keys() == theirs.state_dict().keys()
    assert all(found[name].equal(value) for name, value in theirs.state_dict().items())
    if kind == "granite":
        assert {name: values[name] for name in scale} == scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_dtype_goes_through(tmp_path, dtype):
    """Weights keep their dtype, in and out."""
    path = save_model(tmp_path / "ours", build(tele(), dtype=dtype), tokenizer="none")
    publish.save(path, tmp_path / "theirs", "granite")
    values, found = read_folder(tmp_path / "theirs")
    assert {t.dtype for t in found.values()} == {dtype} and values["dtype"] in str(dtype)
    model, info = model_of(tmp_path / "theirs", tmp_path / "again")
    assert next(model.parameters()).dtype == dtype and info["dtype"] in str(dtype)


# --------------------------------------------------------------------------------------------------
# The public 52B chat model, by arithmetic


def test_the_52b_index_to_the_byte():
    """Its index says 105,665,020,032 bytes: 52,832,509,952 parameters and 64 scalars, in two bytes
    each. That is our preset with the chat model's vocabulary; and our names for it are its own."""
    config = preset("tele-flm-52b").replace(vocab_size=80_896)
    groups = publish.groups(config, "flm")
    shapes = {name: shape for _, theirs in groups for name, shape in theirs.items()}
    assert sum(map(math.prod, shapes.values())) == count_parameters(config) == 52_832_509_952
    assert 2 * (52_832_509_952 + 64) == 105_665_020_032
    inner = ("attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj")
    names = {f"transformer.h.{i}.{name}.weight" for i in range(64) for name in inner}
    outer = {"transformer.wte.weight", "transformer.ln_f.weight", "lm_head.weight"}
    assert set(shapes) == names | outer
    assert shapes["transformer.h.63.mlp.c_fc.weight"] == (8192, 2 * 21824)


def test_the_52b_config_is_our_preset():
    """Its config.json, the keys that matter: our preset, but for the fields that differ between the
    base model and the chat model, whose product is one: 1.0/32 and 0.5/16."""
    keys = dict(n_layer=64, n_embd=8192, n_head=64, n_inner=21824, n_positions=4096)
    keys |= dict(vocab_size=80896, activation_function="silu", add_bias_linear=False)
    keys |= dict(relative_encoding="rotary", rotary_theta=10000, rotary_use_xpos=False)
    keys |= dict(rotary_xpos_scale_base=512, use_RMSNorm=True, tie_word_embeddings=False)
    keys |= dict(use_mup=True, mup_base_width=256, mup_scale_factor=32.0, output_mult=1.0)
    chat, base = publish.read_config(keys | {"input_mult": 1.0}), preset("tele-flm-52b")
    free = ("vocab_size", "mup_base_width", "output_mult", "mup_ff_ratio", "init_std", "norm_eps")
    assert chat.replace(**{name: getattr(base, name) for name in free}) == base
    assert chat.logit_mult == base.logit_mult == 1 / 32
