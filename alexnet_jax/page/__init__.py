"""The report page of a run or a sweep: one self-contained HTML file."""
