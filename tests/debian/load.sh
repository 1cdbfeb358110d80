#!/bin/sh
# Run at build: loads a database in the Debian guest's file system, $1, so that no
# guest has to. SCALE is pgbench's.
set -eu

chroot "$1" install -d -o postgres /run/postgresql
within() { chroot "$1" setpriv --reuid=postgres --regid=postgres --clear-groups "$2"; }

within "$1" /bin/sh <<END
set -eu
cd /
: >/tmp/said
trap 'cat /tmp/log /tmp/said >&2' EXIT
PATH=/usr/lib/postgresql/15/bin:\$PATH
echo 'local all all trust' >/etc/postgresql/15/main/pg_hba.conf
# Whatever is not on disk when this ends is written with the file system.
pg_ctl -s -w -D /var/lib/postgresql/15/main -l /tmp/log start -o \
    '-c config_file=/etc/postgresql/15/main/postgresql.conf -c fsync=off -c max_wal_size=1GB'
pgbench -q -i -s $SCALE postgres 2>/tmp/said
psql -q -v ON_ERROR_STOP=1 postgres <<SQL
CREATE EXTENSION amcheck;
CREATE TABLE journal (number bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY);
CHECKPOINT;
SQL
pg_ctl -s -w -D /var/lib/postgresql/15/main stop
trap - EXIT
rm /tmp/log /tmp/said
END
