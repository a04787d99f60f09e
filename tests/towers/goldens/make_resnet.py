"""Makes resnet.npz: what OpenCLIP's ModifiedResNet does with tiny random weights.

Needs torch and open_clip_torch (the `interop` extra). From the root of the repository:

    python tests/towers/goldens/make_resnet.py

Weights and inputs are not stored: `weights` and `inputs` below, which the test calls too, draw them from
NumPy's RandomState, whose stream is fixed for good. Stored are the outputs in inference and in training, and
from training the new running statistics and the gradients of sum(pooled * cotangent).
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np

BLOCKS, WIDTH, HEADS, OUTPUT, SIZE, BATCH = (2, 1, 3, 1), 4, 2, 12, 64, 6


def weights(shapes):
    """name -> array for a state dict's name -> shape; scales chosen so that no layer fades or explodes."""
    rng = np.random.RandomState(0)
    drawn = {}
    for name, shape in sorted(shapes.items()):
        noise = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            drawn[name] = np.exp(0.3 * noise)
        elif len(shape) == 1:
            drawn[name] = 0.2 * noise + (name.endswith("weight"))
        else:
            drawn[name] = noise * np.float32(np.prod(shape[1:]) ** -0.5)
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def inputs():
    """Normalized images [B, 3, H, W] and the cotangent [B, OUTPUT]."""
    rng = np.random.RandomState(1)
    images = rng.standard_normal((BATCH, 3, SIZE, SIZE)).astype(np.float32)
    return images, rng.standard_normal((BATCH, OUTPUT)).astype(np.float32)


def load_open_clip():
    """open_clip/modified_resnet.py alone: the package around it needs torchvision."""
    package = Path(importlib.util.find_spec("open_clip").origin).parent
    sys.modules["open_clip"] = types.ModuleType("open_clip")
    helpers = types.ModuleType("open_clip.utils")
    helpers.freeze_batch_norm_2d = helpers.feature_take_indices = None
    sys.modules["open_clip.utils"] = helpers
    spec = importlib.util.spec_from_file_location(
        "open_clip.modified_resnet", package / "modified_resnet.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main():
    import torch

    model = load_open_clip().ModifiedResNet(list(BLOCKS), OUTPUT, HEADS, SIZE, WIDTH)
    shapes = {n: tuple(v.shape) for n, v in model.state_dict().items() if "num_batches" not in n}
    model.load_state_dict({n: torch.tensor(v) for n, v in weights(shapes).items()}, strict=False)
    images, cotangent = map(torch.tensor, inputs())
    stored = {
        "names": np.array(list(shapes)),
        "shapes": np.array([str(s) for s in shapes.values()]),
    }
    with torch.no_grad():
        stored["eval"] = model.eval()(images).numpy()
    pooled = model.train()(images)
    stored["train"] = pooled.detach().numpy()
    (pooled * cotangent).sum().backward()
    for name, value in model.state_dict().items():
        if "running" in name:
            stored["stats/" + name] = value.numpy()
    for name, parameter in model.named_parameters():
        if name in ("conv1.weight", "layer1.1.conv2.weight", "layer3.2.bn1.weight",
                    "layer3.2.conv3.weight", "attnpool.q_proj.weight"):  # fmt: skip
            stored["grad/" + name] = parameter.grad.numpy()
    np.savez_compressed(Path(__file__).with_name("resnet.npz"), **stored)


if __name__ == "__main__":
    main()
