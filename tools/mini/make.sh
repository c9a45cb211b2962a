#!/bin/sh
# Both stages of s2-mini, from nothing to the two model folders: tools/mini/make.sh OUT MODELS [SEED [OPTION ...]]
#
# OUT/first   data, recognizer, codec and Dual-AR (9.5 minutes of an H200 with 16 cores)
# OUT/second  recognizer and Dual-AR go on, on other sentences (7 minutes); then the judge
# Options are train.py's and go to both stages, such as --flite DIR or --small.
set -eu

[ $# -ge 2 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }
out=$1 models=$2 seed=${3:-0}
shift $(($# > 2 ? 3 : 2))
train=$(dirname "$0")/train.py
python=${PYTHON:-python3}

"$python" "$train" --out "$out/first" --work "$out/work" --parts data,recognizer,codec,dual --seed "$seed" "$@"
"$python" "$train" --collect "$out/first" --models "$out/first/models"
"$python" "$train" --out "$out/second" --work "$out/work" --seed "$((seed + 2))" --begin-with "$out/first" \
    --dual-from "$out/first/models/s2-mini" --recognizer-until 100 --round-trip-seconds 110 --dual-until 432 \
    --dual-compile-at 3 --shifts 3 "$@"
"$python" "$train" --collect "$out/second" --models "$models"
