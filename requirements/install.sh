#!/bin/sh
# install.sh PYTHON VENV EXTRA [LOCK]
# Installs this checkout in editable mode, with an extra, into a virtual environment, which is created if necessary.
# LOCK pins the versions of all dependencies; without it, the newest are installed. Errors are reported in one line.
set -eu
python=$1 venv=$2 extra=$3 lock=${4-}
here=$(dirname "$0")

stop() {
    echo "senet: $*" >&2
    exit 1
}

"$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null ||
    stop "$python: there is no Python 3.11 or newer of this name; name one: make PYTHON=python3.12"

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then # a venv without a working pip is recreated
    "$python" -c "import ensurepip, venv" 2>/dev/null ||
        stop "$python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"
    mkdir -p "$venv" 2>/dev/null && test -w "$venv" ||
        stop "$venv cannot be written; name folders that can: make demo VENV=/tmp/senet-venv DEMO=/tmp/senet-demo"
    "$python" -m venv --clear "$venv" || stop "no virtual environment could be made in $venv: see above"
fi

# pip and the build backend are pinned, too: PIP_CONSTRAINT does not apply to pip's isolated build environment.
pip() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" ||
        stop "the packages could not be installed: see above; only this step needs the network, run make again with it"
}
pip --constraint "$here/build.lock" pip
if [ -n "$lock" ]; then
    pip --build-constraint "$here/build.lock" --constraint "$lock" --editable "$here/..[$extra]"
else
    pip --build-constraint "$here/build.lock" --upgrade --upgrade-strategy eager --editable "$here/..[$extra]"
fi
