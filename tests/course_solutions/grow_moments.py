import torch


def grow_moments(name, state, shape, r):
    mean, square = torch.zeros(2, *shape, dtype=torch.float64)
    if state is None:
        return {"exp_avg": mean, "exp_avg_sq": square, "step": torch.tensor(0.0)}
    shrink = 1.0 / r if name in ("norm.weight", "norm.bias") else 1.0
    block = tuple(slice(0, size) for size in state["exp_avg"].shape)
    mean[block] = shrink * state["exp_avg"]
    square[block] = shrink**2 * state["exp_avg_sq"]
    return {"exp_avg": mean, "exp_avg_sq": square, "step": state["step"].clone()}
