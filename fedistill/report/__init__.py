"""What people see: the report of a run, runs side by side, and progress in the terminal."""

from fedistill.report.compare import compare, write_comparison
from fedistill.report.html import write_report
from fedistill.report.live import RoundTable

__all__ = ["RoundTable", "compare", "write_comparison", "write_report"]
