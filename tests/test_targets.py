"""What each row of the ledger reads from a run, and its goals against TARGETS.md."""

import re

import ledger
import pytest
import targets
from ledger import Kept
from ledger_runs import HOST, TARGETS, cells, row, run


def test_the_rows():
    assert [len(section) for _, section in targets.SECTIONS] == [12, 13, 5]
    assert len(TARGETS) == 30
    text = ledger.render([])
    assert text.count("| not measured yet |") >= 30
    assert all(f"| **{key}**: " in text for key in TARGETS)


def numbers(text):
    """The numbers of a goal in TARGETS, without those that are sizes or names."""
    text = re.sub(r"\d+ x \d+|\bs \d+|at 512|\): one 32-bit.*|logits never.*?;", " ", text)
    found = re.findall(r"(?<![A-Za-z\d.,])\d[\d,]*(?:\.\d+)?", text)
    return [float(n.replace(",", "")) for n in found]


def bounds(text):
    found = re.findall(r"([<>])= (\d[\d,]*(?:\.\d+)?)", text)
    return {(sign, float(n.replace(",", ""))) for sign, n in found}


def table(text, heading):
    """The cells of the first table under a heading, without its head."""
    lines = text.split(f"## {heading}")[1].split("\n## ")[0].splitlines()
    rows = [line.strip()[1:-1].split("|") for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_goals_are_those_of_targets_md(shared):
    text = (shared / "design" / "TARGETS.md").read_text("utf-8")
    end_to_end, kernels, cpu = (table(text, name) for name in ("End-to-end", "Kernels", "CPU"))
    want, got = {}, {}
    for line in end_to_end:
        want[f"case {line[0]}"] = f"{line[4]} ; {line[5]}"
        got[f"case {line[0]}"] = [
            t for t in targets.END_TO_END if re.match(rf"case {line[0]}( |$)", t.key)
        ]
    order = [[t] for t in targets.KERNELS]
    order[7:9] = [order[7] + order[8]]  # bias + GELU is one row there
    for line, several in zip(kernels, order, strict=True):
        want[line[0]], got[line[0]] = line[1], several
    for line, target in zip(cpu, targets.CPU_ROWS, strict=True):
        assert target.title == f"base, fp32, {line[0]}"
        want[line[0]], got[line[0]] = line[-1].replace("<= ONNX", ">= 1.0 ONNX"), [target]
    assert len(want) == 10 + 12 + 5
    for name, goal in want.items():
        ours, senses = [], set()
        for target in got[name]:
            for part in (*target.parts, *target.against):
                sign = {"≤": "<"}.get(getattr(part, "sense", ""), ">")
                given = [n for n in (part.goal, part.stretch) if n is not None]
                ours += [0.9 if abs(n - 1 / 0.9) < 1e-9 else n for n in given]
                senses |= {(sign, n) for n in given}
        assert set(numbers(goal)) == set(ours), name
        assert bounds(goal) <= senses, name


def test_the_best_peer_of_each_class():
    rows = [
        row("bert_fast", 10, rate={"tokens_per_s": 2.9e6}),
        row("transformers sdpa padded", 30),
        row("transformers sdpa compile default padded", 25),
        row("transformers sdpa sorted", 13),
        row("transformers eager sorted", 20),
        row("varlen_attn", 9),
        row("varlen_attn compile", 8),
        row("transformers sdpa flash padded", 1, "refused"),
    ]
    data = run({"case 5": rows})
    own, against, _ = cells("case 5", data)
    assert own == "2.90 M tok/s, met"
    assert against.split("<br>") == [
        "padded: 2.50x transformers sdpa compile default padded, met",
        "length-sorted: 1.30x transformers sdpa sorted, met",
        "varlen: **0.800x** varlen_attn compile, **missed**",
    ]
    text = ledger.render([Kept("x/0.json", data)])
    behind = text.split("## Where a peer is faster")[1].split("## ")[0]
    assert (
        "\n- case 5: 0.800x varlen_attn compile; 0.900x varlen_attn ([x/0](x/0.json))\n" in behind
    )
    rows[5:7] = []
    text = ledger.render([Kept("x/0.json", run({"case 5": rows}))])
    assert "No peer, in 1 rows" in text and "varlen: not measured yet" in text


FULL = {
    "E": "transformers eager",
    "S": "transformers sdpa",
    "SF": "transformers sdpa flash",
    "EC": "transformers eager compile default",
    "SR": "transformers sdpa compile reduce-overhead",
    "SP": "transformers sdpa padded",
    "SS": "transformers sdpa sorted",
    "SCS": "transformers sdpa compile default sorted",
    "O": "onnxruntime",
    "V": "varlen_attn",
    "VC": "varlen_attn compile",
    "F": "flash varlen",
}


@pytest.mark.parametrize(
    ("key", "label", "members"),
    [
        ("case 1", "compile reduce-overhead", "SR"),
        ("case 1", "eager", "E S SF SP"),
        ("case 2 s128", "best peer", " ".join(FULL)),
        ("case 5", "padded", "E S SF EC SR SP O"),
        ("case 5", "length-sorted", "SS SCS"),
        ("case 5", "varlen", "V VC F"),
        ("case 8", "compiled", "EC SR"),
        ("case 9", "compiled", "EC SR"),
        ("cpu 1x128", "ONNX Runtime", "O"),
        ("cpu 1x128", "transformers SDPA", "S"),
    ],
)
def test_classes(key, label, members):
    (against,) = (a for a in TARGETS[key].against if a.label == label)
    assert {short for short, name in FULL.items() if against.chosen(name)} == set(members.split())


def test_mfu_and_sub_rows():
    rates = {"sequences_per_s": 1700.0, "of_matmul": 0.49, "of_989": 0.41}
    names = ("case 8", "case 10 s128", "case 10 s512")
    data = run({name: [row("bert_fast", 1, rate=rates)] for name in names})
    assert cells("case 8", data)[0].split("<br>") == [
        "1,700 seq/s, met",
        "MFU of the ceiling: 49.0 %, **missed**",
        "MFU of 989 TFLOP/s: 41.0 %",
    ]
    assert cells("case 10 s128", data)[0] == "1,700 seq/s, **missed**"
    assert cells("case 10 s512", data)[0] == "1,700 seq/s, met"
    cut = run({"case 3": [row("bert_fast", 5.5, cut=True)]})
    assert cells("case 3", cut)[0] == "5.50 ms, met<br>rounds cut short"


KERNEL_ROWS = {
    "attention s512, large": (200, {"tflop_per_s": 371.4}),
    "attention_bwd s512, large": (200, {"tflop_per_s": 290.0}),
    "attention s128, large": (100, {"of_copy": 0.69}),
    "attention s256, large": (100, {"tflop_per_s": 300.0}),
    "attention mixed, large": (100, {"tflop_per_s": 291.0}),
    "attention s128 dropout, large": (124, {}),
    "attention s512 dropout, large": (330, {}),
    "add_layer_norm dropout, large": (100, {"of_copy": 0.86}),
    "layer_norm, large": (80e-3, {}),
    "add_layer_norm_bwd, large": (120e-3, {"of_copy": 0.75}),
    "linear, base": (100, {}),
    "linear_gelu, base": (104, {}),
    "bias_gelu, base": (100, {"of_copy": 0.8}),
    "linear_cross_entropy, base": (100, {}),
    "adamw_, large": (100, {"of_copy": 0.83}),
    "lamb_, large": (100, {"of_copy": 0.7}),
}


def kernel_run():
    cases = {
        name: [row("bert_fast", ms, rate=rate, memory={"held": 0, "call": 100})]
        for name, (ms, rate) in KERNEL_ROWS.items()
    }
    torch = row("torch", 160, memory={"held": 0, "call": 290})
    cases["linear_cross_entropy, base"].append(torch)
    cases["attention s512, large"] += [row("torch", 900), row("sdpa", 190), row("varlen_attn", 210)]
    return run(cases)


@pytest.mark.parametrize(
    ("key", "own"),
    [
        ("attention", "371 TFLOP/s, met"),
        ("attention_bwd", "290 TFLOP/s, met, stretch too"),
        ("attention short", "69.0 % of copy, **missed**"),
        ("attention mixed", "97.0 %, met"),
        ("attention dropout", "s 128: 24.0 %, met<br>s 512: 65.0 %, **missed**"),
        ("add_layer_norm", "86.0 % of copy, met"),
        (
            "add_layer_norm_bwd",
            "75.0 % of copy, met<br>32768 x 1024 forward + backward: 100 us, met",
        ),
        (
            "linear_gelu",
            "inference: 4.00 %, met, stretch too<br>training: not measured yet",
        ),
        ("bias_gelu", "80.0 % of copy, **missed**"),
        ("linear_cross_entropy", "memory: 2.90x less than eager PyTorch, **missed**"),
        ("optimizer", "AdamW: 83.0 % of copy, met<br>LAMB: 70.0 % of copy, **missed**"),
        ("determinism", "not measured yet"),
        ("training memory", "not measured yet"),
    ],
)
def test_kernels(key, own):
    assert cells(key, kernel_run())[0] == own


def test_kernels_against_peers():
    data = kernel_run()
    assert cells("linear_cross_entropy", data)[1] == "1.60x torch, met"
    assert cells("attention", data)[1] == "**0.950x** sdpa"
    sdpa = next(r for r in data["rows"] if r["candidate"] == "sdpa")
    sdpa["device"] = {"p50": 0.3}  # three times ours, while its wall time is less
    assert cells("attention", data)[1] == "1.05x varlen_attn"
    sdpa["device"] = None  # then on the clock that both have
    assert cells("attention", data)[1] == "**0.950x** sdpa"


def cpu_run(ours, onnx, sdpa=None, **fields):
    rows = [row("bert_fast", ours), row("onnxruntime", onnx)]
    rows += [row("transformers sdpa", sdpa)] if sdpa else []
    return run({"cpu 1x128": rows, "cpu 16x128 33%": rows}, HOST, "fp32", **fields)


def test_cpu_rows_take_the_best_ratio():
    """Of two processors the slower one may have the better ratio."""
    quick, slow = cpu_run(40, 36, 80), cpu_run(80, 84, 176)
    assert cells("cpu 1x128", quick, slow) == (
        "80.0 ms",
        "ONNX Runtime: 1.05x onnxruntime, met<br>transformers SDPA: 2.20x transformers sdpa",
        "[x/1](x/1.json)",
    )
    assert cells("cpu 1x128", quick)[1].startswith(
        "ONNX Runtime: **0.900x** onnxruntime, **missed**"
    )
    assert "1.20x onnxruntime, met, stretch too" in cells("cpu 1x128", cpu_run(10, 12))[1]
    assert cells("cpu 1x128", cpu_run(10, 9), slow)[2] == "[x/1](x/1.json)"


def test_cpu_rows_with_padding_have_two_goals():
    """The weaker ratio decides, measured by its own goal."""
    one, both = cpu_run(10, 40, 50), cpu_run(10, 26, 61)
    for runs in ((one, both), (both, one)):
        assert cells("cpu 16x128 33%", *runs)[1] == (
            "ONNX Runtime: 2.60x onnxruntime, met<br>"
            "transformers SDPA: 6.10x transformers sdpa, met"
        )
    assert "5.00x transformers sdpa, **missed**" in cells("cpu 16x128 33%", one)[1]
    half = cpu_run(10, 90)  # a goal left open is no better than one missed
    assert cells("cpu 16x128 33%", half, one)[2] == "[x/1](x/1.json)"


def test_cases_that_the_rows_for_kernels_read():
    assert {*targets.kernel_cases()} == {*KERNEL_ROWS}
    assert len(targets.kernel_cases()) == len(KERNEL_ROWS)
