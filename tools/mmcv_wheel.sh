# Part of tools/setup_env.sh: puts mmcv with its compiled ops into $venv, from a wheel that lies here
# already, else compiled, and then kept as a wheel for the next environment.
#
# A wheel says for which Python it was made, not for which torch, which CUDA or which GPU: a folder for
# each of them does. What the user, or pip's cache, has brought is tried, and taken if its ops load.

mmcv=$(grep -o '^mmcv==[^ ]*' requirements/openmmlab.txt)
store=${WSBCN_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/wsbcn_mm/wheels}
kept=$store/torch-$("$venv/bin/python" -c 'import torch; print(torch.__version__, end="")')
[ "$device" = cpu ] || kept="$kept-sm$(tr -cs '0-9\n' - <<<"$TORCH_CUDA_ARCH_LIST")"

# A wheel for CPUs loads beside a torch for CUDA, too.
ops_load() {
    "$venv/bin/python" -c 'import sys, torch; import mmcv._ext as ops
sys.exit(sys.argv[1] == "cuda" and ops.get_compiling_cuda_version() == "not available")' "$device" 2>/dev/null
}
install_from() {  # a folder with wheels; whether mmcv is there, and its ops load
    pip install -q --no-index --no-deps --find-links "$1" "$mmcv" >/dev/null 2>&1 || return 1
    pip install -q -c "$constraints" "$mmcv" >&2 || return 1  # what it needs
    if ops_load; then say "mmcv comes from a wheel in $1"; return; fi
    say "the ops of the wheel in $1 do not load: it was compiled for another torch$([ "$device" = cpu ] || echo ', or for CPUs')"
    pip uninstall -qy mmcv >&2
    return 1
}

install_nvcc() {  # where the machine has none: PyPI's, of torch's CUDA version
    local cuda site folder
    cuda=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda or "")')
    [ -n "$cuda" ] || fail "WSBCN_DEVICE=cuda, and the torch that pip found is a build for the CPU"
    [ "${cuda%%.*}" -ge 13 ] ||
        fail "no nvcc, and PyPI has none for CUDA $cuda, which torch was made for\n  install the CUDA toolkit, or take NMS and RoIAlign of torchvision: WSBCN_MMCV_OPS=torchvision bash $0"
    say "no nvcc on PATH: installing PyPI's, for CUDA $cuda"
    pip install -q "nvidia-cuda-nvcc==$cuda.*" "nvidia-cuda-crt==$cuda.*" "nvidia-nvvm==$cuda.*" \
        "nvidia-cuda-cccl==$cuda.*" >&2
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    folder=$site/nvidia/cu${cuda%%.*}
    # As a toolkit lies elsewhere; the packages have lib alone, and libraries with numbers.
    ln -sfn lib "$folder/lib64"
    ln -sfn "libcudart.so.${cuda%%.*}" "$folder/lib/libcudart.so"
    export CUDA_HOME=$folder PATH="$folder/bin:$PATH"
}

build() {  # arguments of pip
    MMCV_WITH_OPS=1 FORCE_CUDA=$([ "$device" = cuda ] && echo 1 || echo 0) \
        MAX_JOBS=$jobs CFLAGS="-g0 ${CFLAGS:-}" CXXFLAGS="-g0 ${CXXFLAGS:-}" \
        "$venv/bin/python" -m pip -v --disable-pip-version-check wheel --no-build-isolation --no-deps \
        -c "$constraints" -w "$kept" "$@" "$mmcv" 2>&1 |
        tee "$log" |
        # ninja prints "[12/77] c++ ..."; one line each on a terminal, one in ten in a log.
        awk -v tty="$([ -t 2 ] && echo 1 || echo 0)" '
            BEGIN { start = systime() }
            match($0, /^ *\[[0-9]+\/[0-9]+\]/) {
                split(substr($0, RSTART, RLENGTH), part, /[^0-9]+/)
                done = part[2]; all = part[3]; spent = systime() - start
                if (tty || done % 10 == 0 || done == all)
                    printf "%ssetup:   %d of %d files, %d:%02d min%s", (tty ? "\r" : ""), done, all,
                        spent / 60, spent % 60, (tty && done < all ? "" : "\n") > "/dev/stderr"
            }' || {
        tail -n 30 "$log" >&2
        fail "mmcv could not be built; the whole log: $log\n  out of memory? try MAX_JOBS=1 bash $0"
    }
}

if ! ops_load && ! install_from "$kept" && ! install_from "$store"; then
    if [ "$device" = cuda ] && ! command -v nvcc >/dev/null; then install_nvcc; fi
    jobs=${MAX_JOBS:-$(nproc)}
    log=$venv/mmcv-build.log
    # Measured on one core that had nothing else to do: 10 s a file, 77 files; for CUDA 136 of 45 s.
    minutes=$((($([ "$device" = cpu ] && echo 13 || echo 100) + jobs - 1) / jobs))
    cached=$([ "$device" = cuda ] || echo ", seconds where pip's cache has them")
    say "compiling the ops of mmcv with $jobs processes: once, about $minutes minutes if the cores are idle$cached"
    # pip's cache asks for the Python alone: what it has may be for another torch, for CPUs, for another GPU.
    [ "$device" = cuda ] || { build; install_from "$kept" || rm -f "$kept"/mmcv-*.whl; }
    if ! ops_load; then
        build --no-cache-dir
        install_from "$kept" || fail "mmcv was compiled, and its ops do not load; the whole log: $log"
    fi
fi
