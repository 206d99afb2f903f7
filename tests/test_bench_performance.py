"""docs/performance.md and README's table: which runs they show, and what they say of them."""

import copy
import json
import re

import page_kernels
import performance
import pytest
import readme_table
import specs
from ledger import RESULTS, Kept, load
from ledger_runs import H200, HOST, row, run

BY_TITLE = {part.title: part for part in performance.PARTS}
FP32 = BY_TITLE["Encoder, BERT-base in fp32"]
BF16 = BY_TITLE["Encoder, BERT-base in bf16"]
TRAINING = BY_TITLE["Pre-training of small models in fp32"]
LENGTHS, FILL = BY_TITLE["One sequence, by length"], BY_TITLE["By fill"]


def made(cases, started="2025-01-02T03:04:05Z", **fields):
    data = run(cases, HOST, "fp32", started, **fields)
    for name, case in data["cases"].items():
        case["dtype"] = "bf16" if name.endswith("bf16") else "fp32"
    data["environment"] |= {"threads": 2, "instruction_sets": ["avx2"], "transformers": "5.23.0"}
    data["command"] = "python benchmarks/run.py cpu"
    return data


def page(*runs):
    return performance.render([Kept(f"x/{i}.json", data) for i, data in enumerate(runs)])


def section(text, part):
    return text.split(f"## {part.title}\n")[1].split("\n## ")[0]


def cells(text, label):
    """The cells behind `label` in each table that has such a row."""
    found = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [line[1:] for line in found if line[0] == label]


def full(ours=10.0, started="2025-01-02T03:04:05Z"):
    error = {"own": {"max": 2.54e-6, "l2": 1e-6}}
    memory = {"imported": 2**28, "held": 2**29, "peak": 2**30, "lifetime": 2**31}
    rows = [
        row("bert_fast", ours, error=error, memory=memory),
        row("transformers sdpa", 25, error=error),
        row("onnxruntime plain", 9, error=error),
        row("onnxruntime", 12, error=error),
        row("transformers sdpa compile default", state="failed"),
    ]
    cases = [*FP32.rows, *BF16.rows, *[*TRAINING.rows][:2]]
    return made({case: copy.deepcopy(rows) for case in cases}, started)


def test_the_rows_are_those_that_are_measured():
    every = specs.ENCODER | specs.PRETRAINING
    shown = {case: part for part in performance.PARTS for case in part.rows}
    assert sorted(shown) == sorted(name for name in every if name.startswith("cpu "))
    for case, part in shown.items():
        spec, label = every[case], part.rows[case]
        assert (case in specs.PRETRAINING) is (part is TRAINING)
        assert spec.dtype == part.place.dtype and part.place.device == "cpu"
        assert (spec.kind == "texts") is (part.title == "Text in") and spec.kind != "ids"
        sequences = re.search(r"(\d+) (?:x|of|texts)", label)
        assert int(sequences[1]) == spec.lengths.n, label
        if (shape := re.search(r"\d+x(\d+)", case)) is not None:
            assert f" x {shape[1]}" in label
        if (share := re.search(r"(\d+)%", case)) is not None:
            assert f"{share[1]} % filled" in label


def test_a_row_says_times_ratios_differences_and_memory():
    text = page(full())
    times, differences, memory = cells(section(text, FP32), "8 x 128, full")
    assert times[:4] == [
        "10.0 ms (10.0 to 10.0)",
        "25.0 ms (25.0 to 25.0)",
        "9.00 ms (9.00 to 9.00)",
        "12.0 ms (12.0 to 12.0)",
    ]
    assert times[4:] == ["2.50x", "0.900x", "not measured yet"]  # the faster ONNX Runtime
    assert differences == ["2.5e-06"] * 4
    assert memory == ["1,024 (768)", *["not measured yet"] * 3]
    head = next(line for line in section(text, FP32).splitlines() if line.startswith("|  |"))
    assert "compile" not in head  # none of its rows was measured
    for says in ("AMD EPYC, 2 threads; avx2", "transformers 5.23.0", "commit 0123456, 2025-01-02"):
        assert says in section(text, FP32)
    assert "`python benchmarks/run.py cpu`" in section(text, FP32)
    assert "](../benchmarks/results/x/0.json)" in section(text, FP32)


def test_a_candidate_that_was_refused_in_one_row_says_so_there():
    data = full()
    for one in data["rows"]:
        if (one["case"], one["candidate"]) == ("cpu 2x512", "onnxruntime"):
            one["state"] = "refused"
    times, *_ = cells(section(page(data), FP32), "2 x 512, full")
    assert times[3] == "refused" and times[-2] == "0.900x"


def test_where_a_peer_wins_comes_first():
    text = page(full())
    behind = text.split("## Where a peer is faster")[1].split("\n## ")[0]
    assert text.index("## Where a peer is faster") < text.index(f"## {FP32.title}")
    assert "- 8 x 128, full, fp32: 0.900x onnxruntime plain\n" in behind
    assert "- 8 x 128, full, bf16: 0.900x onnxruntime plain\n" in behind
    assert "- BERT-mini, 32 x 128, fp32: 0.900x onnxruntime plain\n" in behind
    assert behind.count("- 8 x 128, full, fp32") == behind.count("- 1 x 128, full") == 1
    text = page(full(ours=5.0))
    behind = text.split("## Where a peer is faster")[1].split("\n## ")[0]
    assert "No peer, in 9 rows that are compared." in behind  # some of them are in two parts
    assert "Nothing yet." in page()


def test_the_newest_run_with_most_rows_is_shown():
    old, new = full(20.0), full(10.0, started="2025-02-02T00:00:00Z")
    one = made({"cpu 1x128": [row("bert_fast", 1)]}, started="2025-03-01T00:00:00Z")
    for runs in ((old, new, one), (one, new, old)):
        times, *_ = cells(section(page(*runs), FP32), "1 x 128, full")
        assert times[0].startswith("10.0 ms")
    text = section(page(one), FP32)
    assert "Not measured yet: 8 x 128, full; 2 x 512, full; " in text and "1.00 ms" in text
    assert "Not measured yet.\n" in section(page(one), BF16)


@pytest.mark.parametrize("change", ["rehearsal", "gpu", "dtype", "refused"])
def test_what_does_not_count_is_not_shown(change):
    data = full()
    data["rehearsal"] = change == "rehearsal"
    for case in data["cases"].values():
        case["device"] = "cuda" if change == "gpu" else "cpu"
        case["dtype"] = "fp16" if change == "dtype" else case["dtype"]
    for one in data["rows"] if change == "refused" else ():
        one["state"] = "refused" if one["candidate"] == "bert_fast" else one["state"]
    text = page(data)
    assert all("Not measured yet.\n" in section(text, part) for part in performance.PARTS)
    assert "10.0 ms" not in text


def test_what_ran_is_said_by_row_where_it_differs():
    data = full()
    ours = [one for one in data["rows"] if one["candidate"] == "bert_fast"]
    for one in ours:
        one["notes"] = {"ops": {"embed": "csrc", "linear": "pytorch", "attention": "csrc"}}
        one["notes"] |= {"extension": "AVX512", "cpu_library": "onednn"}
    same = "csrc for attention, embed; pytorch for linear; the extension: AVX512; fp32 products"
    assert f"- bert_fast: {same} through onednn, chosen by hand\n" in section(page(data), FP32)
    for one in ours:
        one["notes"]["cpu_library_ms"] = {"blas": 2.0, "onednn": 1.0}
    assert f"{same} through onednn, measured faster at first use\n" in section(page(data), FP32)
    ours[1]["notes"] = {**ours[1]["notes"], "cpu_library": "blas"}
    text = section(page(data), FP32)
    assert f"- bert_fast (8 x 128, full): {same} through blas" in text
    others = "; ".join(name for case, name in FP32.rows.items() if case != "cpu 8x128")
    assert f"- bert_fast ({others}): {same} through onednn" in text


def test_a_part_of_which_little_is_measured():
    """A case may be in two parts, and a part may have no case yet."""
    text = page(full())
    assert cells(section(text, LENGTHS), "1 x 128, full")[0][0] == "10.0 ms (10.0 to 10.0)"
    assert "Not measured yet: 1 x 32, full; 1 x 64, full; " in section(text, LENGTHS)
    assert "Not measured yet: 8 x 128, 25 % filled; " in section(text, FILL)
    for title in ("Lengths as in real data", "Text in"):
        assert section(text, BY_TITLE[title]).endswith("\nNot measured yet.\n")
    assert text.split("## Kernels\n")[1].endswith("\nNot measured yet.\n")


# --- kernels -------------------------------------------------------------------------------------


def ops(suite="kernels", started="2025-01-02T03:04:05Z", **fields):
    near = {"gb_per_s": 20.0, "of_copy": 0.8, "tflop_per_s": 0.05, "of_matmul": 0.25}
    far = {"gb_per_s": 2.0, "of_copy": 0.1, "tflop_per_s": 0.18, "of_matmul": 0.9}
    cases = {
        "add_layer_norm fwd+bwd, large": [row("bert_fast", 2, rate=near), row("torch", 3)],
        "attention s512, base, fp32": [
            row("bert_fast", 4, rate=far),
            row("torch", 3),
            row("torch compile default", 5),
            row("torch math", 9),
            row("other", state="failed"),
        ],
        "gelu": [row("bert_fast", 1, rate={"gb_per_s": 7.0})],
        "linear": [row("bert_fast", state="refused"), row("torch", 3)],
    }
    data = made(cases, started, suite=suite, **fields)
    for case in data["cases"].values():
        case["family"] = "kernels"
    data["cases"] |= made({"cpu 1x128": []})["cases"]
    data["rows"].append({"case": "cpu 1x128"} | row("bert_fast", 10))
    return data


@pytest.mark.parametrize("suite", ["kernels", "all"])
def test_kernels(suite):
    text = page(ops(suite)).split(f"## {page_kernels.TITLE}\n")[1]
    assert cells(text, "add_layer_norm fwd+bwd, large, fp32") == [
        ["2.00 (2.00 to 2.00)", "torch", "1.50x", "20.0 GB/s", "80 % of copying"]
    ]
    assert cells(text, "attention s512, base, fp32") == [
        ["4.00 (4.00 to 4.00)", "torch", "0.750x", "0.180 TFLOP/s", "90 % of products"]
    ]
    assert cells(text, "gelu, fp32")[0][1:4] == ["not measured yet", "", "7.00 GB/s"]
    assert "Without a time of ours: linear (refused)." in text and "cpu 1x128" not in text
    assert "AMD EPYC, 2 threads" in text and "](../benchmarks/results/x/0.json)" in text


def test_kernels_where_a_peer_is_faster_come_first():
    behind = page(ops()).split("## Where a peer is faster")[1].split("\n## ")[0]
    assert "- attention s512, base, fp32: 0.750x torch\n" in behind
    assert behind.count("- ") == 1
    data = ops()
    data["rows"] = [one for one in data["rows"] if one["candidate"] != "torch"]
    assert "No peer, in 1 rows" in page(data)


def test_the_newest_run_of_kernels_on_a_cpu_is_shown():
    old, new = ops(started="2025-01-01T00:00:00Z"), ops("all", started="2025-02-01T00:00:00Z")
    later = "2025-03-01T00:00:00Z"
    others = [ops("encoder", started=later), ops(started=later, rehearsal=True)]
    others.append(ops(started=later))
    for case in others[-1]["cases"].values():
        case["device"] = "cuda"
    runs = [Kept(f"x/{i}.json", data) for i, data in enumerate([new, old, *others])]
    assert page_kernels.Kernels.of(runs).run is runs[0]
    assert page_kernels.Kernels.of(runs[2:]) is None


# --- README --------------------------------------------------------------------------------------


def table(*runs):
    return readme_table.render([Kept(f"x/{i}.json", data) for i, data in enumerate(runs)])


def test_the_table_of_the_readme():
    data = full()
    data["ceilings"] = {"matmul_tflop_per_s": {"fp32": 0.2139}}
    data["rows"] = [
        one
        for one in data["rows"]
        if not (one["case"].endswith("bf16") and one["candidate"].startswith("onnx"))
    ]
    text = table(data)
    words = " ".join(text.split("|")[0].split())
    for says in (
        "on AMD EPYC, whose fp32 products reach 0.21 TFLOP/s. With torch 2.11, transformers 5.23.0",
        "onnxruntime absent; 2025-01-02, `python benchmarks/run.py cpu` at commit 0123456. Medians",
        "Medians of 20 calls or more",
    ):
        assert says in words
    assert "rows in bf16" not in words
    assert max(map(len, text.split("|")[0].splitlines())) <= 120
    nested = "not measured yet | 10.0 ms | 2.50x"
    assert f"| 8 x 128, full | 25.0 ms | 9.00 ms | {nested} | 0.900x | |\n" in text
    assert f"| 8 x 128, full, bf16 | 25.0 ms | has none | {nested} | | |\n" in text
    assert text.endswith("| anything on a GPU | not measured yet | | | not measured yet | | | |\n")


def test_the_table_names_each_run_and_peers_that_have_no_time():
    one = made({"cpu 1x128": [row("bert_fast", 1), row("transformers sdpa", state="failed")]})
    other = made({"cpu 8x128 bf16": [row("bert_fast", 2)]}, started="2025-05-05T00:00:00Z")
    text = table(one, other)
    assert "; rows in bf16: 2025-05-05, `python" in " ".join(text.split())
    none = " | ".join(["not measured yet"] * 3)
    assert f"| 1 x 128, full | {none} | 1.00 ms | | | |\n" in text
    assert table().startswith("Not measured yet.\n\n| batch x length |")


def test_the_gpu_row_goes_when_a_gpu_was_measured():
    for state, gone in (("measured", True), ("failed", False)):
        gpu = run({"case 1": [row("bert_fast", 1, state=state)]}, H200)
        assert ("anything on a GPU" not in table(full(), gpu)) is gone


@pytest.mark.parametrize("change", ["none", "no end", "twice", "order"])
def test_the_marks_are_there_once(change):
    begin, end = readme_table.BEGIN, readme_table.END
    texts = {"none": "a", "no end": begin, "twice": f"{begin}{end}" * 2, "order": f"{end}{begin}"}
    with pytest.raises(ValueError, match=r"README.md: want .* once each"):
        readme_table.replace(texts[change], [])
    made = readme_table.replace(f"a\n{begin}\nold\n{end}\nb", [])
    assert made.startswith(f"a\n{begin}\nNot") and made.endswith(f"|\n{end}\nb")
    assert readme_table.replace(made, []) == made


def test_the_readme_of_this_repository():
    """It is what the results say: `python benchmarks/performance.py`."""
    text = performance.README.read_text("utf-8")
    assert readme_table.replace(text, load(RESULTS)) == text
    assert readme_table.replace(text.replace(" ms |", " s |", 1), load(RESULTS)) == text


# --- the files -----------------------------------------------------------------------------------


def test_the_page_of_this_repository():
    """docs/performance.md is what the results say: `python benchmarks/performance.py`."""
    assert performance.PAGE.read_text("utf-8") == performance.render(load(RESULTS))


def test_links_lead_to_files():
    links = re.findall(r"\]\((.*?)\)", performance.PAGE.read_text("utf-8"))
    assert links and all((performance.PAGE.parent / link).is_file() for link in links)


def test_check_bites(tmp_path, capsys):
    results, target = tmp_path / "results", tmp_path / "docs" / "performance.md"
    readme, begin, end = tmp_path / "README.md", readme_table.BEGIN, readme_table.END
    readme.write_text(f"before\n{begin}\n{end}\nafter\n", "utf-8")
    path = results / "amd-epyc-2-cores" / "a.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(full()), "utf-8")
    files = (results, target, readme)
    assert performance.main(["--check"], *files) == 1 and not target.exists()
    assert "10.0 ms" not in readme.read_text("utf-8")
    assert performance.main([], *files) == 0
    capsys.readouterr()
    assert performance.main(["--check"], *files) == 0 and capsys.readouterr().out == ""
    for file, sign in ((target, "+| 1 x 128, full | 10.0 ms"), (readme, "+| 1 x 128, full | 25.0")):
        text = file.read_text("utf-8")
        file.write_text(text.replace("10.0 ms", "9.0 ms"), "utf-8")
        assert performance.main(["--check"], *files) == 1
        out = capsys.readouterr().out
        assert sign in out and out.count("\n--- ") + out.startswith("--- ") == 1
        file.write_text(text, "utf-8")
    path.write_text("{", "utf-8")
    assert performance.main([], *files) == 1
    assert "amd-epyc-2-cores/a.json: " in capsys.readouterr().err
    path.write_text(json.dumps(full()), "utf-8")
    readme.write_text("no marks", "utf-8")
    was = target.read_text("utf-8")
    assert performance.main([], *files) == 1 and target.read_text("utf-8") == was
    assert "README.md: want " in capsys.readouterr().err
