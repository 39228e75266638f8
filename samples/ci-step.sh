#!/usr/bin/env bash
# A pipeline step: compress MODEL into OUT by RECIPE, behind gates. Exit codes are compress's own:
# 4 = the gate failed and nothing was published; the report is there either way.
#   usage: ci-step.sh MODEL RECIPE OUT REPORT
set -euo pipefail
model=$1 recipe=$2 out=$3 report=$4
compress=${COMPRESS:-compress}

$compress plan "$model" --recipe "$recipe"
$compress run "$model" --recipe "$recipe" -o "$out" --overwrite \
  --fail-if "relative_error>${MAX_ERROR:-0.15}" --report "$report" --json > /dev/null
$compress verify "$out" --source "$model"
