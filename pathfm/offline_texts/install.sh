#!/bin/sh
# Checks every byte of this folder, then installs pathfm $version from nothing but it.
#   sh install.sh FOLDER          FOLDER becomes a new Python environment; PYTHON=/path/to/python$python chooses the Python
# Without wheels/ in this folder FOLDER is the environment that has pathfm already.
set -eu
if [ "$${1:-}" = "" ]; then echo "usage: sh install.sh FOLDER" >&2; exit 2; fi
case "$$1" in /*) target=$$1 ;; *) target=$$PWD/$$1 ;; esac
cd "$$(dirname "$$0")"

sha256sum --check --quiet --strict $sums || { echo "this folder is damaged: copy it again" >&2; exit 3; }
if [ "$$(find . -type f ! -path ./$sums | wc -l)" -ne "$$(wc -l < $sums)" ]; then
    echo "there are files in this folder that $sums does not know: copy it again" >&2
    exit 3
fi
echo "checked: all files are as they were made"

if [ -d wheels ]; then
    python=$${PYTHON:-python$python}
    here=$$("$$python" -c 'import sys, sysconfig; print("%d.%d %s" % (*sys.version_info[:2], sysconfig.get_platform()))') ||
        { echo "Python $python is needed: install it, or name it by PYTHON=..." >&2; exit 2; }
    if [ "$$here" != "$python $platform" ]; then
        echo "these wheels are for Python $python on $platform, and $$python is $$here" >&2
        exit 2
    fi
    "$$python" -m venv "$$target"
    # No settings of this machine's pip: nothing but the folder is asked.
    PIP_CONFIG_FILE=/dev/null "$$target/bin/python" -m pip --isolated --disable-pip-version-check install --quiet \
        --no-index --no-deps --find-links wheels --requirement constraints.txt "pathfm==$version"
    echo "installed: $$target"
fi
if [ ! -x "$$target/bin/pathfm" ]; then
    echo "there is no pathfm in $$target, and no wheels in this folder to install it from" >&2
    exit 2
fi
"$$target/bin/pathfm" doctor
exec "$$target/bin/pathfm" verify .
