"""Runs to a page: one self-contained HTML file of one run, or of several side by side.

The page loads nothing: styles, scripts, plots and images are inside. What was not run is shown as "not run".
"""

from swiftsure.report._page import page

__all__ = ["page"]
