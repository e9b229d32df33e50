"""Progress: every item comes through, and where no terminal is a line a minute tells."""

from __future__ import annotations

import pytest

from lmpress import progress


def test_items_come_through_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.track([3, 1, 2], "Work")) == [3, 1, 2]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Work (0/3)" in captured.err


def test_a_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "MINUTE", 0.0)
    assert list(progress.track(iter("ab"), "Work", total=2)) == ["a", "b"]
    assert [line for line in capsys.readouterr().err.splitlines() if line] == [
        "Work (0/2)",
        "Work (1/2)",
        "Work (2/2)",
    ]
