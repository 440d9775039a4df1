#!/usr/bin/env bash
# Builds the documentation as a site; every warning (a link to nothing, a docstring that does not fit its
# function) is an error:
#   bash tools/dev/build_docs.sh [FOLDER]          default: build/site
#
# Needs requirements/docs.txt and nothing of the project: installed once into an environment of its own,
# beside that of tools/setup_env.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
environment=${WSBCN_VENV:-$PWD/.venv}/docs
wanted=$(cksum <requirements/docs.txt)
if [ "$(cat "$environment/ready" 2>/dev/null)" != "$wanted" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip --disable-pip-version-check install -q -r requirements/docs.txt >&2
    echo "$wanted" >"$environment/ready"
fi
site=${1:-build/site}
NO_MKDOCS_2_WARNING=1 "$environment/bin/mkdocs" build -q --strict --site-dir "$(realpath -m "$site")"
echo "$site/index.html"
