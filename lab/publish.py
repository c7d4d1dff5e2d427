"""lab/publish.py - published models in, our models out.

    python -m lab.publish load FOLDER --out CHECKPOINT
    python -m lab.publish save CHECKPOINT --to FOLDER --as granite
    python -m lab.publish save CHECKPOINT --to FILE --as pt

A published model is a folder: config.json, and "shards" that hold the tensors between them. Two
layouts are read, told apart by their config:

    flm      FLM-101B's code base, with LayerNorm and GELU, or with RMSNorm and a gate (the public
             52B chat model). Matrices are stored (in, out); q, k and v are one matrix, gate and up
             are another
    granite  Llama's names, as Tele-FLM has them, with or without its multipliers. transformers
             calls the architecture Granite where it has multipliers

Ours differs from both in where the two channels of a rotary pair are: next to each other, not half
a head apart (section 2). What is not known about a layout stands at its place.

    1. names           our tensors and theirs, group by group
    2. one group       halves to pairs, and back
    3. configurations  their switches and our fields
    4. files           shards, read and written tensor by tensor
    5. load, save
    6. tokenizers      in the form that transformers' AutoTokenizer reads
    7. the command line

Letters as in flm.py: C d_model, H heads, D head_dim, F d_ff.
"""

import argparse
import json
import math
import pickle
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from tiktoken import Encoding
from torch import Tensor
from tqdm import tqdm

import console
from checkpoint import (
    all_finite,
    failed_write,
    find_checkpoint,
    load_model,
    read_info,
    read_tensors,
    stored_tensors,
    write_checkpoint,
)
from flm import FLM, MUST_BE, FLMConfig, fits, growth_mask
from grow import file_backed, return_freed_memory
from tokenizer import TOKENIZERS, get_tokenizer

# --------------------------------------------------------------------------------------------------
# 1. Names
#
# A line is a group: the rows of our matrices, one below the other, are the rows of theirs. N is the
# number of a layer. Each name stands for its ".weight", and its ".bias" where there is one.

GROUPS = {
    "flm": {
        "embedding": "transformer.wte",
        "layers.N.attn_norm": "transformer.h.N.ln_1",
        "layers.N.attn.qkv": "transformer.h.N.attn.c_attn",
        "layers.N.attn.o": "transformer.h.N.attn.c_proj",
        "layers.N.ff_norm": "transformer.h.N.ln_2",
        "layers.N.ff.gate layers.N.ff.up": "transformer.h.N.mlp.c_fc",
        "layers.N.ff.down": "transformer.h.N.mlp.c_proj",
        "norm": "transformer.ln_f",
        "head": "lm_head",
    },
    "granite": {
        "embedding": "model.embed_tokens",
        "layers.N.attn_norm": "model.layers.N.input_layernorm",
        "layers.N.attn.qkv": "model.layers.N.self_attn.q_proj model.layers.N.self_attn.k_proj "
        "model.layers.N.self_attn.v_proj",
        "layers.N.attn.o": "model.layers.N.self_attn.o_proj",
        "layers.N.ff_norm": "model.layers.N.post_attention_layernorm",
        "layers.N.ff.gate": "model.layers.N.mlp.gate_proj",
        "layers.N.ff.up": "model.layers.N.mlp.up_proj",
        "layers.N.ff.down": "model.layers.N.mlp.down_proj",
        "norm": "model.norm",
        "head": "lm_head",
    },
}
NO_WEIGHTS = re.compile(r".*\.attn\.(bias|masked_bias)|.*\.(inv_freq|scale)")  # buffers of theirs

Group = tuple[dict[str, tuple], dict[str, tuple]]  # {our name: shape}, {their name: shape}


def is_transposed(layout: str, name: str) -> bool:
    """Whether their matrix is stored (in, out): in every block of the flm layout ("Conv1D")."""
    return layout == "flm" and ".h." in name


def groups(config: FLMConfig, layout: str) -> list[Group]:
    """The groups of a model's tensors, in the order of the forward pass.

    >>> [(ours, theirs)] = [g for g in groups(FLMConfig(1, 6, 1, 6, 8, 9, 4), "flm")
    ...                     if "layers.0.ff.up.weight" in g[0]]
    >>> ours, theirs
    ({'layers.0.ff.up.weight': (8, 6)}, {'transformer.h.0.mlp.c_fc.weight': (6, 8)})
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in FLM(config).named_parameters()}
    lines = list(GROUPS[layout].items())
    first, inner, last = lines[:1], lines[1:-2], lines[-2:]
    numbered = [
        (ours.replace("N", str(layer)), theirs.replace("N", str(layer)))
        for layer in range(config.n_layers)
        for ours, theirs in inner
    ]
    found = []
    for a, b in [*first, *numbered, *last]:
        for kind in ("weight", "bias"):
            names = [f"{word}.{kind}" for word in a.split()]
            ours = {name: shapes[name] for name in names if name in shapes}
            if ours:
                found.append((ours, their_shapes(ours, [f"{w}.{kind}" for w in b.split()], layout)))
    return found


def their_shapes(ours: dict[str, tuple], names: list[str], layout: str) -> dict[str, tuple]:
    """{their name: shape} of a group: its rows in equal parts, each transposed where theirs is."""
    rows = sum(shape[0] for shape in ours.values()) // len(names)
    shape = (rows, *next(iter(ours.values()))[1:])
    return {name: shape[::-1] if is_transposed(layout, name) else shape for name in names}


# --------------------------------------------------------------------------------------------------
# 2. One group
#
# Rotation by position turns pairs of channels. Theirs are (i, i + D/2), "halves"; ours are
# (2i, 2i+1), the two parts of a complex number. A score q.k is a sum over pairs, so their order
# within a head does not matter, if q and k have the same.


def pairs_from_halves(rows: Tensor, D: int) -> Tensor:
    """Rows of q, then of k, then of v, heads in halves -> our qkv: head by head, in pairs.

    rows: (3*H*D, C), or (3*H*D,) of a bias.

    >>> pairs_from_halves(torch.arange(12), 4).tolist()  # q 0 to 3, k 4 to 7, v 8 to 11
    [0, 2, 1, 3, 4, 6, 5, 7, 8, 9, 10, 11]
    """
    rows = rows.unflatten(0, (3, -1, D))  # (3, H, D, C)
    turned = rows[:2].unflatten(2, (2, D // 2)).transpose(2, 3).flatten(2, 3)  # (2, H, D, C)
    return torch.cat([turned, rows[2:]]).transpose(0, 1).flatten(0, 2)  # (H, 3, D, C)


def halves_from_pairs(qkv: Tensor, D: int) -> Tensor:
    """The inverse of pairs_from_halves."""
    rows = qkv.unflatten(0, (-1, 3, D)).transpose(0, 1)  # (3, H, D, C)
    turned = rows[:2].unflatten(2, (D // 2, 2)).transpose(2, 3).flatten(2, 3)  # (2, H, D, C)
    return torch.cat([turned, rows[2:]]).flatten(0, 2)


def to_ours(theirs: dict[str, Tensor], ours: dict[str, tuple], layout: str, D: int):
    """Their tensors of a group -> {our name: tensor}. Their rows are one below the other first."""
    rows = torch.cat([t.t() if is_transposed(layout, name) else t for name, t in theirs.items()])
    if "qkv" in next(iter(ours)):
        rows = pairs_from_halves(rows, D)
    return dict(zip(ours, rows.split([shape[0] for shape in ours.values()])))


def to_theirs(ours: dict[str, Tensor], theirs: dict[str, tuple], layout: str, D: int):
    """The inverse of to_ours: {their name: tensor}."""
    rows = torch.cat(list(ours.values()))
    if "qkv" in next(iter(ours)):
        rows = halves_from_pairs(rows, D)
    parts = zip(theirs, rows.chunk(len(theirs)))
    return {name: t.t() if is_transposed(layout, name) else t for name, t in parts}


# --------------------------------------------------------------------------------------------------
# 3. Configurations

BOTH = {
    "vocab_size": "vocab_size",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
KEYS = {  # {our field: their key}, where the two mean the same
    "flm": {
        "n_layers": "n_layer",
        "d_model": "n_embd",
        "n_heads": "n_head",
        "d_ff": "n_inner",
        "max_seq_len": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "bias": "add_bias_linear",
        "rotary_theta": "rotary_theta",
        "xpos_scale_base": "rotary_xpos_scale_base",
        **BOTH,
    },
    "granite": {
        "n_layers": "num_hidden_layers",
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "head_dim": "head_dim",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "bias": "attention_bias",
        "rotary_theta": "rope_theta",
        **BOTH,
    },
}
DIVISORS = ("mup_scale_factor", "output_mult", "logits_scaling")
MUP = {"use_mup": False, "mup_scale_factor": 1.0, "input_mult": 1.0, "output_mult": 1.0}
DEFAULTS = {  # of the configuration class, for keys that config.json leaves out
    "flm": {
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "use_RMSNorm": False,
        "add_bias_linear": True,
        "tie_word_embeddings": True,
        "relative_encoding": None,
        "rotary_use_xpos": True,
        "rotary_theta": 10000,
        "rotary_xpos_scale_base": 512,
        "scale_attn_weights": True,
        "initializer_range": 0.02,
        **MUP,
    },
    "granite": {  # transformers' Llama and Granite, and Tele-FLM's multipliers
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "rope_theta": 10000,
        "rope_parameters": None,
        "initializer_range": 0.02,
        "embedding_multiplier": 1.0,
        "attention_multiplier": None,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
        **MUP,
    },
}
ACTIVATIONS = {  # "fast", "new" and "pytorch_tanh" compute one function
    "gelu": "gelu",
    **dict.fromkeys(("gelu_fast", "gelu_new", "gelu_pytorch_tanh"), "gelu_tanh"),
    "silu": "swiglu",
}
# Keys that change nothing in what the model computes: dropout is off, kernels and memory layouts
# differ in rounding alone. (scale_attn_by_inverse_layer_idx is multiplied back before the softmax.)
WITHOUT_EFFECT = re.compile(
    r"_.*|summary_.*|.*_token_id|.*_pdrop|attention_dropout|architectures|auto_map|model_type|"
    r"transformers_version|torch_dtype|dtype|tokenizer_class|use_cache|enable_flash_attn|"
    r"reorder_and_upcast_attn|scale_attn_by_inverse_layer_idx|mup_base_width|mup_ff_ratio|"
    r"pretraining_tp|depth_alpha|base_layers"
)


def layout_of(values: dict) -> str:
    """The layout that a config.json speaks of. Raises ValueError for another one."""
    for layout, keys in KEYS.items():
        if keys["d_model"] in values:
            return layout
    raise ValueError(
        "config.json is of no layout that is known here: it has neither n_embd (FLM-101B's code "
        "base) nor hidden_size (Llama's names, Granite, Tele-FLM)"
    )


def read_config(values: dict) -> FLMConfig:
    """The model of a config.json. Raises ValueError with every key that is missing, unknown, or has
    a value that this repository's model does not compute."""
    layout = layout_of(values)
    defaults = DEFAULTS[layout]
    needed = [key for key in KEYS[layout].values() if key not in defaults]
    problems = [f"{key} is missing" for key in needed if key not in values]
    kinds = dict.fromkeys(needed, "int") | {"head_dim": "int"} | dict.fromkeys(DIVISORS, "float")
    given = {key: kind for key, kind in kinds.items() if key in needed or values.get(key)}
    problems += [
        f"{key} = {values[key]!r}: must be {MUST_BE[kind]}"
        for key, kind in given.items()
        if not fits(kind, values.get(key, 1))
    ]
    problems += [
        f"{key} = {value!r}: an unknown switch; if it changes nothing, remove it from config.json"
        for key, value in values.items()
        if key not in {*needed, *defaults} and value is not None
        if not WITHOUT_EFFECT.fullmatch(key)
    ]
    console.refuse(problems, "config.json does not describe a model that is known here:")
    v = {**defaults, **values}
    fields = {ours: v[theirs] for ours, theirs in KEYS[layout].items()}
    fields["head_dim"] = fields.get("head_dim") or fields["d_model"] // fields["n_heads"]
    fields["d_ff"] = fields["d_ff"] or 4 * fields["d_model"]
    switches, problems = (flm_switches if layout == "flm" else granite_switches)(v, fields)
    multipliers, more = read_multipliers(v, fields)
    depth, other = read_depth(v, fields["n_layers"])
    heading = "config.json asks for what this repository's model does not compute:"
    console.refuse(problems + more + other, heading)
    return FLMConfig(**{**fields, **switches, **multipliers, **depth})


def only(values: dict, allowed: dict) -> list[str]:
    """A line for every key that has none of its allowed values."""
    return [
        f"{key} = {values[key]!r}: must be one of {list(good)}"
        for key, good in allowed.items()
        if values[key] not in good
    ]


def flm_switches(v: dict, fields: dict) -> tuple[dict, list[str]]:
    """(more fields of FLMConfig, problems) of a config.json of the flm layout."""
    activation = v["activation_function"]
    problems = only(
        v | {"n_embd % n_head": v["n_embd"] % v["n_head"]},
        {
            "activation_function": ACTIVATIONS,
            "relative_encoding": ["rotary"],
            "scale_attn_weights": [True],
            "n_embd % n_head": [0],
        },
    )
    return {
        "norm": "rmsnorm" if v["use_RMSNorm"] else "layernorm",
        "activation": ACTIVATIONS.get(activation),
        "rotary": "xpos" if v["rotary_use_xpos"] else "rope",
    }, problems


def granite_switches(v: dict, fields: dict) -> tuple[dict, list[str]]:
    """(more fields of FLMConfig, problems) of a config.json with Llama's names.

    (The config.json of Tele-FLM itself is not known to us. Its loaders are: they take Llama's keys,
    and those of the multipliers.)"""
    rope = {"rope_type": "default", "rope_theta": v["rope_theta"], **(v["rope_parameters"] or {})}
    problems = only(
        v | rope,
        {
            "hidden_act": ["silu"],
            "num_key_value_heads": [None, v["num_attention_heads"]],
            "mlp_bias": [v["attention_bias"]],
            "rope_type": ["default"],
        },
    )
    exact = fields["head_dim"] ** -0.5
    usual = 1.0 if v.get("model_type") == "granite" else exact
    scale = usual if v["attention_multiplier"] is None else v["attention_multiplier"]
    if not math.isclose(scale, exact, rel_tol=1e-9):
        problems.append(f"attention_multiplier = {scale}: must be 1/sqrt(head_dim) = {exact}")
    switches = {"norm": "rmsnorm", "activation": "swiglu", "rotary": "rope"}
    return {**switches, "rotary_theta": rope["rope_theta"]}, problems


def read_depth(v: dict, L: int) -> tuple[dict, list[str]]:
    """(the fields of FLMConfig that have to do with CompleteP, problems), of L layers. A
    config.json of ours names the fields. In another one Granite's multiplier of the branches says
    all, with alpha = 1."""
    given = v.get("residual_multiplier", 1.0)
    if not fits("float", given):
        return {}, [f"residual_multiplier = {given!r}: must be {MUST_BE['float']}"]
    alpha, base = float(given != 1), max(1, round(given * L))
    if given == 1:
        base = FLMConfig.base_layers
    alpha, base = v.get("depth_alpha", alpha), v.get("base_layers", base)
    if not fits("Share", alpha) or not fits("int", base):
        return {}, [f"depth_alpha = {alpha!r}, base_layers = {base!r}: a share, a whole number"]
    if not math.isclose((base / L) ** alpha, given, rel_tol=1e-9):
        rule = f"(base_layers / {L})^depth_alpha, here ({base} / {L})^{alpha}"
        return {}, [f"residual_multiplier = {given!r}: must be {rule}"]
    return {"depth_alpha": alpha, "base_layers": base}, []


def read_multipliers(v: dict, fields: dict) -> tuple[dict, list[str]]:
    """(the fields of FLMConfig that have to do with muP, problems).

    mup_scale_factor is our m, so the base width is d_model / mup_scale_factor. Without use_mup the
    multipliers are Granite's, or 1 where config.json does not name them. The proxy's ratio of d_ff
    to width is in no published config.json: the model's own is taken."""
    C, scale = fields["d_model"], v["mup_scale_factor"]
    found = {"mup": v["use_mup"], "mup_ff_ratio": v.get("mup_ff_ratio", fields["d_ff"] / C)}
    logits, embedding = v.get("logits_scaling", 1.0), v.get("embedding_multiplier", 1.0)
    if not v["use_mup"]:
        found["mup_base_width"] = v.get("mup_base_width", FLMConfig.mup_base_width)
        return found | {"input_mult": embedding, "output_mult": 1 / logits}, []
    problems, base = [], round(C / scale)
    found |= {"mup_base_width": base, "input_mult": v["input_mult"]}
    found["output_mult"] = v["output_mult"]
    if not base or not math.isclose(C / base, scale, rel_tol=1e-9):
        problems.append(f"mup_scale_factor = {scale}: must divide {C} into a whole width")
    ours = v["input_mult"], scale / v["output_mult"]
    if v.get("model_type") == "granite" and not all(map(math.isclose, ours, (embedding, logits))):
        problems.append(
            f"embedding_multiplier = {embedding}, logits_scaling = {logits}: must be {ours[0]} and "
            f"{ours[1]}, as input_mult and mup_scale_factor / output_mult say"
        )
    return found, problems


def their_keys(config: FLMConfig, layout: str) -> dict:
    """What config.json says in both layouts: the sizes, and what read_multipliers and read_depth
    read."""
    return {
        **{theirs: getattr(config, ours) for ours, theirs in KEYS[layout].items()},
        "use_mup": config.mup,
        "mup_scale_factor": config.m_width,
        "mup_base_width": config.mup_base_width,
        "mup_ff_ratio": config.mup_ff_ratio,
        "input_mult": config.input_mult,
        "output_mult": config.output_mult,
        "depth_alpha": config.depth_alpha,
        "base_layers": config.base_layers,
    }


def flm_config(config: FLMConfig) -> dict:
    """config.json in the authors' own keys. The names of classes and files are those of the public
    52B chat model, whose code we could read; FLM-101B's own are not known to us. Raises ValueError
    for a model that their code cannot express."""
    problems, heads = [], f"{config.n_heads} heads of {config.head_dim}"
    if config.n_heads * config.head_dim != config.d_model:
        problems.append(f"{heads}: their code divides d_model = {config.d_model} by the heads")
    if not config.mup and (config.input_mult, config.output_mult) != (1.0, 1.0):
        problems.append("input_mult, output_mult: their code has none without muP")
    if config.norm == "layernorm" and not config.bias:
        problems.append("bias = False: their LayerNorm always has one")
    if config.branch_mult != 1:
        problems.append(f"depth_alpha = {config.depth_alpha}: their code multiplies no branch")
    console.refuse(problems, "this model does not fit the layout flm:")
    activations = {"gelu": "gelu", "gelu_tanh": "gelu_fast", "swiglu": "silu"}
    return {
        "architectures": ["TELECHAT"],
        "model_type": "telechat",
        "auto_map": {
            "AutoConfig": "configuration_telechat.TELECHATConfig",
            "AutoModelForCausalLM": "modeling_telechat.TELECHAT",
        },
        **their_keys(config, "flm"),
        "activation_function": activations[config.activation],
        "use_RMSNorm": config.norm == "rmsnorm",
        "relative_encoding": "rotary",
        "rotary_use_xpos": config.rotary == "xpos",
        "scale_attn_weights": True,
        **dict.fromkeys(("enable_flash_attn", "reorder_and_upcast_attn"), False),
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def granite_config(config: FLMConfig) -> dict:
    """config.json of transformers' GraniteForCausalLM. Raises ValueError for a model that is not
    that architecture."""
    wanted = {"norm": ["rmsnorm"], "activation": ["swiglu"], "rotary": ["rope"]}
    problems = only(config.to_dict(), wanted)
    if config.rotary == "xpos":
        problems.append("no architecture of transformers has xPos's decay: use --as flm")
    console.refuse(problems, "this model is not the architecture Granite:")
    return {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        **their_keys(config, "granite"),
        "num_key_value_heads": config.n_heads,
        "hidden_act": "silu",
        "mlp_bias": config.bias,
        # rope_theta alone is for the library before its version 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rotary_theta},
        "embedding_multiplier": config.input_mult,
        "attention_multiplier": config.head_dim**-0.5,
        "residual_multiplier": config.branch_mult,
        "logits_scaling": 1 / config.logit_mult,
    }


# --------------------------------------------------------------------------------------------------
# 4. Files
#
# safetensors: the length of the header in 8 bytes, the header (JSON: dtype, shape and place of each
# tensor), then the tensors' bytes. It holds no code. A .bin shard is a pickle in a zip file, which
# torch.load(weights_only=True) reads without running any.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_json(file: Path) -> dict:
    """A JSON object. Raises ValueError for anything else."""
    try:
        values = json.loads(console.read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no JSON object")
    return values


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """{name: tensor}. The file is mapped into memory: a tensor is read when it is used."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(min(length, size)))
    header.pop("__metadata__", None)
    bytes_of = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)[8 + length :]
    if max((entry["data_offsets"][1] for entry in header.values()), default=0) != len(bytes_of):
        raise ValueError("its length is not what its header says")
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"], torch.uint8)  # a mask, for example: not used
        piece = bytes_of[begin:end]
        piece = piece if piece.data_ptr() % dtype.itemsize == 0 else piece.clone()
        tensors[name] = piece.view(dtype).view(entry["shape"]) if dtype.is_floating_point else piece
    return tensors


def read_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of one shard, mapped into memory. Raises ValueError where it is missing, cut off,
    or not what its name says."""
    if not file.is_file():
        raise ValueError(f"{file.name} is missing")
    try:
        if file.suffix == ".safetensors":
            return read_safetensors(file)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file.name} holds more than tensors, and is not opened") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0][:100]
        raise ValueError(f"{file.name} is cut off, or is no such file ({reason})") from error


def shard_files(folder: Path) -> list[Path]:
    """The shards of a published model. Raises ValueError where there are none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = set(read_json(index).get("weight_map", {}).values())
            return [folder / Path(shard).name for shard in sorted(names)]
        if (folder / name).is_file():
            return [folder / name]
    raise ValueError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or the "
        "index of their shards (model.safetensors.index.json)"
    )


def read_shards(folder: Path) -> dict[str, Tensor]:
    """{name: tensor} of all shards. Raises ValueError with every shard that cannot be read."""
    tensors, problems = {}, []
    for file in shard_files(folder):
        try:
            tensors |= read_shard(file)
        except ValueError as error:
            problems.append(str(error))
    console.refuse(problems, f"the weights in {folder} are not whole:")
    return {name: t for name, t in tensors.items() if not NO_WEIGHTS.fullmatch(name)}


def write_shard(file: Path, shapes: dict[str, tuple], dtype: torch.dtype, tensors: Iterator):
    """Write a safetensors file. tensors: (name, tensor) in the order of `shapes`."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    name_of = {value: key for key, value in DTYPES.items()}
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": name_of[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            found, tensor = next(tensors)
            assert found == name and tuple(tensor.shape) == shapes[name]
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def cut_into_shards(shapes: dict[str, tuple], itemsize: int, limit: float) -> list[dict]:
    """The tensors in their order, in shards of at most `limit` bytes. A larger tensor is alone.

    >>> cut_into_shards({"a": (3,), "b": (4,), "c": (9,)}, 4, 28)
    [{'a': (3,), 'b': (4,)}, {'c': (9,)}]
    """
    shards, room = [], 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if not shards or size > room:
            shards.append({})
            room = limit
        shards[-1][name] = shape
        room -= size
    return shards


# --------------------------------------------------------------------------------------------------
# 5. Load, save


def refuse_target(path: Path):
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists: choose another folder to write")


def some(lines: list[str]) -> list[str]:
    """The first ten, and how many more."""
    return lines[:10] + ([f"and {len(lines) - 10} more"] if len(lines) > 10 else [])


def check_tensors(stored: dict[str, Tensor], expected: list[Group], tied: bool):
    """Raise ValueError with every tensor that is missing, unknown, or of another shape than
    config.json says."""
    shapes = {name: shape for _, theirs in expected for name, shape in theirs.items()}
    problems = some([f"{name} is missing" for name in shapes if name not in stored])
    spare = {"lm_head.weight"} if tied else set()
    unknown = [name for name in stored if name not in shapes and name not in spare]
    problems += some([f"{name} is not a part of this model" for name in unknown])
    differ = {k: tuple(t.shape) for k, t in stored.items() if k in shapes}
    problems += some(
        [f"{k}: {shape}, not {shapes[k]}" for k, shape in differ.items() if shape != shapes[k]]
    )
    embedding = next(iter(shapes))
    head = stored.get("lm_head.weight") if tied and not problems else None
    if head is not None and not torch.equal(head, stored[embedding]):
        problems.append(f"lm_head.weight is not {embedding}, though tie_word_embeddings is true")
    console.refuse(problems, "the weights do not fit config.json:")


def load(folder, out, tokenizer: str | None = None) -> dict:
    """Read a published model from `folder` and write the checkpoint `out`; returns its info.

    tokenizer: one of tokenizer.TOKENIZERS, or "none". Without it: the name that `save` has written;
    cl100k_base for the flm layout at FLM-101B's vocabulary of 100,352; else "none".
    Tensor by tensor, so memory is a few times the largest one (all lie in file-backed memory, as
    when grow.py grows a checkpoint). There are no moments of AdamW: they begin at zero.
    Raises ValueError for a folder that is not whole or not known here, or an `out` that exists;
    OSError where the disk is full. `out` appears whole or not at all."""
    folder, out = Path(folder), Path(out)
    refuse_target(out)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give that of a published model")
    values = read_json(folder / "config.json")
    layout, config = layout_of(values), read_config(values)
    name = tokenizer or guess_tokenizer(folder, layout, config)
    check_tokenizer(name, config)
    stored, expected = read_shards(folder), groups(config, layout)
    check_tensors(stored, expected, config.tie_embeddings)
    console.make_folder(out.parent)
    dtype = stored[next(iter(expected[0][1]))].dtype
    tensors = {}
    bar = count_numbers(expected, "loading")
    for ours, theirs in expected:
        pieces = {name: stored.pop(name) for name in theirs}
        for name_, value in to_ours(pieces, ours, layout, config.head_dim).items():
            tensors[name_] = file_backed(value.shape, dtype, out.parent).copy_(value)
            refuse_infinite(name_, tensors[name_])
            bar.update(value.numel())
    info = {"step": 0, "samples": 0, "stage": 0, "growth": None, "tokenizer": name}
    info |= {"config": config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    write_checkpoint(out, {"model": tensors}, info)
    return info


def count_numbers(expected: list[Group], desc: str) -> tqdm:
    """A bar for all numbers of a model."""
    shapes = [shape for ours, _ in expected for shape in ours.values()]
    options = {"desc": desc, "unit": "numbers", "unit_scale": True}
    return console.progress(total=sum(map(math.prod, shapes)), **options)


def refuse_infinite(name: str, tensor: Tensor):
    if not all_finite([tensor]):
        raise ValueError(f"{name} holds numbers that are not finite: the file or the run is broken")


IDS = {"bytes": 257, "cl100k_base": 100_277, "none": 0}  # {tokenizer: its ids}


def check_tokenizer(name: str, config: FLMConfig):
    """Raise ValueError for a tokenizer with more tokens than the model has rows."""
    if IDS[name] > config.vocab_size:
        raise ValueError(
            f"the tokenizer {name} has ids up to {IDS[name] - 1:,}, the model has "
            f"{config.vocab_size:,} rows: give another --tokenizer, or none"
        )


def guess_tokenizer(folder: Path, layout: str, config: FLMConfig) -> str:
    """See load."""
    file = folder / "tokenizer_config.json"
    written = read_json(file).get("flm_tokenizer") if file.is_file() else None
    paper = layout == "flm" and config.vocab_size == 100_352
    return written if written in TOKENIZERS else "cl100k_base" if paper else "none"


def our_tensors(path: Path, expected: list[Group], layout: str, D: int) -> Iterator:
    """(their name, tensor) of a checkpoint, group by group."""
    stored, bar = stored_tensors(path), count_numbers(expected, "saving")
    for ours, theirs in expected:
        group = {
            name: torch.empty(shape, dtype=stored[f"model.{name}"][1])
            for name, shape in ours.items()
        }
        read_tensors(path, {"model": group})
        for name, tensor in group.items():
            refuse_infinite(name, tensor)
            bar.update(tensor.numel())
        yield from to_theirs(group, theirs, layout, D).items()


def finished(path: Path, info: dict):
    """Raise ValueError for a checkpoint in mid-ramp, with the command that finishes it."""
    c, growth = growth_mask(info["growth"], info["samples"]), info["growth"]
    if c < 1:
        steps = -(-(growth["start"] + growth["ramp"] - info["samples"]) // 16)
        raise ValueError(
            f"{path} is in mid-ramp of a growth: its mask, at c = {c:.3f}, has no place in a "
            f"published model. Train it to the end of the ramp:\n  python train.py --init-from "
            f"{shlex.quote(str(path))} --tokenizer {info['tokenizer']} --batch-size 16 "
            f"--steps {steps}"
        )


def save(checkpoint, to, form: str, shard_size: float = 5e9, tokenizer_file=None) -> list[Path]:
    """Write a CHECKPOINT as a published model into the folder `to`; returns its files.

    form: "flm" or "granite". shard_size: bytes of a shard at most.
    Raises ValueError for a model that the form cannot express, a checkpoint in mid-ramp, or a
    folder that exists; OSError where the disk is full. The folder appears whole or not at all."""
    path, to = find_checkpoint(checkpoint), Path(to)
    refuse_target(to)
    if path.is_file():
        raise ValueError(f"{path} is a file of weights: give the step folder that it was made from")
    info = read_info(path)
    finished(path, info)
    config = FLMConfig.from_dict(info["config"])
    files = published_json(config, form, info, tokenizer_file)
    expected = groups(config, form)
    shapes = {name: shape for _, theirs in expected for name, shape in theirs.items()}
    dtype = getattr(torch, info["dtype"])
    shards = cut_into_shards(shapes, dtype.itemsize, shard_size)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    size = sum(map(math.prod, shapes.values())) * dtype.itemsize
    where = {key: name for name, shard in zip(names, shards) for key in shard}
    index = {"metadata": {"total_size": size}, "weight_map": where}
    files["model.safetensors.index.json"] = index
    console.make_folder(to.parent)
    tmp = to.with_name(f".{to.name}.publishing")
    try:
        shutil.rmtree(tmp, ignore_errors=True)  # of a process that was killed
        tmp.mkdir()
        tensors = our_tensors(path, expected, form, config.head_dim)
        for name, shard in zip(names, shards):
            write_shard(tmp / name, shard, dtype, tensors)
        for name, values in files.items():
            (tmp / name).write_text(json.dumps(values, indent=1, ensure_ascii=False))
        tmp.rename(to)
    except (OSError, RuntimeError) as error:
        raise failed_write(str(to), error) from error
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return sorted(to.iterdir())


def export_weights(checkpoint: str | Path, file: str | Path):
    """Write the weights of a CHECKPOINT into one file, which torch.load(weights_only=True) reads
    and which holds no code: {"info": ..., "model": {name: tensor}}. Raises ValueError for a file
    that exists, OSError where it cannot be written."""
    if Path(file).exists():
        raise ValueError(f"{file} exists: choose another name for the weights")
    file = console.output_file(file)
    model, info = load_model(checkpoint)
    info = {key: value for key, value in info.items() if key != "files"}
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tmp = file.with_name(f".{file.name}.exporting")
    try:
        with open(tmp, "wb") as stream:  # a stream of Python's: PyTorch's own hides a full disk
            torch.save({"info": info, "model": weights}, stream)
        tmp.replace(file)
    except (OSError, RuntimeError) as error:
        raise failed_write(str(file), error) from error
    finally:
        tmp.unlink(missing_ok=True)


def published_json(config: FLMConfig, form: str, info: dict, tokenizer_file) -> dict[str, dict]:
    """{file: its JSON} of a published model, all but the index of its shards."""
    values = (flm_config if form == "flm" else granite_config)(config)
    files = {"config.json": values}
    end = None
    if info["tokenizer"] in TOKENIZERS:
        tokenizer = get_tokenizer(info["tokenizer"], tokenizer_file)
        check_tokenizer(tokenizer.name, config)
        end = tokenizer.eot_token
        files["tokenizer.json"] = tokenizer_json(tokenizer)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "flm_tokenizer": tokenizer.name,
            "eos_token": "<|endoftext|>",
            "split_special_tokens": True,  # "<|endoftext|>" in a text is text, as everywhere here
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_seq_len,
        }
    values |= {"dtype": info["dtype"], "torch_dtype": info["dtype"]}
    values |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None}
    files["generation_config.json"] = {"bos_token_id": end, "eos_token_id": end}
    return files


# --------------------------------------------------------------------------------------------------
# 6. Tokenizers

# The pattern of cl100k_base without possessive quantifiers, which the library's regular expressions
# read otherwise. It cuts every text in the same places (tried once on all of Unicode).
CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_letters() -> dict[int, str]:
    """The letter that stands for a byte in tokenizer.json (GPT-2's choice): itself, or a letter
    from U+0100 on where the byte would be blank or unseen.

    >>> byte_letters()[ord("a")], byte_letters()[ord(" ")]
    ('a', 'Ġ')
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """tiktoken joins two tokens where their bytes are a token, the lowest rank first. The library
    wants the pairs in that order, all of them."""
    pairs = []
    for piece, rank in ranks.items():
        for i in range(1, len(piece)):
            a, b = piece[:i], piece[i:]
            if a in ranks and b in ranks:
                pairs.append((rank, ranks[a], ranks[b], a, b))
    return [(a, b) for *_, a, b in sorted(pairs)]


def tokenizer_json(tokenizer: Encoding) -> dict:
    """tokenizer.json, which gives the ids that `tokenizer` gives."""
    letters = byte_letters()
    ranks, special = tokenizer._mergeable_ranks, tokenizer._special_tokens
    spell = lambda piece: "".join(letters[byte] for byte in piece)
    whole = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    cut, vocabulary = [], {spell(piece): rank for piece, rank in ranks.items()}
    if tokenizer.name == "cl100k_base":
        pattern = {"Regex": CL100K_PATTERN}
        cut = [{"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}]
        # Here too, or the library would number them itself, from the hole at 100256 on. The pattern
        # makes no piece of them, so no text gets their ids.
        vocabulary |= special
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": text, **plain, "special": True} for text, i in special.items()]
    return {
        "version": "1.0",
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*cut, {"type": "ByteLevel", **whole}],
        },
        "decoder": {"type": "ByteLevel", **whole},
        "model": {
            "type": "BPE",
            "ignore_merges": bool(cut),  # a piece that is a token is that token
            "vocab": vocabulary,
            "merges": [[spell(a), spell(b)] for a, b in merges_of(ranks)],
        },
    }


# --------------------------------------------------------------------------------------------------
# 7. The command line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lab.publish", description="Published models in, our models out."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    help_ = "a published model's folder -> a checkpoint"
    add = commands.add_parser("load", help=help_, description=help_).add_argument
    add("folder", help="holds config.json, and *.safetensors or pytorch_model*.bin")
    add("--out", required=True, metavar="CHECKPOINT", help="the folder to write; must not exist")
    choices = [*TOKENIZERS, "none"]
    add("--tokenizer", choices=choices, help="the model's (default: what the folder says, or none)")
    help_ = "a checkpoint -> a folder that other programs load, or one file of weights"
    add = commands.add_parser("save", help=help_, description=help_).add_argument
    add("checkpoint", help="a run folder (its newest checkpoint) or a step folder")
    target = "the folder to write, which must not exist; with --as pt a file"
    add("--to", required=True, metavar="FOLDER", help=target)
    form = "flm: the authors' own names; granite: transformers' GraniteForCausalLM; pt: one file "
    form += "without code, for sample.py and all others here"
    add("--as", required=True, dest="form", choices=[*GROUPS, "pt"], help=form)
    add("--shard-size", type=float, default=5.0, metavar="GB", help="at most (default %(default)s)")
    add("--tokenizer-file", metavar="FILE", help="cl100k_base.tiktoken, if no download is possible")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return_freed_memory()
    if args.command == "load":
        info = load(args.folder, args.out, args.tokenizer)
        out = shlex.quote(args.out)
        print(f"wrote {args.out}: weights in {info['dtype']}, the tokenizer is {info['tokenizer']}")
        print("  there are no moments of AdamW: training begins with zeros")
        if info["tokenizer"] != "none":
            print(f"  python sample.py {out} --prompt TEXT")
        return 0
    if args.form == "pt":
        export_weights(args.checkpoint, args.to)
        print(f"wrote {args.to}: python sample.py {shlex.quote(args.to)} --prompt TEXT")
        return 0
    if not args.shard_size > 0:
        raise ValueError(f"--shard-size {args.shard_size:g}: must be above 0 GB")
    size = args.shard_size * 1e9
    for file in save(args.checkpoint, args.to, args.form, size, args.tokenizer_file):
        print(f"{file.stat().st_size:>14,} bytes  {file}")
    return 0


if __name__ == "__main__":
    console.run(main)
