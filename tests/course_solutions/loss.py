import torch


def chunked_loss(hidden, weight, targets, rows):
    loss = torch.zeros((), dtype=torch.float64)
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), rows):
        stop = min(start + rows, len(hidden))
        x, t = hidden[start:stop], targets[start:stop]
        live = t != -100
        logits = x @ weight.T
        logits = logits - logits.max(dim=1, keepdim=True).values
        log_p = logits - logits.exp().sum(dim=1, keepdim=True).log()
        d = log_p.exp()
        for row in range(stop - start):
            if live[row]:
                loss -= log_p[row, t[row]]
                d[row, t[row]] -= 1.0
            else:
                d[row] = 0.0
        d_hidden[start:stop] = d @ weight
        d_weight += d.T @ x
    return loss, d_hidden, d_weight
