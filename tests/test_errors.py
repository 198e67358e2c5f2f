"""One bad input becomes one line."""

from chatbind_cli.errors import MediaError, contained


def test_an_error_of_ours_stays_as_it_is():
    error = MediaError("is empty", where="x.png")
    assert contained(error, where="elsewhere") is error


def test_any_other_error_says_which_kind_and_where():
    error = contained(OverflowError("too\nlarge " + "x" * 500), where="a.npy")
    assert str(error).startswith("a.npy: cannot be used (OverflowError: too large xxx")
    assert len(str(error)) < 260
    assert str(contained(KeyError(), where="b")) == "b: cannot be used (KeyError)"


def test_the_traceback_is_for_debugging_alone(monkeypatch, capsys):
    def fail() -> Exception:
        try:
            raise ValueError("inner")
        except ValueError as error:
            return error

    contained(fail(), where="x")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("CHATBIND_DEBUG", "1")
    contained(fail(), where="x")
    assert "Traceback" in capsys.readouterr().err
