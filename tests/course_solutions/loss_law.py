import math

import numpy as np


def fit_law(N, loss):
    if len(set(N)) < 4:
        raise ValueError("give at least 4 different sizes")
    sizes, losses = np.array(N) / np.median(N), np.array(loss)

    def at(b):
        x = sizes**b
        slope = np.cov(x, losses, bias=True)[0, 1] / np.var(x)
        level = losses.mean() - slope * x.mean()
        return ((slope * x + level - losses) ** 2).sum(), slope, level

    tries = np.linspace(-4.0, -0.02, 400)
    best = min(range(len(tries)), key=lambda i: at(tries[i])[0])
    low, high = tries[max(0, best - 1)], tries[min(len(tries) - 1, best + 1)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        one, two = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, two) if at(one)[0] < at(two)[0] else (one, high)
    b = (low + high) / 2
    _, slope, level = at(b)
    return slope / np.median(N) ** b, b, level
