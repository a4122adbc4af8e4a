"""The forward-mode engine on a model of one's own: a loss and its derivatives in K directions, in one run."""

import torch
from torch import nn
from torch.func import functional_call

from spryfl.jvp import jvp

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True)
model = nn.Sequential(layer, nn.Flatten(), nn.Linear(16 * 64, 3)).eval()
inputs, labels = torch.randn(8, 16, 64), torch.randint(0, 3, (8,))
params = {name: p.detach() for name, p in model.named_parameters()}


def loss(p):
    return nn.functional.cross_entropy(functional_call(model, p, (inputs,)), labels)


directions = {name: torch.randn(8, *p.shape) for name, p in params.items()}  # K = 8
value, slopes = jvp(loss, params, directions)
estimate = {name: torch.einsum("k,k...->...", slopes, d) / 8 for name, d in directions.items()}  # of the gradient
print(f"loss {value:.4f}, its derivatives in 8 directions {[round(s, 3) for s in slopes.tolist()]}")
