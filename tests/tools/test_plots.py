"""Pictures of studies, looked at before they are written."""

import pytest
from matplotlib.colors import to_hex

from minimoe.tools import plots
from minimoe.tools.results import Line, Panel, Sample, StudyResult
from minimoe.tools.tables import LONG, findings, study_table


def points(title, kinds, means):
    lines = [Line(kind, [mean], [0.1]) for kind, mean in zip(kinds, means, strict=True)]
    names = [f"{kind} {i}" for i, kind in enumerate(kinds)]
    return Panel(title, "ACC", lines, names=names, kinds=list(kinds))


def result(panels, rows=1):
    made = {f"row {i}": {"acc": Sample(0.5, 0.1, [0.4, 0.5, 0.6])} for i in range(rows)}
    return StudyResult(
        "atlas", "?", "minimoe study atlas", [0, 1, 2], False, "2", None, 1.0, {"acc": "ACC"}, made,
        panels, "Found.",
    )  # fmt: skip


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    def draw(panels):
        figures = []
        monkeypatch.setattr(plots, "_write", lambda figure, path: figures.append(figure))
        plots.plot_study(result(panels), tmp_path / "atlas.png")
        return figures[0]

    return draw


def test_a_kind_has_one_colour_in_all_panels(drawn):
    figure = drawn(
        [points("all", ["scheme", "atlas", "baseline"], [0.2, 0.3, 0.4])]
        + [points(f"no atlas {i}", ["scheme", "baseline"], [0.2, 0.4]) for i in range(4)]
    )
    shown = [axes for axes in figure.axes if axes.get_title()]
    assert len(shown) == 5 and len({axes.get_position().y0 for axes in shown}) == 2  # two rows
    for axes in shown:
        colours = [to_hex(bar[0].get_color()) for bar in axes.containers]
        assert colours == [
            plots.COLOURS[i].lower() for i in ([0, 1, 2] if len(colours) == 3 else [0, 2])
        ]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["scheme", "atlas", "baseline"]


def test_what_is_far_off_is_an_arrow_at_the_edge(drawn):
    figure = drawn([points("a", ["scheme"] * 3, [-20.0, 0.5, 3.0])])
    markers = [bar[0] for bar in figure.axes[0].containers]
    assert [line.get_marker() for line in markers] == ["<", plots.MARKERS[0], ">"]
    assert [line.get_xdata()[0] for line in markers] == [-1, 0.5, 1]


def test_a_label_is_drawn_alike_in_all_panels_and_what_is_below_0_is_marked(drawn):
    def lines(*labels):
        means = {"a": [0.2, 0.3], "b": [-0.5, 0.4], "c": [0.1, 0.1]}
        return [Line(label, means[label], [0.1, 0.1]) for label in labels]

    panels = [Panel(str(i), "x", lines(*labels), "ACC", [1.0, 2.0]) for i, labels in enumerate(
        ("ab", "b", "cb"))]  # fmt: skip
    figure = drawn(panels)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.texts] == ["a", "b", "c"]
    for axes in figure.axes:
        (b,) = (line for line in axes.get_lines() if line.get_label() == "b")
        assert (b.get_color(), b.get_marker()) == (plots.COLOURS[1], plots.MARKERS[1])
        marks = [
            line.get_xydata().tolist() for line in axes.get_lines() if len(line.get_xdata()) < 2
        ]
        assert [mark for mark in marks if mark] == [[[1.0, 0.0]]]
        assert axes.get_ylabel() == "ACC (below 0: at the edge)"


def test_a_long_table_is_cut_on_the_page_and_says_so():
    long = result([points("a", ["scheme"], [0.5])], rows=LONG + 1)
    page = findings([long])
    assert "row 19 " in page and "row 20 " not in page
    assert f"{LONG + 1} rows, of which these are the first 20." in page
    assert f"row {LONG} " in study_table(long)  # in a terminal it is whole
    assert f"row {LONG - 1} " in findings([result([], rows=LONG)])
