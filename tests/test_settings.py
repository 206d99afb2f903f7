"""Settings of a run: every problem is named at once, every shipped file is right."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bert_fast.train.config_file import MAX_BYTES, SHIPPED, dump_yaml, override, parse_yaml
from bert_fast.train.settings import MATHEMATICS, PretrainSettings, load

ROOT = Path(__file__).resolve().parents[1]
LEAST = {
    "data": {"corpus": "corpus"},
    "model": {"size": "mini"},
    "phases": [{"steps": 10, "max_length": 128, "sequences": 4}],
    "output": "run",
}


def settings(*assignments):
    values = copy.deepcopy(LEAST)
    for assignment in assignments:
        override(values, assignment)
    return PretrainSettings.from_dict(values)


def write(directory, text):
    path = directory / "run.yaml"
    path.write_text(text, "utf-8")
    return path


# --- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped(name):
    """Each loads, says all in its own file, and survives being written down."""
    loaded = load(name)
    assert PretrainSettings.from_dict(parse_yaml(loaded.to_yaml(), name)) == loaded
    file = ROOT / "bert_fast" / "train" / "configs" / f"{name}.yaml"
    assert max(map(len, file.read_text("utf-8").splitlines())) <= 100
    assert yaml.safe_load(file.read_text("utf-8")).keys() >= {"data", "model", "phases", "output"}


def test_every_shipped_file_has_a_name():
    files = (ROOT / "bert_fast" / "train" / "configs").iterdir()
    assert {file.stem for file in files} == {*SHIPPED}


@pytest.mark.parametrize("name", ["base", "large"])
def test_the_papers_run(name):
    loaded = load(name)
    per_step = {
        phase.max_length: (phase.steps, phase.sequences * loaded.micro_batches)
        for phase in loaded.phases
    }
    assert per_step == {128: (900_000, 256), 512: (100_000, 256)}
    optimizer = loaded.optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay) == (1e-4, (0.9, 0.999), 0.01)
    assert loaded.warmup_steps == 10_000 and loaded.learning_rate(9_999) == 1e-4
    assert loaded.learning_rate(999_999) == 0
    config = loaded.model.bert_config(30522)
    assert config.hidden_dropout_prob == config.attention_probs_dropout_prob == 0.1
    assert config.num_hidden_layers == {"base": 12, "large": 24}[name]


def test_defaults_are_the_papers():
    given, base = settings(), load("base")
    data = "short_seq_prob mlm_probability mask_replace_prob random_replace_prob".split()
    for name in data:
        assert getattr(given.data, name) == getattr(base.data, name)
    for name in "name lr betas eps weight_decay max_grad_norm schedule lr_end".split():
        assert getattr(given.optimizer, name) == getattr(base.optimizer, name)


def test_values_get_their_types(tmp_path):
    path = write(tmp_path, dump_yaml(LEAST))
    text = "optimizer.lr=1e-3 optimizer.betas=[0,.5] save.resume=no phases.0.steps=010 threads=~"
    got = load(path, [*text.split(), "model.config.hidden_dropout_prob=0", "output=1:30"])
    assert got.optimizer.lr == 1e-3 and got.optimizer.betas == (0.0, 0.5)
    assert got.save.resume == "no" and got.steps == 10 and got.threads is None
    assert got.model.bert_config(99).hidden_dropout_prob == 0 and got.output == "1:30"
    assert isinstance(settings("optimizer.weight_decay=0").optimizer.weight_decay, float)


def test_a_later_assignment_wins():
    assert settings("seed=1", "seed=2").seed == 2


def test_empty_sections_are_defaults(tmp_path):
    text = dump_yaml(LEAST) + "log:\noptimizer: {}\n"
    assert load(write(tmp_path, text)) == settings()


@pytest.mark.parametrize("text", ["no", "1e5", "1e-3", "null", "true", "a: b", "", "\u00e9", ".5"])
def test_texts_survive_being_written_down(text):
    assert parse_yaml(dump_yaml({"output": text}), "x") == {"output": text}


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimizer.lr=fast", "optimizer.lr: want a number above 0, got 'fast'"),
        ("optimizer.lr=.inf", "optimizer.lr: want a number above 0, got inf"),
        ("optimizer.lr=.nan", "optimizer.lr: want a number above 0, got nan"),
        ("optimizer.lr=true", "optimizer.lr: want a number above 0, got True"),
        (f"optimizer.lr=1{'0' * 400}", "optimizer.lr: want a number above 0, got 1000"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas: want two numbers from 0 to below 1"),
        ("optimizer.warmup=10", "optimizer.warmup: want fewer than all 10 steps, got 10"),
        ("optimizer.warmup=1.5", "optimizer.warmup: want a number of steps, or a share"),
        ("optimizer.lr_end=1", "optimizer.lr_end: want at most lr 0.0001, got 1.0"),
        ("optimizer.wamrup=3", "optimizer.wamrup: want the name of a setting (did you mean warmup"),
        ("optimizr={}", "optimizr: want the name of a setting (did you mean optimizer?)"),
        ("seed=1.5", "seed: want an int in 0 .. 9223372036854775807, got 1.5"),
        ("precision=fp8", "precision: want one of fp32, bf16, fp16, got 'fp8'"),
        ("device=tpu", "device: want null or cpu, cuda or cuda:N, got 'tpu'"),
        ("compile=yes", "compile: want true or false, got 'yes'"),
        ("output=", "output: want a path, got None"),
        ("log=5", "log: want settings by name, got 5"),
        ("phases=[]", "phases: want a list of at least one, got []"),
        ("phases.0.tokens=4096", "phases.0.sequences, tokens: want one of them, got both"),
        ("phases.0.sequences=", "phases.0.sequences, tokens: want one of them, got neither"),
        ("phases.0={steps: 1, max_length: 128, tokens: 99}", "phases.0.tokens: want 128 or more"),
        ("phases.0.max_length=513", "phases.0.max_length: want at most 512, as the model"),
        ("phases.0.max_length=4", "phases.0.max_length: want an int in 5 .. 65536, got 4"),
        ("model={}", "model.size, init: want one of them, got neither"),
        ("model.init=x", "model.size, init: want one of them, got both"),
        ("model={init: x, output_bias: unigram}", "model.output_bias: want zeros with init"),
        ("model={init: x, positions: sinusoidal}", "model.positions: want random with init"),
        ("model.config.pad_token_id=3", "model.config.pad_token_id: want it left out"),
        ("optimizer.eps=0", "optimizer.eps: want a number above 0, got 0"),
        ("model.positions=sin", "model.positions: want one of random, sinusoidal, got"),
        ("model={init: x, config: {hidden_size: 8}}", "model.config.hidden_size: want hidden_drop"),
        ("model.size=huge", "model.size: want null or one of tiny, mini, small"),
        ("model.config.hidden_size=3", "model.config.num_attention_heads: want a divisor"),
        ("model.config.hidden_dropout_prob=2", "model.config.hidden_dropout_prob: want a number"),
        ("model.config.hiden_size=8", "model.config.hiden_size: want the name of a setting (did"),
        ("model.config.vocab_size=8", "model.config.vocab_size: want it left out"),
        ("model.config.is_decoder=true", "model.config.is_decoder: want False, got True"),
        ("data={}", "data.corpus: want a path, got nothing"),
        ("data.mlm_probability=15", "data.mlm_probability: want a number in 0 .. 1, got 15"),
        ("data.random_replace_prob=.3", "data.random_replace_prob: want at most 1 with mask_repl"),
        ("data.vocab_size=1000", "data.vocab_size: want null with a corpus that is not synthetic"),
        ("data={corpus: synthetic, lengths: [4]}", "data.lengths: want null or a list of ints, 5"),
        ("save.resume=false", "save.resume: want a path, got False"),
    ],
)
def test_refused(assignment, message):
    with pytest.raises(ValueError) as caught:
        settings(assignment)
    assert str(caught.value).startswith(f"settings: {message}"), caught.value
    assert "; " not in str(caught.value)


def test_all_problems_at_once():
    wrong = ["seed=x", "phases.0.steps=0", "optimizer.eps=-1", "log.evry=3", "data.workers=1.5"]
    with pytest.raises(ValueError) as caught:
        settings(*wrong)
    for assignment in wrong:
        assert f"{assignment.partition('=')[0]}: want " in str(caught.value)
    assert str(caught.value).count("; ") == len(wrong) - 1


def test_all_wrong_assignments_at_once():
    wrong = ["optimizer.lr", "=3", "phases.1.steps=3", "phases.x=3", "output.x=3", "seed=[", "a.=1"]
    with pytest.raises(ValueError) as caught:
        load("tiny", wrong)
    assert str(caught.value).count("; ") == len(wrong) - 1
    assert "phases.1.steps: want a number below 1 behind phases, got '1'" in str(caught.value)
    assert "output.x: want output to have parts, got 'runs/tiny'" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", ":2: want YAML, got the key 'seed' twice"),
        ("a: &a {}\nb: *a\n", ":2: want YAML, got an alias"),
        ("data: [", ":1: want YAML, got "),
        ("- 1\n", ": want settings by name, got [1]"),
        ("seed: !!python/object/apply:os.system [ls]", ":1: want YAML, got could not determine"),
        ("a: " + "[" * 5000, ": want YAML, got "),
        (f"seed: {'9' * 5000}", ": want YAML, got Exceeds the limit"),
        ("#" * (MAX_BYTES + 1), f": want at most {MAX_BYTES} bytes of YAML"),
        ("? [a]\n: 1\n", ":1: want YAML, got found unhashable key"),
    ],
    ids=lambda text: text[:20],
)
def test_bad_files(text, message, tmp_path):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}{message}") and len(str(caught.value)) < 1000


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"basee: want a file, or one of .*mean base\?"):
        load("basee")
    with pytest.raises(FileNotFoundError, match="got something else"):
        load(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"output: \xff")
    with pytest.raises(ValueError, match="want UTF-8"):
        load(tmp_path / "x.yaml")


# --- what they say -------------------------------------------------------------------------------


def test_phases_of_steps():
    two = "phases=[{steps: 3, max_length: 8, tokens: 8}, {steps: 2, max_length: 9, tokens: 9}]"
    given = settings(two)
    assert given.steps == 5
    assert [given.place_of(step) for step in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert [given.phase_at(step).max_length for step in range(5)] == [8, 8, 8, 9, 9]
    for step in (-1, 5):
        with pytest.raises(ValueError, match=f"step: want 0 to 4, got {step}"):
            given.phase_at(step)


def test_warmup_is_steps_or_a_share():
    assert settings("optimizer.warmup=3").warmup_steps == 3
    assert settings("optimizer.warmup=0.25", "phases.0.steps=1000").warmup_steps == 250
    assert settings("optimizer.warmup=0").learning_rate(0) == pytest.approx(0.9e-4)


def leaves(section, prefix=""):
    for entry in dataclasses.fields(section):
        value = getattr(section, entry.name)
        if dataclasses.is_dataclass(value) and prefix + entry.name not in MATHEMATICS:
            yield from leaves(value, f"{prefix}{entry.name}.")
        else:
            yield prefix + entry.name


EXECUTION = (  # each with another value
    *("data.corpus=other", "data.workers=0", "save.every=7", "save.keep=9", "save.on_error=warn"),
    *("save.resume=no", "evaluate.every=7", "evaluate.batches=7", "evaluate.also=other"),
    *(
        "log.every=7",
        "log.tensorboard=true",
        "log.plot=false",
        "output=other",
        "device=cpu",
        "threads=3",
    ),
    *("compile=true", "activation_checkpointing=true", "fsdp=true"),
)


def test_every_setting_is_mathematics_or_execution():
    """A new one must say which."""
    of_execution = {assignment.partition("=")[0] for assignment in EXECUTION}
    assert not of_execution & {*MATHEMATICS}
    assert {*leaves(settings())} == of_execution | {*MATHEMATICS}


@pytest.mark.parametrize("assignment", EXECUTION)
def test_execution_leaves_the_fingerprint(assignment):
    assert settings(assignment) != settings()
    assert settings(assignment).fingerprint() == settings().fingerprint()


@pytest.mark.parametrize(
    "assignment",
    [
        *("data.short_seq_prob=0", "data.mlm_probability=.2", "data.mask_replace_prob=.7"),
        *("data.random_replace_prob=0", "data.whole_word_mask=true", "data.max_predictions=9"),
        *("model.size=tiny", "model.config.hidden_dropout_prob=0", "phases.0.steps=11"),
        *("model.output_bias=unigram", "model.positions=sinusoidal"),
        *("micro_batches=2", "optimizer.lr=1e-3", "optimizer.betas=[0,0]", "precision=bf16"),
        *("seed=1", "optimizer.name=lamb", "optimizer.schedule=constant"),
    ],
)
def test_mathematics_changes_the_fingerprint(assignment):
    assert settings(assignment).fingerprint() != settings().fingerprint()


def test_the_fingerprint_is_of_the_corpus_too():
    prints = {settings().fingerprint(corpus) for corpus in ("", "a", "b")}
    assert len(prints) == 3 and all(len(found) == 64 for found in prints)


def test_the_mathematics_can_be_told():
    found = settings("seed=5").mathematics()
    assert found["seed"] == 5 and json.loads(json.dumps(found)) == found


def test_sizes_fit_the_corpus(tmp_path):
    assert settings().model.bert_config(1234).vocab_size == 1234
    settings().model.bert_config(100).save_pretrained(tmp_path)
    given = settings(f"model={{init: '{tmp_path}', config: {{hidden_dropout_prob: 0}}}}")
    config = given.model.bert_config(100)
    assert config.num_hidden_layers == 4 and config.hidden_dropout_prob == 0
    with pytest.raises(ValueError, match=r"model.init: .* want a vocabulary of 99 tokens, as the"):
        given.model.bert_config(99)


def test_starts_without_torch():
    """As bare modules: what the packages around them import is not theirs to decide."""
    code = (
        "import sys, types\n"
        "for name in ('bert_fast', 'bert_fast.train'):\n"
        "    package = types.ModuleType(name); sys.modules[name] = package\n"
        f"    package.__path__ = [{str(ROOT)!r} + '/' + name.replace('.', '/')]\n"
        "import bert_fast.train.settings\n"
        "assert not {'torch', 'numpy'} & {*sys.modules}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
