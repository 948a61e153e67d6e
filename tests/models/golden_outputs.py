"""Run as a script: a network's outputs for the golden weights and image, written to an .npz file.

The golden numbers were computed with 256-bit vector units. Batch statistics over few values, and logits of 1e7, amplify
the order of summation, so the caller sets ONEDNN_MAX_CPU_ISA=AVX2 and the eager backend runs: then the same order is
taken, bit for bit. How the fused blocks compare with eager is for tests/nn/test_functional.py.

    python -m tests.models.golden_outputs NAME OUT.npz
"""

from __future__ import annotations

import sys

import numpy as np
import torch

import yolov9_fast as yf
from tests.golden import deterministic
from yolov9_fast.models import create_model
from yolov9_fast.ops._decode import decode


def main(name: str, out: str) -> None:
    torch.set_num_threads(2)
    yf.set_backend("eager")
    model = create_model(name)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(np.asarray(deterministic.parameter(k, s))) for k, s in shapes.items()})
    image = torch.from_numpy(deterministic.image("image", (2, 3, 96, 64)))
    results = {"state_keys": np.array(list(shapes)), "state_shapes": np.array([str(list(s)) for s in shapes.values()])}
    with torch.no_grad():
        output = model.eval().raw(image)
        branches = [output.main] if output.auxiliary is None else [output.auxiliary, output.main]
        for number, maps in enumerate(branches):
            results[f"eval_decoded_{number}"] = decode(maps, model.strides).numpy()
        assert np.array_equal(model(image).numpy(), results[f"eval_decoded_{len(branches) - 1}"])
    output = model.train()(image)
    branches = [output.main] if output.auxiliary is None else [output.auxiliary, output.main]
    for number, maps in enumerate(branches):
        for level, values in enumerate(maps):
            results[f"train_branch{number}_level{level}"] = values.detach().numpy()
    total = torch.stack([values.square().mean() for maps in branches for values in maps]).sum()
    total.backward()
    results["sum_square_mean"] = total.detach().numpy()
    gradients = {key: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
    results["grad_keys"], results["grad_norms"] = np.array(list(gradients)), np.array(list(gradients.values()))
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
