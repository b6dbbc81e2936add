#!/usr/bin/env bash
# build_image.sh OUT.sif: the image of environments/cpu.def, with this machine's own Debian mirror
# and pip settings, which are bound while it is built and stay out of it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=$1
suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
mirror=$(apt-get indextargets --format '$(REPO_URI)|$(CODENAME)|$(ORIGIN)|$(COMPONENT)' 'Created-By: Packages' |
    awk -F'|' -v c="$suite" '$2==c && $3=="Debian" && $4=="main" {print $1; exit}')
[ -n "$mirror" ] || { echo "no Debian $suite among the sources of apt: apt-get update?" >&2; exit 1; }
case $mirror in *@*) echo "apt's mirror holds credentials, which would be kept in the image" >&2; exit 1 ;; esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mapfile -t binds < <("${PYTHON:-python3}" tests/cluster/pip_settings.py "$work")
# Debian's root is made here: Apptainer's own way with debootstrap and --fakeroot keeps a core busy
# with waiting until the build ends (prepareFakerootEnv, 1.4.5).
packages=$(sed -n 's/^Include: //p' environments/cpu.def | tr -s ' ' ,)
debootstrap --variant=minbase --include="$packages" "$suite" "$work/root" "$mirror" >"$work/log" ||
    { tail -20 "$work/log" >&2; exit 1; }
# No root of a user namespace may copy devices, and a container is given its own.
rm -rf "$work"/root/var/cache/apt/archives/*.deb "$work"/root/dev/*
# squashfs with zstd: ten times faster to pack than the default, at the same size.
apptainer --silent build --fakeroot --force --mksquashfs-args "-comp zstd -Xcompression-level 3" \
    --build-arg BOOTSTRAP=localimage --build-arg "FROM=$work/root" \
    --build-arg "MIRROR=$mirror" --build-arg "SUITE=$suite" "${binds[@]}" "$out" environments/cpu.def
