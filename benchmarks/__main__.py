"""
The benchmarks: one script a claim. Each answers `--help`, runs without an argument, is small with `--quick`, and
writes to benchmarks/results/<its name>.

    python -m benchmarks              # this table
    python benchmarks/NAME.py --quick
    make bench                        # all of them with --quick; `make bench BENCH_FLAGS=` in full, a day
"""

import argparse
import tomllib
from pathlib import Path


INDEX = Path(__file__).with_name("index.toml")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print("| script | claim | full run, about | data | quoted in |\n| --- | --- | --- | --- | --- |")
    for name, row in tomllib.loads(INDEX.read_text()).items():
        print(f"| {name} | {row['claim']} | {row['time']} | {row['data']} | {row['docs']} |")


if __name__ == "__main__":
    main()
