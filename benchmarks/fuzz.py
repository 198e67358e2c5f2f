"""A campaign against the whole program: mutants of every file that it reads, through its commands.

    python benchmarks/fuzz.py [--seed 0] [--media 2000] [--records 300] [--weights 200]
                              [--only png] [--only png-0012 --keep DIR] [--jobs 2] [--patience 1]

A mutant is named by its format and number; seed and name make it again, to the byte. Prints a JSON
line a finding as it comes and one a format at the end, and a table on stderr; exit 1 when there is
a finding.

Media go through `encode` in batches, half of them with their modality said; those that say it also
through `vqa`, a few through `ask`. Every medium must give one record: finite numbers, or an error
of one line that names the file. A batch that ends badly is cut up until the guilty mutant is found.
Files of records go through `vqa`, `encode`, `review` and `summarize`, a process each: as many
records as lines, strict JSON. Weights, indexes, configs and tokenizers go through `ask`, `encode`,
`convert`, `extract-projector` and `apply-delta`, a process each: exit 0, or 1 with one line.

The first run of every batch of media is the installed console script. Every other run is a fork of
a parent that has imported torch and transformers and then calls `chatbind_cli.cli.main(words)` with
files as its standard streams: the program from the command line to the exit code, without seconds
of imports. A process may hold 2 GiB (it is watched and killed beyond) and take 30 s, a batch more.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from fuzzing.files import RECORDS, WEIGHTS, records_job, weights_job
from fuzzing.media import media_job
from fuzzing.process import Campaign, Result, kind_of, run, write_lines
from fuzzing.seeds import MODALITY, make_models, record_seeds

BATCH = 96
JOBS = {"media": media_job, "records": records_job, "weights": weights_job}


def jobs_of(options: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """What to run: mutants of all formats by turns, so that a batch holds many formats."""
    for what, kinds in (("media", MODALITY), ("records", RECORDS), ("weights", WEIGHTS)):
        chosen = [
            kind
            for kind in kinds
            if options.only in (None, kind) or kind_of(options.only or "") == kind
        ]
        count = getattr(options, what)
        names = [
            f"{kind}-{number:04d}" for number in range(-(-count // len(kinds))) for kind in chosen
        ]
        if options.only and options.only not in kinds:
            names = [options.only] if chosen else []
        size = BATCH if what == "media" else 5
        for start in range(0, len(names), size):
            yield what, names[start : start + size]


def do(campaign: Campaign, job: tuple[str, list[str]]) -> Result:
    """Runs one of `jobs_of`, in a process of the pool."""
    what, names = job
    result = Result()
    JOBS[what](campaign, names, result)
    return result


def prepare(campaign: Campaign) -> None:
    """Makes models and records, in a process of its own so that no thread is left for the forks."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    torch.set_num_threads(1)
    make_models(campaign.models)
    good = record_seeds()
    folder = campaign.home / "first"
    folder.mkdir()
    for name, records in good.items():
        write_lines(folder / f"{name}.jsonl", records)
    words = "review --judge rule -q questions.jsonl --answer-list answers.jsonl others.jsonl"
    ended = run(words.split(), folder, 60)
    good["reviews"] = [json.loads(line) for line in ended.stdout.splitlines()]
    (campaign.home / "records.json").write_text(json.dumps(good))


def report(total: Result) -> None:
    """A JSON line a format, and the table."""
    show = sys.stderr.write
    show(f"{'format':22}  runs    ok  refused  findings  slowest s    MiB\n")
    for kind in ("batches", *MODALITY, *RECORDS, *WEIGHTS):
        counts = {what: total.runs[kind, what] for what in ("runs", "ok", "refused", "findings")}
        if not counts["runs"] and kind not in total.slowest:
            continue
        slow, large = total.slowest.get(kind, (0.0, "")), total.largest.get(kind, (0.0, ""))
        line = {"format": kind, **counts, "slowest": slow, "largest_mib": large}
        print(json.dumps(line), flush=True)
        show(f"{kind:22}{counts['runs']:>6}{counts['ok']:>6}{counts['refused']:>9}"
             f"{counts['findings']:>10}{slow[0]:>11.1f}{large[0]:>7.0f}\n")  # fmt: skip


def main() -> int:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--media", type=int, default=2000)
    parser.add_argument("--records", type=int, default=300)
    parser.add_argument("--weights", type=int, default=200)
    parser.add_argument("--only", help="a format, or the name of a mutant")
    parser.add_argument("--keep", type=Path, help="write the mutants here, too")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--patience", type=float, default=1.0, help="times the limits in seconds")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    total, begun = Result(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home:
        campaign = Campaign(options.seed, Path(home), options.patience, options.keep)
        maker = fork.Process(target=prepare, args=(campaign,))
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("the models could not be made")
        gc.freeze()  # a collector that walks through the libraries copies them for every fork
        with fork.Pool(options.jobs) as pool:
            for done in pool.imap_unordered(partial(do, campaign), list(jobs_of(options))):
                total.runs += done.runs
                total.findings += done.findings
                for mine, its in ((total.slowest, done.slowest), (total.largest, done.largest)):
                    for kind, value in its.items():
                        mine[kind] = max(mine.get(kind, (0.0, "")), value)
    report(total)
    runs = sum(count for (_, what), count in total.runs.items() if what == "runs")
    sys.stderr.write(
        f"{runs} runs, {len(total.findings)} findings, {time.monotonic() - begun:.0f} s\n"
    )
    return 1 if total.findings else 0


if __name__ == "__main__":
    sys.exit(main())
