import numpy as np


def speed_up(scratch, flops, loss):
    runs = sorted(scratch)
    logs = np.log([spent for spent, _ in runs])
    losses = np.array([reached for _, reached in runs])
    if len(runs) < 2 or np.any(np.diff(losses) >= 0):
        return None, ""
    mark = "<" if loss > losses[0] else ">" if loss < losses[-1] else ""
    needed = np.interp(-loss, -losses, logs)  # beyond the ends: the value at the end
    return np.exp(needed) / flops, mark
