"""Benchmarks of fasternet_kernels against other runtimes; `python -m bench --help`.

    workloads.py   what is computed: networks, chains of blocks, operators; FLOPs, bytes
    providers.py   who computes it: one function each, from a network to something to call
    worker.py      the process in which one provider lives
    session.py     one group of rows: parity gate, then interleaved bursts
    results.py     the CSV: columns, provenance, append and read
    stats.py       how many times faster, with a bootstrap interval
    report.py      the goals, README's tables
    plot.py        charts, from the CSV alone

bench imports the package; the package never imports bench.
"""
