"""Estimators in a PyTorch loop of one's own: `plain.backward` where `loss.backward()` stood, and any torch.optim.

A small transformer learns whether a sequence holds more ones than twos. The same loop runs by backprop, by forward mode
and by central differences: what changes is one line. Few values and many directions make the last two work.
"""

import sys

import torch
from torch import nn

from spryfl import plain
from spryfl.estimators import backprop, central_difference, forward

ESTIMATORS = {
    "backprop": backprop(),
    "forward mode": forward(directions=32, distribution="orthogonal"),
    "central differences": central_difference(directions=32, mu=1e-2),
}


class Counter(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.answer = nn.Linear(16, 2)

    def forward(self, ids):
        return self.answer(self.block(self.embed(ids)).mean(1))


def batch(generator):
    ids = torch.randint(0, 4, (64, 15), generator=generator)
    return ids, ((ids == 1).sum(1) > (ids == 2).sum(1)).long()


def main(steps: int = 150):
    for name, estimator in ESTIMATORS.items():
        torch.manual_seed(0)
        model, data = Counter(), torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        loss_fn = plain.PlainLoss(model, lambda model, b: nn.functional.cross_entropy(model(b[0]), b[1]))
        for step in range(int(steps)):
            optimizer.zero_grad()
            loss = plain.backward(estimator, loss_fn, batch(data), seed=step)  # was: loss.backward()
            optimizer.step()
        ids, truth = batch(data)
        right = (model.eval()(ids).argmax(1) == truth).float().mean()
        print(f"{name:20s} loss {loss:.3f}, right {right:.2f}, on a batch that was not trained on")


if __name__ == "__main__":
    main(*sys.argv[1:])
