#!/bin/sh
# Installs a wheel where nothing else is, and uses it from an empty folder: sh tests/wheel.sh PYTHON WHEEL
set -eu
python=$(command -v "$1")
case $python in
  /*) ;;
  *) python=$PWD/$python ;;
esac
wheel=$(realpath "$2")
tests=$(realpath "$(dirname "$0")")
lock=$tests/../requirements.txt
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
unset PYTHONPATH

"$python" -m venv environment
environment/bin/pip install --quiet --disable-pip-version-check --constraint="$lock" "$wheel"
echo "wheel: installed on $(environment/bin/python --version), $(du -sm environment | cut -f1) MB"
if environment/bin/python -c 'import tensorflow' 2> /dev/null; then
  echo 'wheel: TensorFlow is installed with it' >&2
  exit 1
fi
environment/bin/python - <<'END'
import sys

import alexnet_jax

assert alexnet_jax.__file__.startswith(sys.prefix), alexnet_jax.__file__
heavy = {'jax', 'numpy', 'flax', 'tensorflow_datasets'} & set(sys.modules)
assert not heavy, f'import alexnet_jax imports {heavy}'
END

mkdir empty
cd empty
PATH=$folder/environment/bin:$PATH
mkdir pictures
python -c "from PIL import Image; from skimage import data; Image.fromarray(data.chelsea()).save('pictures/cat.png')"
alexnet train --config=quickstart --config.train.steps=100 > train.out 2> train.err
alexnet predict runs/quickstart pictures > predict.out
$(sed -n 's/^report *//p' train.out)
for file in runs/quickstart/result.json runs/quickstart/report.html; do
  test -s $file || { echo "wheel: $file is missing" >&2; exit 1; }
done
test "$(head -n1 predict.out)" = pictures/cat.png
python -W error "$tests/doctests.py"
python -c "import alexnet_jax as a; assert a.load('runs/quickstart').predict('pictures/cat.png')[0]['probability'] > 0"
if grep -iE 'warning|error:|deprecat' train.err; then
  echo 'wheel: a warning reached the user' >&2
  exit 1
fi
for command in train prepare evaluate predict figures report convert audit; do
  alexnet $command --help > help.out || true  # absl ends with 1
  grep -q "alexnet $command" help.out || { echo "wheel: alexnet $command --help" >&2; exit 1; }
done
echo 'wheel: alexnet train, predict, report, --help and the examples of the Python API work from an empty folder'
