"""The report of runs: complete, losses first, the same bytes each time, and nothing cut off."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import report_runs as runs
from report_runs import PICTURES, encoder, kernel, made, one, row, run, write

pytest.importorskip("matplotlib")
import ledger
import report
import report_cases
import report_page
import report_plots
import report_sheet

ROOT = Path(__file__).resolve().parents[1]
VOID = {"meta", "img", "br", "wbr", "source", "link", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; gathers ids, labels, links, headings, text and cells."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.all, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.all.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def report_of(tmp_path, *several):
    """The texts of a report of these runs: Markdown and HTML."""
    files = report.build(made(tmp_path, *several))
    return files["report.md"].decode(), files["index.html"].decode()


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The files of a report that has every picture."""
    path = tmp_path_factory.mktemp("full")
    write(path / "results" / "deep" / "a.json", runs.whole())
    assert report.main([str(path / "results"), "--out", str(path / "out")]) == 0
    return path / "out"


# --- losses --------------------------------------------------------------------------------------


def test_losses_stand_first_and_complete_and_the_worst_of_them_first(tmp_path):
    cases = {name: encoder(8, 128) for name in "abc"}
    rows = [row(name, "bert_fast", 10) for name in cases]
    rows += [row("a", "torch", 9.9), row("b", "torch", 5), row("b", "onnxruntime", 12)]
    rows += [row("c", "torch", 9.9996), row("c", "onnxruntime", 7, state="refused", why="wrong")]
    text, page = report_of(tmp_path, run(cases, rows))
    part = text.split("## Where a peer is faster")[1].split("\n## ")[0]
    shares = [line.split(" | ")[1:3] for line in part.splitlines() if line.startswith("| ")][2:]
    assert shares == [["**0.500x**", "torch"], ["**0.990x**", "torch"], ["**0.99996x**", "torch"]]
    assert "In 3 of 3 cases that are compared, 3 of 4 comparisons." in part
    headings = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    assert headings[:2] == ["Where a peer is faster", "Pictures"] and headings[-1] == "The runs"


def test_no_loss_is_said_with_the_number_of_cases(tmp_path):
    text, _ = report_of(tmp_path, one(row("a", "bert_fast", 1), row("a", "torch", 2)))
    assert "No peer, in 1 case that are compared." in text
    text, _ = report_of(tmp_path, one(row("a", "bert_fast", 1)))
    assert "Nothing is compared yet." in text


@pytest.mark.parametrize("state", ["refused", "failed", "absent", "unfinished"])
def test_a_row_of_ours_without_a_time_is_loud(state, tmp_path):
    rows = row("a", "bert_fast", state=state, why="<it> | broke"), row("a", "torch", 2)
    text, page = report_of(tmp_path, one(*rows))
    part = text.split("## Where a peer is faster")[1].split("\n## ")[0]
    assert "> **bert_fast itself was not measured in 1 row:**" in part
    assert f"**{state}** | &lt;it&gt; \\| broke | run 1 |" in part
    assert "Nothing is compared yet." in part
    assert '<p class="notice">' in page and f'class="loud">{state}<' in page


def test_a_case_without_a_row_of_ours_is_loud(tmp_path):
    text, _ = report_of(tmp_path, one(row("a", "torch", 2)))
    assert "**absent** | there is no row of it" in text


# --- merging -------------------------------------------------------------------------------------


def test_the_newest_run_that_measured_ours_gives_the_case(tmp_path):
    old = one(row("a", "bert_fast", 7), started="2025-01-01T00:00:00Z")
    new = one(row("a", "bert_fast", 8), started="2025-01-02T00:00:00Z")
    other = one(row("a", "torch", 9), started="2025-01-03T00:00:00Z")
    wrong = one(row("a", "bert_fast", state="refused", why="off"), started="2025-01-04T00:00:00Z")
    merged = report_cases.merge(made(tmp_path, wrong, other, new, old))
    assert [(case.run.label, case.spread()["p50"]) for case in merged] == [("run 2", 0.008)]
    assert [(r.label, state) for r, state, _ in merged[0].refused] == [
        ("run 3", "absent"),
        ("run 4", "refused"),
    ]
    merged = report_cases.merge(made(tmp_path, wrong, new, name="again"))
    fixed = one(row("a", "bert_fast", 6), started="2025-01-05T00:00:00Z")
    assert merged[0].refused and not report_cases.merge(made(tmp_path, wrong, fixed))[0].refused


def test_machines_and_dtypes_are_apart(tmp_path):
    gpu = {"device": "NVIDIA H200", "slug": "nvidia-h200", "gpu": {"name": "NVIDIA H200"}}
    cases = {"a": encoder(8, 128, dtype="bf16")}
    several = [
        one(row("a", "bert_fast", 1), row("a", "torch", 2)),
        run(cases, [row("a", "bert_fast", 3), row("a", "torch", 4)]),
        run(cases, [row("a", "bert_fast", 5), row("a", "torch", 6)], gpu),
    ]
    assert len(report_cases.merge(made(tmp_path, *several))) == 3
    found, _ = report_plots.plots(report_cases.merge(made(tmp_path, *several)))
    names = [plot.name for plot in found]
    assert names == ["ratios-encoder-amd-epyc-2-cores", "ratios-encoder-nvidia-h200"]


def test_a_run_that_says_nothing_of_its_machine_is_shown(tmp_path):
    data = one(row("a", "bert_fast", 1), row("a", "torch", 2), machine={"device": None})
    data["ceilings"], data["ended"] = {}, None
    text, _ = report_of(tmp_path, data)
    assert "it was killed, or still runs" in text and "an unknown machine" in text


def test_families_are_inferred_where_a_run_does_not_say_them(tmp_path):
    facts = {"device": "cpu", "dtype": "fp32"}
    names = ("case 10 s128", "case 1", "cpu mini 32x128", "attention")
    cases = {name: dict(facts) for name in names}
    cases["attention"]["op"] = "attention"
    merged = report_cases.merge(
        made(tmp_path, run(cases, [row(name, "bert_fast", 1) for name in names]))
    )
    assert {case.name: case.family for case in merged} == {
        "case 10 s128": "pretraining",
        "case 1": "encoder",
        "cpu mini 32x128": "pretraining",
        "attention": "kernels",
    }


def test_kernels_are_compared_by_the_clock_of_the_device_and_the_encoder_is_not(tmp_path):
    rows = [row("a", "bert_fast", 4), row("a", "torch", 8), row("a", "loop", 2)]
    for r, ms in zip(rows, (1, 3, None), strict=True):
        r["device"] = ms and {"p20": ms / 1e3, "p50": ms / 1e3, "p80": ms / 1e3, "n": 9}
    for facts, ratios in ((kernel("gelu"), [0.5, 3.0]), (encoder(8, 128), [0.5, 2.0])):
        case = report_cases.merge(made(tmp_path, one(*rows, facts=facts)))[0]
        assert [value for value, _ in case.ratios()] == ratios


def test_checks_that_were_not_to_be_timed_are_counted_and_not_shown(tmp_path):
    data = one(row("a", "bert_fast", 1), row("odd", "bert_fast", state="passed"))
    text, _ = report_of(tmp_path, data)
    assert "1 measured, 1 passed" in text and "| odd" not in text


# --- what the runs say ---------------------------------------------------------------------------


def test_a_run_is_described_with_its_pulse_and_what_is_missing_of_it(tmp_path):
    data = one(row("a", "bert_fast", 1, cut=True))
    data |= {"ended": "in parts", "stages": [{"stage": "x", "ended": "past its deadline"}]}
    data["stages"].append({"stage": "y", "ended": "done", "restarts": 2})
    text, _ = report_of(tmp_path, data)
    assert "a fixed product (fp32, 1024 x 1024 x 1024) reached 0.200 to 0.220 TFLOP/s" in text
    assert "GB/s over the run" not in text
    for case in data["cases"].values():
        case["pulse"] |= {"gb_per_s": {"p20": 20, "p50": 21, "p80": 22}, "bytes": 2**26}
    copies, _ = report_of(tmp_path, data)
    assert "a fixed copy (64 MiB) reached 20.0 to 22.0 GB/s over the run, before the" in copies
    said = "in parts; x: past its deadline; y: begun anew 2 times; 1 row cut short"
    assert f"**{said}**" in text
    assert "copy 30.0 GB/s, fp32 products 0.210 TFLOP/s" in text
    assert "20, cut short" in text


def test_tables_say_rate_error_memory_and_why_there_is_no_time(tmp_path):
    ours = row("a", "bert_fast", 10, memory={"held": 2**20, "call": 2**21})
    ours["rate"] = {"tokens_per_s": 102400.0, "tflop_per_s": 0.105, "of_matmul": 0.5}
    text, _ = report_of(tmp_path, one(ours, row("a", "onnx", state="absent", why="needs it")))
    line = next(line for line in text.splitlines() if "| **bert_fast** |" in line)
    assert "| 10.0 | 9.71 to 10.5 |  | 102,000 | 0.105 (50 %) | 2.5e-06 of 4.0e-05 | 3.00 |" in line
    assert "| onnx | absent: needs it |" in text
    assert "`bert-fast bench encoder --length 128`" in text
    assert "| base | 8 x 128, full | 1234 | fp32 | cpu |" in text


@pytest.mark.parametrize(
    ("facts", "shape"),
    [
        ({"lengths": "8 x 128, 50 % filled", "fill": 0.5}, "8 x 128, 50 % filled"),
        (
            {"lengths": "32 of glue, at most 128", "fill": 0.21},
            "32 of glue, at most 128, 21 % filled",
        ),
        ({"sequences": 8, "longest": 128, "fill": 1.0, "seed": 3}, "8 x 128, 100 % filled"),
        (
            {"sequences": 8, "longest": 64, "lengths": "squad", "fill": None, "input": "texts"},
            "8 x 64, squad, texts in host memory",
        ),
        (
            {
                "op": "attention",
                "sizes": {"lengths": [3, 9], "H": 2},
                "direction": "both",
                "p": 0.1,
            },
            "lengths 2 of 3 to 9, H 2, forward and backward, dropout 0.1",
        ),
        (
            {"op": "a", "sizes": {"lengths": [3, 3]}, "lengths": "full"},
            "lengths 2 x 3",
        ),
        (
            {"op": "a", "sizes": {"lengths": [3, 4]}, "lengths": "glue"},
            "lengths 2 of 3 to 4, as in glue",
        ),
        ({"op": "adamw_", "sizes": {"D": 8}, "direction": "step"}, "D 8, step"),
        (
            {"lengths": "2 x 8, full", "optimizer": "lamb", "dropout": 0.1},
            "2 x 8, full, dropout 0.1, lamb",
        ),
        ({}, ""),
    ],
)
def test_what_a_case_works_on_is_said_in_short(facts, shape, tmp_path):
    case = report_cases.merge(made(tmp_path, one(row("a", "bert_fast", 1), facts={"x": 0} | facts)))
    assert report._shape(case[0]) == shape


def test_the_command_of_the_run_repeats_a_case_that_has_none(tmp_path):
    facts = encoder(8, 128)
    del facts["command"]
    text, _ = report_of(tmp_path, one(row("a", "bert_fast", 1), facts=facts))
    assert f"`{runs.COMMAND}`" in text.split("## To repeat a case")[1]


# --- files ---------------------------------------------------------------------------------------


def test_every_picture_is_there_and_the_report_links_it(full):
    names = {path.name for path in (full / "plots").iterdir()}
    assert names == {f"{p}{end}" for p in PICTURES for end in (".svg", ".png", "-dark.png")}
    text = (full / "report.md").read_text()
    for name in PICTURES:
        assert f'src="plots/{name}.png"' in text and f'srcset="plots/{name}-dark.png"' in text
    assert "### Left out" not in text


def test_a_picture_without_data_is_left_out_and_the_report_says_why(tmp_path):
    text, _ = report_of(tmp_path, one(row("a", "bert_fast", 1)))
    for name in ("Time against length", "Throughput against fill", "Kernels under their roofs"):
        assert f"- {name}: no " in text
    assert "- Memory: it was measured in no case." in text


def test_pngs_are_1440_pixels_wide_on_light_and_on_dark(full):
    image = pytest.importorskip("PIL.Image")
    for path in (full / "plots").glob("*.png"):
        with image.open(path) as picture:
            assert picture.width == 1440 and 200 < picture.height < 8000
            dark = path.stem.endswith("-dark")
            assert picture.convert("RGB").getpixel((0, 0)) == ((13, 17, 23) if dark else (255,) * 3)


def test_the_same_results_give_the_same_bytes(tmp_path):
    cases, rows = runs.kernels()
    data = run(dict([*cases.items()][:4]), rows[:12])
    first, again = (report.build(made(tmp_path, data)) for _ in range(2))
    assert first == again and len(first) > 5
    script = (
        "import sys; sys.path.insert(0, 'benchmarks'); import report; report.main(sys.argv[1:])"
    )
    argv = [sys.executable, "-c", script, str(tmp_path / "m"), "--out", str(tmp_path / "other")]
    subprocess.run(argv, check=True, cwd=ROOT, capture_output=True)  # another hash of strings
    for name, content in first.items():
        assert (tmp_path / "other" / name).read_bytes() == content, name


def test_the_page_is_whole_in_itself_and_accessible(full):
    text = (full / "index.html").read_text()
    assert not re.search(r"""(?:src|href|url\(|@import)\s*=?\s*["']?\s*(?:https?:)?//""", text)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    for name, attributes in page.all:
        for key in ("href", "xlink:href", "aria-labelledby"):
            if key in attributes:
                assert attributes[key].removeprefix("#") in page.ids
        assert name not in ("script", "link", "img", "iframe")
        if name == "svg":
            assert attributes["role"] == "img" and len(attributes["aria-label"]) > 20
        if name == "th":
            assert attributes["scope"] in ("col", "row", "rowgroup")
    for link in re.findall(r"url\(#([^)]*)\)", text):
        assert link in page.ids
    tags = [name for name, _ in page.all]
    assert tags.count("table") == tags.count("caption") == 6
    assert tags.count("svg") == 2 * len(PICTURES)


def test_pictures_take_the_colour_of_the_page_and_have_words_as_words(full):
    for path in (full / "plots").glob("*.svg"):
        text = path.read_text()
        assert "currentColor" in text and report_sheet._INK not in text
        assert "background:#ffffff" in text and "prefers-color-scheme:dark" in text
        assert "<metadata>" not in text
        assert "<text" in text and "<title>" in text


def test_what_would_be_markup_is_escaped(tmp_path):
    name = "a|b <i>&amp; `c` *d* [e](f) _g_ $h$"
    data = run({name: encoder(8, 128)}, [row(name, "bert_fast", 3), row(name, "<b>|x", 2)])
    data["command"] = "run `x` | <y>"
    del data["cases"][name]["command"]
    data["rows"].append(row(name, "bad", state="failed", why="</td><script>alert(1)</script>"))
    text, page = report_of(tmp_path, data)
    assert "<i>" not in page and "<script" not in page and "<b>" not in page
    assert name in Page(page).words
    escaped = "a\\|b &lt;i&gt;&amp;amp; \\`c\\` \\*d\\* \\[e\\](f) \\_g\\_ $h$"
    assert f"| {escaped} |" in text.split("## To repeat a case")[1]
    assert "`` run `x` \\| <y> ``" in text or "``run `x` \\| <y>``" in text
    for line in text.splitlines():
        if line.startswith("|") and "&lt;b&gt;" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) in (7, 11)


# --- the command ---------------------------------------------------------------------------------


def test_the_results_of_the_repository_have_a_report(tmp_path, capsys):
    assert report.main([str(ledger.RESULTS), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "## Where a peer is faster" in text and "cpu 8x512 46%" in text
    Page((tmp_path / "index.html").read_text())
    assert "written: " in capsys.readouterr().out


def test_a_rehearsal_is_skipped_in_a_directory_and_loud_where_it_is_named(tmp_path, capsys):
    real = write(tmp_path / "r" / "real.json", one(row("a", "bert_fast", 1)))
    small = write(tmp_path / "r" / "small.json", one(row("a", "bert_fast", 9), rehearsal=True))
    (tmp_path / "r" / "other.json").write_text("[1]")
    assert [run.name for run in report_cases.read([tmp_path / "r"])] == ["r/real.json"]
    said = capsys.readouterr().err
    assert "small.json: left out, it is a rehearsal" in said
    assert "other.json: left out, it is no run" in said
    merged = report_cases.merge(report_cases.read([real, small, real]))
    assert [case.spread()["p50"] for case in merged] == [0.001, 0.009]
    assert report.main([str(small), "--out", str(tmp_path / "out")]) == 0
    assert report.REHEARSAL in capsys.readouterr().err
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.count(f"> **{report.REHEARSAL}**") == 2 and f": {report.REHEARSAL}**" in text


@pytest.mark.parametrize("content", ["[1]", "{", '{"format": 7}', '{"format": 1, "rows": []}'])
def test_a_named_file_that_is_no_run_is_an_error(content, tmp_path, capsys):
    path = tmp_path / "no.json"
    path.write_text(content)
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 1
    assert "no.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_found_and_nothing_there_are_errors(tmp_path, capsys):
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "want runs, got none" in capsys.readouterr().err
    assert report.main([str(tmp_path / "x.json"), "--out", str(tmp_path / "out")]) == 1
    assert "x.json" in capsys.readouterr().err


def test_a_broken_run_in_a_directory_is_an_error(tmp_path, capsys):
    data = one(row("a", "bert_fast", 1))
    data["rows"][0]["wall"]["p50"] = 0
    write(tmp_path / "r" / "bad.json", data)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "bad.json" in capsys.readouterr().err


def test_the_same_run_twice_is_shown_once(tmp_path):
    data = one(row("a", "bert_fast", 1))
    assert len(made(tmp_path, data, json.loads(json.dumps(data)))) == 1


def test_matplotlib_is_asked_for_where_it_is_not(tmp_path, capsys, monkeypatch):
    for name in [*sys.modules]:
        if name.startswith(("report_plots", "report_charts", "report_sheet")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = write(tmp_path / "a.json", one(row("a", "bert_fast", 1)))
    assert report.main([str(path), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == f"report: {report.WANT}\n"


def test_markdown_and_page_say_the_same_words(full):
    page = Page((full / "index.html").read_text()).words
    for block in re.findall(r"^[A-Z][^|<\n]{30,}$", (full / "report.md").read_text(), re.MULTILINE):
        assert block in page or "\\" in block, block


def test_a_word_of_markdown_is_escaped_only_where_it_would_be_taken_for_one():
    assert report_page.plain("a_b _c_") == "a_b \\_c\\_"


# --- the one of this repository ------------------------------------------------------------------

KEPT = ledger.RESULTS / "report"


def test_the_report_of_this_repository_is_what_its_results_say():
    """`make ledger` writes it; pictures depend on matplotlib's version, the words do not."""
    files = report.build(report_cases.read([ledger.RESULTS]))
    assert (KEPT / "report.md").read_text("utf-8") == files["report.md"].decode()
    there = {path.relative_to(KEPT).as_posix() for path in KEPT.rglob("*") if path.is_file()}
    assert there == set(files)
    page = Page((KEPT / "index.html").read_text("utf-8"))
    assert page.words == Page(files["index.html"].decode()).words
