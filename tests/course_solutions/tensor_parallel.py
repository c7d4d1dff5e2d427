import torch
import torch.distributed as dist


def column_linear(x, weight, bias, d_y):
    y = torch.addmm(bias, x, weight.T)
    d_x = torch.mm(d_y, weight)
    dist.all_reduce(d_x)
    return y, d_x, torch.mm(d_y.T, x), d_y.sum(dim=0)


def row_linear(x, weight, bias, d_y):
    y = torch.mm(x, weight.T)
    dist.all_reduce(y)
    return y + bias, torch.mm(d_y, weight), torch.mm(d_y.T, x), d_y.sum(dim=0)
