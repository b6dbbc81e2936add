#!/usr/bin/env bash
# apptainer.sh: a real Apptainer on Debian 12, as root. Debian has it in sid only: that package is
# taken from the mirror apt is configured with, signature checked, and its two programs are bound to
# the older glibc here (glibc.py).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export DEBIAN_FRONTEND=noninteractive
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

install() {
    local release mirror libc
    release=$(. /etc/os-release && echo "$VERSION_CODENAME")
    apt-get -qq -o DPkg::Lock::Timeout=600 update >/dev/null
    mirror=$(apt-get indextargets --format '$(REPO_URI)|$(CODENAME)|$(ORIGIN)|$(COMPONENT)' 'Created-By: Packages' |
        awk -F'|' -v c="$release" '$2==c && $3=="Debian" && $4=="main" {print $1; exit}')
    [ -n "$mirror" ] || { echo "no Debian $release among the sources of apt" >&2; exit 1; }
    mkdir -p "$work"/{lists,cache/archives}/partial
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror sid main" >"$work/sources.list"
    local sid=(-qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferencesparts=/dev/null -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root -o Acquire::Languages=none)
    apt-get "${sid[@]}" update
    (cd "$work" && apt-get "${sid[@]}" download apptainer)
    dpkg-deb -R "$work"/apptainer_*.deb "$work/tree"
    python3 "$here/glibc.py" "$work/tree/usr/bin/apptainer" "$work"/tree/usr/lib/*/apptainer/bin/starter
    libc=$(getconf GNU_LIBC_VERSION | cut -d' ' -f2)
    sed -i -E "s/libc6 \(>= [0-9.]+\)/libc6 (>= $libc)/; /^(Static-)?Built-Using:/d" "$work/tree/DEBIAN/control"
    (cd "$work/tree" && find usr etc -type f -exec md5sum {} + >DEBIAN/md5sums)
    dpkg-deb --root-owner-group -Zgzip -z1 -b "$work/tree" "$work/apptainer.deb" >/dev/null
    chmod 755 "$work" # apt reads it as a user of its own
    apt-get -qq -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "$work/apptainer.deb" \
        squashfuse fuse-overlayfs e2fsprogs debootstrap >/dev/null 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
}

apptainer --version >/dev/null 2>&1 || install
command -v debootstrap >/dev/null || apt-get -qq install -y --no-install-recommends debootstrap >/dev/null
for file in /etc/subuid /etc/subgid; do # for --fakeroot
    grep -qs '^root:' "$file" || echo 'root:1000000:65536' >>"$file"
done
# Apptainer asks for every capability there is; a root that lacks some may have those it has.
python3 - <<'END'
import json, subprocess
from pathlib import Path
NAMES = """CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
PERFMON BPF CHECKPOINT_RESTORE""".split()
status = Path("/proc/self/status").read_text()
have = int(status.partition("CapBnd:")[2].split()[0], 16)
last = int(Path("/proc/sys/kernel/cap_last_cap").read_text())
if have != (1 << last + 1) - 1:
    names = [f"CAP_{name}" for bit, name in enumerate(NAMES) if have >> bit & 1]
    Path("/etc/apptainer/capability.json").write_text(json.dumps({"users": {"root": names}}))
    subprocess.run(
        ["apptainer", "config", "global", "--set", "root default capabilities", "file"], check=True
    )
END
apptainer --version
