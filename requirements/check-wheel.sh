#!/bin/sh
# Build the wheel by way of the source distribution, install it in a clean environment outside the checkout, look into it,
# and run the demo with it. `make check-wheel` calls this from the root of the checkout, with PYTHON set.
set -eu

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
root=$(pwd)

# From the source distribution, so that what is published can be built from what is published.
"$PYTHON" -m build --no-isolation --outdir "$outside/dist" . >"$outside/build.log" 2>&1 || { cat "$outside/build.log"; exit 1; }
set -- "$outside"/dist/*.whl
wheel=$1
echo "built: $(cd "$outside/dist" && echo *)"

# The three required dependencies with what they need, at the pinned versions: the wheel's own claim decides which.
"$PYTHON" -m venv "$outside/venv"
sed -e 's/ *\\$//' -e '/^ *--hash/d' -e '/^ *#/d' requirements/dev.txt >"$outside/constraints.txt"
"$outside/venv/bin/python" -m pip install --quiet --constraint "$outside/constraints.txt" "$wheel"
"$outside/venv/bin/python" -m pip check

cp examples/llm_usage.py "$outside/llm_usage.py"
cd "$outside"
unset PYTHONPATH
"$outside/venv/bin/python" -W error - "$wheel" "$root" <<'PYTHON'
import importlib.util
import sys
import zipfile

wheel, root = sys.argv[1:]
names = zipfile.ZipFile(wheel).namelist()
strangers = {name.split("/")[0] for name in names} - {"brimful", names[-1].split("/")[0]}
assert not strangers, f"the wheel holds more than brimful: {strangers}"
assert importlib.util.find_spec("llm") is None, "the wheel installed a module named llm"
import brimful

assert not brimful.__file__.startswith(root), f"imported from the checkout: {brimful.__file__}"
print(f"wheel: {len(names)} files, brimful alone, imported from the clean environment")
PYTHON
"$outside/venv/bin/brimful" --help >/dev/null
"$outside/venv/bin/python" llm_usage.py
echo "check-wheel: passed"
