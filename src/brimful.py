"""In a checkout `brimful`, the name of the installed package, is `llm` beside this file. Never shipped."""

import sys
from typing import TYPE_CHECKING

from _alias import install  # not `src._alias`: only this folder need be on the path

if TYPE_CHECKING:
    from llm import *  # noqa: F403  what a type checker sees under this name

install()
if __name__ == "__main__":  # python -m brimful
    import runpy

    runpy.run_module("llm", run_name="__main__", alter_sys=True)
else:
    import llm

    sys.modules[__name__] = llm  # the import system hands out what stands here
