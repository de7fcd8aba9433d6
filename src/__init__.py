"""The root of a checkout is on the path: `src.llm` and `brimful` name the package `llm` in this folder. Never shipped."""

from ._alias import install

install()
