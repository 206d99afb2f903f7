"""A fault to plant in a source file, and the tests that must see it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: says the fault.
        text: what stands in the file, once (in `within`, if that is given).
        replacement: what the fault puts in its place.
        chosen: pytest's -k, the cheapest tests of `tests` that see it.
        file: path in the checkout.
        tests: the test file.
        within: the function that `text` is in; "": the whole file.
    """

    name: str
    text: str
    replacement: str
    chosen: str
    file: str
    tests: str
    within: str = ""

    def apply(self, source: str) -> str:
        """Return the file's text with the fault in it.

        Raises:
            ValueError: `text` does not stand there exactly once.
        """
        first, last = 0, len(source)
        if self.within:
            head = f"def {self.within}("
            if source.count(head) != 1:
                got = source.count(head)
                raise ValueError(f"{self.file}: want {head!r} once, got it {got} times")
            first = source.index(head)
            end = source.find("\n\n\n", first)  # two empty lines part definitions
            last = len(source) if end < 0 else end
        count = source.count(self.text, first, last)
        if count != 1:
            where = f"{self.file} {self.within}".strip()
            raise ValueError(f"{where}: want {self.text!r} once, got it {count} times")
        part = source[first:last].replace(self.text, self.replacement)
        return source[:first] + part + source[last:]
