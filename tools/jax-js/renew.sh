#!/usr/bin/env bash
# Makes jax.min.js again: the npm package @jax-js/jax as one plain script, `jax`.
# Needs node and the npm registry; nothing else here does.
#     tools/jax-js/renew.sh [VERSION]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
version=${1:-0.1.25}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm init --yes > /dev/null
npm install --silent --no-audit --no-fund "@jax-js/jax@$version" esbuild@0.25.12
# The WebGPU and WebGL backends are loaded on demand from files of their own; the
# page uses WebAssembly (or the plain CPU), so they stay outside.
npx esbuild node_modules/@jax-js/jax/dist/index.js --bundle --minify --format=iife \
  --global-name=jax --external:./webgpu-* --external:./webgl-* --charset=utf8 \
  --banner:js="/* @jax-js/jax $version, MIT, https://github.com/ekzhang/jax-js */" \
  --outfile="$here/jax.min.js" --log-level=warning
cp node_modules/@jax-js/jax/LICENSE "$here/LICENSE"
ls -l "$here/jax.min.js"
