from .report import read_run, write_run_report

__all__ = ["read_run", "write_run_report"]
