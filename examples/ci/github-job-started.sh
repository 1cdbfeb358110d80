#!/usr/bin/env bash
# A self-hosted GitHub runner takes a guest ahead of each job. In the runner's file .env:
#
#   ACTIONS_RUNNER_HOOK_JOB_STARTED=/opt/snapback/ci/github-job-started.sh
#   ACTIONS_RUNNER_HOOK_JOB_COMPLETED=/opt/snapback/ci/github-job-completed.sh
#   SNAPBACK_POOL=booted
#
# The steps of the job run on the runner, and find the guest in their environment: SNAPBACK_GUEST (its
# id), SNAPBACK_QMP and SNAPBACK_DIR (paths), SNAPBACK_PORTS (JSON, such as {"2222": 40731}) and, if
# there is such a port, SNAPBACK_SSH (a port of 127.0.0.1):
#
#   - run: ssh -p "$SNAPBACK_SSH" ci@127.0.0.1 uname -a
#   - run: curl --unix-socket "$SNAPBACK_SOCKET" -X POST "http://localhost/v1/guests/$SNAPBACK_GUEST/reset"
#
# Tried: both scripts, called as the runner calls them (clients/python/tests/test_ci.py).
# Not tried: a GitHub runner.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/snapback.sh"
# A runner has one job at a time.
name=$(name github "${RUNNER_NAME:?}")

# Of a job whose end was never told, such as behind a power cut.
release "$name"
taken=$(take "$name")
{
    jq -r '"SNAPBACK_GUEST=\(.id)", "SNAPBACK_QMP=\(.qmp)", "SNAPBACK_DIR=\(.dir)",
           "SNAPBACK_PORTS=\(.ports | tojson)"' <<<"$taken"
    echo "SNAPBACK_SOCKET=$socket"
    echo "SNAPBACK_SSH=$(port "$taken")"
} >>"${GITHUB_ENV:?}"
jq -r '"Guest \(.name) of pool \(.pool) runs (\(.ms) ms)."' <<<"$taken"
