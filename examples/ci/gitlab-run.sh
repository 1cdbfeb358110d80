#!/usr/bin/env bash
# GitLab Runner's custom executor, stage `run`: runs a script of the runner in the job's guest. It is
# called several times for a job, as `gitlab-run.sh SCRIPT STAGE`. See gitlab-config.sh.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/snapback.sh"
script=$1

guest=$(guest "gitlab-${CUSTOM_ENV_CI_JOB_ID:?}") || exit "${SYSTEM_FAILURE_EXIT_CODE:-1}"
[ -n "$guest" ] || {
    echo "The job's guest has ended." >&2
    exit "${SYSTEM_FAILURE_EXIT_CODE:-1}"
}
status=0
in_guest "$guest" bash -l <"$script" || status=$?
case $status in
0) ;;
255)
    echo "The job's guest can't be reached." >&2
    exit "${SYSTEM_FAILURE_EXIT_CODE:-1}"
    ;;
*)
    # GitLab 16 and later take the code itself from here (`allow_failure:exit_codes`).
    [ -z "${BUILD_EXIT_CODE_FILE:-}" ] || echo "$status" >"$BUILD_EXIT_CODE_FILE"
    exit "${BUILD_FAILURE_EXIT_CODE:-1}"
    ;;
esac
