"""The model that comes with the package: its directory, as `from_pretrained` takes one."""

from pathlib import Path

# 4 layers x 256, uncased English, texts of up to 128 tokens; README.md in it is its card.
ENGLISH_MINI = Path(__file__).with_name("english_mini")
