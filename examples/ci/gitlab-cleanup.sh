#!/usr/bin/env bash
# GitLab Runner's custom executor, stage `cleanup`: ends the job's guest, whatever became of the
# job. See gitlab-config.sh.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/snapback.sh"
release "gitlab-${CUSTOM_ENV_CI_JOB_ID:?}"
