"""The report page: one HTML file that needs nothing else, of a run or of a sweep."""
