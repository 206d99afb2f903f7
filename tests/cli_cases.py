"""What tests of `bert-fast` share: a directory to work in, and how it is run."""

import subprocess
import sys

from corpus_cases import BOOK
from encoder_models import TEXTS, save_tiny

from bert_fast import cli


def work_in(directory, monkeypatch):
    """Make it the current directory, with a model, texts and a book; no launcher's variables."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    save_tiny(directory / "model")
    (directory / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    (directory / "reviews.csv").write_text('id,body\n1,"the whale, the sea"\n2,money\n')
    (directory / "book.txt").write_text(BOOK)
    monkeypatch.chdir(directory)
    return directory


def call(capfd, *arguments):
    """Run it in this process: (exit status, stdout, stderr)."""
    status = cli.main([str(a) for a in arguments])
    return status, *capfd.readouterr()


def process(*arguments, prefix=(sys.executable, "-m", "bert_fast"), **options):
    """Run it in another: the same."""
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    done = subprocess.run([*prefix, *map(str, arguments)], **options)
    return done.returncode, done.stdout, done.stderr
