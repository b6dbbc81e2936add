#!/usr/bin/env bash
# slurm.sh up|down: a real Slurm with accounting on this Debian machine, as root, without systemd.
# NODES slurmd run side by side, each with GPUs made of twins of /dev/null. State, sockets, pids and
# logs lie in STATE; `up` ends what an aborted run left, `down` ends everything by its pid file and
# takes the configuration away: programs of a Slurm that is down would wait for it.
set -euo pipefail
NODES=${NODES:-3}
STATE=${STATE:-/var/lib/llava-steps-cluster}
host=$(hostname -s)
unset "${!SLURM_@}" "${!SBATCH_@}" "${!SACCT_@}" "${!SQUEUE_@}"
export SLURM_CONF=/etc/slurm/slurm.conf MYSQL_UNIX_PORT=$STATE/mariadb.sock DEBIAN_FRONTEND=noninteractive

as() { local user=$1; shift; setpriv --reuid "$user" --regid "$user" --init-groups -- "$@"; }
sql() { as slurm mariadb --no-defaults -S "$MYSQL_UNIX_PORT" -e "$1"; }
await() { # await WHAT COMMAND...: until it succeeds, two minutes at most
    local what=$1 left=600; shift
    until "$@" >/dev/null 2>&1; do
        left=$((left - 1)); [ $left -gt 0 ] || { echo "$what does not come up; see $STATE" >&2; exit 1; }
        sleep 0.2
    done
}

install() {
    local wanted=(munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core) made=
    dpkg-query -W "${wanted[@]}" >/dev/null 2>&1 && return
    # Debian would start its own daemons where there is a systemd.
    [ -e /usr/sbin/policy-rc.d ] || { printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d; chmod +x /usr/sbin/policy-rc.d; made=1; }
    apt-get -qq -o DPkg::Lock::Timeout=600 update >/dev/null
    apt-get -qq -o DPkg::Lock::Timeout=600 install -y --no-install-recommends "${wanted[@]}" >/dev/null 2>"$STATE/apt.log" ||
        { tail -20 "$STATE/apt.log" >&2; exit 1; }
    [ -z "$made" ] || rm /usr/sbin/policy-rc.d
}

configure() {
    getent hosts "$host" >/dev/null || echo "127.0.0.1 $host" >>/etc/hosts
    command install -d -o slurm -g slurm "$STATE" "$STATE/ctld" "$STATE/db" "$STATE/log"
    command install -d -o munge -g munge -m 755 /run/munge
    command install -d -o munge -g munge -m 700 /var/log/munge /var/lib/munge
    [ -s /etc/munge/munge.key ] || { head -c 1024 /dev/urandom >/etc/munge/munge.key; chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
    local i
    for i in 0 1 2 3; do [ -c "$STATE/gpu$i" ] || mknod -m 666 "$STATE/gpu$i" c 1 3; done
    # The second line of the scheduler makes short jobs quick; production has other numbers.
    cat >/etc/slurm/slurm.conf <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=slurm
AuthType=auth/munge
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmctldLogFile=$STATE/log/slurmctld.log
StateSaveLocation=$STATE/ctld
SlurmdPidFile=$STATE/slurmd-%n.pid
SlurmdLogFile=$STATE/log/slurmd-%n.log
SlurmdSpoolDir=$STATE/spool-%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
PropagateResourceLimits=NONE
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
KillWait=5
MinJobAge=600
GresTypes=gpu
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStorageTRES=gres/gpu
AccountingStoreFlags=job_comment,job_script
$(for i in $(seq "$NODES"); do echo "NodeName=n$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((17000 + i)) CPUs=8 RealMemory=16000 Gres=gpu:4"; done)
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    echo "NodeName=n[1-$NODES] Name=gpu File=$STATE/gpu[0-3]" >/etc/slurm/gres.conf
    command install -o slurm -g slurm -m 600 /dev/null /etc/slurm/slurmdbd.conf
    cat >/etc/slurm/slurmdbd.conf <<END
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
SlurmUser=slurm
PidFile=$STATE/slurmdbd.pid
LogFile=$STATE/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=slurm
StorageLoc=accounting
END
}

up() {
    mkdir -p "$STATE"
    install
    down
    rm -rf "$STATE/ctld" "$STATE/db" "$STATE"/spool-*
    configure
    as munge /usr/sbin/munged --pid-file=/run/munge/munged.pid
    await munged sh -c 'munge -n | unmunge'
    cp /run/munge/munged.pid "$STATE/munged.pid"
    as slurm mariadb-install-db --no-defaults --datadir="$STATE/db" --auth-root-authentication-method=socket \
        --auth-root-socket-user=slurm --skip-test-db --skip-name-resolve >"$STATE/log/mariadb.log" 2>&1
    as slurm setsid -f mariadbd --no-defaults --datadir="$STATE/db" --socket="$MYSQL_UNIX_PORT" --pid-file="$STATE/db/mariadbd.pid" \
        --skip-networking --skip-log-bin --innodb-log-file-size=32M </dev/null >>"$STATE/log/mariadb.log" 2>&1
    await mariadbd sql 'select 1'
    cp "$STATE/db/mariadbd.pid" "$STATE/mariadbd.pid"
    sql 'create database if not exists accounting'
    as slurm slurmdbd </dev/null >/dev/null 2>&1
    await slurmdbd sacctmgr -n show cluster
    for what in "cluster test" "account test Cluster=test" "user root Account=test DefaultAccount=test"; do
        sacctmgr -i add $what >/dev/null
    done
    slurmctld </dev/null >/dev/null 2>&1
    await slurmctld scontrol ping
    local i
    for i in $(seq "$NODES"); do
        mkdir -p "$STATE/spool-n$i"
        slurmd -N "n$i" </dev/null >/dev/null 2>&1
    done
    await "a node" sh -c "[ \$(sinfo -h -N -t idle -o %N | wc -l) = $NODES ]"
}

down() {
    local file pid left
    if [ -e "$STATE/slurmctld.pid" ] && scontrol ping 2>/dev/null | grep -q UP; then
        scancel -u root 2>/dev/null || true
        left=100; while [ -n "$(squeue -h 2>/dev/null)" ] && [ $left -gt 0 ]; do left=$((left - 1)); sleep 0.2; done
    fi
    if grep -qs "^StateSaveLocation=$STATE/ctld$" "$SLURM_CONF"; then # that of a real cluster stays
        rm -f "$SLURM_CONF" /etc/slurm/gres.conf /etc/slurm/slurmdbd.conf
    fi
    for file in "$STATE"/slurmd-*.pid "$STATE"/{slurmctld,slurmdbd,mariadbd,munged}.pid; do
        pid=$(cat "$file" 2>/dev/null) || continue
        name=$(basename "${file%.pid}"); name=${name%-n*}
        # A number that another program has by now is left alone; a zombie has ended.
        left=150
        while grep -qs "^$name" "/proc/$pid/comm" && ! grep -qs '^State:.*Z' "/proc/$pid/status"; do
            [ $left = 150 ] && kill "$pid"
            [ $left = 0 ] && kill -KILL "$pid" && break
            left=$((left - 1)); sleep 0.1
        done
        rm -f "$file"
    done
}

"$1"
