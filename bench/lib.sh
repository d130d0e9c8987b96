# What the bench scripts share. Sourced by bash, from the repository's root.
longreach=build/cpu-release/bin/longreach
model=models/longreach-tiny
book=data/kjv.txt

# Every result begins with what was run, on what, and how busy that was.
header()
{
    local cpu memory dirty=""
    cpu=$(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2 | xargs)
    memory=$(awk '/MemTotal/ { printf "%.0f GiB", $2 / 1048576 }' /proc/meminfo)
    grep -qw avx512f /proc/cpuinfo && cpu="$cpu (AVX-512)" || cpu="$cpu (AVX2)"
    git diff --quiet HEAD -- base comm kernels worker client || dirty=", with changes"
    echo "\$ $*"
    echo "commit $(git rev-parse --short HEAD)$dirty, $cpu, $(nproc) cores, $memory, $(date -u +%Y-%m-%d)," \
        "load before $(cut -d' ' -f1-2 /proc/loadavg)"
}

# The number of field $1 in a line of JSON
field() { sed -nE "s/.*\"$1\":([0-9.e+-]+).*/\1/p"; }

need_build()
{
    [ -x "$longreach" ] || { echo "build first: cmake --preset cpu-release && cmake --build --preset cpu-release" >&2; exit 1; }
}
