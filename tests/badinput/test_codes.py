"""Codes and exit statuses are a promise to scripts: listed here one by one."""

from collections.abc import Iterator

from moeconv.core.strict_json import error_json
from moeconv.errors import MoeconvError
from tests.badinput.checks import CODES


def _classes(kind: type[MoeconvError]) -> Iterator[type[MoeconvError]]:
    for below in kind.__subclasses__():
        yield below
        yield from _classes(below)


def test_every_class_has_the_code_and_exit_status_that_the_table_says():
    found = {kind: (kind.code, kind.exit_code) for kind in _classes(MoeconvError)}
    assert found == CODES


def test_no_two_classes_share_a_code():
    codes = [code for code, _ in CODES.values()]
    assert len(set(codes)) == len(codes)


def test_an_error_prints_its_code_place_cause_and_fix():
    problem = MoeconvError("it broke", at="here", cause="because", fix="mend it")
    expected = "error[error]: it broke\n  at: here\n  cause: because\n  fix: mend it"
    assert str(problem) == expected


def test_an_error_as_json_has_the_same_fields():
    problem = MoeconvError("it broke", at="here", cause="because", fix="mend it")
    assert error_json(problem) == {
        "type": "error",
        "code": "error",
        "exit_code": 4,
        "message": "it broke",
        "at": "here",
        "cause": "because",
        "fix": "mend it",
    }
