#!/usr/bin/env bash
# GitLab Runner's custom executor, stage `config`: tells the runner where the job's files lie, in
# the guest. The four gitlab-*.sh go together; in config.toml of the runner:
#
#   [[runners]]
#     executor = "custom"
#     environment = ["SNAPBACK_POOL=booted"]   # jobs may name another in their variables
#     builds_dir = "/home/ci/builds"
#     cache_dir = "/home/ci/cache"
#     [runners.custom]
#       config_exec = "/opt/snapback/ci/gitlab-config.sh"
#       prepare_exec = "/opt/snapback/ci/gitlab-prepare.sh"
#       run_exec = "/opt/snapback/ci/gitlab-run.sh"
#       cleanup_exec = "/opt/snapback/ci/gitlab-cleanup.sh"
#
# The guest needs what jobs need: an SSH server, bash, git, and gitlab-runner for artifacts and
# caches. Which pools jobs may have is for this script to decide: POOLS, below.
#
# Tried: the four scripts, called as the runner calls them (clients/python/tests/test_ci.py).
# Not tried: a GitLab Runner.
set -euo pipefail

# What jobs may name in SNAPBACK_POOL; empty for any.
POOLS=${SNAPBACK_ALLOWED_POOLS:-}

pool=${CUSTOM_ENV_SNAPBACK_POOL:-}
if [ -z "$pool" ] || { [ -n "$POOLS" ] && [[ " $POOLS " != *" $pool "* ]]; }; then
    echo "SNAPBACK_POOL is \`$pool\`; there may be: ${POOLS:-any name of a pool}" >&2
    exit "${BUILD_FAILURE_EXIT_CODE:-1}"
fi

# `job_env` is the environment of the stages that follow.
jq -n --arg pool "$pool" '{
    driver: {name: "snapback", version: "0.1.0"},
    builds_dir_is_shared: false,
    job_env: {SNAPBACK_POOL: $pool}
}'
