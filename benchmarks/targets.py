"""The rows of the ledger: twelve end to end, thirteen of kernels, five of CPUs.

The numbers are those of the project's table of targets; `tests/test_ledger.py` compares them with
it where it is at hand. A figure without a reader waits for the row that will measure it.
"""

from goals import (
    CPU,
    H200,
    LESS,
    OURS,
    Against,
    Part,
    Rows,
    Target,
    device_us,
    extra,
    memory_saved,
    rate,
    rate_over,
    wall_ms,
)


def is_varlen(name: str) -> bool:
    """Say whether that peer runs without padding on an attention of variable length."""
    return name.startswith(("varlen_attn", "flash varlen"))


def is_nested(name: str) -> bool:
    """Say whether that peer is PyTorch's encoder, which pads nothing in its layers."""
    return name == "nn.TransformerEncoder"


def is_sorted(name: str) -> bool:
    """Say whether that peer pads, after sorting the texts by length."""
    return not is_varlen(name) and name.endswith(" sorted")


def is_padded(name: str) -> bool:
    """Say whether that peer pads what it is given."""
    return not (is_varlen(name) or is_sorted(name) or is_nested(name))


def is_compiled(name: str) -> bool:
    """Say whether that peer is padded and under torch.compile."""
    return is_padded(name) and " compile" in name


def is_graphed(name: str) -> bool:
    """Say whether that peer is padded and compiled for CUDA graphs."""
    return is_compiled(name) and "reduce-overhead" in name


def is_eager(name: str) -> bool:
    """Say whether that peer is transformers in eager mode, whichever attention it calls."""
    return is_padded(name) and name.startswith("transformers") and not is_compiled(name)


def is_any(name: str) -> bool:
    """Take every peer."""
    return True


CLASSES = {
    "best peer": is_any,
    "padded": is_padded,
    "length-sorted": is_sorted,
    "varlen": is_varlen,
    "compiled": is_compiled,
    "compile reduce-overhead": is_graphed,
    "eager": is_eager,
    "eager PyTorch": lambda name: name == "torch",
    "ONNX Runtime": lambda name: name.startswith("onnxruntime"),
    "transformers SDPA": lambda name: name == "transformers sdpa",
    "nn.TransformerEncoder": is_nested,
}


def _against(case: str, label: str, goal: float | None, stretch: float | None = None) -> Against:
    return Against(label, case, CLASSES[label], goal, stretch)


def _case(key: str, title: str, parts: tuple[Part, ...], classes: dict[str, float]) -> Target:
    against = tuple(_against(key, label, goal) for label, goal in classes.items())
    return Target(key, title, H200, parts, against, (key,))


def _latency(key: str, goal: float, stretch: float | None = None) -> tuple[Part, ...]:
    return (Part(wall_ms(key), "ms", goal, stretch, LESS),)


def _sequences(key: str, goal: float, stretch: float | None = None) -> Part:
    return Part(rate(key, "sequences_per_s"), "seq/s", goal, stretch)


END_TO_END = (
    _case(
        "case 1",
        "base, one sequence of 128",
        _latency("case 1", 0.32, 0.25),
        {"compile reduce-overhead": 1.5, "eager": 8},
    ),
    _case(
        "case 2 s128",
        "large, one sequence of 128",
        _latency("case 2 s128", 0.65),
        {"best peer": 1.4},
    ),
    _case(
        "case 2 s384",
        "large, one sequence of 384",
        _latency("case 2 s384", 0.95),
        {"best peer": 1.4},
    ),
    _case("case 3", "base, 128 x 128, full", _latency("case 3", 5.6, 5.0), {"best peer": 1.25}),
    _case("case 4", "large, 128 x 384, full", _latency("case 4", 59, 54), {"best peer": 1.15}),
    _case(
        "case 5",
        "base, 8,192 texts of 16 to 512, real tokens",
        (Part(rate("case 5", "tokens_per_s", 1e-6), "M tok/s", 2.75, 3.0),),
        {"padded": 2.2, "length-sorted": 1.25, "varlen": 1.15},
    ),
    _case(
        "case 6",
        "large, lengths as in SQuAD",
        (_sequences("case 6", 4700, 5200), Part(None, "seq/s", None, 8000, label="FP8")),
        {"padded": 1.8, "varlen": 1.15},
    ),
    _case(
        "case 7",
        "base, 16 sequences of at most 512, 60 % filled",
        _latency("case 7", 2.0),
        {"padded": 2.0, "varlen": 1.2},
    ),
    _case(
        "case 8",
        "pre-training, large, full at 128, AdamW",
        (
            _sequences("case 8", 1650, 1970),
            Part(rate("case 8", "of_matmul", 100), "%", 50, 60, label="MFU of the ceiling"),
            Part(rate("case 8", "of_989", 100), "%", label="MFU of 989 TFLOP/s"),
        ),
        {"compiled": 1.5, "eager": 2.2},
    ),
    _case(
        "case 9",
        "pre-training, large, lengths up to 512, LAMB",
        (_sequences("case 9", 800, 1000),),
        {"compiled": 2.5, "varlen": 1.3},
    ),
    _case(
        "case 10 s128",
        "pre-training, base, 128",
        (_sequences("case 10 s128", 6200),),
        {"best peer": 1.8},
    ),
    _case(
        "case 10 s512",
        "pre-training, base, 512",
        (_sequences("case 10 s512", 1450),),
        {"best peer": 1.5},
    ),
)


def _kernel(
    key: str,
    title: str,
    *parts: Part,
    cases: tuple[str, ...] = (),
    against: tuple[Against, ...] | None = None,
    words: str = "",
) -> Target:
    if against is None:
        against = tuple(_against(case, "best peer", None) for case in cases)
    return Target(key, title, H200, parts, against, cases, words, kernel=True)


def _copy_share(case: str, goal: float) -> Part:
    return Part(rate(case, "of_copy", 100), "% of copy", goal)


KERNELS = (
    _kernel(
        "attention",
        "attention forward, s 512",
        Part(rate("attention s512, large", "tflop_per_s"), "TFLOP/s", 360),
        cases=("attention s512, large",),
    ),
    _kernel(
        "attention_bwd",
        "attention backward, s 512, counted as 10 len^2 K H",
        Part(rate("attention_bwd s512, large", "tflop_per_s"), "TFLOP/s", 220, 285),
        cases=("attention_bwd s512, large",),
    ),
    _kernel(
        "attention short",
        "attention forward, s 128",
        _copy_share("attention s128, large", 70),
        cases=("attention s128, large",),
    ),
    _kernel(
        "attention mixed",
        "attention on mixed lengths, against equal ones of 256",
        Part(rate_over("attention mixed, large", "attention s256, large", "tflop_per_s"), "%", 95),
        cases=("attention mixed, large",),
    ),
    _kernel(
        "attention dropout",
        "dropout inside attention, extra time",
        Part(
            extra("attention s128 dropout, large", "attention s128, large"),
            "%",
            25,
            None,
            LESS,
            "s 128",
        ),
        Part(
            extra("attention s512 dropout, large", "attention s512, large"),
            "%",
            60,
            30,
            LESS,
            "s 512",
        ),
        cases=("attention s128 dropout, large", "attention s512 dropout, large"),
        against=(
            Against("s 128", "attention s128 dropout, large", is_any),
            Against("s 512", "attention s512 dropout, large", is_any),
        ),
    ),
    _kernel(
        "add_layer_norm",
        "dropout + residual + LayerNorm forward",
        _copy_share("add_layer_norm dropout, large", 85),
        cases=("add_layer_norm dropout, large",),
    ),
    _kernel(
        "add_layer_norm_bwd",
        "LayerNorm backward",
        _copy_share("add_layer_norm_bwd, large", 70),
        Part(
            device_us("layer_norm, large", "add_layer_norm_bwd, large"),
            "us",
            110,
            None,
            LESS,
            "32768 x 1024 forward + backward",
        ),
        cases=("add_layer_norm_bwd, large",),
    ),
    _kernel(
        "linear_gelu",
        "bias + GELU after a product, extra time",
        Part(extra("linear_gelu, base", "linear, base"), "%", 10, 5, LESS, "inference"),
        Part(None, "%", 25, None, LESS, "training"),
        cases=("linear_gelu, base",),
    ),
    _kernel(
        "bias_gelu",
        "bias + GELU by itself",
        _copy_share("bias_gelu, base", 85),
        cases=("bias_gelu, base",),
    ),
    _kernel(
        "linear_cross_entropy",
        "masked-LM head and loss",
        Part(
            memory_saved("linear_cross_entropy, base", "torch"),
            "x less than eager PyTorch",
            3,
            label="memory",
        ),
        cases=("linear_cross_entropy, base",),
        against=(_against("linear_cross_entropy, base", "eager PyTorch", 1.5),),
    ),
    _kernel(
        "optimizer",
        "AdamW and LAMB step",
        Part(rate("adamw_, large", "of_copy", 100), "% of copy", 80, label="AdamW"),
        Part(rate("lamb_, large", "of_copy", 100), "% of copy", 80, label="LAMB"),
        cases=("adamw_, large", "lamb_, large"),
        against=(
            Against("AdamW", "adamw_, large", is_any),
            Against("LAMB", "lamb_, large", is_any),
        ),
    ),
    _kernel("determinism", "same input, same bits", Part(None, ""), words="always"),
    _kernel(
        "training memory",
        "peak of training, large, s 512, batch 64",
        Part(None, "x transformers SDPA", 0.5, None, LESS),
    ),
)


class _Asked(Rows):
    """Rows of no run, which note the cases they are asked for."""

    def __init__(self):
        self.cases: list[str] = []

    def measured(self, case: str, candidate: str = OURS) -> None:
        """Note the case."""
        self.cases.append(case)


def kernel_cases() -> list[str]:
    """Return the names of the cases that the rows for kernels read, each once."""
    asked = _Asked()
    for target in KERNELS:
        asked.cases += target.cases
        for part in target.parts:
            if part.read:
                part.read(asked)
    return [*dict.fromkeys(asked.cases)]


def _cpu(
    batch: str, title: str, runtime: tuple[float, float | None], transformers: float | None = None
) -> Target:
    key = f"cpu {batch}"
    against = (
        _against(key, "ONNX Runtime", *runtime),
        _against(key, "transformers SDPA", transformers),
    )
    return Target(key, title, CPU, (Part(wall_ms(key), "ms", sense=LESS),), against, (key,))


NO_SLOWER = (1.0, 1 / 0.9)  # stretch: 0.9 of its time

CPU_ROWS = (
    _cpu("1x128", "base, fp32, 1 x 128", NO_SLOWER),
    _cpu("8x128", "base, fp32, 8 x 128", NO_SLOWER),
    _cpu("2x512", "base, fp32, 2 x 512", NO_SLOWER),
    _cpu("16x128 33%", "base, fp32, 16 x 128, 33 % filled", (2.5, None), 6),
    _cpu("8x512 46%", "base, fp32, 8 x 512, 46 % filled", (2.3, None), 5),
)

SECTIONS = (
    ("End to end, one H200", END_TO_END),
    ("Kernels, one H200", KERNELS),
    ("CPU", CPU_ROWS),
)
