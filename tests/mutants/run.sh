#!/usr/bin/env bash
# Mutate the ops, or the backward of the models, with cosmic-ray, and list the mutants that the tests let live:
#   pip install -e '.[mutation]' && tests/mutants/run.sh norm activation loss ... gpt2 llama transformer layers
# Works on a copy, since cosmic-ray edits the files in place.
set -euo pipefail
source_folder=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$source_folder"/{gptjax,tests,pyproject.toml} "$work"
cd "$work"
export PYTHONPATH=$work GPTJAX_SHARED=/nonexistent
# What a mutant does not change is compiled once for all of them
export JAX_COMPILATION_CACHE_DIR=$work/cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
mkdir -m 700 "$work/cache"
# The slow tests are for what the others let live; 5 says that there are none
cat > test.sh <<'EOF'
run() { python -m pytest -x -q -p no:cacheprovider -n 0 --hypothesis-profile mutation "$@"; }
run "$@" || exit 1
run -m slow "$@" || [[ $? == 5 ]]
EOF
for module in "$@"; do
  path=gptjax/ops/$module.py tests="tests/ops/test_names.py tests/ops/test_$module.py"
  case $module in
    blockwise) tests+=" tests/ops/test_attention.py" ;;
    products | barrier | moments) path=gptjax/xla/$module.py tests="tests/xla/test_$module.py tests/ops/test_linear.py tests/ops/test_norm.py" ;;
    gpt2 | llama | transformer | layers)
      path=gptjax/models/$module.py tests="tests/models/test_$module.py"
      [[ $module != layers ]] || tests+=" tests/models/test_gpt2.py tests/models/test_llama.py"
      [[ $module != transformer ]] || tests+=" tests/models/test_gpt2.py tests/parallel/test_sharding.py"
      tests+=" -k 'numpy or pairs or gradient or every_setting or mask or counts or chunks or binding or numbers or recompu or packed or gather or all_reduced or falls'"
      ;;
  esac
  cat > "$module.toml" <<EOF
[cosmic-ray]
module-path = "$path"
timeout = 1200.0
excluded-modules = []
test-command = "bash test.sh $tests"
[cosmic-ray.distributor]
name = "local"
[cosmic-ray.filters.operators-filter]
# Operators on bits and integers, which fail on floating-point arrays, and the | of type annotations.
exclude-operators = ["core/ReplaceBinaryOperator_.*_(FloorDiv|Mod|Pow|RShift|LShift|BitOr|BitAnd|BitXor)", "core/ReplaceBinaryOperator_BitOr_.*"]
EOF
  cosmic-ray init "$module.toml" "$module.sqlite"
  cosmic-ray baseline "$module.toml"
  cr-filter-operators "$module.sqlite" "$module.toml" > filtered
  [[ $path != gptjax/models/* ]] || python "$source_folder/tests/mutants/keep_backward.py" "$path" "$module.sqlite"
  cosmic-ray exec "$module.toml" "$module.sqlite"
  cr-report "$module.sqlite" --surviving-only --show-diff
  python - "$module" <<'EOF'
import sqlite3, sys
counts = sqlite3.connect(f"{sys.argv[1]}.sqlite").execute("select test_outcome, count(*) from work_results group by 1").fetchall()
print(sys.argv[1], ", ".join(f"{outcome or 'skipped'} {count}" for outcome, count in counts))
EOF
done
