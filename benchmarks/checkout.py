"""Importing this makes `bert_fast` mean this checkout, installed or not, its kernels included."""

import sys

from record import ROOT

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import bert_fast

if str(ROOT) not in bert_fast.__path__:
    bert_fast.__path__.append(str(ROOT))  # where `kernels` lies; seen before what is installed
