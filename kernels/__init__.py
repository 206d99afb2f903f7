"""Triton kernels of bert_fast, imported as `bert_fast.kernels`.

Hugging Face's package on PyPI has the name of this folder. A Python with the repository root on its
`sys.path` finds this file for `import kernels`; under that name it looks for theirs on the rest of
the path and lets it take its place.
"""

# transformers asks an importable `kernels` for its version, and makes no use of one as old as this.
__version__ = "0"

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry) != root]
    spec = importlib.machinery.PathFinder.find_spec("kernels", elsewhere)
    if spec is not None and spec.loader is not None:
        theirs = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = theirs  # before it runs, for its own imports; import returns it
        spec.loader.exec_module(theirs)
