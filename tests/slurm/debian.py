"""SLURM and munge from Debian's archive, on a machine that has none."""

from __future__ import annotations

import os
import shutil
import subprocess

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
LOCK_AND_POLICY = ("/var/lock/pathfm-slurm", "/usr/sbin/policy-rc.d")
INSTALL = """
export DEBIAN_FRONTEND=noninteractive
policy=$2
exec 9> "$1" && flock --wait 300 9 || exit
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\\nexit 101\\n' > "$policy" && chmod 755 "$policy"
fi
get() {
    timeout "$1" apt-get --quiet --yes --no-install-recommends -o Acquire::Retries=1 -o Acquire::http::Timeout=10 \\
        -o Acquire::https::Timeout=10 -o DPkg::Lock::Timeout=120 "${@:2}"
}
get 60 update
get 120 --download-only install slurm-wlm munge || exit
get 0 --no-download install slurm-wlm munge
"""
"""What can hang, the network, is given three minutes; dpkg is never stopped half-way. Lists out of reach are no failure by
themselves: they may be those of another archive, or the packages are here already. Debian asks policy-rc.d whether new services
may start: none may."""


class NoClusterError(Exception):
    """SLURM cannot be had here; the message says why."""


def install() -> None:
    """Installs SLURM and munge unless they are here; none of their services is started. Without a network it gives up in time.

    Raises:
        NoClusterError: it takes root, apt-get and an archive that can be reached.
    """
    if all(map(shutil.which, PROGRAMS)):
        return
    if os.geteuid() != 0:
        raise NoClusterError("SLURM is not installed, and only root can install it")
    if not shutil.which("apt-get"):
        raise NoClusterError("SLURM is not installed, and there is no apt-get to install it")
    # In its own session: neither Ctrl-C nor the death of this process leaves a package half installed.
    done = subprocess.run(
        ["bash", "-c", INSTALL, "install", *map(str, LOCK_AND_POLICY)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    if done.returncode:
        why = [line for line in done.stderr.splitlines() if line.startswith("E:")] or ["it got no answer in time"]
        raise NoClusterError(f"SLURM is not installed, and apt-get cannot install it: {why[-1]}")
