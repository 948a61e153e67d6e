"""bn_silu and rep_bn_silu with a process group: two processes equal one of the whole batch, also within DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import yolov9_fast as yf
from tests.ops.batch_norm_cases import EPS, MOMENTUM, call, make_case, run
from yolov9_fast.ops import Norm

SPLIT = 3
SHAPE = (5, 4, 3, 2)
OTHERS = [(1, "auto", SPLIT), (1, "eager", SPLIT), (1, "auto", 0)]


class Unit(nn.Module):
    """The operator with its parameters, as a network would hold it."""

    def __init__(self, norms: list[Norm]) -> None:
        super().__init__()
        self.vectors = nn.ParameterList([vector for norm in norms for vector in norm[:2]])
        self.running = [vector.clone() for norm in norms for vector in norm[2:]]

    def forward(self, inputs: list[Tensor]) -> Tensor:
        norms = [Norm(*self.vectors[2 * i : 2 * i + 2], *self.running[2 * i : 2 * i + 2]) for i in range(len(inputs))]
        return call(inputs, norms, training=True, momentum=MOMENTUM, eps=EPS, group=dist.group.WORLD)


def _work(rank: int, folder: str, branches: int, backend: str, split: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    case = make_case(branches, SHAPE, mean=1e3)
    part = slice(0, split) if rank == 0 else slice(split, None)
    inputs = [x[part].clone().requires_grad_() for x in case.inputs]
    unit = Unit(case.norms)
    parallel = nn.parallel.DistributedDataParallel(unit)  # its hooks go with it: it lives until after backward
    with yf.backend(backend):
        z = parallel(inputs)
        z.backward(case.dz[part])
    results = {"z": z.detach()} | {f"dx{i}": x.grad for i, x in enumerate(inputs)}
    for i in range(branches):
        results |= {f"dweight{i}": unit.vectors[2 * i].grad, f"dbias{i}": unit.vectors[2 * i + 1].grad}
        results |= {f"running_mean{i}": unit.running[2 * i], f"running_var{i}": unit.running[2 * i + 1]}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()  # neither leaves while the other still waits for it
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("branches", "backend", "split"),
    [(2, "auto", SPLIT), *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
def test_two_processes_equal_one(tmp_path: Path, branches: int, backend: str, split: int) -> None:
    mp.spawn(_work, args=(str(tmp_path), branches, backend, split), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    expected = run(make_case(branches, SHAPE, mean=1e3), "auto")
    for name, whole in expected.items():
        if name == "z" or name.startswith("dx"):
            both = torch.cat((first[name], second[name]))
        elif name.startswith("d"):
            both = 2 * first[name]  # DDP averages the local sums
        else:
            both = first[name]
        if not (name == "z" or name.startswith("dx")):
            assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(both, whole, rtol=1e-3, atol=1e-3, msg=name)
