"""Tables that fit a terminal, and other forms of them."""

import csv
import io
from typing import ClassVar

from minimoe.tools.results import Reachable, Spread
from minimoe.tools.tables import aligned, filled, formatted

ROWS = [["", "first", "second", "third"], ["a", "1", "22", "333"], ["long name", "4", "5", "6"]]


def test_a_table_by_hand():
    assert aligned(ROWS) == [
        "           first  second  third",
        "-------------------------------",
        "a              1      22    333",
        "long name      4       5      6",
    ]


def test_a_narrow_table_goes_on_below():
    assert aligned(ROWS, 24) == [
        "           first  second",
        "------------------------",
        "a              1      22",
        "long name      4       5",
        "",
        "           third",
        "----------------",
        "a            333",
        "long name      6",
    ]
    for width in range(1, 40):  # and at any width every cell is there once
        cells = " ".join(aligned(ROWS, width)).split()
        for cell in ("first", "second", "third", "1", "22", "333", "4", "5", "6"):
            assert cells.count(cell) == 1
    assert max(map(len, aligned(ROWS, 17))) <= 17


def test_paragraphs_are_broken_anew():
    assert filled("one two\nthree", None) == "one two\nthree"
    assert filled("one two\nthree", 13) == "one two three"
    assert filled("one two\nthree", 8) == "one two\nthree"


RESULT = {
    "rows": [
        {
            "part": "layer",
            "pass": "forward",
            "name": "a_b|c",
            "R": 1024,
            "routing": "pool",
            "ms": {"median": 2.0, "iqr": 0.5},
            "ratio": {"median": 0.25, "iqr": 0.125},
        }
    ]
}


def test_forms_by_hand():
    head = "part,pass,name,R,routing,ms,ms std,ratio,ratio std"
    line = "layer,forward,a_b|c,1024,pool,2.0,0.25,0.25,0.0625"
    assert formatted("bench", RESULT, "csv").splitlines() == [head, line]
    assert formatted("bench", RESULT, "markdown").splitlines() == [
        "| part | pass | name | R | routing | ms | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        r"| layer | forward | a_b\|c | 1,024 | pool | 2.000±.250 | .250±.062 |",
    ]
    assert formatted("bench", RESULT, "latex").splitlines() == [
        r"\begin{tabular}{lrrrrrr}",
        r"\toprule",
        r"part & pass & name & R & routing & ms & ratio \\",
        r"\midrule",
        r"layer & forward & a\_b|c & $1{,}024$ & pool & $2.000 \pm .250$ & $.250 \pm .062$ \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


class Row:
    def __init__(self, **fields):
        self.__dict__.update(fields)

    def __getattr__(self, name):
        return Spread(None, None)


class Result:
    schemes: ClassVar = {
        "mora": Row(
            acc=Spread(1 / 3, 0.1), reachable=Reachable(0.9, None, limit=False), trainable=7
        ),
        "oracle": Row(acc=Spread(-0.5, None), reachable=None, trainable=70_000),
    }
    closed_forms: ClassVar = {"one linear map": Spread(0.25, 0.125)}


def test_what_is_missing_is_empty_or_a_dash():
    rows = list(csv.DictReader(io.StringIO(formatted("compare", Result, "csv"))))
    assert rows[0]["acc"] == repr(1 / 3) and rows[0]["acc std"] == "0.1"
    assert (rows[0]["reachable"], rows[1]["reachable"], rows[1]["acc std"]) == ("0.9", "", "")
    assert (rows[0]["trainable"], rows[1]["bwt"]) == ("7", "")
    shown = formatted("compare", Result, "markdown").splitlines()
    assert shown[2].startswith("| mora | ≥ .900 | .333±.100 | – |")
    assert shown[3].startswith("| oracle | – | -.500 | – |") and "| 70,000 |" in shown[3]
    tex = formatted("compare", Result, "latex")
    assert r"mora & $\geq  .900$ & $.333 \pm .100$ & -- &" in tex


def test_a_closed_form_is_a_row_with_nothing_but_its_accuracy():
    row = list(csv.DictReader(io.StringIO(formatted("compare", Result, "csv"))))[2]
    filled = {name: value for name, value in row.items() if value}
    assert filled == {"scheme": "one linear map", "acc": "0.25", "acc std": "0.125"}
    last = formatted("compare", Result, "markdown").splitlines()[-1]
    assert last.startswith("| one linear map | – | .250±.125 | – |")
