#!/bin/sh
# Rooms include only what lies below them: base < kernels, comm < worker < client; mpi.h is included by comm/mpi.c alone, nccl.h by comm/nccl*,
# immintrin.h by kernels/cpu alone, and *_impl.h and ops.h of comm stay in their folder.
set -u
failures=0
complain() { echo "$1" >&2; failures=$((failures + 1)); }

# forbid FOLDER PATTERN: no file of the folder includes a header that matches
forbid()
{
    found=$(grep -rnE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]($2)" "$1" --include='*.[ch]' --include='*.cu' --include='*.cuh')
    [ -z "$found" ] || complain "$1 must not include $2: $found"
}
forbid base '(kernels|comm|worker|client|tests|bench)/'
forbid kernels '(comm|worker|client|tests|bench)/'
forbid comm '(kernels|worker|client|tests|bench)/'
forbid worker '(client|tests|bench)/'
forbid client '(tests|bench)/'

only() # HEADER ALLOWED_PREFIX
{
    found=$(grep -rlE "^[[:space:]]*#[[:space:]]*include[[:space:]]*[<\"]$1[>\"]" base kernels comm worker client --include='*.[ch]' | grep -v "^$2")
    [ -z "$found" ] || complain "only $2 may include $1: $found"
}
only mpi.h comm/mpi.c
only nccl.h comm/nccl
only immintrin.h kernels/cpu/
only comm/ops.h comm/
only worker/session_impl.h '\(worker/\|client/inspect.c\)'
only kernels/cpu/.* kernels/cpu/

# every header can be included by itself
for header in $(find base kernels comm worker client -name '*.h' ! -path 'kernels/cuda/*' ! -path 'kernels/cpu/*' ! -path 'comm/nccl*'); do
    echo "#include \"$header\"" | ${CC:-cc} -std=gnu17 -D_GNU_SOURCE -I. -fsyntax-only -x c - 2> /dev/null || complain "$header does not stand alone"
done
[ $failures -eq 0 ] || exit 1
echo "the rooms are in order"
