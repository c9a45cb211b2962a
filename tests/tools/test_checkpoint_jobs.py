"""What the tools of many checkpoints share: the names of their options, and how they refuse a word."""

from __future__ import annotations

import argparse
from pathlib import Path

import checkpoint_jobs
import pytest
import recipes_table
from mini import damage

from s2quant.cli import evaluate, quantize


def options_of(parser: argparse.ArgumentParser) -> set[str]:
    return {word for action in parser._actions for word in action.option_strings if word.startswith("--")}


def test_shared_options_are_called_as_on_the_main_command_line() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    quantize.add(commands)
    evaluate.add(commands)
    known = set().union(*(options_of(command) for command in commands.choices.values()))
    ours = argparse.ArgumentParser()
    checkpoint_jobs.add_options(ours)
    assert len(options_of(ours)) == 7 and options_of(ours) <= known


@pytest.mark.parametrize("tool", [damage, recipes_table], ids=lambda tool: str(tool.__name__))
def test_words_that_are_no_numbers(tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    words = ["--model", str(tmp_path), "--asr-model", "x", "--out", str(tmp_path / "out"), "--seeds", "0;1"]
    assert tool.main(words) == 2
    assert "got: --seeds '0;1'\nexpected: whole numbers with commas between them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
