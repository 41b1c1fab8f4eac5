#!/usr/bin/env bash
# Makes the virtual environment: tools/install.sh .venv
#
# Everything comes from pip except a few system libraries: OpenGL for headless rendering, and a C compiler
# with the kernel's headers for one package (evdev, through robosuite) that has no wheels. On Debian and
# Ubuntu, as root, the missing ones are installed; otherwise this script stops and says the line to run.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=$1

log() { printf '== %s\n' "$*"; }
fail() { printf 'install: %s\n' "$*" >&2; exit 1; }

usable() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' >/dev/null 2>&1
}
find_python() {
    for candidate in "${PYTHON:-}" python3.11 python3.12 python3.10 python3; do
        if [ -n "$candidate" ] && usable "$candidate"; then echo "$candidate"; return; fi
    done
}
loads() { "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" >/dev/null 2>&1; }
has_header() { printf '#include <%s>\n' "$1" | cc -E -I"$include" - >/dev/null 2>&1; }
install_packages() {  # the reason, then Debian package names
    local reason=$1; shift
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        log "$reason: installing $*"
        apt-get update -q >/dev/null || true
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@" >/dev/null ||
            fail "apt-get could not install: $*"
    else
        fail "$reason. On Debian or Ubuntu run: sudo apt-get install -y $* ; then run make again."
    fi
}

python=$(find_python)
if [ -z "$python" ]; then
    install_packages "no Python 3.10, 3.11 or 3.12 with venv was found" python3 python3-venv python3-dev
    python=$(find_python)
fi
[ -n "$python" ] || fail "no Python 3.10, 3.11 or 3.12 was found; install one, or name it: make install PYTHON=/path/to/python3.11"
include=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["include"])')

missing=()
loads libEGL.so.1 || missing+=(libegl1)
loads libEGL_mesa.so.0 || loads libEGL_nvidia.so.0 || missing+=(libegl-mesa0 libgl1-mesa-dri)
loads libGL.so.1 || missing+=(libgl1)
loads libgthread-2.0.so.0 || missing+=(libglib2.0-0)
[ ${#missing[@]} = 0 ] || install_packages "headless rendering needs OpenGL (EGL) libraries" "${missing[@]}"

missing=()
command -v cc >/dev/null || missing+=(gcc libc6-dev)
has_header linux/input.h || missing+=(linux-libc-dev)
[ -f "$include/Python.h" ] || missing+=(python3-dev)
[ ${#missing[@]} = 0 ] || install_packages "a package without wheels (evdev) needs a C compiler and headers" "${missing[@]}"

if ! { [ -x "$venv/bin/python" ] && usable "$venv/bin/python"; }; then
    log "making $venv with $("$python" --version)"
    "$python" -m venv --clear "$venv"
fi
pip=("$venv/bin/python" -m pip --disable-pip-version-check)
log "installing hma_gym and what it needs into $venv (several minutes the first time)"
"${pip[@]}" install -q --upgrade "pip>=24" "setuptools>=77" wheel
"${pip[@]}" install -q -c constraints.txt torch==2.13.0
"${pip[@]}" install -q -c constraints.txt -e ".[sim,diffusion,rl,metrics,train,hub,web,vlm,dev]"
# robomimic depends on egl_probe, which needs cmake to build and which nothing here imports: leave it out.
"${pip[@]}" install -q -c constraints.txt torchvision tensorboardX matplotlib psutil termcolor
"${pip[@]}" install -q -c constraints.txt --no-deps robomimic==0.3.0
# Triton stays apart, for tests alone: in a process that draws with Mesa its copy of LLVM crashes.
triton=$(sed -n 's/^triton==\([0-9.]*\).*/\1/p' constraints.txt)
if [ "$(uname)" = Linux ] && ! [ -d "$venv/triton/triton-$triton.dist-info" ]; then
    rm -rf "$venv/triton"
    "${pip[@]}" install -q --no-deps --target "$venv/triton" "triton==$triton"
fi
log "installed"
