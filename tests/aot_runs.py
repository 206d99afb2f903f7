"""Run `aot_record` and `aot_compile` in processes of their own, and read what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BUILD = ROOT / "build" / "aot"
TABLE = TESTS / "aot_table.json"
PINNED = "3.7.1"  # constraints.txt says the same
OLDEST = "3.6.0"  # what the GPU machines have
ARCHS = 80, 86, 89, 90, 100, 120
JOBS = os.cpu_count() or 1


def environment(version: str | None = None) -> dict[str, str]:
    """Without the interpreter; Triton as it is installed, or of that version, made on demand."""
    path = [str(TESTS), str(ROOT / "benchmarks")]
    if version is not None:
        path.insert(0, str(install(version)))
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env["PYTHONPATH"] = os.pathsep.join(path)
    env["TRITON_CACHE_DIR"] = str(BUILD / f"cache-{version or 'installed'}")
    return env | {"OMP_NUM_THREADS": "1"}


def install(version: str) -> Path:
    """Where that Triton lies, alone.

    Raises:
        subprocess.CalledProcessError: pip cannot get it.
    """
    folder = BUILD / f"triton-{version}"
    if not (folder / f"triton-{version}.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        pip += ["--target", str(folder), "--no-deps", f"triton=={version}"]
        subprocess.run(pip, check=True, capture_output=True, text=True, timeout=600)
    return folder


def run(script: str, *args: Any, out: Path, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Return what the script wrote.

    Raises:
        RuntimeError: it failed; with what it printed last.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, TESTS / script, *args, "--out", out]
    done = subprocess.run(
        list(map(str, command)), env=env or environment(), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{script}: {(done.stdout + done.stderr)[-3000:]}")
    return json.loads(out.read_text())


def record_and_compile(
    folder: Path, calls: str, archs: tuple[int, ...], version: str | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return (what was recorded, a row for each variant that was compiled)."""
    env = environment(version)
    variants = folder / f"variants-{calls}.json"
    names = ",".join(map(str, archs))
    recorded = run("aot_record.py", "--calls", calls, "--archs", names, out=variants, env=env)
    args = "--variants", variants, "--jobs", JOBS
    compiled = run("aot_compile.py", *args, out=folder / f"rows-{calls}.json", env=env)
    assert version in (None, compiled["triton"])
    return recorded, compiled["rows"]


# --- what is asked of the rows -------------------------------------------------------------------


def name_of(row: dict[str, Any]) -> str:
    kernel = row["kernel"].rpartition(".")[2].replace(":", ".")
    return f"sm_{row['arch']} {kernel}: {row['text']} (by {row['call']})"


def unfit(rows: list[dict[str, Any]]) -> list[str]:
    """The variants that could not be launched, or break a rule, and why."""
    return [f"{name_of(row)}: {why}" for row in rows for why in row["wrong"]]


def spilled(row: dict[str, Any]) -> int:
    """Bytes of local memory for a thread."""
    return row.get("stack", 0) + row.get("local", 0)


def must_not_spill(row: dict[str, Any]) -> bool:
    """BERT-base and -large in 16 bits on sm_90, from aligned tensors."""
    call = f"{row['call']} "
    if row["arch"] != 90 or "float32" in call or "unaligned" in call or "mixed" in call:
        return False
    sizes = "K=64", "D=768", "D=1024", "D=3072", "D=4096", "F=3072", "F=4096"
    return any(f" {size} " in call for size in sizes)


def spills(rows: list[dict[str, Any]]) -> list[str]:
    """The variants that must keep everything in registers and do not."""
    found = [row for row in rows if must_not_spill(row) and spilled(row)]
    return [f"{name_of(row)}: {spilled(row)} bytes" for row in found]


# --- the table in the repository -----------------------------------------------------------------


def key_of(row: dict[str, Any]) -> str:
    return f"{row['kernel'].rpartition('.')[2].replace(':', '.')}: {row['text']}"


def table_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of default variants; spilled bytes of others."""
    default: dict[str, dict[str, list[int]]] = {}
    others: dict[str, dict[str, int]] = {}
    for row in sorted(rows, key=lambda row: (key_of(row), row["arch"])):
        if "error" in row:
            continue
        arch = str(row["arch"])
        if row["default"]:
            numbers = [row["registers"], spilled(row), row["shared"]]
            default.setdefault(key_of(row), {})[arch] = numbers
        elif spilled(row):
            others.setdefault(key_of(row), {})[arch] = spilled(row)
    return {"triton": PINNED, "default": default, "spilled": others}


def write_table(rows: list[dict[str, Any]], path: Path = TABLE) -> None:
    """A variant on each line."""
    table = table_of(rows)

    def lines(part: dict[str, Any]) -> str:
        return ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in part.items())

    parts = [f' "{name}": {{\n{lines(table[name])}\n }}' for name in ("default", "spilled")]
    path.write_text(f'{{\n "triton": "{PINNED}",\n' + ",\n".join(parts) + "\n}\n", "utf-8")


def worse_than_table(rows: list[dict[str, Any]], table: dict[str, Any]) -> list[str]:
    """What needs more registers (over 5 %), spills or shared memory than is written down."""
    found = []
    for row in rows:
        if "error" in row:
            continue
        key, arch = key_of(row), str(row["arch"])
        if not row["default"]:
            recorded = table["spilled"].get(key, {}).get(arch, 0)
            if spilled(row) > recorded:
                found.append(
                    f"{name_of(row)}: spills {spilled(row)} bytes, in the table {recorded}"
                )
            continue
        numbers = table["default"].get(key, {}).get(arch)
        if numbers is None:
            found.append(f"{name_of(row)}: not in the table")
            continue
        registers, spill, shared = numbers
        if row["registers"] > 1.05 * registers:
            found.append(f"{name_of(row)}: {row['registers']} registers, in the table {registers}")
        if spilled(row) > spill:
            found.append(f"{name_of(row)}: spills {spilled(row)} bytes, in the table {spill}")
        if row["shared"] > shared:
            found.append(f"{name_of(row)}: {row['shared']} bytes shared, in the table {shared}")
    return found


def main() -> None:
    """Write the table: every variant for every GPU, compiled by the pinned Triton."""
    recorded, rows = record_and_compile(BUILD / "table", "every", ARCHS, PINNED)
    write_table(rows)
    problems = recorded["failed"] + unfit(rows) + spills(rows)
    print("\n".join([f"{len(rows)} variants compiled, in {TABLE}", *problems]))
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
