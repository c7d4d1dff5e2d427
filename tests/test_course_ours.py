"""This repository's own functions, held against the course's checks: what students' functions must
have, ours have too. Each property is written once, in course/checks/.

An adapter below gives one of our functions the form that the assignment asks for."""

import dataclasses
import itertools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import tiny
from torch.distributed.tensor import Replicate, Shard

import course.assignments  # noqa: F401 (its checks register themselves)
import data
import grow
import muP
import parallel
from course.checking import CHECKS, first_failure
from course.student import Local
from flm import (
    FLM,
    Attention,
    FLMConfig,
    HeadLoss,
    Norm,
    rotate,
    visible_slots,
    xpos_tables,
)
from lab import growth, publish
from lab.timetable import order_of_work
from lab.transfer import fit_law
from sample import KVCache

pytestmark = pytest.mark.quick
THETA = next(f.name for f in dataclasses.fields(FLMConfig) if f.name.endswith("_theta"))


def our_rotate(q, k, start, origin, theta, scale_base):
    """flm.rotate with the tables of a model whose origin is that one."""
    T, D = q.shape
    options = {THETA: theta, "xpos_scale_base": scale_base, "max_seq_len": max(1, 2 * origin)}
    tables = xpos_tables(tiny(head_dim=D, **options), start + T, dtype=torch.float64)[start:]
    turned = rotate(torch.stack([q, k], 1)[None, :, None], tables)  # (1, T, 1, 2, D)
    return turned[0, :, 0].unbind(1)


def our_attend(q, k, v, past):
    """flm.Attention between matrices that copy: queries, keys and values come in as they are."""
    B, H, T, D = q.shape
    P = 0 if past is None else past[0].shape[2]
    config = tiny(n_layers=1, n_heads=H, head_dim=D, d_model=3 * H * D, max_seq_len=P + T)
    attention = Attention(config).double()
    attention.load_state_dict(
        {
            "qkv.weight": torch.eye(3 * H * D),
            "qkv.bias": torch.zeros(3 * H * D),
            "o.weight": torch.eye(3 * H * D, H * D),
            "o.bias": torch.zeros(3 * H * D),
        }
    )
    cache = KVCache(FLM(config).double(), P + T)
    if past is not None:
        cache.extend(0, *past)
        cache.length = P
    x = torch.stack([q, k, v], 3).permute(0, 2, 1, 3, 4).flatten(2)  # (B, T, H * 3 * D)
    no_turn = torch.ones(T, 2, D // 2, dtype=torch.complex128)
    y = attention(x, no_turn, visible_slots(P, T, None, None, "cpu"), cache, 0)
    return y[..., : H * D].unflatten(2, (H, D)).transpose(1, 2), cache.kv[0]


def our_chunked_loss(hidden, weight, targets, rows):
    """flm.HeadLoss with pieces of that many rows."""
    with torch.enable_grad(), mock.patch.object(HeadLoss, "PIECE", rows * len(weight)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = HeadLoss.apply(*leaves, targets, True)
        # Half of the loss: what comes from above is multiplied into the gradients.
        return loss.detach(), *(2 * d for d in torch.autograd.grad(loss / 2, leaves))


def our_masked_norm(x, gain, bias, mask, eps):
    """flm.LayerNorm."""
    norm = Norm(len(gain), eps).double()
    norm.load_state_dict({"weight": gain, "bias": bias})
    norm.mask = mask
    return norm(x)


def configs_of(name: str, old, new, r: float) -> tuple[FLMConfig, FLMConfig]:
    """Two configurations that give the parameter these two shapes, and muP's m this ratio."""
    part = grow.split_name(name)[1]
    sides = grow.MATRICES.get(part.rpartition(".")[0], ("C",))
    fields = {"V": "vocab_size", "C": "d_model", "F": "d_ff", "HD": "n_heads", "3HD": "n_heads"}
    found = []
    for shape, scale in ((old, 1), (new, r)):
        sizes = {"d_model": round(4 * scale), "head_dim": 2, "mup_base_width": 8}
        for side, length in zip(sides, shape):
            sizes[fields[side]] = length // {"HD": 2, "3HD": 6}.get(side, 1)
        found.append(tiny(**sizes))
    return tuple(found)


def our_grow_parameter(name, old, fresh, r):
    """grow.grow_tensor of a parameter."""
    configs = configs_of(name, old.shape, fresh.shape, r)
    return grow.grow_tensor(name, old, *configs, seed=0, draw=lambda *drawn: fresh)


def our_grow_moments(name, state, shape, r):
    """grow.grow_tensor of AdamW's state of a parameter."""
    old = shape if state is None else state["exp_avg"].shape
    configs = configs_of(name, old, shape, r)
    return {
        key: grow.grow_tensor(f"{name}.{key}", state and state[key], *configs, seed=0)
        for key in grow.STATES
    }


PARAMETERS = {
    "embedding": "embedding.weight",
    "head": "head.weight",
    "norm": "norm.weight",
    "bias": "layers.0.ff.up.bias",
    "qkv": "layers.0.attn.qkv.weight",
    "o": "layers.0.attn.o.weight",
    "up": "layers.0.ff.up.weight",
    "down": "layers.0.ff.down.weight",
}


def model_of(config: dict, **changes) -> FLMConfig:
    """The configuration that a check describes."""
    sizes = {key: value for key, value in config.items() if key != "base_width"}
    return tiny(**sizes | {"mup_base_width": config["base_width"], **changes})


def our_initial_std(kind, config):
    """muP.init_std."""
    return muP.init_std(model_of(config), PARAMETERS[kind])


def our_adamw_group(kind, config, lr, decay):
    """The group of muP.param_groups in which a parameter of this kind is."""
    with torch.device("meta"):
        model = FLM(model_of(config, n_layers=1, tie_embeddings=False))
    parameter = dict(model.named_parameters())[PARAMETERS[kind]]
    groups = muP.param_groups(model, lr, decay)
    (group,) = [g for g in groups if any(p is parameter for p in g["params"])]
    return group["lr"], group["weight_decay"]


def our_fit_law(N, loss):
    """lab.transfer.fit_law."""
    law = fit_law(N, loss)
    return law.a, law.b, law.c


def our_order(rank, ranks, micro_batches):
    """PyTorch's own 1F1B, as a run of train.py uses it."""
    work = order_of_work(ranks, micro_batches, "1F1B")[rank]
    return [(kind, micro) for kind, _, micro in work]


def our_square_share(pieces, mesh):
    """parallel.Worker.grad_square, of a rank whose parameters say how they are cut."""
    parameters = []
    for piece, cut in pieces:
        placements = [Shard(0) if cut[axis] == "shard" else Replicate() for axis in mesh]
        device_mesh = SimpleNamespace(shape=tuple(mesh.values()))
        described = SimpleNamespace(grad=piece, device_mesh=device_mesh, placements=placements)
        parameters.append(("", described))
    world = SimpleNamespace(layout=None, last=True)
    rank = SimpleNamespace(world=world, named=parameters, tied_end=None, ddp=None)
    with mock.patch.object(parallel, "DTensor", SimpleNamespace):
        return parallel.Worker.grad_square(rank)


def our_clipped(pieces, square, max_norm):
    """What train.update does with the gradients once it has the sum of all squares."""
    parameters = [torch.zeros_like(piece) for piece, _ in pieces]
    for parameter, (piece, _) in zip(parameters, pieces):
        parameter.grad = piece.clone()
    norm = torch.tensor(square, dtype=torch.float64).sqrt()
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return [parameter.grad for parameter in parameters]


OUR_QKV = "layers.0.attn.qkv.weight"


def our_read_qkv(published, heads):
    """lab.publish.to_ours of FLM-101B's layout."""
    rows = published.shape[-1]
    theirs = {"transformer.h.0.attn.c_attn.weight": published}
    return publish.to_ours(theirs, {OUR_QKV: (rows,)}, "flm", rows // (3 * heads))[OUR_QKV]


def our_write_qkv(ours, heads):
    """lab.publish.to_theirs of Tele-FLM's layout."""
    names = publish.GROUPS["granite"]["layers.N.attn.qkv"].split()
    found = publish.to_theirs(
        {OUR_QKV: ours}, dict.fromkeys(names), "granite", len(ours) // (3 * heads)
    )
    return tuple(found.values())


def our_speed_up(scratch, flops, loss):
    """lab.growth.speed_up, with the two budgets around the loss: then its curve is straight."""
    pairs = itertools.pairwise(growth.falling(dict(scratch)))
    around = [pair for pair in pairs if pair[0][1] >= loss >= pair[1][1]]
    return growth.speed_up(dict(around[0] if around else scratch), flops, loss)


# What tensor_parallel and iq_task ask for has no counterpart of the same form here: the trainer
# leaves it to PyTorch's engine (tests/test_parallel.py), and the task is new.
OURS = {
    "xpos": Local(rotate=our_rotate),
    "attention": Local(attend=our_attend),
    "loss": Local(chunked_loss=our_chunked_loss),
    "sampler": Local(
        pick=lambda sample, share: data.pick(sample, [share, data.ONE]), shuffled=data.shuffled
    ),
    "masked_norm": Local(masked_norm=our_masked_norm),
    "grow_tensor": Local(grow_parameter=our_grow_parameter),
    "grow_moments": Local(grow_moments=our_grow_moments),
    "mup": Local(initial_std=our_initial_std, adamw_group=our_adamw_group),
    "loss_law": Local(fit_law=our_fit_law),
    "one_f_one_b": Local(order=our_order),
    "grad_norm": Local(square_share=our_square_share, clipped=our_clipped),
    "published_qkv": Local(read_qkv=our_read_qkv, write_qkv=our_write_qkv),
    "speed_up": Local(speed_up=our_speed_up),
}
CASES = [(name, check) for name in OURS for check in CHECKS[name]]


@pytest.mark.parametrize("name, check", CASES, ids=[f"{n}-{c.holds.__name__}" for n, c in CASES])
def test_ours_has_the_property(name, check):
    """The check, whose sentence is its docstring's, holds for our function, on three times as many
    inputs as for a student's."""
    check = dataclasses.replace(check, examples=3 * check.examples)
    failure = first_failure(check, OURS[name])
    assert failure is None, f"{check.says} {failure}"
