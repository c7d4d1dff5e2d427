import torch


def masked_norm(x, gain, bias, mask, eps):
    share = mask / mask.sum()
    mean = torch.einsum("...c,c->...", x, share)
    centred = x - mean[..., None]
    variance = torch.einsum("...c,c->...", centred**2, share)
    scaled = centred / torch.sqrt(variance + eps)[..., None]
    return mask * (gain * scaled + bias)
