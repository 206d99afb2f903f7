"""The pictures of the report: nothing cut off or covered, and seen on light and on dark."""

import itertools

import pytest
import report_runs as runs
from report_runs import PICTURES, encoder, made, one, row

pytest.importorskip("matplotlib")
import report_cases
import report_charts
import report_plots
import report_sheet


@pytest.mark.parametrize("long", [False, True])
def test_no_word_is_cut_off_and_no_legend_covers_data(long, tmp_path):
    names = tuple(f"{runs.LONG} {i}" for i in range(4)) if long else runs.PEERS
    data = runs.whole(names)
    if long:
        few = [k for k, v in data["cases"].items() if v["family"] != "kernels"]
        few += [k for k, v in data["cases"].items() if v["family"] == "kernels"][::3]
        data["cases"] = {k: data["cases"][k] for k in few}
        data["rows"] = [r for r in data["rows"] if r["case"] in few]
        data["cases"] = {f"{k}, {'long ' * 12}": v for k, v in data["cases"].items()}
        for r in data["rows"]:
            r["case"] += f", {'long ' * 12}"
    found, left_out = report_plots.plots(report_cases.merge(made(tmp_path, data)))
    assert {plot.name for plot in found} == PICTURES and not left_out
    for plot in found:
        for look in (report_sheet.WIDE, report_sheet.NARROW):
            with report_sheet.settings():
                figure = plot.draw(look)
                figure.canvas.draw()
                check_extents(figure, f"{plot.name}, {look.width}")


def check_extents(figure, what):
    """Assert that every word lies in the figure, and none of the page's in any axes with data."""
    renderer = figure.canvas.get_renderer()
    width, height = figure.bbox.width, figure.bbox.height
    page, *panels = figure.axes
    boxes = [axes.get_window_extent(renderer) for axes in panels]
    count = 0
    for text in figure.findobj(lambda artist: hasattr(artist, "get_text")):
        box = text.get_window_extent(renderer)
        if not text.get_text() or not text.get_visible() or not box.width:
            continue
        count += 1
        inside = box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert inside, f"{what}: {text.get_text()!r} is cut off: {box.extents}"
    for line in page.lines:  # of legends
        box = line.get_window_extent(renderer)
        assert not any(panel.overlaps(box) for panel in boxes), what
    assert count > 5 and boxes
    groups = [page.texts]
    for axes in panels:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            groups += [[t for t in labels if t.get_text().startswith("\n") == k] for k in (0, 1)]
    for texts in groups:
        found = [(text.get_text(), text.get_window_extent(renderer)) for text in texts]
        for (a, first), (b, second) in itertools.combinations(found, 2):
            both = first.intersection(first, second)
            assert both is None or both.height < 2, f"{what}: {a!r} covers {b!r}"


@pytest.mark.parametrize("most", [3, 7, 14])
@pytest.mark.parametrize("span", [(0.8, 1.25), (120, 180), (3, 4e4), (0.97, 1.01), (1e-3, 2e-2)])
def test_ticks_are_round_few_and_apart(span, most):
    found = report_sheet.ticks(*span, most)
    assert 2 <= len(found) <= most + 1 and found == sorted(set(found))
    assert all(span[0] <= value <= span[1] for value in found)


def test_what_is_too_near_stands_apart_and_inside():
    found = report_sheet.apart([1, 1, 1, 50, 99, 99], 5, 100)
    assert all(b - a >= 5 - 1e-9 for a, b in itertools.pairwise(found))
    assert found[0] >= 5 and found[-1] <= 100 and found[3] == 50


def test_candidates_keep_their_style_and_none_looks_like_ours():
    names = [f"peer {i}" for i in range(20)]
    style = report_sheet.styles(["transformers", "bert_fast graphs", *names])
    assert style["bert_fast"].color == style["bert_fast graphs"].color == report_sheet.OWN
    looks = [(one.color, one.marker, str(one.dash)) for one in style.values()]
    assert len(looks) == len(set(looks))
    for name, one_of in style.items():
        assert (one_of.color == report_sheet.OWN) == name.startswith("bert_fast")
        assert one_of.color != report_sheet.SIGNAL


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("color", [*report_sheet._COLORS, report_sheet.OWN, report_sheet.SIGNAL])
def test_colours_are_seen_on_light_and_on_dark(color):
    for paper in (report_sheet.LIGHT.paper, report_sheet.DARK.paper):
        low, high = sorted((luminance(color), luminance(paper)))
        assert (high + 0.05) / (low + 0.05) >= 3


def test_distributions_are_named_at_their_fills(tmp_path):
    words = {
        "squad": "SQuAD",
        "8 of squad, at most 384": "SQuAD",
        "32 x 512, full": "full",
        "8 x 128, 50 % filled": "",
        "lognormal": "lognormal",
    }
    for lengths, name in words.items():
        data = one(row("a", "bert_fast", 1), facts=encoder(8, 128) | {"lengths": lengths})
        case = report_cases.merge(made(tmp_path, data))[0]
        assert report_plots._distribution(case) == name


def test_the_roofs_are_named_over_them_with_their_heights():
    roof = report_charts.Roof("t", 30.0, 0.21, [])
    assert roof.words == "t: copy 30.0 GB/s, products 0.210 TFLOP/s"
    assert (roof.height(1), roof.height(7), roof.height(100)) == (0.03, 0.21, 0.21)
