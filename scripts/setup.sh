#!/bin/sh
# Make .venv ready: `scripts/setup.sh serve` for running shoal, `scripts/setup.sh dev` for
# working on it. Needs Python >= 3.11 with venv, a POSIX shell, and a package index.
#
#   .venv/.shoal-serve, .venv/.shoal-dev   stamps: what was installed; nothing to do if it still
#                                          is what pyproject.toml, constraints.txt and the C++
#                                          sources say, and built with the compiler of today
#   .venv/.shoal-installing                left behind by a run that was cut short, so the
#                                          next one starts afresh instead of trusting half
#
# PYTHON=/path/to/python3.12 picks the interpreter; pip's own settings (PIP_INDEX_URL, ...)
# are honoured.
set -eu

cd "$(dirname "$0")/.."
kind=${1:-}
venv=.venv
unfinished=$venv/.shoal-installing
log=$venv/setup.log
min_free_kib=2500000 # the CPU build of torch and its friends; a CUDA build needs about 8 GB

main() {
    case $kind in
    serve) package=. stamps=serve ;;
    dev) package='.[dev]' stamps='serve dev' ;;
    *) fail "Got '$kind'; say 'serve' or 'dev', as in: make setup" ;;
    esac
    if is_ready; then return 0; fi
    wait_for_other_setup
    if is_ready; then return 0; fi

    discard_broken_environment
    check_disk
    if [ ! -x $venv/bin/python ]; then create_environment; fi
    install
}

is_ready() {
    [ ! -e $unfinished ] && [ -x $venv/bin/python ] && [ -x $venv/bin/shoal ] &&
        [ -f "$venv/.shoal-$kind" ] && [ "$(cat "$venv/.shoal-$kind")" = "$(key)" ]
}

key() {
    # An editable install compiles once: what the libraries are made of counts, and so does a
    # compiler that was not there the last time.
    {
        cat pyproject.toml constraints.txt scripts/setup.sh setup.py
        cat src/shoal/kernels/cpu/csrc/* src/shoal/comm/csrc/*
        compiler || true
    } | cksum
    # The place counts too: an environment that was moved or copied has stale paths inside.
    pwd
}

compiler() { command -v "${CXX:-g++}" || command -v c++; }

wait_for_other_setup() {
    command -v flock >/dev/null 2>&1 || return 0
    exec 9<scripts/setup.sh
    flock -n 9 && return 0
    say "another setup is at work in this folder; waiting for it"
    flock 9
}

discard_broken_environment() {
    [ -e $venv ] || return 0
    if [ -e $unfinished ]; then
        say "the last setup was cut short; starting $venv afresh"
    elif ! $venv/bin/python -m pip --version >/dev/null 2>&1; then
        say "$venv has no working Python and pip; starting it afresh"
    elif moved_from=$(old_home) && [ "$moved_from" != "$(pwd)" ]; then
        say "$venv was made in $moved_from; starting it afresh"
    else
        return 0
    fi
    rm -rf $venv
}

old_home() {
    stamp=$(ls $venv/.shoal-serve 2>/dev/null) && tail -n 1 "$stamp"
}

check_disk() {
    free_kib=$(df -Pk . | awk 'NR == 2 { print $4 }')
    if [ -x $venv/bin/python ] || [ "$free_kib" -ge $min_free_kib ]; then return 0; fi
    fail "No disk space: $((free_kib / 1000)) MB are free in $(pwd), $((min_free_kib / 1000)) MB are needed." \
        "Free some, or clone shoal to a larger disk."
}

create_environment() {
    find_python
    say "creating $venv with $python ($("$python" -V))"
    mkdir -p $venv
    : >$unfinished
    "$python" -m venv $venv
}

find_python() {
    too_old=''
    incomplete=''
    for python in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        # Some version managers put names on PATH that only say "not installed": run it.
        version=$("$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            too_old="$too_old $python is $version;"
        elif ! "$python" -c 'import venv, ensurepip, ssl' 2>/dev/null; then
            incomplete="$incomplete $python $version;"
        else
            return 0
        fi
    done
    if [ -n "$incomplete" ]; then
        fail "Python without the modules venv, ensurepip and ssl: found$incomplete" \
            "On Debian or Ubuntu: sudo apt-get install python3-venv (or python3.12-venv, as your version says)."
    fi
    fail "Python 3.11 or newer is needed; found:${too_old:- none (tried ${PYTHON:-python3.13 python3.12 python3.11 python3})}" \
        "Install one (Debian, Ubuntu: sudo apt-get install python3 python3-venv)," \
        "or point at one: make setup PYTHON=/path/to/python3.12"
}

install() {
    say "installing shoal and its dependencies ($kind); the first time takes minutes"
    announce_kernels
    : >$unfinished
    # An old build would look like a good one, if this one fails or is for another Python.
    rm -f $venv/.shoal-serve $venv/.shoal-dev $log
    rm -f src/shoal/kernels/cpu/_library*.so src/shoal/comm/_group*.so
    if ! $venv/bin/python -m pip install --disable-pip-version-check --no-input --log $log \
        -c constraints.txt -e "$package"; then
        explain_failed_install
    fi
    for stamp in $stamps; do key >"$venv/.shoal-$stamp"; done
    check_kernels
    rm -f $unfinished $log
    say "ready: $venv"
}

announce_kernels() {
    if ! wants_kernels; then return 0; fi
    if compiler >/dev/null; then
        say "compiling the CPU kernels is about a minute of it on 2 cores; pip says nothing meanwhile"
    else
        say "no C++ compiler: shoal will run, several times slower on a CPU; to mend that, install g++" \
            "(Debian, Ubuntu: sudo apt-get install g++) and run make again"
    fi
}

check_kernels() {
    if ! wants_kernels || ! compiler >/dev/null; then return 0; fi
    if ls src/shoal/kernels/cpu/_library*.so >/dev/null 2>&1; then return 0; fi
    say "the CPU kernels did not compile: shoal runs, several times slower on a CPU; to see why:" \
        "$venv/bin/python -m pip install -v --force-reinstall --no-deps -e ."
}

wants_kernels() { case $(uname -m) in x86_64 | amd64) ;; *) return 1 ;; esac }

explain_failed_install() {
    # pip touches the environment only after everything is downloaded and built; indented
    # lines of its log speak of the build's own environment.
    if ! logged '^[^ ]+ Installing collected packages'; then rm -f $unfinished; fi
    if logged 'No space left on device|Errno 28'; then
        fail "The disk is full ($(df -Pk . | awk 'NR == 2 { print int($4 / 1000) }') MB free in $(pwd)); pip also needs room in ${TMPDIR:-/tmp}." \
            "Free some space (a CUDA build of torch needs about 8 GB), then run make again."
    elif logged 'NewConnectionError|NameResolutionError|Max retries|ConnectTimeout|Read timed out|ProxyError|SSLError|Connection refused|403 Forbidden'; then
        fail "The package index cannot be reached (${PIP_INDEX_URL:-as set up in pip, or https://pypi.org/simple})." \
            "Check the network, or set PIP_INDEX_URL (a mirror) or HTTPS_PROXY, then run make again."
    elif logged 'No matching distribution'; then
        fail "The package index has no build of some package for $($venv/bin/python -V) on $(uname -sm): see above." \
            "Try another Python: make clean, then make setup PYTHON=/path/to/python3.12"
    fi
    fail "pip could not install shoal: see above; the whole log is $(pwd)/$log"
}

logged() { grep -qE "$1" $log 2>/dev/null; }

say() { echo "setup: $*"; }

fail() {
    for line in "$@"; do echo "setup: $line" >&2; done
    exit 1
}

main
