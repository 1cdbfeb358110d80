#!/usr/bin/env bash
# GitLab Runner's custom executor, stage `prepare`: takes a guest for the job, under a name by which
# the other stages find it. See gitlab-config.sh.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/snapback.sh"
name=gitlab-${CUSTOM_ENV_CI_JOB_ID:?}

# A stage that failed is tried again.
release "$name" || exit "${SYSTEM_FAILURE_EXIT_CODE:-1}"
taken=$(take "$name") || exit "${SYSTEM_FAILURE_EXIT_CODE:-1}"
jq -r '"Guest \(.name) of pool \(.pool) runs (\(.ms) ms)."' <<<"$taken"
