#!/usr/bin/env bash
# A self-hosted GitHub runner gives back the guest of a job that has ended, whatever became of it. See
# github-job-started.sh.
set -euo pipefail

. "$(dirname "${BASH_SOURCE[0]}")/snapback.sh"
release "$(name github "${RUNNER_NAME:?}")"
