import torch


def rotate(q, k, start, origin, theta, scale_base):
    T, D = q.shape
    n = torch.arange(start - origin, start - origin + T, dtype=torch.float64)
    new_q, new_k = torch.empty_like(q), torch.empty_like(k)
    for i in range(D // 2):
        angle = n * theta ** (-2 * i / D)
        zeta = (2 * i / D + 0.4) / 1.4
        grow, shrink = zeta ** (n / scale_base), zeta ** (-n / scale_base)
        for new, x, size in ((new_q, q, grow), (new_k, k, shrink)):
            a, b = x[:, 2 * i], x[:, 2 * i + 1]
            new[:, 2 * i] = size * (a * torch.cos(angle) - b * torch.sin(angle))
            new[:, 2 * i + 1] = size * (a * torch.sin(angle) + b * torch.cos(angle))
    return new_q, new_k
