"""What verbs print, from what the package returns."""

import sys
from typing import Any


def note_summary(done: Any) -> None:
    """Say on the standard error what an encoding did."""
    said = [f"{done.rows:,} rows of {done.dimension} in {done.output}"]
    if done.rows > done.encoded:
        said.append(f"{done.rows - done.encoded:,} of them not encoded by this process now")
    counts = {"skipped": done.skipped, "changed": done.replaced, "cut": done.cut}
    said += [f"{count:,} {what}" for what, count in counts.items() if count]
    print(f"bert-fast: {', '.join(said)}", file=sys.stderr)


def note_tokenizer(tokens: int, target: Any) -> None:
    """Say on the standard error that a tokenizer is there."""
    print(f"bert-fast: a tokenizer of {tokens:,} tokens in {target}", file=sys.stderr)


def note_prepared(done: Any) -> None:
    """Say on the standard error what a preparation made."""
    said = []
    for split, documents in done.documents.items():
        name, tokens = split.replace("_", " "), done.tokens[split]
        said.append(f"{name} {documents:,} documents, {tokens:,} tokens")
    print(f"bert-fast: {done.path}: {'; '.join(said)}", file=sys.stderr)
    if done.problems:
        counts = ", ".join(f"{name} {said['count']:,}" for name, said in done.problems.items())
        print(f"bert-fast: problems: {counts}", file=sys.stderr)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print as JSON."""
    import json

    print(json.dumps(value, ensure_ascii=False, indent=indent))


def print_masks(found: list[Any]) -> None:
    """Print a table for each mask."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for i, entries in enumerate(found if isinstance(found[0], list) else [found], 1):
        table = Table(box=None, pad_edge=False, title_justify="left")
        if isinstance(found[0], list):
            table.title = f"mask {i}"
        for name, justify in (("score", "right"), ("token", "left"), ("text", "left")):
            table.add_column(name, justify=justify, overflow="fold")
        for entry in entries:
            row = f"{entry['score']:.4f}", entry["token_str"], entry["sequence"]
            table.add_row(*(str(cell).replace("[", r"\[") for cell in row))
        console.print(table)


def print_conversion(done: Any) -> None:
    """Print what a conversion read, wrote and left out."""
    print(f"{done.architecture}: {len(done.written)} tensors from {done.source} to {done.target}")
    print(f"  written  {', '.join(sorted(done.files))}")
    names: dict[str, list[str]] = {}
    for name, reason in done.ignored.items():
        names.setdefault(reason, []).append(name)
    for reason, ignored in names.items():
        print(f"  ignored  {_some(ignored)}: {reason}")
    if done.missing:
        print(f"  missing  {_some(done.missing)}: whoever loads it initialises them")


def print_corpus(found: dict[str, Any]) -> None:
    """Print what `inspect_corpus` found, and texts."""
    print(f"{found['path']}: {found['vocab_size']:,} tokens in the vocabulary, {found['digest']}")
    for split, said in found["splits"].items():
        counts = ", ".join(
            f"{said[kind]:,} {kind}" for kind in ("documents", "sentences", "tokens")
        )
        print(f"  {split:<9} {counts}, {said['bytes'] / 1e6:,.1f} MB")
        for kind in ("sentence", "document"):
            lengths = said[f"{kind}_tokens"].items()
            print(f"    tokens a {kind}: {', '.join(f'{name} {n:,}' for name, n in lengths)}")
    if "unigram_entropy" in found:
        print(f"  unigram entropy {found['unigram_entropy']:.4f} nats")
    if "unknown" in found:
        print(f"  unknown {found['unknown']:.3%} of the tokens")
    for source in found.get("sources", []):
        print(f"  from {source['name']}: {source['documents']:,} documents")
    for kind, said in found.get("problems", {}).items():
        print(f"  {kind} {said['count']:,}")
        for message in said["first"]:
            print(f"    {message}")
    for sentences in found.get("texts", []):
        print("\n" + "\n".join(sentences))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"
