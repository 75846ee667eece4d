#!/bin/sh
# Builds llama.cpp's llama-server and ggml-rpc-server for CPUs from the sources that llama-cpp-python's source
# distribution holds, in the folder given; tests/unit/export/test_export_llama_cpp.py takes its bin/ as APPORTION_LLAMA_CPP.
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
version=${2:-0.3.36}
# pip makes a package's metadata after unpacking it, for which the build's own requirements may be missing.
TMPDIR="$folder" python3 -m pip download --quiet --no-clean --no-deps --no-build-isolation \
    --no-binary llama-cpp-python "llama-cpp-python==$version" --dest "$folder" 2>/dev/null || true
sources=$(find "$folder" -path "*/vendor/llama.cpp/CMakeLists.txt" | head -1)
[ -n "$sources" ] || { echo "llama-cpp-python $version was not to be had" >&2; exit 1; }
cmake -S "$(dirname "$sources")" -B "$folder" -DGGML_RPC=ON -DLLAMA_CURL=OFF -DGGML_NATIVE=OFF -DLLAMA_BUILD_TESTS=OFF \
    -DLLAMA_BUILD_EXAMPLES=OFF -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_FLAGS=-O0 -DCMAKE_CXX_FLAGS=-O0
cmake --build "$folder" --target llama-server ggml-rpc-server --parallel "${JOBS:-2}"
echo "APPORTION_LLAMA_CPP=$folder/bin"
