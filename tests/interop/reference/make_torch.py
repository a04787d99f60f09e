"""Makes goldens/saved.pt and scripted.pt: one tiny module as torch.save and TorchScript write it."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import named_weights as weights


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(3, 2)
        self.low = torch.nn.Embedding(2, 2).half()
        self.register_buffer("steps", torch.tensor(0))
        self.width = 3

    def forward(self, x):
        return self.inner(x)


out = Path(__file__).parent.parent / "goldens"
module = Tiny().eval()
with torch.no_grad():
    for name, tensor in module.inner.named_parameters(prefix="inner"):
        tensor.copy_(torch.from_numpy(weights.tensor(name, tuple(tensor.shape))))
torch.save(module.state_dict(), out / "saved.pt")
torch.jit.script(module).save(str(out / "scripted.pt"))
