#!/usr/bin/env bash
# Installs what longreach needs to build, run and test on Debian and Ubuntu; elsewhere prints what is missing.
# usage: deploy/install-deps.sh
set -euo pipefail

packages=(build-essential cmake ninja-build pkg-config openmpi-bin libopenmpi-dev libjansson-dev
          libpcre2-dev libutf8proc-dev libcmocka-dev iproute2 procps python3)

if ! command -v dpkg-query >/dev/null; then
    echo "This is not Debian or Ubuntu. longreach needs: a C17 compiler, CMake >= 3.21, Ninja, pkg-config, Open MPI 4,"
    echo "Jansson, PCRE2 (8 bit), utf8proc, and for its tests cmocka, iproute2 and Python 3."
    for tool in cc cmake ninja pkg-config mpicc mpirun python3; do
        command -v "$tool" >/dev/null || echo "missing program: $tool"
    done
    for library in jansson libpcre2-8 libutf8proc cmocka; do
        pkg-config --exists "$library" 2>/dev/null || echo "missing library: $library"
    done
    exit 0
fi

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'install ok installed' || missing+=("$package")
done
if [ ${#missing[@]} -eq 0 ]; then
    echo "All packages are installed."
    exit 0
fi
echo "Installing: ${missing[*]}"
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    as_root=(sudo)
fi
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
