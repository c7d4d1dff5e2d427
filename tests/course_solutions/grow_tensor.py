def grow_parameter(name, old, fresh, r):
    new = fresh.clone()
    factor = r if name.split(".")[0] == "norm" else 1.0
    if old.dim() == 1:
        new[: old.shape[0]] = old * factor
    else:
        new[: old.shape[0], : old.shape[1]] = old * factor
    return new
