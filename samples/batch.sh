#!/usr/bin/env bash
# Compress every checkpoint directory of a folder; go on after a failure, fail at the end.
#   usage: batch.sh MODELS OUTS PASS...
set -uo pipefail
models=$1 outs=$2
shift 2
compress=${COMPRESS:-compress}
failed=0
mkdir -p "$outs"
for model in "$models"/*/; do
  name=$(basename "$model")
  if $compress verify "$outs/$name" > /dev/null 2>&1; then
    echo "$name: done already"
    continue
  fi
  # --resume takes up an interrupted run; --overwrite replaces an output that does not verify.
  if $compress run "$model" -o "$outs/$name" --overwrite --resume --json "$@" \
    > "$outs/$name.log" 2> "$outs/$name.err"; then
    echo "$name: compressed"
  else
    code=$?
    echo "$name: exit $code: $(head -n 1 "$outs/$name.err")"
    failed=1
  fi
done
exit $failed
