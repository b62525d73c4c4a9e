"""The command `report`: a run or a sweep as text or as an HTML page."""
