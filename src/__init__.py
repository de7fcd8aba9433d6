"""With the root of a checkout on the path, `src.llm` and `brimful` name `llm` in this folder. Never shipped."""

from ._alias import install

install()
