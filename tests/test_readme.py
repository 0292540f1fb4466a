"""What the README shows runs as written."""

import re
from functools import partial
from pathlib import Path

import torch

import swiftsure as ss
from swiftsure.recipe import Schedule

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_lines_of_python_run_and_prove_something():
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for block in BLOCKS[:2]:
        exec(block, names)
    certificate = names["certificate"]
    assert len(certificate.certified) == 100
    assert certificate.certified.sum() > 20
    broken = names["net"](names["x_adv"]).argmax(1) != names["y"]
    assert not (broken & certificate.certified).any()


def test_the_lines_on_exits_run_and_save_work(monkeypatch):
    monkeypatch.setattr(ss, "fit", partial(ss.fit, schedule=Schedule(epochs=5, warmup=1, ramp=2)))
    splits = ss.data.load("digits")
    x, y = splits.test.batch(slice(None))
    names = {"ss": ss, "splits": splits, "x": x}
    torch.manual_seed(0)
    exec(BLOCKS[3], names)
    answer = names["answer"]
    assert (answer.label == y).double().mean() > 0.7
    assert answer.macs.double().mean() < 110_000 < max(names["net"].macs((1, 8, 8)))
    assert len(answer.exit.unique()) > 1


def test_three_lines_turn_a_training_script_into_mixtrain():
    assert len(BLOCKS) == 4
    splits = ss.data.load("digits")
    torch.manual_seed(0)
    net = ss.models.build("digits_small", width=8)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    proven = []
    names = {"ss": ss, "net": net, "w": 1.0, "ramp_steps": 60, "clean_accuracy": 0.98}
    for step in range(240):
        names["x"], names["y"] = splits.train.batch(torch.randint(len(splits.train), (50,)))
        names["step"] = step
        exec(BLOCKS[2], names)
        optimizer.zero_grad()
        names["loss"].backward()
        optimizer.step()
        if step % 60 == 59:
            lower = ss.margins(net, names["x"], names["y"], ss.Ball(0.02), method="symbolic")
            proven.append((lower.scatter(1, names["y"][:, None], 1.0) > 0).all(1).float().mean().item())
    assert proven[-1] > 0.5
    assert names["w"] == 20


def test_no_figure_of_the_docs_is_a_placeholder():
    docs = [Path(__file__).parents[1] / name for name in ("README.md", "CHANGELOG.md")]
    for page in [*docs, *(Path(__file__).parents[1] / "docs").glob("*.md")]:
        left = re.findall(r"@\w+@|TODO|FIXME|XX+", page.read_text(encoding="utf-8"))
        assert not left, f"{page.name}: {left}"
