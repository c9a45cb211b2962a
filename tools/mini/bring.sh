#!/bin/sh
# Gather what training needs on a machine without a network: tools/mini/bring.sh DIR [PYTHON_VERSION]
#
# DIR/flite   the synthesizer's shared libraries (of the installed Debian packages libflite1 and libasound2)
# DIR/wheels  packages that an installation of PyTorch, numpy, scipy, tokenizers, safetensors, tiktoken and PyYAML lacks
#
# There:  python3 -m pip install --no-index --no-deps --target SITE DIR/wheels/*.whl
#         PYTHONPATH=SITE python3 tools/mini/train.py --flite DIR/flite --out OUT
set -eu

[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
target=$1
version=${2:-3.12}
libraries=$(dirname "$(ldconfig -p | sed -n 's/.*libflite\.so\.1 .*=> //p' | head -n 1)")
[ -e "$libraries/libflite.so.1" ] || { echo "no libflite.so.1: apt-get install flite" >&2; exit 2; }

mkdir -p "$target/flite" "$target/wheels"
for name in asound.so.2 flite.so.1 flite_usenglish.so.1 flite_cmulex.so.1 \
    flite_cmu_us_rms.so.1 flite_cmu_us_slt.so.1 flite_cmu_us_awb.so.1 flite_cmu_us_kal16.so.1; do
    cp -L "$libraries/lib$name" "$target/flite/"
done

python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_17_x86_64 \
    --platform manylinux2014_x86_64 --platform manylinux1_x86_64 \
    -d "$target/wheels" soxr==1.1.0 soundfile==0.14.0 cffi==2.1.1 pycparser==3.0 more-itertools==11.2.1 \
    || { echo "pip found no wheels" >&2; exit 1; }
python3 -m pip wheel -q --no-deps -w "$target/wheels" openai-whisper==20250625  # published as source only

du -sh "$target/flite" "$target/wheels"
