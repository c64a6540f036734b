#!/usr/bin/env bash
# Every table of README.md but that of deployments, one after another: about half an hour on a quiet
# machine, most of it the naive loops. Lines of JSON, each after the command that printed it:
#
#     FEDISTILL_DATA=DIR benchmarks/all.sh > figures.jsonl
#
# Peers that are not installed are skipped; README.md says how to install them.
set -u
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

run() {
    echo "# python $*"
    python -W ignore "$@" || echo "# failed: $*"
}

for model in mlp linear lenet cnn; do run benchmarks/bound.py --model "$model"; done

# The standard round, and peers on it.
run benchmarks/fd_round.py --model mlp --clients 100
run benchmarks/fd_round.py --model linear --clients 100
run benchmarks/fd_round.py --model mlp --clients 10 --batch 20
run benchmarks/fd_round.py --model lenet --clients 10 --turns 3
run benchmarks/fd_round.py --model cnn --clients 10 --turns 3
for clients in 20 100; do
    run benchmarks/fd_round.py --model mlp --clients "$clients" --workers 1 \
        --engines naive,vectorized,blazefl
done
run benchmarks/fd_round.py --model mlp --clients 20 --engines vectorized,processes,flower
run benchmarks/local_training.py --model mlp
run benchmarks/local_training.py --model linear

# Whole federations.
for method in fedistill ds-fl; do
    for model in mlp linear; do
        run benchmarks/backends.py --model "$model" --method "$method" --clients 40 --turns 2
    done
done
run benchmarks/worker_processes.py
run benchmarks/many_clients.py

# Parts of a round.
run benchmarks/cnn_step.py
run benchmarks/robust_rules.py
run benchmarks/server_memory.py --rows 2003 --classes 100 \
    --rules mean,distribution-weighted,trimmed-mean,krum
run benchmarks/codecs.py

# Privacy.
for model in mlp linear cnn; do run benchmarks/dp_step.py --model "$model"; done

# Streams.
run benchmarks/buffer.py
run benchmarks/continual_step.py
