"""docs/performance.md: which runs it shows, and what it says of them."""

import copy
import json
import re

import encoder
import performance
import pretraining
import pytest
from ledger import RESULTS, Kept, load
from ledger_runs import HOST, row, run

FP32, BF16, TRAINING = performance.PARTS


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
    cases = [*FP32.rows, *BF16.rows, *TRAINING.rows]
    return made({case: copy.deepcopy(rows) for case in cases}, started)


def test_the_rows_are_those_that_are_measured():
    for part, module in ((FP32, encoder), (BF16, encoder), (TRAINING, pretraining)):
        for case in part.rows:
            spec = module.SPECS[case]
            assert case.split()[1] in part.rows[case].replace(" ", "") or module is pretraining
            if module is encoder:
                assert str(spec.on_cpu).endswith("bfloat16" if part is BF16 else "float32")
    every = {name for module in (encoder, pretraining) for name in module.SPECS}
    shown = [case for part in performance.PARTS for case in part.rows]
    assert sorted(shown) == sorted(name for name in every if name.startswith("cpu "))


def test_a_row_says_times_ratios_differences_and_memory():
    text = page(full())
    times, differences, memory = cells(section(text, FP32), "8 x 128, full")
    assert times[:4] == [
        "10.0 ms (10.0 to 10.0)",
        "25.0 ms (25.0 to 25.0)",
        "9.00 ms (9.00 to 9.00)",
        "12.0 ms (12.0 to 12.0)",
    ]
    assert times[4:] == ["2.50x", "0.900x"]  # ONNX Runtime: the faster of its two
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
    assert times[3] == "refused" and times[-1] == "0.900x"


def test_where_a_peer_wins_comes_first():
    text = page(full())
    behind = text.split("## Where a peer is faster")[1].split("\n## ")[0]
    assert text.index("## Where a peer is faster") < text.index(f"## {FP32.title}")
    assert "- 8 x 128, full, fp32: 0.900x onnxruntime plain\n" in behind
    assert "- 8 x 128, full, bf16: 0.900x onnxruntime plain\n" in behind
    assert "- BERT-mini, 32 x 128, fp32: 0.900x onnxruntime plain\n" in behind
    text = page(full(ours=5.0))
    behind = text.split("## Where a peer is faster")[1].split("\n## ")[0]
    assert "No peer, in 9 rows that are compared." in behind
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


def test_the_page_of_this_repository():
    """docs/performance.md is what the results say: `python benchmarks/performance.py`."""
    assert performance.PAGE.read_text("utf-8") == performance.render(load(RESULTS))


def test_links_lead_to_files():
    links = re.findall(r"\]\((.*?)\)", performance.PAGE.read_text("utf-8"))
    assert links and all((performance.PAGE.parent / link).is_file() for link in links)


def test_check_bites(tmp_path, capsys):
    results, target = tmp_path / "results", tmp_path / "docs" / "performance.md"
    path = results / "amd-epyc-2-cores" / "a.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(full()), "utf-8")
    assert performance.main(["--check"], results, target) == 1 and not target.exists()
    assert performance.main([], results, target) == 0
    capsys.readouterr()
    assert performance.main(["--check"], results, target) == 0 and capsys.readouterr().out == ""
    target.write_text(target.read_text("utf-8").replace("10.0 ms", "9.0 ms"), "utf-8")
    assert performance.main(["--check"], results, target) == 1
    assert "+| 1 x 128, full | 10.0 ms" in capsys.readouterr().out
    path.write_text("{", "utf-8")
    assert performance.main([], results, target) == 1
    assert "amd-epyc-2-cores/a.json: " in capsys.readouterr().err
