"""Bounds keep to the memory they are given, and do not depend on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swiftsure import bounds, models
from swiftsure.ball import Ball
from swiftsure.bounds._substitution import Substitution

LIMIT = 4 * 10**9

CERTIFY = """
import json, re, sys
from pathlib import Path
import torch
import swiftsure as ss

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

name, eps, memory, images, *methods = sys.argv[1:]
torch.set_num_threads(1)
torch.manual_seed(0)
net = ss.models.build(name).eval()
x = torch.rand(int(images), *net.config["input_shape"])
found = {"start": peak()}
with ss.bounds.memory.limited(ss.bounds.memory.parse(memory)):
    for method in methods:
        certificate = ss.certify(net, x, ball=ss.Ball(eps), method=method, delta=1e-5)
        found[method] = {"peak": peak(), "margin": certificate.margin.tolist()}
print(json.dumps(found))
"""

linux = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc"
)


def certified(name: str, eps: str, memory: str, images: int, *methods: str) -> dict:
    """Peaks and margins of a process that certifies random images with random weights."""
    command = [sys.executable, "-c", CERTIFY, name, eps, memory, str(images), *methods]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
@pytest.mark.slow
@pytest.mark.parametrize(("name", "eps"), [("mnist_large", "0.1"), ("cifar_resnet", "2/255")])
def test_the_papers_largest_networks_are_certified_within_4_gb(name: str, eps: str) -> None:
    """The whole process, with all that Python and torch take. Random weights leave more units unstable than trained."""
    found = certified(name, eps, "4GB", 1, *bounds.TECHNIQUES)
    margins = {method: found[method]["margin"][0] for method in bounds.TECHNIQUES}
    assert found["alpha-crown"]["peak"] < LIMIT
    # All ran, and each bounded what it should: far apart, in the order of their cost.
    assert margins["interval"] < margins["crown-ibp"] < margins["crown"] <= margins["alpha-crown"] < 0
    assert margins["interval"] < margins["symbolic"] < 0
    many = certified(name, eps, "4GB", 64, "interval", "crown-ibp")
    assert many["crown-ibp"]["peak"] < LIMIT
    assert many["crown-ibp"]["margin"][0] == pytest.approx(margins["crown-ibp"], rel=1e-4)


@linux
def test_a_small_limit_is_kept() -> None:
    """What comes on top of it: code that is loaded late, the allocator's reserve."""
    more, less = (certified("mnist_large", "0.003", memory, 1, "crown") for memory in ("2GB", "50MB"))
    assert less["crown"]["peak"] - less["start"] < 50e6 + 100e6
    assert more["crown"]["peak"] - more["start"] > 50e6 + 130e6
    assert less["crown"]["margin"] == pytest.approx(more["crown"]["margin"], rel=1e-4)


@pytest.mark.parametrize("norm", ["inf", "2"])
@pytest.mark.parametrize("method", ["crown-ibp", "symbolic", "crown", "alpha-crown"])
def test_bounds_do_not_depend_on_memory(method: str, norm: str) -> None:
    """Down to one row and one image at a time."""
    torch.manual_seed(0)
    net = models.build("digits_small", width=2, hidden=8).eval()
    x, y, ball = torch.rand(3, 1, 8, 8), torch.arange(3), Ball(0.05 if norm == "inf" else 0.2, norm)
    found = []
    for limit in (1, 100_000, 4 * 10**9):
        with bounds.memory.limited(limit), torch.no_grad():
            found.append(
                (bounds.margins(net, x, y, ball, method), *bounds.output_bounds(net, x, ball, method))
            )
    # Nothing else than the order of sums; it may lead an ascent to another slope, next to the best.
    room = 1e-4 if method == "alpha-crown" else 1e-5
    for part in found[:2]:
        for end, wanted in zip(part, found[2], strict=True):
            torch.testing.assert_close(end, wanted, rtol=room, atol=room)


@pytest.mark.parametrize("method", ["crown-ibp", "symbolic"])
def test_gradients_do_not_depend_on_memory(method: str) -> None:
    torch.manual_seed(0)
    net = models.build("digits_small", width=2, hidden=8).double().eval()
    x, y = torch.rand(5, 1, 8, 8, dtype=torch.float64), torch.arange(5)
    found = []
    for limit in (1, 250_000, 4 * 10**9):
        with bounds.memory.limited(limit):
            bounds.margins(net, x, y, Ball(0.05), method).sum().backward()
        found.append([weight.grad.clone() for weight in net.parameters()])
        net.zero_grad()
    for few in found[:2]:
        torch.testing.assert_close(few, found[2], rtol=1e-9, atol=1e-9)


def test_a_part_of_a_batch_is_bounded_like_a_batch() -> None:
    """With as many rows for each image, so that its fields are read in place; copied for each row they cost a third."""
    torch.manual_seed(0)
    net = models.build("digits_small", width=2, hidden=8).eval()
    x = torch.rand(5, 1, 8, 8)
    graph = bounds.trace(net, x)
    network = Substitution(graph, bounds.Region(x, Ball(0.05)), "tight", refine=False)
    functions = torch.eye(10).expand(5, -1, -1)
    row = 2 * bounds.memory.COPIES * 4 * network._width(graph.outputs[0])

    def parts(rows_at_once: int) -> list[tuple[int, int, int]]:
        with bounds.memory.limited(row * rows_at_once):
            return [
                (len(part.region.x), len(rows.values), rows.each)
                for part, rows in network.parts(graph.outputs[0], functions)
            ]

    assert parts(50) == [(5, 50, 10)]
    assert parts(25) == [(2, 20, 10), (2, 20, 10), (1, 10, 10)]
    # A thousand classes of one image may be too many.
    assert parts(4) == [(1, 4, 4), (1, 4, 4), (1, 2, 2)] * 5
