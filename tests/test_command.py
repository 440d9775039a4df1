"""wsbcn_mm.command: every command is a tool, and gets its arguments."""

import sys

import pytest

from wsbcn_mm import command


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['wsbcn-mm', *arguments])
    command.main()


def test_every_command_is_there():
    for file, _ in command.COMMANDS.values():
        assert file is None or (command.TOOLS / file).is_file()


def test_a_tool_gets_its_arguments(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, 'convert', '--help')
    assert ended.value.code == 0
    assert '--backbone' in capsys.readouterr().out


def test_what_is_no_command(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="no command 'trian'"):
        run(monkeypatch, 'trian')
    run(monkeypatch)
    assert 'find-lr' in capsys.readouterr().out
