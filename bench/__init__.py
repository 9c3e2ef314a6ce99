"""Benchmarks of fasternet_kernels against other runtimes; `python -m bench --help`.

    workloads.py   what is computed: networks, chains of blocks, operators; FLOPs, bytes
    zoo.py         networks of other papers
    published.py   what others published, from published.csv
    providers.py   who computes it: one function each, from a network to something to call
    worker.py      the process in which one provider lives
    session.py     one group of rows: parity gate, then interleaved bursts
    results.py     the CSV: columns, provenance, append and read
    stats.py       how many times faster, with a bootstrap interval
    report.py      the goals, README's table of speed
    tables.py      tables of networks, operators and the paper's claims
    plot.py        charts, from the CSV alone
    pages.py       writes tables and charts into README and docs/

    calls.py         single ops at the shapes of the networks' stages
    offline.py       the Triton kernels compiled without a GPU, and what stands in the binaries
    roofline.py      how fast they can be, computed
    gpu.py           `make gpu`: its sections, their time, what is left to do
    gpu_sections.py  what each measures
    gpu_rows.py      the rows: columns, parity gate, times in turns
    gpu_timing.py    CUDA events and graphs
    gpu_tune.py      tuning tables
    gpu_report.py    the one-page summary

bench imports the package; the package never imports bench.
"""
