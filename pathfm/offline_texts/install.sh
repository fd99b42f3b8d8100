#!/bin/sh
# Checks every byte of this folder, then installs pathfm $version from nothing but it.
#   sh install.sh FOLDER          FOLDER becomes a new Python environment; PYTHON=/path/to/python$python chooses the Python
# Without wheels/ in this folder FOLDER is the environment that has pathfm already.
set -eu
if [ "$${1:-}" = "" ]; then echo "usage: sh install.sh FOLDER" >&2; exit 2; fi
case "$$1" in /*) target=$$1 ;; *) target=$$PWD/$$1 ;; esac
cd "$$(dirname "$$0")"

sha256sum --check --quiet --strict $sums || { echo "this folder is damaged: copy it again" >&2; exit 3; }
unknown=$$(find . ! -type d | cut -c 3- | awk 'NR == FNR { known[substr($$0, 67)]; next } !($$0 in known)' $sums - | grep -vx $sums || true)
if [ "$$unknown" != "" ]; then
    echo "$$unknown" >&2
    echo "these files are not of this folder: remove them, or copy it again" >&2
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
    if [ -e "$$target" ] && [ "$$(ls -A "$$target")" != "" ]; then
        echo "there is something in $$target already: name a new folder, or remove it" >&2
        exit 2
    fi
    trap 'rm -rf "$$target"; echo "nothing was installed" >&2' EXIT
    trap 'exit 130' INT TERM HUP
    "$$python" -m venv "$$target"
    # No settings of this machine's pip: nothing but the folder is asked.
    PIP_CONFIG_FILE=/dev/null "$$target/bin/python" -m pip --isolated --disable-pip-version-check install --quiet \
        --no-index --no-deps --find-links wheels --requirement constraints.txt "pathfm==$version" || {
        echo "pip could not install the wheels; they were gathered with $libc, here is $$(getconf GNU_LIBC_VERSION)" >&2
        exit 1
    }
    trap - EXIT INT TERM HUP
    echo "installed: $$target"
fi
if [ ! -x "$$target/bin/pathfm" ]; then
    echo "there is no pathfm in $$target, and no wheels in this folder to install it from" >&2
    exit 2
fi
"$$target/bin/pathfm" doctor
exec "$$target/bin/pathfm" verify .
