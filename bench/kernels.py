"""`python -m bench.kernels`: the two computations of the mixture's delta, by shape; is `pick_kernel`'s choice right?

Forward and backward of one layer with its base, in milliseconds. A choice counts as right when it costs at most a
tenth more than the fastest. Numbers in a row: utterances × positions, width in and out, experts, rank, experts per
utterance.
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from bench.setting import THREADS
from common.model.mixture import Kernel, MixtureLinear, pick_kernel
from common.model.routing import Routing, RoutingSlot

TOLERANCE = 1.1


@dataclass(frozen=True, slots=True)
class Shape:
    """Of one layer's work: rows B of T positions, I features in, O out, E experts of rank R, K of them per row."""

    B: int
    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    R: int
    K: int = 2

    def __str__(self) -> str:
        return f"{self.B}×{self.T}, {self.I}→{self.O}, E {self.E}, R {self.R}, K {min(self.K, self.E)}"


def shapes(device: torch.device, *, quick: bool) -> Iterator[Shape]:
    """E 2…16, R 8…64, long audio, short audio and decoder text."""
    if quick:
        yield Shape(2, 16, 8, 8, 2, 4)
        return
    rows, width = (8, 1280) if device.type == "cuda" else (4, 384)
    for positions in (1500, 448, 24):
        for experts, rank in ((2, 16), (4, 16), (8, 8), (8, 16), (8, 64), (16, 16), (16, 32)):
            yield Shape(rows, positions, width, width, experts, rank)
    yield Shape(rows, 1500, width, 4 * width, 8, 16)
    yield Shape(rows, 1500, 4 * width, width, 8, 16)
    yield Shape(4 * rows, 448, width, width, 8, 16)
    yield Shape(rows, 1500, width, width, 1, 16, 1)


def measure(shape: Shape, dtype: torch.dtype, device: torch.device, *, repeat: int) -> dict[Kernel, float]:
    """Milliseconds of the layer by each computation, in turn, medians."""
    layer, x_BTI = make_layer(shape, dtype, device)
    taken: dict[Kernel, list[float]] = {kernel: [] for kernel in get_args(Kernel)}
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for number in range(repeat + 1):
            for kernel in taken:
                layer.kernel = kernel
                _synchronize(device)
                started = time.perf_counter()
                x_BTI.grad = None
                layer.zero_grad()
                y_BTO = layer(x_BTI)
                torch.autograd.backward(y_BTO, torch.ones_like(y_BTO))
                _synchronize(device)
                if number:  # the first round warms up
                    taken[kernel].append(1000 * (time.perf_counter() - started))
    return {kernel: statistics.median(times) for kernel, times in taken.items()}


def make_layer(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[MixtureLinear, torch.Tensor]:
    """A layer with its routing set, and an input that wants its gradient."""
    torch.manual_seed(0)
    slot, base = RoutingSlot(), nn.Linear(shape.I, shape.O, device=device)
    layer = MixtureLinear(base, slot, num_experts=shape.E, rank=shape.R, alpha=2 * shape.R)
    topk = min(shape.K, shape.E)
    ids_BK = torch.stack([torch.randperm(shape.E)[:topk] for _ in range(shape.B)]).to(device)
    slot.routing = Routing(ids_BK, torch.full((shape.B, topk), 1 / topk, device=device).requires_grad_())
    return layer, torch.randn(shape.B, shape.T, shape.I, dtype=dtype, device=device, requires_grad=True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Prints one line per shape and the number of right choices."""
    parser = argparse.ArgumentParser(prog="bench.kernels", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(THREADS)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    right = total = 0
    print(f"| shape ({str(dtype).removeprefix('torch.')}) | masked ms | gathered ms | fastest | chosen |")
    print("|---|---|---|---|---|")
    for shape in shapes(device, quick=options.quick):
        taken = measure(shape, dtype, device, repeat=2 if options.quick else 20 if device.type == "cuda" else 7)
        layer, x_BTI = make_layer(shape, dtype, device)
        assert layer.slot.routing is not None
        chosen = pick_kernel(x_BTI, layer.routed.lora_A, layer.slot.routing)
        fastest = min(taken, key=lambda kernel: taken[kernel])
        good = taken[chosen] <= TOLERANCE * taken[fastest]
        right, total = right + good, total + 1
        cells = [f"{taken[kernel]:.2f}" for kernel in get_args(Kernel)]
        print(f"| {shape} | {' | '.join(cells)} | {fastest} | {chosen} {'✓' if good else '✗'} |", flush=True)
    print(f"\n{right} of {total} choices are right: at most a tenth slower than the fastest")


if __name__ == "__main__":
    main()
