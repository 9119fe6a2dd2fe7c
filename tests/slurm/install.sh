#!/usr/bin/env bash
# Installs what tests/slurm needs (root; Debian or Ubuntu): Slurm and munge, of which no daemon is started, and shellcheck.
set -euo pipefail

declare -A packages=(
  [slurmctld]=slurmctld [slurmd]=slurmd [sbatch]=slurm-client [munged]=munge [shellcheck]=shellcheck
  [unshare]=util-linux [mount]=mount [hostname]=hostname
)
PATH=$PATH:/usr/sbin:/sbin
missing=()
for program in "${!packages[@]}"; do
  command -v "$program" >/dev/null || missing+=("${packages[$program]}")
done
((${#missing[@]})) || exit 0

# invoke-rc.d, which starts a package's daemons, asks this file for leave.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
fi
install() {
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"
}
# The lists of an image may be old, or none at all.
install || { apt-get update -qq && install; }
