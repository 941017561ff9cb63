"""The verbs beside fit, validate, test and predict."""

import pytest

from zoo.__main__ import main


def test_assets_are_listed(capsys):
    assert main(["assets"]) == 0
    out = capsys.readouterr().out
    assert "digits" in out and "BSD" in out


def test_assets_are_fetched_several_at_once(capsys):
    assert main(["assets", "fetch", "digits", "mnist-5k"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["digits", "mnist-5k"]


def test_an_unknown_asset_is_one_sentence(capsys):
    assert main(["assets", "fetch", "digit"]) == 2
    assert "digits" in capsys.readouterr().err


def test_convert_says_what_is_missing(capsys, tmp_path):
    assert main(["convert", str(tmp_path / "none.ckpt"), str(tmp_path / "out")]) == 2
    assert "There is no checkpoint file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["convert"])
