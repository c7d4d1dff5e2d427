def ratio(kind, config):
    base = config["base_width"]
    if kind in ("qkv", "up"):
        return config["d_model"] / base
    if kind == "o":
        return config["n_heads"] * config["head_dim"] / base
    if kind == "down":
        return config["d_ff"] / (4 * base)
    return 1.0


def initial_std(kind, config):
    variance = config["init_std"] ** 2 / ratio(kind, config)
    if kind in ("o", "down"):
        variance /= 2 * config["n_layers"]
    return variance**0.5


def adamw_group(kind, config, lr, decay):
    m = ratio(kind, config)
    if kind in ("norm", "bias"):
        return lr, 0.0
    return lr / m, decay * m
