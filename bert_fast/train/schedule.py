"""The learning rate of every step."""

SCHEDULES = ("linear", "constant")


def learning_rate(
    step: int,
    *,
    steps: int,
    lr: float,
    warmup: int = 0,
    schedule: str = "linear",
    lr_end: float = 0.0,
) -> float:
    """Return the learning rate of a step: it rises linearly to lr, then falls linearly to lr_end.

    The first step has lr / warmup, step warmup - 1 has lr, the last has lr_end. This is
    transformers' `get_linear_schedule_with_warmup` one step ahead, whose first step changes
    nothing. Google's code lets the rate fall from step 0 on, behind the warm-up too, so that its
    highest is lr (1 - warmup / steps): 1 % less in the paper's runs.

    Args:
        step: counted from 0.
        steps: of the whole run.
        lr: the highest rate.
        warmup: steps until it is reached, fewer than `steps`.
        schedule: "linear", or "constant": it stays lr.
        lr_end: the rate of the last step, with "linear".

    Raises:
        ValueError: there is no such step or schedule, or no step after the warm-up.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step: want 0 to {steps - 1}, got {step}")
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup: want 0 to {steps - 1} steps, got {warmup}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: want one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    left = (steps - 1 - step) / (steps - warmup)
    return lr_end + (lr - lr_end) * left
