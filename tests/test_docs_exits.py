"""The tables of docs/exits.md hold what the package counts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import swiftsure as ss
from swiftsure.exits import exit_macs, head_names, paper_macs, parameters, static_macs

TEXT = (Path(__file__).parents[1] / "docs/exits.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["rdi_smallcnn", "rdi_resnet38", "rdi_mobilenetv2"])
def test_multiply_adds(name: str) -> None:
    cumulative, paper = (
        [cell.strip() for cell in row.split("|") if cell.strip()]
        for row in re.findall(rf"^\| {name} \|(.*)$", TEXT, flags=re.MULTILINE)
    )
    net, static = ss.models.build(name), ss.models.build(f"{name}_static")
    assert cumulative[0] == f"{parameters(net):,}"
    assert cumulative[1:] == [f"{macs / 1e6:.3f}" for macs in (*exit_macs(net), static_macs(static))]
    assert paper == [f"{figure:.2f}" for figure in (*paper_macs(net), *paper_macs(static))]


def test_heads_are_named() -> None:
    for name in ("linear", "pooled", "conv"):
        assert name in head_names()
        assert f"| `{name}`" in TEXT
