import io

import pytest

from swiftsure.data.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("in_bytes", "amount"), [(False, "256/512"), (True, "256/512 bytes")])
def test_a_bar_is_drawn_on_a_terminal(monkeypatch, in_bytes, amount):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress("decoding", 512, in_bytes) as advance:
        advance(256)
    assert "decoding" in terminal.getvalue()
    assert amount in terminal.getvalue()


def test_nothing_is_drawn_elsewhere(capsys):
    with progress("decoding", 512) as advance:
        advance(256)
    assert capsys.readouterr() == ("", "")
