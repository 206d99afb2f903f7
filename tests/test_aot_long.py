"""Every variant for every GPU, by the pinned Triton and the oldest supported; Triton's cache."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import aot_runs
import pytest

pytestmark = pytest.mark.long
ARCHS = aot_runs.ARCHS


@pytest.fixture(scope="module", params=[aot_runs.PINNED, aot_runs.OLDEST])
def every(request, tmp_path_factory):
    """(Version of Triton, what was recorded, a row for each compiled variant)."""
    try:
        aot_runs.install(request.param)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"pip cannot get triton {request.param}: {error.stderr.splitlines()[-1]}")
    folder = tmp_path_factory.mktemp("aot")
    return request.param, *aot_runs.record_and_compile(folder, "every", ARCHS, request.param)


def test_every_variant_of_every_gpu(every):
    """All compile, and fit; BERT-base and -large spill nothing on sm_90; no more than the table."""
    version, recorded, rows = every
    assert {row["arch"] for row in rows} == set(ARCHS)
    problems = recorded["failed"] + aot_runs.unfit(rows) + aot_runs.spills(rows)
    if version == aot_runs.PINNED:
        table = json.loads(aot_runs.TABLE.read_text("utf-8"))
        problems += aot_runs.worse_than_table(rows, table)
    assert not problems, "\n".join(problems)


# --- Triton's cache ------------------------------------------------------------------------------

COMPILE = """
import json, sys
import aot_compile
variant = json.load(open(sys.argv[1]))
compiled = aot_compile.triton.compile(*aot_compile.load(variant))
print(compiled.metadata.name, len(compiled.asm["cubin"]), sorted(compiled.asm))
"""
# Forked after the imports, and let go at once, so that they meet.
RACE = """
import json, os, sys
import aot_compile
variant, processes, rounds = json.load(open(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
for i in range(rounds):
    os.environ["TRITON_CACHE_DIR"] = f"{sys.argv[4]}/{i}"
    gate, go = os.pipe()
    children = []
    for _ in range(processes):
        children.append(os.fork())
        if not children[-1]:
            os.close(go)
            os.read(gate, 1)
            compiled = aot_compile.triton.compile(*aot_compile.load(variant))
            parts = compiled.metadata.name, len(compiled.asm["cubin"]), sorted(compiled.asm)
            os.write(1, f"{parts}\\n".encode())
            os._exit(0)
    os.close(go)
    os.close(gate)
    failed = [child for child in children if os.waitpid(child, 0)[1]]
    assert not failed, f"round {i}: {len(failed)} processes failed"
"""
PROCESSES, ROUNDS = 8, 50


def start(variant: Path, cache: Path) -> subprocess.Popen:
    env = aot_runs.environment() | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", COMPILE, str(variant)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **pipes)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def variant(tmp_path_factory) -> Path:
    """A variant of a kernel that is quickly compiled."""
    folder = tmp_path_factory.mktemp("variant")
    args = "--calls", "controls", "--archs", 90
    recorded = aot_runs.run("aot_record.py", *args, out=folder / "controls.json")
    path = folder / "good.json"
    path.write_text(json.dumps(recorded["variants"][0]), "utf-8")
    return path


def test_processes_that_compile_at_once_do_not_disturb_each_other(variant, tmp_path):
    """As ranks do on a cold cache: 400 compilations, all the same."""
    args = map(str, (variant, PROCESSES, ROUNDS, tmp_path))
    ran = subprocess.run(
        [sys.executable, "-c", RACE, *args],
        env=aot_runs.environment(), capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    lines = ran.stdout.splitlines()
    assert len(lines) == PROCESSES * ROUNDS and len(set(lines)) == 1


def test_a_cut_cache_file_heals_or_is_loud(variant, tmp_path):
    """Triton's own behaviour, held so that a change of it shows.

    A cut list of files is made anew; a cut description raises, until the cache is removed. Cut code
    is handed out as it is: the driver refuses it, which needs a GPU to see.
    """
    cache = tmp_path / "cache"
    assert finish(start(variant, cache))[0] == 0
    files = sorted(path.relative_to(cache) for path in cache.rglob("*") if path.is_file())
    assert len(files) >= 6
    behaviour = {}
    for file in files:
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(cache, copy)
        for group in copy.rglob("__grp__*"):  # it names the files in full
            group.write_text(group.read_text("utf-8").replace(str(cache), str(copy)), "utf-8")
        size = (copy / file).stat().st_size
        os.truncate(copy / file, size // 2)
        code, _, err = finish(start(variant, copy))
        healed = (copy / file).stat().st_size == size
        part = "list" if file.name.startswith("__grp__") else file.suffix[1:]
        behaviour[part] = "healed" if healed else "raised" if code else "handed out"
        assert not code or "JSONDecodeError" in err, err
    assert behaviour.pop("list") == "healed"
    assert behaviour.pop("json") == "raised"
    assert set(behaviour.values()) <= {"handed out", "healed"}
